"""Taggers with what was made for classifiers: integer factors, every router, recorded rows, and `evaluate`."""

import hashlib
import json

import pytest
import torch

from tests import tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.evaluate_artifact import evaluate_artifact
from twin_merging_hf.probe import TOLERANCE, probe
from twin_merging_hf.row_hashes import read_hashes


KIND = "bert-tokens"
NAME = "model.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integer_factors_tag_as_dense_models_do_and_are_saved_again_byte_for_byte(world, tmp_path, dtype):
    folder = world.artifact(KIND, tiny.TAGS, exclusive={"rank": 5, "dtype": dtype})
    model, inputs = load(folder), tiny.batch(KIND, 4)
    assert check_artifact(folder) == [] and probe(model, seed=3) < TOLERANCE / 10
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / NAME).read_bytes() == (folder / NAME).read_bytes()
    assert torch.equal(load(tmp_path / "again")(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("router", ["centroid", {"type": "knn", "none": 0.2}], ids=["centroid", "knn and none"])
def test_routers_route_taggers_and_survive_saving(world, tmp_path, router):
    folder = world.artifact(KIND, tiny.TAGS, router=router)
    model, inputs = load(folder), tiny.batch(KIND, 4)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / NAME).read_bytes() == (folder / NAME).read_bytes()
    assert torch.equal(load(tmp_path / "again").route(**inputs), model.route(**inputs))


def test_a_build_records_the_rows_of_taggers_by_their_words(world):
    folder = world.artifact(KIND, tiny.TAGS)
    found = read_hashes(folder / "rows.json")
    assert set(found) == set(tiny.TAGS)
    lines = (world.experts(KIND, tiny.TAGS) / "a.jsonl").read_text(encoding="utf-8").splitlines()
    words = [" ".join(json.loads(line)["tokens"]) for line in lines]
    expected = {hashlib.sha256(json.dumps([text, ""]).encode()).hexdigest()[:16] for text in words}
    recorded = (folder / "rows.json").read_text(encoding="utf-8")
    assert all(digest in recorded for digest in expected)
    assert not any(text in recorded for text in words)


def test_evaluate_refuses_taggers_and_says_what_it_scores(world, tmp_path):
    folder = world.artifact(KIND, tiny.TAGS, exclusive={"rank": 5, "dtype": "int4"})
    with pytest.raises(
        TwinMergingError, match="evaluate scores classification of whole rows, regression and generation, not Bert"
    ):
        evaluate_artifact(folder, {"a": world.experts(KIND, tiny.TAGS) / "a.jsonl"})
