"""`tune`: what it chooses is recomputed from its own record and from dense models; test rows stay unread."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests import files, tiny
from twin_merging_hf import TwinMergingError, evaluation
from twin_merging_hf.preflight import preflight
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.tuning import TOLERANCE, Grids, tune_recipe


GRIDS = Grids(sums=(0.2, 0.5), lambdas=(0.5, 1.0), densities=(0.2, 0.5), ranks=(1, 2, 8, 64))
QUIET = Progress(quiet=True)
LABELS = {"a": ["x", "y"], "b": ["p", "q", "r"], "r": ["score"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classifiers and a regression whose labels are their own answers, so that each scores 1 on its own rows."""
    root = tiny.make_experts("bert", tmp_path_factory.mktemp("tuning"), LABELS, rows=60, std=0.12)
    inputs = preflight(load_recipe(tiny.write_recipe(root, LABELS)))
    for index, (name, labels) in enumerate(LABELS.items()):
        rows = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        answers = evaluation.model_outputs(evaluation.checkpoint_model(inputs.experts[index]), rows, inputs.processing)
        for row, answer in zip(rows, answers, strict=True):
            row["label"] = float(answer[0]) if len(labels) == 1 else labels[int(answer.argmax())]
        files.write_rows(root / f"{name}.jsonl", rows)
    inputs.close()
    return root


def tune(folder: Path, out: Path, **recipe):
    path = tiny.write_recipe(folder, LABELS, **recipe)
    return tune_recipe(path, out, GRIDS, QUIET), path


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "tsv_m"])
def test_it_tries_the_grid_and_chooses_by_the_record(folder, tmp_path, method):
    tuning, path = tune(folder, tmp_path / "tuned.yaml", merge_method=method, exclusive={"rank": 4})
    assert tuning.own == {"a": 1.0, "b": 1.0, "r": pytest.approx(1.0)}
    tried = {tuple(sorted(candidate.setting.items())) for candidate in tuning.merge}
    lambdas = {"ties": (0.5, 1.0), "tsv_m": (0.5, 1.0)}.get(method, (0.2, 0.3, 0.5))
    densities = (0.2, 0.5) if method == "ties" else (None,)
    expected = [{"density": d, "lambda": s} if d else {"lambda": s} for d in densities for s in lambdas]
    assert tried == {tuple(sorted(setting.items())) for setting in expected} and len(tried) == len(tuning.merge)
    record = json.loads((tmp_path / "tuned.json").read_text())
    best = max(candidate["score"] for candidate in record["merge"])
    chosen = {key: value for key, value in record["chosen"].items() if key != "rank"}
    assert next(c["score"] for c in record["merge"] if c["setting"] == chosen) == best
    assert [c["setting"]["rank"] for c in record["rank"]] == [1, 2, 4, 8, 32]
    top = max(candidate["score"] for candidate in record["rank"])
    good = [c["setting"]["rank"] for c in record["rank"] if c["score"] >= top - TOLERANCE]
    assert record["chosen"]["rank"] == min(good)
    assert record["rank"][-1]["score"] == pytest.approx(1.0)  # full rank is the expert
    assert record["rank"][0]["score"] < 1.0 and len({c["score"] for c in record["merge"]}) > 1


def test_scores_are_those_of_plain_merged_models(folder, tmp_path):
    """One candidate again, from the files alone."""
    tuning, path = tune(folder, tmp_path / "tuned.yaml", merge_method="task_arithmetic", exclusive={"rank": 4})
    candidate = next(c for c in tuning.merge if c.setting == {"lambda": 0.2})
    inputs = preflight(load_recipe(path))
    base, *experts = (files.tensors_of(folder / name) for name in ("base", *LABELS))
    shares = []
    for index, (name, labels) in enumerate(LABELS.items()):
        model = evaluation.checkpoint_model(inputs.experts[index])
        state = model.state_dict()
        for key in (key for key in state if key.startswith("bert.")):
            state[key].copy_(base[key] + 0.2 * sum(expert[key] - base[key] for expert in experts))
        rows = inputs.rows[index].held_out
        outputs = evaluation.model_outputs(model, rows, inputs.processing)
        labels_of = torch.tensor([row["label"] for row in rows])
        if len(labels) == 1:
            shares.append(float(torch.corrcoef(torch.stack([outputs[:, 0], labels_of]))[0, 1]))
        else:
            shares.append(float((outputs.argmax(1) == labels_of).float().mean()))
        assert candidate.raw[name] == pytest.approx(shares[-1], abs=1e-4)
    assert candidate.score == pytest.approx(sum(shares) / 3, abs=1e-4)
    inputs.close()


def test_the_recipe_differs_in_the_tuned_keys_only_and_its_paths_hold_from_its_new_folder(folder, tmp_path):
    out = tmp_path / "new" / "deep" / "tuned.yaml"
    keys = {"merge_method": "ties", "exclusive": {"rank": 4, "dtype": "bf16"}, "seed": 3, "out_dtype": "float32"}
    tuning, path = tune(folder, out, parameters={"normalize": False}, **keys)
    before, after = load_recipe(path), load_recipe(out)
    assert out.read_text().startswith("# Tuned on held-out rows")
    assert (after.scaling, after.density) == (tuning.chosen["lambda"], tuning.chosen["density"])
    assert after.normalize is False and after.exclusive.rank == tuning.chosen["rank"]
    assert after.exclusive.dtype == before.exclusive.dtype
    for key in ("merge_method", "seed", "out_dtype", "router", "names", "include", "exclude"):
        assert getattr(before, key) == getattr(after, key)
    assert (after.folder / after.base_model).resolve() == (folder / "base").resolve()
    for expert in after.experts:
        assert (after.folder / expert.model).resolve() == (folder / expert.name).resolve()
        assert expert.data.train.resolve() == (folder / f"{expert.name}.jsonl").resolve()
    again, _ = tune(folder, tmp_path / "again" / "x" / "tuned.yaml", parameters={"normalize": False}, **keys)
    assert again == tuning


def test_what_has_nothing_to_choose_is_left_and_said(folder, tmp_path):
    tuning, _ = tune(folder, tmp_path / "a.yaml", exclusive={"ratio": 0.25})
    assert tuning.chosen == {} and tuning.merge == [] and tuning.rank == []
    assert set(tuning.left) == {"parameters", "exclusive.rank", "router"}
    content = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert content["exclusive"] == {"ratio": 0.25} and "parameters" not in content


def test_test_rows_are_never_read(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    files.write_rows(tmp_path / "validation.jsonl", rows[:20])
    parts = {"train": "a.jsonl", "validation": str(tmp_path / "validation.jsonl"), "test": "not/there.jsonl"}
    tuning, _ = tune(folder, tmp_path / "a.yaml", exclusive={"rank": 1}, experts={"a": {"data": parts}})
    assert tuning.rows == {"a": 20, "b": 12, "r": 12}  # all of validation, a fifth of train


def test_refusals(folder, tmp_path):
    (tmp_path / "tuned.json").write_text("mine")
    path = tiny.write_recipe(folder, LABELS)
    with pytest.raises(TwinMergingError, match=r"tuned\.json exists already"):
        tune_recipe(path, tmp_path / "tuned.yaml", GRIDS, QUIET)
    with pytest.raises(TwinMergingError, match="exists already"):
        tune_recipe(path, path, GRIDS, QUIET)
    without = tiny.write_recipe(folder, LABELS, experts={"b": {"data": None}})
    with pytest.raises(TwinMergingError, match="'b' has no `data`"):
        tune_recipe(without, tmp_path / "x.yaml", GRIDS, QUIET)
    assert (tmp_path / "tuned.json").read_text() == "mine" and not (tmp_path / "tuned.yaml").exists()


# ---- models without classes of rows ----------------------------------------------------------------------------------


def with_own_answers(root: Path, name: str, auto: type) -> None:
    """Rows whose completion is the word that the expert itself writes first."""
    model, tokenizer = auto.from_pretrained(root / name).eval(), AutoTokenizer.from_pretrained(root / name)
    rows = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
    kept = []
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        word = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
        if word >= len(tiny.SPECIAL):
            kept.append({**row, "completion": tokenizer.decode(word)})
    files.write_rows(root / f"{name}.jsonl", kept)


@pytest.mark.parametrize(("kind", "auto"), [("llama-lm", AutoModelForCausalLM), ("t5-lm", AutoModelForSeq2SeqLM)])
def test_language_models_are_scored_by_the_tokens_that_they_would_write(tmp_path, kind, auto):
    root = tiny.make_experts(kind, tmp_path, {"a": (), "b": ()}, rows=60, std=0.12)
    for name in "ab":
        with_own_answers(root, name, auto)
    recipe = tiny.write_recipe(root, "ab", merge_method="task_arithmetic", exclusive={"rank": 64})
    tuning = tune_recipe(recipe, tmp_path / "tuned.yaml", GRIDS, QUIET)
    assert tuning.own == {"a": 1.0, "b": 1.0} and tuning.rank[-1].score == 1.0
    assert tuning.rank[0].score < 1.0 and min(candidate.score for candidate in tuning.merge) < 1.0


def test_taggers_are_scored_by_their_tags(tmp_path):
    root = tiny.make_experts("bert-tokens", tmp_path, tiny.TAGS, rows=40, std=0.12)
    tuning = tune_recipe(
        tiny.write_recipe(root, tuple(tiny.TAGS), exclusive={"rank": 64}), tmp_path / "t.yaml", GRIDS, QUIET
    )
    inputs = preflight(load_recipe(root / "recipe.yaml"))
    for index, name in enumerate(tiny.TAGS):
        rows = inputs.rows[index].held_out
        outputs = evaluation.model_outputs(evaluation.checkpoint_model(inputs.experts[index]), rows, inputs.processing)
        true = torch.tensor([tag for row in rows for tag in row["tags"]])
        assert tuning.own[name] == pytest.approx(float((outputs.argmax(1) == true).float().mean()))
    inputs.close()
    assert tuning.rank[-1].score == pytest.approx(1.0)
