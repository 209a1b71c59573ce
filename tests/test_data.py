"""Rows of data: read, and split so that equal inputs never stand on both sides."""

import random
from pathlib import Path

import pytest
from PIL import Image

from tests import files
from twin_merging_hf import TwinMergingError
from twin_merging_hf.data import read_rows, row_key, split_rows


def rows_of(texts) -> list[dict]:
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


def test_labels_are_names_or_ids(tmp_path):
    files.write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": 1}])
    rows = read_rows(tmp_path / "x.jsonl", "text", ["yes", "no"], False)
    assert rows == [{"text": "a", "label": 1}, {"text": "b", "label": 1}]


def test_a_name_that_looks_like_an_id_is_a_name(tmp_path):
    files.write_rows(tmp_path / "x.jsonl", [{"text": "a", "label": "0"}, {"text": "b", "label": 0}])
    rows = read_rows(tmp_path / "x.jsonl", "text", ["1", "0"], False)
    assert [row["label"] for row in rows] == [1, 0]


def test_pairs_numbers_and_blank_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = ['{"text": "a", "text_pair": "b", "label": 2}', "", '{"text": "é", "text_pair": null, "label": -0.5}', "  "]
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = read_rows(path, "text", ["score"], True)
    assert rows == [{"text": "a", "text_pair": "b", "label": 2.0}, {"text": "é", "label": -0.5}]


def test_images_lie_beside_the_file(tmp_path):
    (tmp_path / "p").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "p" / "1.png")
    files.write_rows(tmp_path / "x.jsonl", [{"image": "p/1.png", "label": "y"}])
    rows = read_rows(tmp_path / "x.jsonl", "image", ["y", "n"], False)
    assert rows == [{"image": tmp_path / "p" / "1.png", "label": 0}]


def test_the_key_is_the_input_and_not_the_label():
    row = {"text": "a", "text_pair": "b", "label": 1}
    assert row_key(row) == row_key({**row, "label": 0})
    assert len({row_key(row), row_key({"text": "a"}), row_key({"text": "b", "text_pair": "a"})}) == 3
    assert row_key({"image": Path("x")}) != row_key({"text": "x"})


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_equal_texts_never_stand_on_both_sides(seed, given):
    rng = random.Random(seed)
    texts = [str(rng.randrange(25)) for _ in range(60)]
    validation = rows_of(str(rng.randrange(25)) for _ in range(8)) if given else None
    rows = split_rows(rows_of(texts), validation, 1000, seed, "a")
    train, held_out = ([row["text"] for row in part] for part in (rows.train, rows.held_out))
    assert not set(train) & set(held_out)
    assert len(train) == len(set(train)) and len(held_out) == len(set(held_out))
    if given:
        assert {*held_out} == {row["text"] for row in validation}
        assert {*train} == {*texts} - {*held_out}
    else:
        assert {*train, *held_out} == {*texts}
        assert len(held_out) == max(1, len(set(texts)) // 5)


def test_the_split_depends_on_seed_and_name_alone():
    rows = rows_of(map(str, range(40)))
    state = random.getstate()
    first = split_rows(rows, None, 1000, 0, "a")
    assert random.getstate() == state
    random.seed(7)
    assert split_rows(rows, None, 1000, 0, "a") == first
    assert split_rows(rows, None, 1000, 1, "a") != first
    assert split_rows(rows, None, 1000, 0, "b") != first


def test_the_limit_counts_training_rows_and_half_as_many_held_out():
    rows = split_rows(rows_of(map(str, range(100))), None, 10, 0, "a")
    assert (len(rows.train), len(rows.held_out)) == (10, 5)
    rows = split_rows(rows_of(map(str, range(100))), rows_of(map(str, range(200, 250))), 10, 0, "a")
    assert (len(rows.train), len(rows.held_out)) == (10, 5)
    rows = split_rows(rows_of(map(str, range(100))), None, 2, 0, "a")
    assert (len(rows.train), len(rows.held_out)) == (2, 1)


@pytest.mark.parametrize(("train", "validation"), [(["x"] * 9, None), (["x", "y"], None), (["x", "y"], ["x", "z"])])
def test_too_few_different_rows_are_refused(train, validation):
    with pytest.raises(TwinMergingError, match="expert 'a': .* different training rows"):
        split_rows(rows_of(train), validation and rows_of(validation), 1000, 0, "a")
