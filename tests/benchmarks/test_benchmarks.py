"""The benchmark's own arithmetic against hand examples and naive formulas, and both tables end to end on tiny models."""

import csv
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import pearsonr
from torch.func import functional_call

from tests import tiny
from twin_merging_hf.recipe import parse_recipe


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TASKS: dict[str, list[str] | None] = {"a": ["x", "y"], "c": ["x", "y"], "v": None}

ONLY = "experts,base,base-routed,published-oracle,published,ours,ours-top-1,swap,ceiling,multi-task,routers"


@pytest.fixture(scope="module", autouse=True)
def path():
    """The scripts import each other as a folder of scripts does."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def module(name: str):
    return importlib.import_module(name)


# ---- score rules ------------------------------------------------------------------------------------------------


def gold(one_space: bool = False):
    """Two tasks: classes (4 rows) and a regression (4 rows, train mean 5)."""
    task, value = np.array([0] * 4 + [1] * 4), np.array([0, 0, 0, 0, 1.0, 2.0, 3.0, 4.0])
    return module("scores").Gold(task, np.array([0, 1, 0, 1, 0, 0, 0, 0]), value, (False, True), (0.0, 5.0), one_space)


def answers(task, label, value):
    return module("scores").Answers(np.array(task), np.array(label), np.array(value, float), np.full(8, np.nan))


def test_a_label_of_another_task_is_wrong_even_if_its_number_is_right():
    scores = module("scores")
    found = answers([0, 0, 1, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 4])
    assert scores.right(found, gold())[:4].tolist() == [True, True, False, False]
    assert scores.task_scores(found, gold()).tolist() == [[0.5, 1.0]]


def test_where_tasks_share_their_labels_any_head_may_answer():
    scores = module("scores")
    found = answers([1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 2, 3, 4])
    assert scores.task_scores(found, gold(one_space=True))[0, 0] == 1.0
    assert scores.task_scores(found, gold())[0, 0] == 0.0


def test_a_regression_row_routed_elsewhere_counts_as_the_train_mean():
    scores = module("scores")
    found = answers([0, 0, 0, 0, 1, 0, 1, 1], [0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1.5, 99, 3.5, 3])
    expected = pearsonr([1.5, 5.0, 3.5, 3.0], [1, 2, 3, 4])[0]
    assert scores.task_scores(found, gold())[0, 1] == pytest.approx(expected)


def test_constant_regression_scores_nothing():
    found = answers([0] * 8, [0, 1, 0, 1, 0, 0, 0, 0], [7.0] * 8)
    assert module("scores").task_scores(found, gold())[0, 1] == 0.0


def test_resampled_scores_are_those_of_the_rows_drawn():
    scores = module("scores")
    found = answers([0] * 4 + [1] * 4, [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 2.0, 1.0, 4.0, 3.0])
    counts = scores.resamples(gold(), seed=3, times=20)
    drawn = scores.task_scores(found, gold(), counts)
    for i in range(20):
        rows = np.repeat(np.arange(4), counts[0][i].astype(int))
        assert len(rows) == 4
        assert drawn[i, 0] == pytest.approx(np.mean([[1, 0, 1, 1][r] for r in rows]))
        rows = np.repeat(np.arange(4), counts[1][i].astype(int))
        x, y = np.array([2.0, 1, 4, 3])[rows], np.array([1.0, 2, 3, 4])[rows]
        assert drawn[i, 1] == pytest.approx(pearsonr(x, y)[0] if len(set(rows)) > 1 else 0.0)


def test_normalised_is_the_mean_of_ratios_not_the_ratio_of_means():
    score = module("scores").normalised(np.array([[0.4, 0.9]]), np.array([[0.8, 0.9]]))
    assert score == pytest.approx([75.0])


def test_calibration_error_of_a_hand_example():
    # Bin of 0.95: three rows, one wrong; bin of 0.5: one row, right.
    error = module("scores").calibration_error(np.array([0.95, 0.95, 0.95, 0.5]), np.array([1, 1, 0, 1]))
    assert error == pytest.approx(0.75 * abs(0.95 - 2 / 3) + 0.25 * 0.5)


def test_paired_interval_of_a_method_against_itself_is_nothing():
    table, scores = module("table"), module("scores")
    rng = np.random.default_rng(0)
    half = np.array([0] * 50 + [1] * 50)
    truth = scores.Gold(half, rng.integers(0, 2, 100), np.zeros(100), (False, False), (0.0, 0.0))
    guess = scores.Answers(half, rng.integers(0, 2, 100), np.zeros(100), np.full(100, np.nan))
    better = scores.Answers(
        half, np.where(np.arange(100) % 10 == 0, guess.label, truth.label), np.zeros(100), guess.confidence
    )
    method = module("methods").Method
    found = [
        (method(key, key, lambda seed: guess, lambda: 1.0), [given]) for key, given in (("ours", guess), ("m", better))
    ]
    same, other = table.make_lines(found, better, truth)
    assert same.difference == (0.0, 0.0, 0.0)
    assert other.normalised == pytest.approx(100.0)
    assert other.difference[0] > 0 and other.difference[1] > 0


# ---- rivals, by naive formulas ----------------------------------------------------------------------------------


def test_emr_elects_sign_and_largest_agreeing_magnitude():
    vectors = torch.tensor([[3.0, -1.0, 2.0], [-1.0, -4.0, -2.0], [1.0, 2.0, 1.0]])
    assert module("rivals").elect_unified(vectors).tolist() == [3.0, -4.0, 2.0]


def test_iso_c_has_one_singular_value_and_tsv_m_keeps_orthogonal_tasks():
    static = module("static_merges")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 6, 5, generator=generator)
    merged = static.iso_c(vectors)
    values = torch.linalg.svdvals(merged)
    expected = torch.linalg.svdvals(vectors.sum(0)).mean()
    torch.testing.assert_close(values, expected.expand(5), rtol=1e-5, atol=1e-5)
    # Two tasks of rank 1 (of three: one each is kept) on directions of their own do not disturb each other, so nothing changes.
    left, right = (
        torch.linalg.qr(torch.randn(6, 2, generator=generator)).Q,
        torch.linalg.qr(torch.randn(3, 2, generator=generator)).Q,
    )
    apart = torch.stack([2 * torch.outer(left[:, 0], right[:, 0]), 3 * torch.outer(left[:, 1], right[:, 1])])
    torch.testing.assert_close(static.tsv_m(apart), apart.sum(0), rtol=1e-4, atol=1e-5)
    shared = torch.stack([apart[0], apart[0]])
    assert not torch.allclose(static.tsv_m(shared), shared.sum(0), atol=1e-2)
    assert torch.equal(static.tsv_m(vectors[:, 0]), vectors[:, 0].mean(0))


@pytest.mark.parametrize("kind", ["linear", "mlp", "centroid", "knn"])
def test_every_router_separates_groups_that_lie_apart(kind):
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 600)
    # Far from the origin, where angles say nothing unless the mean is taken away.
    x = (50 + 4 * np.eye(3, 8)[y] + rng.normal(size=(1800, 8))).astype(np.float32)
    predict = module("router_comparison").TYPES[kind](x[::2], y[::2], x[::2], y[::2])
    assert (predict(x[1::2]) == y[1::2]).mean() > 0.9


# ---- the published run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A tiny base and a tasks file with rows of words that name their task and their label."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny.new_model("bert").base_model.save_pretrained(folder / "base")
    tiny.save_tokenizer(folder / "base")
    tasks = {}
    for index, (name, labels) in enumerate(TASKS.items()):
        rng, files = random.Random(index), {}
        for split, count in (("train", 48), ("validation", 16), ("test", 20)):
            lines = []
            for _ in range(count):
                label = rng.randrange(3 if labels is None else len(labels))
                words = f"{tiny.text_row(index, rng)} {' '.join([tiny.WORDS[label]] * 3)}"
                lines.append(json.dumps({"text": words, "label": label + 0.5 if labels is None else labels[label]}))
            files[split] = f"{name}.{split}.jsonl"
            (folder / files[split]).write_text("\n".join(lines), encoding="utf-8")
        tasks[name] = files
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"rows": {}, "tasks": tasks}))
    return folder


def run_text(text: Path, monkeypatch, *more: str) -> None:
    options = [
        "--tasks",
        text / "tasks.yaml",
        "--base",
        text / "base",
        "--cache",
        text / "cache",
        "--out",
        text / "out",
    ]
    monkeypatch.setattr(sys, "argv", ["text_experts.py", *map(str, options), "--threads", "1", *more])
    module("text_experts").main()


@pytest.fixture(scope="module")
def table(text) -> dict[str, dict]:
    """The table's CSV by key, from a run over the rows that matter here."""
    with pytest.MonkeyPatch.context() as patch:
        run_text(text, patch, "--seeds", "2", "--only", ONLY)
    with (text / "out" / "text.csv").open() as stream:
        return {row["key"]: row for row in csv.DictReader(stream)}


def new_bench(text: Path):
    loaded = module("text_tasks").load_tasks(text / "tasks.yaml", text, None, 0)
    models = text / "cache" / "models"
    experts = [models / f"expert-{task.name}-seed0-epochs3" for task in loaded]
    return module("bench").Bench(loaded, text / "base", experts, text / "cache" / "data", text / "cache")


@pytest.mark.parametrize("script", ["artifacts", "vision_experts"])
def test_our_recipes_are_recipes(script):
    experts = [{"name": name, "model": name, "data": f"{name}.jsonl"} for name in "ab"]
    recipe = parse_recipe({"base_model": "base", "experts": experts, **module("artifacts").OURS, **module(script).OURS})
    assert recipe.exclusive.dtype == "int4" and recipe.router.type == "auto"


def test_published_mixture_is_the_dense_formula(text, table):
    """theta_s + sum_t w_t SVD_r(theta_t - theta_s), biases of one expert, row by row."""
    bench, running = new_bench(text), module("running")
    base, experts = running.backbone(bench, bench.base), [running.backbone(bench, path) for path in bench.experts]
    rows = bench.part("test").rows
    rng = np.random.default_rng(0)
    weights, owner = rng.dirichlet(np.ones(3), len(rows)), rng.integers(0, 3, len(rows))
    found = module("published").Published(bench).outputs(weights, owner)
    shared = {name: start + 0.3 * sum(e[name] - start for e in experts) for name, start in base.items()}
    for index in (0, 25, 47):
        state = {}
        for name in base:
            if "bias" in name:
                state[name] = experts[owner[index]][name]
                continue
            state[name] = shared[name].clone()
            for weight, expert in zip(weights[index], experts, strict=True):
                delta = expert[name] - shared[name]
                if delta.dim() == 2:
                    u, s, vh = torch.linalg.svd(delta)
                    rank = max(1, int(0.1 * min(delta.shape)))
                    delta = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
                state[name] += weight * delta
        inputs = bench.processing.inputs([rows[index]])
        for task, path in enumerate(bench.experts):
            own = running.load(path)
            expected = functional_call(own, {**dict(own.state_dict()), **state}, kwargs=inputs).logits[0]
            np.testing.assert_allclose(found[index, bench.spans[task]], expected.detach(), atol=2e-4)


def test_published_router_keeps_the_epoch_that_the_judging_rows_like(monkeypatch):
    published = module("published")
    monkeypatch.setattr(published, "EPOCHS", 20)
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    kept = published.train_mlp(x, y, x, y, 2)
    torch.manual_seed(0)
    against = published.train_mlp(x, y, x, 1 - y, 2)
    accuracy = [float((router(x).argmax(1) == y).float().mean()) for router in (kept, against)]
    assert accuracy[0] > accuracy[1]


def test_oracle_answers_with_the_true_head_and_the_routed_run_does_not(table):
    assert float(table["published-oracle"]["storage_ratio"]) == float(table["published"]["storage_ratio"]) > 1
    assert table["published-oracle"]["knows_task"] == "True" and table["published"]["knows_task"] == "False"


# ---- the whole table --------------------------------------------------------------------------------------------


def test_table_holds_every_method_and_experts_are_100(text, table):
    assert float(table["experts"]["normalised"]) == pytest.approx(100.0)
    assert float(table["experts"]["storage_ratio"]) == 3.0
    assert float(table["ours"]["minus_ours"]) == 0.0
    assert table["ours"]["seeds"] == "2" and table["experts"]["seeds"] == "1"
    assert (text / "out" / "text.png").is_file() and (text / "out" / "text_router_layers.png").is_file()
    with (text / "out" / "text_router_layers.csv").open() as stream:
        routers = list(csv.DictReader(stream))
    assert {row["router"] for row in routers} >= {"linear", "mlp", "centroid", "knn", "ceiling"}


def test_experts_score_is_recomputed_from_stock_models(text, table):
    bench, running = new_bench(text), module("running")
    for task, path in zip(bench.tasks, bench.experts, strict=True):
        model, rows = running.load(path), task.rows["test"]
        with torch.no_grad():
            out = model(**bench.processing.inputs(rows)).logits
        if task.labels is None:
            score = pearsonr(out[:, 0], [row["label"] for row in rows])[0]
        else:
            score = np.mean([task.labels[i] == row["label"] for i, row in zip(out.argmax(1), rows, strict=True)])
        assert float(table["experts"][f"raw_{task.name}"]) == pytest.approx(100 * score, abs=1e-3)


def test_ours_given_is_the_artifact_called_with_the_tasks_name(text, table):
    bench = new_bench(text)
    artifact = module("artifacts").ours(bench, 0)
    given, part = artifact.given(), bench.part("test")
    for index in (0, 30, 50):
        name = bench.names[part.gold.task[index]]
        with torch.no_grad():
            out = artifact.model(**bench.processing.inputs([part.rows[index]]), experts=name).expert_logits[0]
        assert given.label[index] == int(out[bench.spans[part.gold.task[index]]].argmax())


def test_a_second_run_reads_its_answers_from_the_cache(text, table, monkeypatch):
    monkeypatch.setattr(module("running"), "run_over", None)
    before = (text / "out" / "text.csv").read_bytes()
    run_text(text, monkeypatch, "--seeds", "2", "--only", ONLY)
    assert (text / "out" / "text.csv").read_bytes() == before


@pytest.mark.parametrize(
    "names", ["rank,shift", pytest.param("routers,bytes,ablations,experts,unseen,long", marks=pytest.mark.slow)]
)
def test_sweeps_write_what_they_say(text, table, monkeypatch, names):
    sweeps = module("sweeps")
    monkeypatch.setattr(sweeps, "RANKS", (1, 4))
    monkeypatch.setattr(sweeps, "BYTE_POINTS", {"fp32": (2,), "bf16": (2,)})
    monkeypatch.setattr(sweeps, "LORA_RANKS", (2,))
    monkeypatch.setattr(sweeps, "BUDGETS", ())
    monkeypatch.setattr(sweeps, "LONG_RANKS", (1, 4))
    run_text(text, monkeypatch, "--sweeps", names)
    found = {}
    for name in names.split(","):
        assert (text / "out" / f"text_{name}.png").is_file()
        with (text / "out" / f"text_{name}.csv").open() as stream:
            found[name] = list(csv.DictReader(stream))
    if "shift" in found:
        assert {(row["expert"], row["rows_of"]) for row in found["shift"]} == {("a", "c"), ("c", "a")}
        assert [row["rank"] for row in found["rank"]] == ["1", "4"]
        assert float(found["rank"][0]["storage_ratio"]) < float(found["rank"][1]["storage_ratio"])
    else:
        ratios = {row["method"]: float(row["storage_ratio"]) for row in found["bytes"]}
        assert ratios["BitDelta"] < ratios["EMR-Merging"]
        assert [row["held_out_task"] for row in found["unseen"]] == [*TASKS, "mean"]
        assert [row["method"] for row in found["ablations"]] == ["svd", "magnitude", "bernoulli"]


@pytest.mark.slow
def test_trainings_side_by_side_give_the_same_weights(text, monkeypatch):
    found = []
    for threads in ("1", "2"):
        run_text(text, monkeypatch, "--only", "experts", "--cache", str(text / f"cache{threads}"), "--threads", threads)
        models = sorted((text / f"cache{threads}" / "models").iterdir())
        found.append({path.name: (path / "model.safetensors").read_bytes() for path in models})
    assert len(found[0]) == len(TASKS) + 2 and found[0] == found[1]


def test_unknown_methods_and_sweeps_are_named(text, table, monkeypatch):
    with pytest.raises(SystemExit, match="no method 'nonsense'"):
        run_text(text, monkeypatch, "--only", "nonsense")
    with pytest.raises(SystemExit, match="no sweep 'nonsense'"):
        run_text(text, monkeypatch, "--sweeps", "nonsense")


def test_vision_tasks_split_pictures_and_never_twice(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(module("vision_tasks"), "MOST", {"train": 30, "validation": 20, "test": 20})
    tasks = module("vision_tasks").make_tasks(tmp_path, 0)
    seen: set[str] = set()
    for task in tasks:
        for rows in task.rows.values():
            names = {row["image"].name for row in rows}
            assert len(names) == len(rows) and not names & seen
            seen |= names
            assert {row["label"] for row in rows} <= set(task.labels)
