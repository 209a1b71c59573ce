"""Whole builds: the same bytes every time, all or nothing on disk, and a proof at the end."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests import files, interrupts, tiny
from twin_merging_hf import TwinMergingError, builder, modeling
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import Progress, build_artifact, plan_build
from twin_merging_hf.modeling.matrices_twin_merging import MatrixForward
from twin_merging_hf.recipe import load_recipe


SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")


@pytest.fixture
def inputs(world, tmp_path) -> Path:
    return files.copy_inputs(world.experts("bert"), tmp_path / "in")


def build(recipe: Path, out: Path):
    return build_artifact(recipe, out, Progress(quiet=True))


# ---- the result -------------------------------------------------------------------------------------------------


def test_an_artifact_is_whole_and_says_what_it_is(world, kind, artifact):
    assert check_artifact(artifact) == []
    report = files.read_json(artifact / "report.json")
    assert [entry["name"] for entry in report["experts"]] == list(tiny.LABELS)
    assert report["labels"] == [f"{name}/{label}" for name, labels in tiny.LABELS.items() for label in labels]
    assert report["probe"]["largest_relative_difference"] < 1e-5
    assert report["verdict"]["given"] == {name: 1.0 for name in tiny.LABELS}
    config = files.read_json(artifact / "config.json")
    assert config["provenance"]["verdict"] == report["verdict"]
    processor = "tokenizer.json" if kind != "vit" else "preprocessor_config.json"
    names = {path.name for path in artifact.iterdir()}
    assert {"README.md", "recipe.yaml", "report.json", "confusion.png", "model.safetensors"} <= names
    assert processor in names or "processor_config.json" in names


def test_experts_chosen_by_hand_answer_as_themselves(world, kind):
    """The promise of a full-rank artifact, checked against the checkpoints themselves."""
    model, inputs = world.model(kind), tiny.batch(kind, 4)
    for t, name in enumerate(tiny.LABELS):
        auto = modeling.shared_twin_merging.find_shared_class(model.config.shared_class)[0]
        expert = auto.from_pretrained(world.experts(kind) / name).eval()
        with torch.no_grad():
            expected, output = expert(**inputs).logits, model(**inputs, experts=name)
        torch.testing.assert_close(output.expert_logits[:, model.label_space.columns(t)], expected, rtol=0, atol=1e-4)


def test_a_plan_foretells_the_build_and_writes_nothing(world, inputs, tmp_path):
    recipe = tiny.write_recipe(inputs, ("a", "b"), exclusive={"rank": 3})
    before = files.listing(tmp_path)
    plan = plan_build(recipe, tmp_path / "out")
    assert files.listing(tmp_path) == before
    report = build(recipe, tmp_path / "out").report
    assert plan.shared_bytes == report["storage"]["shared"] and plan.delta_bytes == report["storage"]["deltas"]
    assert (plan.labels, plan.experts, plan.router_type) == (report["labels"], report["experts"], "linear")
    assert plan.notes == report["notes"]


def test_a_plan_without_data_routes_by_projection(inputs, tmp_path):
    plan = plan_build(tiny.write_recipe(inputs, ("a", "b"), data=False), tmp_path / "out")
    assert plan.router_type == "projection"


def test_one_expert_alone_is_a_recipe_too(inputs, tmp_path):
    report = build(tiny.write_recipe(inputs, ("a",)), tmp_path / "out").report
    assert report["labels"] == ["x", "y"] and report["storage"]["deltas"] == 0


@pytest.mark.parametrize(
    ("experts", "labels"),
    [
        ({"a": ["yes", "no"], "b": ["no", "yes"]}, ["yes", "no"]),
        (
            {"a": ["LABEL_0", "LABEL_1"], "b": ["LABEL_0", "LABEL_1"]},
            ["a/LABEL_0", "a/LABEL_1", "b/LABEL_0", "b/LABEL_1"],
        ),
        ({"a": ["score"], "b": ["p", "q"]}, ["a/score", "b/p", "b/q"]),
        ({"a": ["score"], "b": ["stars"]}, ["value"]),
        ({"a": ["score"], "b": ["score"]}, ["score"]),
    ],
)
def test_every_kind_of_label_space_builds(tmp_path, experts, labels):
    folder = tiny.make_experts("bert", tmp_path / "in", experts)
    recipe = tiny.write_recipe(folder, list(experts), exclusive={"rank": tiny.FULL_RANK})
    report = build(recipe, tmp_path / "out").report
    assert report["labels"] == labels == files.read_json(tmp_path / "out" / "report.json")["labels"]
    assert all(share == pytest.approx(1, abs=1e-3) for share in report["verdict"]["given"].values())
    assert any("automatic label names" in note for note in report["notes"]) == ("LABEL_0" in labels[0])
    assert check_artifact(tmp_path / "out") == []


def test_inputs_are_not_touched(inputs, tmp_path):
    recipe = tiny.write_recipe(inputs, ("a", "b"))
    before = files.listing(inputs)
    build(recipe, tmp_path / "out")
    assert files.listing(inputs) == before


def test_a_recipe_made_in_python_has_no_text(inputs, tmp_path):
    recipe = load_recipe(tiny.write_recipe(inputs, ("a", "b")))
    build_artifact(replace(recipe, text=""), tmp_path / "out", Progress(quiet=True))
    assert check_artifact(tmp_path / "out") == []


def test_progress_bars_are_as_before(inputs, tmp_path):
    shown = transformers_logging.is_progress_bar_enabled()
    build(tiny.write_recipe(inputs, ("a", "b"), data=False), tmp_path / "out")
    assert transformers_logging.is_progress_bar_enabled() == shown


@pytest.mark.parametrize("text_kind", ["bert", "vit"])
@pytest.mark.parametrize("router", ["linear", "mlp", "projection"])
def test_the_same_inputs_give_the_same_bytes(world, tmp_path, monkeypatch, text_kind, router):
    """Wherever the inputs and the artifact lie, whatever the working folder and the global random state are."""
    recipe = {"router": {"type": router, "epochs": 2}, "exclusive": {"rank": 4, "dtype": "bf16"}}
    found = []
    for number in (1, 2):
        home = tmp_path / f"home{number}"
        folder = files.copy_inputs(world.experts(text_kind), home / "in")
        torch.manual_seed(number)
        monkeypatch.chdir(home if number == 1 else folder)
        build(tiny.write_recipe(folder, ("a", "b"), **recipe), home / "deep" / f"out{number}")
        found.append(files.listing(home / "deep" / f"out{number}"))
    assert found[0] == found[1]


def test_another_seed_gives_another_router(world, inputs, tmp_path):
    for seed in (0, 1):
        build(tiny.write_recipe(inputs, ("a", "b"), seed=seed, router="mlp"), tmp_path / f"out{seed}")
    first, second = (files.tensors_of(tmp_path / f"out{seed}") for seed in (0, 1))
    key = "router.network.0.weight"
    assert not torch.equal(first[key], second[key])


def test_nothing_in_an_artifact_tells_where_it_was_built(inputs, tmp_path):
    build(tiny.write_recipe(inputs, ("a", "b")), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


# ---- all or nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["separate", "_assemble", "_save", "probe", "reach_verdict", "write_card"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_a_build_that_fails_anywhere_leaves_nothing(inputs, tmp_path, monkeypatch, step, error):
    def fail(*args, **kwargs):
        raise error

    recipe = tiny.write_recipe(inputs, ("a", "b"))
    before = files.listing(tmp_path)
    monkeypatch.setattr(builder, step, fail)
    with pytest.raises(error):
        build(recipe, tmp_path / "out")
    assert files.listing(tmp_path) == before


def test_a_failed_build_takes_the_folders_it_made_along(inputs, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "separate", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tiny.write_recipe(inputs, ("a", "b")), tmp_path / "new" / "deep" / "out")
    assert not (tmp_path / "new").exists()


def test_a_rule_that_does_not_fit_fails_the_build(inputs, tmp_path, monkeypatch):
    """The probe: were the deltas of biases applied wrongly, no artifact would appear."""
    real = MatrixForward._row_bias
    monkeypatch.setattr(MatrixForward, "_row_bias", lambda self, call: 1.05 * real(self, call))
    recipe = tiny.write_recipe(inputs, ("a", "b"))
    with pytest.raises(TwinMergingError, match="does not compute what it should"):
        build(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def start_build(recipe: Path, out: Path) -> subprocess.Popen:
    """The command itself; SIGINT acts even where the tests run in the background of a shell, which ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "twin_merging_hf.cli", "build", str(recipe), str(out), "--quiet"],
        env=files.environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_staging(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not any(folder.iterdir()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.001)


def test_an_interrupted_command_leaves_nothing_and_a_killed_one_can_be_repeated(world, tmp_path):
    recipe = tiny.write_recipe(files.copy_inputs(world.experts("bert"), tmp_path / "in"), ("a", "b"))
    folder = tmp_path / "artifacts"
    folder.mkdir()
    out = folder / "out"

    process = start_build(recipe, out)
    wait_for_staging(folder, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; nothing was written" in error and "Traceback" not in error
    assert list(folder.iterdir()) == []

    process = start_build(recipe, out)
    wait_for_staging(folder, process)
    process.kill()
    process.communicate(timeout=60)
    assert not out.exists() and all(path.name.startswith(".out.") for path in folder.iterdir())

    process = start_build(recipe, out)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert list(folder.iterdir()) == [out] and check_artifact(out) == []


def test_builds_stopped_at_many_moments_are_there_whole_or_not_at_all(world, tmp_path):
    recipe = tiny.write_recipe(files.copy_inputs(world.experts("bert"), tmp_path / "in"), ("a", "b"))
    folder = tmp_path / "artifacts"
    folder.mkdir()
    delays = [0, 0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6]
    moments = [f"{SIGNALS[i % 3]}:{delay}" for i, delay in enumerate(delays)]
    result = subprocess.run(
        [sys.executable, str(Path(interrupts.__file__)), str(recipe), str(folder), *moments],
        env=files.environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["moment"] for entry in found] == [*moments, "none"]
    for entry in found[:-1]:
        name, leftovers = entry["moment"].split(":")[0], set(entry["names"]) - {interrupts.OUT}
        finished = interrupts.OUT in entry["names"]
        assert finished or entry["code"] != 0, entry
        killed = name == "SIGKILL" and not finished  # leaves its staging folder and its finished parts
        assert 0 < len(leftovers) <= 2 if killed else not leftovers, entry
    assert sum(interrupts.OUT not in entry["names"] for entry in found[:-1]) >= 6
    assert found[-1] == {"moment": "none", "code": 0, "names": [interrupts.OUT]}
    build(recipe, tmp_path / "undisturbed")
    for artifact in [folder / interrupts.OUT, *tmp_path.glob("finished-*")]:
        assert check_artifact(artifact) == []
        assert files.listing(artifact) == files.listing(tmp_path / "undisturbed")


def test_a_second_build_of_one_output_at_the_same_time_spoils_nothing(world, inputs, tmp_path, monkeypatch):
    """Whoever is first has the folder; the other is told, and takes nothing away."""
    recipe, out, real = tiny.write_recipe(inputs, ("a", "b"), data=False), tmp_path / "out", builder.write_card

    def slow(*args, **kwargs):
        real(*args, **kwargs)
        shutil.copytree(world.artifact("bert"), out)

    world.artifact("bert")
    monkeypatch.setattr(builder, "write_card", slow)
    with pytest.raises(TwinMergingError, match="exists already"):
        build(recipe, out)
    assert files.listing(out) == files.listing(world.artifact("bert"))
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
