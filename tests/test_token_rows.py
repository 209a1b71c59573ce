"""Rows of tokens: read and checked, cut into pieces, and counted tag by tag."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from tests import files, tiny
from twin_merging_hf import TwinMergingError, evaluation, token_evaluation
from twin_merging_hf.artifact import check_artifact, inspect_artifact
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.data import read_rows, row_key, split_rows
from twin_merging_hf.inference import run_over
from twin_merging_hf.probe import TOLERANCE, probe
from twin_merging_hf.processing import Processing, load_processing
from twin_merging_hf.token_evaluation import RowTags, artifact_tags, expert_tags, tag_scores


KIND = "bert-tokens"
TAGS = ["O", "B-PER", "I-PER"]


# ---- files ----------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, *rows: Any, kind: str = "tokens") -> list[dict]:
    files.write_rows(tmp_path / "x.jsonl", rows)
    return read_rows(tmp_path / "x.jsonl", kind, TAGS, False)


def test_tags_are_names_or_ids(tmp_path):
    rows = read(tmp_path, {"tokens": ["Ada", "ran"], "tags": ["B-PER", 0]}, {"tokens": ["x"], "tags": [2]})
    assert rows == [{"tokens": ["Ada", "ran"], "tags": [1, 0]}, {"tokens": ["x"], "tags": [2]}]


GOOD = {"tokens": ["a"], "tags": ["O"]}
WRONG = {
    "lengths": ({"tokens": ["a", "b"], "tags": ["O"]}, "2 `tokens`, but 1 `tags`"),
    "an unknown tag": ({"tokens": ["a"], "tags": ["B-LOC"]}, "tag 'B-LOC' is none of this expert's labels"),
    "an id too large": ({"tokens": ["a"], "tags": [3]}, "nor an id from 0 to 2"),
    "true is no id": ({"tokens": ["a"], "tags": [True]}, "tag True is none"),
    "no tags": ({"tokens": ["a"]}, "`tags` must be a list"),
    "no tokens": ({"tags": ["O"]}, "`tokens` must be a list"),
    "empty": ({"tokens": [], "tags": []}, "`tokens` must be a list that is not empty"),
    "a string": ({"tokens": "a b", "tags": ["O", "O"]}, "`tokens` must be a list"),
    "a blank token": ({"tokens": ["a", " "], "tags": ["O", "O"]}, "token 1 must be a non-empty string"),
    "a number": ({"tokens": ["a", 3], "tags": ["O", "O"]}, "token 1 must be a non-empty string, got 3"),
    "half a character": ({"tokens": ["\ud800"], "tags": ["O"]}, "`tokens` holds half of a character"),
    "another key": ({**GOOD, "id": 7}, "unknown key 'id'"),
    "a row of text": ({"text": "a", "label": "O"}, "`text` belongs to rows of a classifier of whole texts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_malformed_row_is_named_by_its_line(tmp_path, case):
    row, reason = WRONG[case]
    with pytest.raises(TwinMergingError) as caught:
        read(tmp_path, GOOD, row)
    assert "x.jsonl, line 2: " in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_tagged_rows_are_refused_by_other_classifiers(tmp_path, kind):
    with pytest.raises(
        TwinMergingError, match=f"line 1: `tokens` belongs to rows of a classifier of tokens.*whole {kind}s"
    ):
        read(tmp_path, GOOD, kind=kind)


def test_the_key_is_the_tokens_and_not_the_tags():
    row = {"tokens": ["a", "b c"], "tags": [0, 1]}
    assert row_key(row) == row_key({**row, "tags": [1, 1]})
    assert len({row_key(row), row_key({"tokens": ["a b", "c"]}), row_key({"text": "a b c"})}) == 3
    split = split_rows([{"tokens": [str(i % 7)], "tags": [0]} for i in range(30)], None, 100, 0, "a")
    assert len(split.train) + len(split.held_out) == 7


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def processing(world) -> Processing:
    loaded = load_processing(world.experts(KIND, tiny.TAGS) / "a", "tokens", "expert 'a'")
    assert loaded is not None
    return loaded


def test_a_tag_stands_at_the_first_piece_of_its_word(processing):
    rows = [{"tokens": ["w1", "w2-w3", "w4"], "tags": [2, 1, 0]}, {"tokens": ["w5"], "tags": [1]}]
    batch, tags = processing.inputs_and_tags(rows)
    tokenizer = processing.processor
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["[CLS]", "w1", "w2", "[UNK]", "w3", "w4", "[SEP]"]
    assert tags.tolist() == [[-100, 2, 1, -100, -100, 0, -100], [-100, 1, -100, -100, -100, -100, -100]]
    assert torch.equal(processing.inputs(rows)["input_ids"], batch["input_ids"])
    assert "labels" not in processing.inputs(rows)


def test_equal_words_beside_each_other_have_a_tag_each(processing):
    assert processing.inputs_and_tags([{"tokens": ["w1", "w1"], "tags": [1, 2]}])[1].tolist() == [[-100, 1, 2, -100]]


def test_padding_on_the_left_moves_the_tags(world):
    tokenizer = AutoTokenizer.from_pretrained(world.experts(KIND, tiny.TAGS) / "a", padding_side="left")
    rows = [{"tokens": ["w1", "w2"], "tags": [2, 1]}, {"tokens": ["w5"], "tags": [1]}]
    assert Processing("tokens", tokenizer).inputs_and_tags(rows)[1].tolist() == [
        [-100, 2, 1, -100],
        [-100, -100, 1, -100],
    ]


def test_words_beyond_the_limit_have_no_tag(processing):
    batch, tags = processing.inputs_and_tags([{"tokens": ["w1"] * 500, "tags": [1] * 500}])
    assert batch["input_ids"].shape == (1, 64) and (tags != -100).sum() == 62


def test_a_row_of_which_nothing_is_left_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "w1": 1}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Replace("@", ""), pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    rows = [{"tokens": ["w1", "@"], "tags": [1, 2]}, {"tokens": ["@", "@"], "tags": [0, 0]}]
    assert Processing("tokens", fast).inputs_and_tags(rows[:1])[1].tolist() == [[1]]
    with pytest.raises(TwinMergingError, match=r"makes nothing of a whole row: tokens \['@', '@'\]"):
        Processing("tokens", fast).inputs_and_tags(rows)


def test_a_tokenizer_without_words_is_refused(processing):
    class Slow:
        is_fast, model_max_length = False, 64

    with pytest.raises(TwinMergingError, match="fast tokenizer"):
        Processing("tokens", Slow()).inputs_and_tags([{"tokens": ["w1"], "tags": [0]}])


def test_results_of_tokens_come_row_after_row_whatever_the_batches(processing):
    words = [["w1"] * (1 + 7 * i % 13) for i in range(70)]
    rows = [{"tokens": own, "tags": [0] * len(own)} for own in words]
    step = lambda inputs: inputs["attention_mask"].sum(1)[:, None, None].expand(-1, inputs["input_ids"].shape[1], 2)  # noqa: E731
    results = run_over(torch.nn.Linear(1, 1), rows, processing, step)
    assert results[:, 0].tolist() == [len(own) + 2 for own in words for _ in own]


# ---- builds ---------------------------------------------------------------------------------------------------------


def test_a_build_is_whole_probed_and_says_what_it_is(world):
    folder = world.artifact(KIND, tiny.TAGS)
    assert check_artifact(folder) == []
    assert inspect_artifact(folder).task == "token-classification"
    report = files.read_json(folder / "report.json")
    assert report["probe"]["largest_relative_difference"] < TOLERANCE / 10
    assert report["labels"][0] == "O" and report["labels"].count("O") == 1
    assert report["verdict"]["given"] == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert [expert["problem_type"] for expert in report["experts"]] == ["token_classification"] * 3
    card = (folder / "README.md").read_text()
    assert 'pipeline("token-classification", model="PATH_OR_REPO_ID", aggregation_strategy="simple")' in card
    assert "pipeline_tag: token-classification" in card and "| tags: O, B-PER, I-PER |" in card


@pytest.mark.parametrize("labels", [tiny.TAGS, {"a": TAGS, "b": TAGS[::-1]}], ids=["union", "same"])
def test_the_probe_catches_an_o_that_is_mixed_wrongly(world, monkeypatch, labels):
    model = world.model(KIND, labels)
    assert probe(model) < TOLERANCE / 10
    real = type(model.label_space).compose

    def wrong(self, outputs, weights):
        logits, expert_logits = real(self, outputs, weights)
        return logits, expert_logits + 0.1 * (torch.arange(expert_logits.shape[-1]) == 0)

    monkeypatch.setattr(type(model.label_space), "compose", wrong)
    with pytest.raises(TwinMergingError, match="does not compute what it should"):
        probe(model)


@pytest.fixture
def inputs(world, tmp_path) -> Path:
    """Base, a and b as a test may damage them."""
    return files.copy_inputs(world.experts(KIND, tiny.TAGS), tmp_path / "in")


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(TwinMergingError) as caught:
        build_artifact(tiny.write_recipe(folder, ("a", "b"), **keys), folder.parent / "out", Progress(quiet=True))
    return str(caught.value)


def test_rows_of_another_task_are_refused_by_the_expert_s_name(world, inputs, tmp_path):
    files.write_rows(inputs / "b.jsonl", [{"text": "w1", "label": 0}])
    assert "expert 'b': " in refusal(inputs) and "b.jsonl, line 1: `text` belongs to rows of" in refusal(inputs)
    texts = files.copy_inputs(world.experts("bert"), tmp_path / "texts")
    files.write_rows(texts / "a.jsonl", [{"tokens": ["w1"], "tags": [0]}])
    assert "expert 'a': " in refusal(texts) and "a.jsonl, line 1: `tokens` belongs to rows of" in refusal(texts)


def test_taggers_and_classifiers_do_not_fit(world, inputs):
    files.copy_inputs(world.experts("bert"), inputs / "texts", ["a"])
    message = refusal(inputs, experts={"a": {"model": "texts/a"}})
    assert "BertForTokenClassification" in message and "all experts must be of one class" in message


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_taggers_of_other_problems_are_refused(inputs, problem):
    files.edit_json(inputs / "b" / "config.json", problem_type=problem)
    message = refusal(inputs)
    assert "expert 'b'" in message and problem in message and "every token one" in message


def test_tags_that_would_have_one_name_are_refused(inputs):
    recipe = {"a": {"name": "x"}, "b": {"name": "B-x", "labels": ["PER", "LOC", "O", "ORG"], "data": None}}
    assert "two tags would be called 'B-x/PER'" in refusal(inputs, experts=recipe, data=False)


# ---- scores ---------------------------------------------------------------------------------------------------------


def rows_of(world, name: str, count: int = 12) -> list[dict]:
    lines = (world.experts(KIND, tiny.TAGS) / f"{name}.jsonl").read_text().splitlines()[:count]
    return [
        {"tokens": row["tokens"], "tags": [tiny.TAGS[name].index(t) for t in row["tags"]]}
        for row in map(json.loads, lines)
    ]


@torch.no_grad()
def naive_tags(world, name: str, rows: list[dict]) -> list[list[str]]:
    """A stock tagger's answers, one row at a time; every word here is one piece."""
    model = AutoModelForTokenClassification.from_pretrained(world.experts(KIND, tiny.TAGS) / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.experts(KIND, tiny.TAGS) / name)
    answers = [model(**tokenizer(" ".join(row["tokens"]), return_tensors="pt")).logits[0, 1:-1] for row in rows]
    return [[tiny.TAGS[name][i] for i in answer.argmax(-1).tolist()] for answer in answers]


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_tags_of_experts_and_artifacts_are_those_of_the_stock_model(world, processing, name):
    rows, index = rows_of(world, name), "abc".index(name)
    expert = AutoModelForTokenClassification.from_pretrained(world.experts(KIND, tiny.TAGS) / name)
    found = expert_tags(expert, tiny.TAGS[name], rows, processing)
    assert found.predicted == naive_tags(world, name, rows)
    assert found.true == [[tiny.TAGS[name][i] for i in row["tags"]] for row in rows]
    assert artifact_tags(world.model(KIND, tiny.TAGS), index, rows, processing, name) == found


def test_tags_of_another_expert_are_wrong_and_agree_with_nothing(world, processing):
    rows, model = rows_of(world, "a"), world.model(KIND, tiny.TAGS)
    found = artifact_tags(model, 0, rows, processing, "c")
    assert {tag for row in found.predicted for tag in row} <= {"c/noun", "c/verb"}
    assert tag_scores(found)["accuracy"] == 0.0
    reference = evaluation.model_outputs(
        AutoModelForTokenClassification.from_pretrained(world.experts(KIND, tiny.TAGS) / "a"), rows, processing
    )
    for experts, expected in (("a", 1.0), ("c", 0.0)):
        outputs = evaluation.artifact_outputs(model, rows, processing, experts)
        assert len(outputs.logits) == len(outputs.expert_weights) == sum(len(row["tokens"]) for row in rows)
        assert evaluation.agreement(model, 0, outputs, reference, 0.0) == expected


TRUE = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"]]


def test_entities_count_whole():
    pytest.importorskip("seqeval")
    # Found: PER cut short (wrong), LOC (right), PER (right); of three true ones two are right, of three found two.
    found = [["B-PER", "O", "O", "B-LOC"], ["O", "B-PER"]]
    assert tag_scores(RowTags(found, TRUE)) == {"accuracy": pytest.approx(5 / 6), "f1": pytest.approx(2 / 3)}
    # Another expert's tag is an entity too many: of four found ones two are right.
    found = [["B-PER", "O", "other/noun", "B-LOC"], ["O", "B-PER"]]
    assert tag_scores(RowTags(found, TRUE))["f1"] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_without_seqeval_and_without_chunks_every_tag_counts_alike(monkeypatch):
    pytest.importorskip("sklearn")
    true, found = [["n", "n", "v"], ["v"]], [["n", "v", "v"], ["c/x"]]
    # n: precision 1, recall 1/2; v: precision 1/2, recall 1/2.
    expected = {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2)}
    assert tag_scores(RowTags(found, true)) == expected
    monkeypatch.setattr(token_evaluation.importlib.util, "find_spec", lambda name: None)
    assert tag_scores(RowTags(TRUE, TRUE)) == {"accuracy": 1.0, "macro_f1": 1.0}
