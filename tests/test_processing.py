"""Tokenizers and image processors: what a row becomes depends on the row alone, and differences are seen."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.processing import Processing, differing_parts, load_processing


@pytest.fixture
def text(world) -> Processing:
    processing = load_processing(world.experts("bert") / "a", "text", "expert 'a'")
    assert processing is not None
    return processing


def ids(processing: Processing, rows: list[dict]) -> list[list[int]]:
    """Token ids of each row without padding."""
    batch = processing.inputs(rows)
    return [row[mask > 0].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def test_a_folder_without_files_has_none(tmp_path):
    assert load_processing(tmp_path, "text", "x") is None and load_processing(tmp_path, "image", "x") is None


def test_a_broken_one_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(TwinMergingError, match="base model: the image processor in .* cannot be loaded"):
        load_processing(tmp_path, "image", "base model")


CODE = """
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus({text}, *args, **kwargs)
"""


@pytest.fixture
def coded(world, tmp_path) -> Path:
    """Experts whose tokenizers come with a class of their own; `own.py` is left to write."""
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    for name in ("base", "a", "b"):
        files.edit_json(folder / name / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
        files.edit_json(folder / name / "tokenizer_config.json", tokenizer_class="Own")
        (folder / name / "own.py").write_text(CODE.format(text="text"))
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_a_tokenizer_of_own_code_serves_and_its_code_stays_behind(coded, tmp_path, trusted):
    recipe = tiny.write_recipe(coded, ("a", "b"), trust_remote_code=trusted)
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    assert check_artifact(tmp_path / "out") == []
    assert not (tmp_path / "out" / "own.py").exists()
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)


def test_a_tokenizer_that_cannot_do_without_its_code_is_refused(coded):
    (coded / "a" / "own.py").write_text(CODE.format(text="(text + ' w1' if isinstance(text, str) else text)"))
    with pytest.raises(TwinMergingError, match="expert 'a': the tokenizer .* without its own code, Own would split"):
        load_processing(coded / "a", "text", "expert 'a'", trust_remote_code=True)


def test_rows_become_what_the_tokenizer_makes_of_them(world, text):
    tokenizer = AutoTokenizer.from_pretrained(world.experts("bert") / "a")
    rows = [{"text": "w1 w2"}, {"text": "w3 w4 w5"}]
    assert ids(text, rows) == [tokenizer(row["text"])["input_ids"] for row in rows]
    pairs = [{"text": "w1", "text_pair": "w2 w3"}, {"text": "w3", "text_pair": "w4"}]
    assert ids(text, pairs) == [tokenizer(row["text"], row["text_pair"])["input_ids"] for row in pairs]


def test_batch_mates_change_no_row(text):
    """A row without a second text stays one text, also beside rows that have two."""
    rows = [{"text": "w1 w2"}, {"text": "w3", "text_pair": "w4 w5"}, {"text": "w6"}]
    assert ids(text, rows) == [ids(text, [row])[0] for row in rows]


def test_long_texts_are_cut(text):
    assert len(ids(text, [{"text": "w1 " * 500}])[0]) == 64
    assert len(text.inputs([{"text": "w1 " * 500}], max_tokens=9)["input_ids"][0]) == 9


def test_texts_longer_than_the_model_takes_are_no_obstacle(world, tmp_path):
    """Many tokenizers do not say how much their model takes."""
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    for name in ("base", "a", "b"):
        files.edit_json(folder / name / "tokenizer_config.json", model_max_length=None)
    with (folder / "a.jsonl").open("a", encoding="utf-8") as stream:
        for word in tiny.WORDS[:20]:
            stream.write(f'{{"text": "{f"{word} " * 200}", "label": 0}}\n')
    build_artifact(tiny.write_recipe(folder, ("a", "b")), tmp_path / "out", Progress(quiet=True))
    assert check_artifact(tmp_path / "out") == []


def test_pictures_may_be_paths_or_pictures_of_any_mode(world, tmp_path):
    processing = load_processing(world.experts("vit") / "a", "image", "expert 'a'")
    assert processing is not None
    picture = tiny.picture(1, 3)
    picture.save(tmp_path / "x.png")
    picture.convert("L").save(tmp_path / "grey.png")
    pixels = processing.inputs([{"image": tmp_path / "x.png"}, {"image": picture}])["pixel_values"]
    assert torch.equal(pixels[0], pixels[1]) and pixels.shape == (2, 3, tiny.IMAGE, tiny.IMAGE)
    grey = processing.inputs([{"image": tmp_path / "grey.png"}])["pixel_values"]
    assert torch.equal(grey[0, 0], grey[0, 1])
    transparent = Image.new("RGBA", (tiny.IMAGE, tiny.IMAGE))
    transparent.save(tmp_path / "clear.png")
    assert processing.inputs([{"image": tmp_path / "clear.png"}])["pixel_values"].shape == (1, 3, 16, 16)


def test_equal_ones_do_not_differ_and_only_the_asked_parts_count(world, tmp_path, text):
    assert differing_parts(text, text) == []
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ["a"])
    content = files.read_json(folder / "a" / "tokenizer.json")
    files.edit_json(folder / "a" / "tokenizer.json", **{**content, "normalizer": {"type": "Lowercase"}})
    other = load_processing(folder / "a", "text", "x")
    assert other is not None
    assert differing_parts(other, text) == ["normalizer"]
    assert differing_parts(other, text, ("vocabulary",)) == []


def test_names_and_places_are_no_difference(world, tmp_path):
    source = world.experts("vit") / "a"
    first = load_processing(source, "image", "x")
    other = load_processing(Path(files.copy_inputs(world.experts("vit"), tmp_path / "in", ["a"])) / "a", "image", "y")
    assert first is not None and other is not None and differing_parts(first, other) == []
