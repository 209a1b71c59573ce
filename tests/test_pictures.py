"""Pictures: they appear, they are the same every time, and a build does without them."""

import sys

import pytest
from PIL import Image

from tests import files, tiny
from twin_merging_hf import TwinMergingError, builder
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.pictures import draw_confusion, draw_evaluation, draw_scores


SCORES = [("mean", {"a": 0.5, "b": 0.25}), ("routed", {"a": 1.0, "b": 0.9})]
PANELS = {
    "Raw": {"routed": {"a": 0.5, "b": 0.25}, "given": {"a": 0.6, "b": 0.3}},
    "Normalised": {"routed": {"a": 98.0, "b": None}, "given": {"a": 99.0, "b": None}},
}
DRAWINGS = {
    "confusion": lambda path: draw_confusion(path, ["a", "b"], [[8, 2], [0, 5]]),
    "nothing held out": lambda path: draw_confusion(path, ["a", "b"], [[0, 0], [0, 5]]),
    "scores": lambda path: draw_scores(path, SCORES, "Scores"),
    "evaluation": lambda path: draw_evaluation(path, ["a", "b"], [[8, 1, 1], [0, 5, 0]], PANELS),
}


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_a_picture_is_drawn_and_the_same_every_time(tmp_path, drawing):
    for name in ("one.png", "two.png"):
        DRAWINGS[drawing](tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    picture = Image.open(tmp_path / "one.png")
    assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_other_counts_give_another_picture(tmp_path):
    draw_confusion(tmp_path / "one.png", ["a", "b"], [[8, 2], [0, 5]])
    draw_confusion(tmp_path / "two.png", ["a", "b"], [[2, 8], [0, 5]])
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TwinMergingError, match=r"pip install 'twin-merging-hf\[plot\]'"):
        draw_confusion(tmp_path / "x.png", ["a"], [[1]])


def test_without_matplotlib_a_build_has_no_picture_and_is_whole(world, tmp_path, monkeypatch):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    monkeypatch.setattr(builder, "can_draw", lambda: False)
    report = build_artifact(tiny.write_recipe(folder, ("a", "b")), tmp_path / "out", Progress(quiet=True)).report
    assert report["router"]["held_out_rows"] > 0
    assert check_artifact(tmp_path / "out") == [] and not list((tmp_path / "out").glob("*.png"))
