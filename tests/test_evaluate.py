"""`evaluate`: every figure counted once more from the files alone, and the rows that it refuses."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.cli import app
from twin_merging_hf.evaluate_artifact import AT_BUILD, ON_THESE_ROWS, evaluate_artifact
from twin_merging_hf.evaluate_table import table


RANK = {"exclusive": {"rank": 2}}
REGRESSION = {"a": ["x", "y"], "r": ["score"]}


def write_tests(kind: str, folder: Path, labels: dict[str, list[str]] | None = None, rows: int = 17) -> dict[str, Path]:
    """New rows for each expert; one in three looks like the next task's, so that routers err."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = labels or tiny.LABELS
    found = {}
    for index, (name, own) in enumerate(labels.items()):
        parts = []
        for task in (index + 3, index + 4):  # 3 more: pictures of other seeds
            path = tiny.write_data(kind, folder, f"{name}{task}-test", own, task, rows)
            parts.append([json.loads(line) for line in path.read_text().splitlines()])
        mixed = [parts[i % 3 == 0][i] for i in range(rows)]
        found[name] = folder / f"{name}.test.jsonl"
        files.write_rows(found[name], mixed)
    return found


class Naive:
    """Answers row by row, from folders, by Transformers alone."""

    def __init__(self, kind: str, folder: Path):
        auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
        self.model = auto.from_pretrained(folder).eval()
        self.processor = (AutoImageProcessor if kind == "vit" else AutoTokenizer).from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, row: dict, folder: Path, **kwargs: Any) -> Any:
        if "image" in row:
            inputs = self.processor(Image.open(folder / row["image"]).convert("RGB"), return_tensors="pt")
        else:
            inputs = self.processor(row["text"], row.get("text_pair"), return_tensors="pt")
        return self.model(**inputs, **kwargs)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module", params=["bert", "vit"])
def case(request, world, tmp_path_factory):
    """(kind, artifact, recipe, test files, evaluation) of three experts, rank 2, with the recipe and two merges."""
    kind = request.param
    artifact = world.artifact(kind, **RANK)
    recipe = artifact.with_suffix(".yaml")
    tests = write_tests(kind, tmp_path_factory.mktemp("tests"))
    return kind, artifact, recipe, tests, evaluate_artifact(artifact, tests, recipe, merges=["linear", "base"])


def test_scores_counted_once_more(case, world):
    kind, artifact, _, tests, found = case
    model = Naive(kind, artifact)
    names = model.model.config.id2label
    confusion = [[0] * 4 for _ in tests]
    for t, (name, path) in enumerate(tests.items()):
        expert, right = Naive(kind, world.experts(kind) / name), {"routed": 0, "given": 0, "own": 0}
        for row in rows_of(path):
            routed, given = model(row, path.parent), model(row, path.parent, experts=name)
            truth = f"{name}/{row['label']}"
            right["routed"] += names[int(routed.logits.argmax())] == truth
            right["given"] += names[int(given.logits.argmax())] == truth
            right["own"] += tiny.LABELS[name][int(expert(row, path.parent).logits.argmax())] == row["label"]
            confusion[t][int(routed.expert_weights.argmax())] += 1
        assert found["routed"]["raw"][name] == pytest.approx(right["routed"] / 17)
        assert found["given"]["raw"][name] == pytest.approx(right["given"] / 17)
        assert found["experts"]["scores"][name] == pytest.approx(right["own"] / 17)
        assert found["routed"]["normalised"][name] == pytest.approx(100 * right["routed"] / right["own"])
        assert found["difference"][name]["difference"] == pytest.approx((right["routed"] - right["given"]) / 17)
        assert found["difference"][name]["low"] <= found["difference"][name]["high"]
    assert found["router"]["confusion"] == confusion and found["router"]["none"] == 0
    correct = sum(confusion[t][t] for t in range(3))
    assert found["router"]["accuracy"] == pytest.approx(correct / 51) and correct < 51
    shares = [found["routed"]["normalised"][name] for name in tests]
    assert found["routed"]["normalised_mean"] == pytest.approx(sum(shares) / 3)
    assert found["routed"]["minimum"]["normalised"] == pytest.approx(min(shares))
    assert found["experts"]["source"] == ON_THESE_ROWS


def test_calibration_counted_once_more(case):
    kind, artifact, _, tests, found = case
    model = Naive(kind, artifact)
    confidences, losses = [], []
    for name, path in tests.items():
        for row in rows_of(path):
            logits = model(row, path.parent).logits[0].double()
            truth = model.model.config.label2id[f"{name}/{row['label']}"]
            losses.append(-float(logits[truth]))
            confidences.append((float(logits.exp().max()), int(logits.argmax()) == truth))
    error = 0.0
    for b in range(15):
        inside = [pair for pair in confidences if b / 15 < pair[0] <= (b + 1) / 15]
        error += abs(sum(right - sure for sure, right in inside)) / len(confidences)
    assert found["calibration"]["ece"] == pytest.approx(error, abs=1e-4)
    assert found["calibration"]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["calibration"]["rows"] == 51 and set(found["calibration"]["tasks"]) == set(tests)


def test_merges_counted_once_more(case, world):
    kind, _, _, tests, found = case
    folder = world.experts(kind)
    state = {name: Naive(kind, folder / name).model.state_dict() for name in ("base", *tests)}
    for t, (name, path) in enumerate(tests.items()):
        model = Naive(kind, folder / name)
        backbone = [key for key in state[name] if not key.startswith("classifier")]
        assert len(backbone) == len(state[name]) - 2
        for method in ("linear", "base"):
            parts = ["base"] if method == "base" else list(tests)
            merged = {key: sum(state[part][key] for part in parts) / len(parts) for key in backbone}
            model.model.load_state_dict(merged, strict=False)
            right = sum(
                tiny.LABELS[name][int(model(row, path.parent).logits.argmax())] == row["label"] for row in rows_of(path)
            )
            assert found["merges"][method]["raw"][name] == pytest.approx(right / 17), (t, method)


def test_storage_and_time(case):
    _, artifact, _, _, found = case
    sizes = files.tensors_of(artifact)
    total = sum(tensor.numel() * tensor.element_size() for tensor in sizes.values())
    assert found["storage"]["total"] == total and found["storage"]["ratio"] == pytest.approx(
        total / found["storage"]["shared"]
    )
    low, high = found["time"]["ratio_spread"]
    assert 0 < low <= found["time"]["ratio"] <= high and found["time"]["repeats"] >= 5 and found["time"]["batch"] == 32


def test_the_same_inputs_give_the_same_figures(case):
    _, artifact, recipe, tests, found = case
    again = evaluate_artifact(artifact, tests, recipe, merges=["linear", "base"])
    assert {**again, "time": None} == {**found, "time": None}
    assert json.loads(json.dumps(found)) == found


# ---- what scores are relative to --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_tests(tmp_path_factory) -> dict[str, Path]:
    return write_tests("bert", tmp_path_factory.mktemp("bert-tests"))


@pytest.fixture(scope="module")
def bert_artifact(world) -> Path:
    return world.artifact("bert", **RANK)


def test_without_a_recipe_the_scores_of_the_build_are_used_and_said_so(world, bert_artifact, bert_tests):
    found = evaluate_artifact(bert_artifact, bert_tests)
    recorded = files.read_json(bert_artifact / "report.json")["verdict"]["expert_scores"]
    assert found["experts"] == {"scores": {name: recorded[name]["score"] for name in bert_tests}, "source": AT_BUILD}
    assert AT_BUILD in "\n".join(table(found)) and "not on these rows" in AT_BUILD
    for name, entry in recorded.items():
        assert found["routed"]["normalised"][name] == pytest.approx(found["routed"]["raw"][name] / entry["score"] * 100)


def test_a_build_records_how_the_experts_do_on_rows_that_it_held_out(world, bert_artifact):
    recorded = files.read_json(bert_artifact / "report.json")["verdict"]["expert_scores"]
    for name in tiny.LABELS:
        folder = world.experts("bert")
        expert, path = Naive("bert", folder / name), folder / f"{name}.jsonl"
        from twin_merging_hf.data import read_rows, split_rows

        rows = split_rows(read_rows(path, "text", tiny.LABELS[name], False), None, 1000, 0, name).held_out
        right = sum(int(expert(row, folder).logits.argmax()) == row["label"] for row in rows)
        assert recorded[name] == {"metric": "accuracy", "score": round(right / len(rows), 6), "rows": len(rows)}


def test_a_metric_that_the_build_did_not_record_has_no_normalised_score(world, bert_artifact, bert_tests):
    metrics = {"a": "matthews", "b": "macro_f1"}
    found = evaluate_artifact(bert_artifact, bert_tests, metrics=metrics, resamples=9)
    assert found["routed"]["normalised"]["a"] is None and found["routed"]["normalised"]["c"] is not None
    assert found["routed"]["normalised_mean"] is None and found["routed"]["minimum"] is None
    assert "a: the build recorded only its accuracy; give --recipe to normalise matthews" in found["notes"]
    known = evaluate_artifact(
        bert_artifact, bert_tests, bert_artifact.with_suffix(".yaml"), metrics=metrics, resamples=9
    )
    assert known["experts"]["scores"]["a"] != found["experts"]["scores"]["c"]
    assert known["routed"]["raw"] == found["routed"]["raw"]
    undefined = [name for name, own in known["experts"]["scores"].items() if own <= 0]
    assert [name for name, value in known["routed"]["normalised"].items() if value is None] == undefined
    assert all(any(note.startswith(f"{name}: its own expert scores") for note in known["notes"]) for name in undefined)


def test_some_tasks_alone_and_the_others_are_named(bert_artifact, bert_tests):
    found = evaluate_artifact(bert_artifact, {"b": bert_tests["b"]})
    assert list(found["routed"]["raw"]) == ["b"] and found["router"]["confusion"][0] == [0, 0, 0, 0]
    assert "a: no rows given, so not evaluated" in found["notes"]


def test_without_data_the_recipes_test_files_are_read(world, tmp_path, bert_tests):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    experts = {name: {"data": {"train": f"{name}.jsonl", "test": str(bert_tests[name])}} for name in "ab"}
    recipe = tiny.write_recipe(folder, ("a", "b"), experts=experts)
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    found = evaluate_artifact(tmp_path / "out", {}, recipe)
    assert {name: entry["file"] for name, entry in found["data"].items()} == {n: str(bert_tests[n]) for n in "ab"}


# ---- regression -------------------------------------------------------------------------------------------------


def test_regression_rows_that_others_answer_count_as_the_train_mean(world, tmp_path):
    artifact = world.artifact("bert", REGRESSION, **RANK)
    tests = write_tests("bert", tmp_path, REGRESSION, rows=30)
    report = files.read_json(artifact / "report.json")
    model, path = Naive("bert", artifact), tests["r"]
    slot = model.model.config.label2id["r/score"]
    mean, values, elsewhere = report["data"]["r"]["train_mean"], [], 0
    for row in rows_of(path):
        output = model(row, path.parent)
        own = int(output.logits.argmax()) == slot
        values.append(float(output.expert_logits[0, slot]) if own else mean)
        elsewhere += not own
    assert 0 < elsewhere < 30
    expected = np.corrcoef(values, [row["label"] for row in rows_of(path)])[0, 1]
    for recipe in (None, artifact.with_suffix(".yaml")):
        found = evaluate_artifact(artifact, tests, recipe)
        assert found["data"]["r"]["metric"] == "pearson"
        assert found["routed"]["raw"]["r"] == pytest.approx(expected, abs=1e-4)
        assert found["calibration"]["rows"] == 30 and list(found["calibration"]["tasks"]) == ["a"]
        assert any("regression rows (r) are left out" in note for note in found["notes"])


def test_the_recorded_train_mean_is_that_of_the_rows_trained_on(world):
    artifact = world.artifact("bert", REGRESSION, **RANK)
    from twin_merging_hf.data import read_rows, split_rows

    rows = read_rows(world.experts("bert", REGRESSION) / "r.jsonl", "text", ["score"], True)
    train = split_rows(rows, None, 1000, 0, "r").train
    recorded = files.read_json(artifact / "report.json")["data"]
    assert recorded["r"]["train_mean"] == pytest.approx(math.fsum(row["label"] for row in train) / len(train))
    assert "train_mean" not in recorded["a"]


def test_regressions_alone_have_no_calibration(world, tmp_path):
    labels = {"r": ["score"], "s": ["stars"]}
    artifact = world.artifact("bert", labels, **RANK)
    found = evaluate_artifact(artifact, write_tests("bert", tmp_path, labels), metrics={"r": "pearson_spearman"})
    assert found["calibration"] is None and "no rows of classes" in "\n".join(table(found))
    assert found["router"]["rows"] == 34


# ---- rows that were seen ----------------------------------------------------------------------------------------


def seen(path: Path, name: str, count: int = 2) -> list[dict]:
    return [{"text": "new row of nobody", "label": 0}, *rows_of(path / f"{name}.jsonl")[:count]]


@pytest.mark.parametrize("change", ["as it is", "white space", "case", "other label"])
def test_rows_of_the_build_are_refused_however_they_are_written(world, bert_artifact, tmp_path, change):
    changes = {
        "as it is": lambda row: row,
        "white space": lambda row: {**row, "text": "\t" + row["text"].replace(" ", "  \n") + " "},
        "case": lambda row: {**row, "text": row["text"].upper()},
        "other label": lambda row: {**row, "label": 1},
    }
    rows = seen(world.experts("bert"), "a")
    path = tmp_path / "elsewhere" / "a.jsonl"
    path.parent.mkdir()
    files.write_rows(path, [rows[0], *map(changes[change], rows[1:])])
    with pytest.raises(TwinMergingError) as error:
        evaluate_artifact(bert_artifact, {"a": path})
    assert f"{path}: 2 of 3 rows overlap: 2 among the train rows of 'a'" in str(error.value)
    assert "lines 2, 3" in str(error.value)


def test_rows_of_another_expert_are_refused_too(world, bert_artifact, tmp_path):
    files.write_rows(
        tmp_path / "c.jsonl", [{"text": row["text"], "label": "m"} for row in seen(world.experts("bert"), "b")]
    )
    with pytest.raises(TwinMergingError, match="2 of 3 rows overlap: 2 among the train rows of 'b'"):
        evaluate_artifact(bert_artifact, {"c": tmp_path / "c.jsonl"})


def test_an_image_is_seen_under_any_name(world, tmp_path):
    artifact, folder = world.artifact("vit", **RANK), world.experts("vit")
    shutil.copyfile(folder / "images" / "a0.png", tmp_path / "fresh.png")
    files.write_rows(tmp_path / "a.jsonl", [{"image": "fresh.png", "label": "x"}])
    with pytest.raises(TwinMergingError, match="1 of 1 rows overlap: 1 among the train rows of 'a'.*line 1"):
        evaluate_artifact(artifact, {"a": tmp_path / "a.jsonl"})


def test_pairs_overlap_as_pairs(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    pairs = [{"text": f"w{i} w1", "text_pair": f"w{i % 5} w2", "label": i % 2} for i in range(20)]
    files.write_rows(folder / "a.jsonl", pairs)
    build_artifact(tiny.write_recipe(folder, ("a", "b"), **RANK), tmp_path / "out", Progress(quiet=True))
    others = [
        {"text": "w3 w1", "text_pair": "w4 w2", "label": 0},  # both seen, never together
        {"text": "w3 w1", "label": 1},
        {"text": "w3 w2", "text_pair": "w3 w1", "label": 0},
    ]
    files.write_rows(tmp_path / "a.jsonl", others)
    assert evaluate_artifact(tmp_path / "out", {"a": tmp_path / "a.jsonl"})["data"]["a"]["rows"] == 3
    files.write_rows(tmp_path / "a.jsonl", [*others, {"text": "w3  w1", "text_pair": " W3 w2", "label": 0}])
    with pytest.raises(TwinMergingError, match="1 of 4 rows overlap.*line 4"):
        evaluate_artifact(tmp_path / "out", {"a": tmp_path / "a.jsonl"})


def test_rows_of_the_recipe_are_refused_although_the_artifact_never_saw_them(
    world, bert_artifact, tmp_path, bert_tests
):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ("base", *tiny.LABELS))
    experts = {"a": {"data": str(bert_tests["a"])}}
    recipe = tiny.write_recipe(folder, experts=experts, **RANK)
    assert evaluate_artifact(bert_artifact, bert_tests)["data"]["a"]["rows"] == 17
    with pytest.raises(
        TwinMergingError, match=r"17 of 17 rows overlap: 17 among the train rows of 'a' \(in the recipe\)"
    ):
        evaluate_artifact(bert_artifact, bert_tests, recipe)


def test_an_artifact_that_lost_its_record_scores_nothing(bert_artifact, bert_tests, tmp_path):
    copy = tmp_path / "artifact"
    shutil.copytree(bert_artifact, copy)
    (copy / "rows.json").unlink()
    with pytest.raises(TwinMergingError, match="rows.json cannot be read"):
        evaluate_artifact(copy, bert_tests)
    files.edit_json(copy / "config.json", provenance={})  # as older builds wrote it
    with pytest.raises(TwinMergingError, match="build the artifact again"):
        evaluate_artifact(copy, bert_tests)


def test_an_artifact_without_data_says_that_overlap_is_unknown(world, bert_tests):
    found = evaluate_artifact(world.artifact("bert", data=False), bert_tests)
    assert any("overlap with training was not checked" in note for note in found["notes"])
    assert found["routed"]["normalised_mean"] is None
    assert sum("the build recorded no score of it" in note for note in found["notes"]) == 3


def test_a_saved_copy_still_refuses(world, bert_artifact, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bert_artifact)
    model.save_pretrained(tmp_path / "copy")
    with pytest.raises(TwinMergingError, match="20 of 20 rows overlap"):
        evaluate_artifact(tmp_path / "copy", {"a": world.experts("bert") / "a.jsonl"})


# ---- what is refused --------------------------------------------------------------------------------------------

BAD = {
    "unknown expert": ({"z": "x.jsonl"}, {}, "'z', but the artifact's experts are a, b, c"),
    "no rows": ({}, {}, "give `--data NAME=FILE`"),
    "missing file": ({"a": "none.jsonl"}, {}, "expert 'a': data file none.jsonl does not exist"),
    "merges alone": (None, {"merges": ["linear"]}, "need the recipe"),
    "unknown metric": (None, {"metrics": {"a": "bleu"}}, "'bleu' is no metric"),
    "stray metric": (None, {"metrics": {"z": "accuracy"}}, "a metric is given for 'z'"),
    "device": (None, {"device": "nowhere"}, "device 'nowhere' cannot be used"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_is_said(bert_artifact, bert_tests, bad):
    data, options, says = BAD[bad]
    with pytest.raises(TwinMergingError, match=says):
        evaluate_artifact(bert_artifact, bert_tests if data is None else data, **options)


def test_a_recipe_of_other_experts_is_refused(world, bert_artifact, bert_tests, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ("base", *tiny.LABELS))
    recipe = tiny.write_recipe(folder)
    assert evaluate_artifact(bert_artifact, bert_tests, recipe)["experts"]["source"] == ON_THESE_ROWS
    with pytest.raises(TwinMergingError, match="'nonsense' is no merge method; known: linear"):
        evaluate_artifact(bert_artifact, bert_tests, recipe, merges=["nonsense"])
    with pytest.raises(TwinMergingError, match="expert 'a': `labels` is .*in the recipe"):
        other = tiny.write_recipe(folder, data=False, experts={"a": {"labels": ["no", "yes"]}}, file="other.yaml")
        evaluate_artifact(bert_artifact, bert_tests, other)
    with pytest.raises(TwinMergingError, match="the recipe has no expert 'c'"):
        evaluate_artifact(bert_artifact, bert_tests, tiny.write_recipe(folder, ("a", "b"), file="fewer.yaml"))
    files.edit_tensors(folder / "b", lambda tensors: tensors["classifier.bias"].add_(1))
    with pytest.raises(TwinMergingError, match="expert 'b': .*not the checkpoint that the artifact was built from"):
        evaluate_artifact(bert_artifact, bert_tests, recipe)


# ---- the command ------------------------------------------------------------------------------------------------


def call(*args: Any, code: int = 0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_a_table_and_writes_json_and_a_picture(bert_artifact, bert_tests, tmp_path):
    pairs = [f"{name}={path}" for name, path in bert_tests.items()]
    out = tmp_path / "deep" / "scores.json"
    recipe = bert_artifact.with_suffix(".yaml")
    text = call(bert_artifact, "--data", *pairs, "--recipe", recipe, "--merges", "linear,base", "-o", out, "-q").stdout
    for part in ("routed %", "given %", "linear %", "minimum", "router accuracy", "ECE", "NLL", "times the shared",
                 "the true task's head", f"wrote {out} and {out.with_suffix('.png')}"):  # fmt: skip
        assert part in text, part
    found = files.read_json(out)
    assert found["routed"] == evaluate_artifact(bert_artifact, bert_tests, recipe)["routed"]
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    assert "exists already" in call(bert_artifact, "--data", *pairs, "-o", out, code=2).stderr


def test_json_on_standard_output_is_json_alone(bert_artifact, bert_tests, tmp_path):
    options = [
        "--data",
        f"a={bert_tests['a']}",
        "--data",
        f"b={bert_tests['b']}",
        "--metric",
        "a=exact_match",
        "--json",
    ]
    found = json.loads(call(bert_artifact, *options).stdout)
    assert found["data"]["a"]["metric"] == "exact_match" and found["data"]["b"]["metric"] == "accuracy"
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_json_and_a_note(bert_artifact, bert_tests, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = call(bert_artifact, "--data", f"a={bert_tests['a']}", "-o", tmp_path / "s.json", "-q").stdout
    assert "no picture, because matplotlib is not installed" in text and "twin-merging-hf[evaluate]" in text
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]
    assert any("no picture" in note for note in files.read_json(tmp_path / "s.json")["notes"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--data", "a"], "--data must be NAME=VALUE"),
        (["--data", "=x"], "--data must be NAME=VALUE"),
        (["--data", "a=x", "--data", "a=y"], "given twice for 'a'"),
        (["--data", "a=x", "-o", "scores.txt"], "must end in .json"),
        (["--allow-overlap"], "No such option"),
    ],
)
def test_wrong_usage(bert_artifact, args, says):
    assert says in call(bert_artifact, *args, code=2).stderr


def test_overlap_ends_the_command_with_2_and_writes_nothing(world, bert_artifact, tmp_path):
    result = call(bert_artifact, "--data", f"a={world.experts('bert') / 'a.jsonl'}", "-o", tmp_path / "x.json", code=2)
    assert result.stderr.count("error: ") == 1 and "rows overlap" in result.stderr
    assert list(tmp_path.iterdir()) == []
