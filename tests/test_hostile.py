"""Input from anywhere: thousands of mutations, and the planted attacks that matter most."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import files, hostile, tiny
from twin_merging_hf import TwinMergingConfig, TwinMergingError, checkpoints
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.checkpoints import open_checkpoint, resolve
from twin_merging_hf.data import read_rows
from twin_merging_hf.recipe import load_recipe, parse_recipe
from twin_merging_hf.safe_yaml import parse_yaml


QUICK, LONG = 300, 10_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return hostile.make_inputs(tmp_path_factory.mktemp("hostile").resolve() / "in")


@pytest.fixture
def copy(world, tmp_path) -> Path:
    return Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))


# ---- mutations --------------------------------------------------------------------------------------------------


def test_mutated_inputs_end_cleanly(sound):
    figures = hostile.attack(sound, QUICK, seed=0)
    assert figures.failures == [] and figures.inputs == QUICK
    assert set(figures.by_target) == set(hostile.TARGETS) and figures.ends["our error"] > QUICK / 4


@pytest.mark.slow
def test_ten_thousand_mutated_inputs_end_cleanly(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(LONG), "1"],
        cwd=files.ROOT, env=files.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1])["inputs"] == LONG


GUARDS = {
    "another error": (lambda folder: 1 / 0, "ZeroDivisionError"),
    "a hang": (lambda folder: [None for _ in iter(int, 1)], "longer than"),
    "code that runs": (lambda folder: os.system("true"), "os.system"),
    "a file elsewhere": (lambda folder: (folder.parent / "elsewhere").write_text("x"), "open for writing"),
}


@pytest.mark.parametrize("case", GUARDS)
def test_the_guards_can_fail(sound, monkeypatch, case):
    read, expected = GUARDS[case]
    monkeypatch.setattr(hostile, "SECONDS", 0.2)
    monkeypatch.setattr(hostile.TARGETS["recipe"], "read", read)
    figures = hostile.Figures()
    hostile._attack_one(sound, "recipe", "0:0", figures)
    assert expected in figures.failures[0]


FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["experts", "base_model", "exclusive", "router", "parameters", "include", "seed", "dtype", "alignment"]
)


@FUZZ
@given(st.dictionaries(KEYS, VALUES) | VALUES)
def test_any_content_of_a_recipe(content):
    try:
        parse_recipe(content)
    except TwinMergingError as error:
        assert str(error)


@FUZZ
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(content)
    for read in (
        load_recipe,
        lambda p: read_rows(p, "text", ["x"], False),
        lambda p: read_rows(p, "tokens", ["x"], False),
    ):
        with pytest.raises(TwinMergingError, match="file"):
            read(path)


# ---- YAML -------------------------------------------------------------------------------------------------------

BOMB = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
HOSTILE_YAML = {
    "deep brackets": ("[" * 100_000, "nested deeper"),
    "deep blocks": ("- " * 5000 + "x", "recursion"),
    "an alias bomb": ("a0: &a0 [x]\n" + BOMB, "aliases stand for"),
    "a list that holds itself": ("a: &a [*a]", "aliases stand for|recursive"),
    "a tag that runs code": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a key twice": ("a: 1\na: 2", "given twice"),
    "too long": ("#" * (1 << 20) + "#", "characters"),
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_yaml_is_refused_quickly(case):
    text, expected = HOSTILE_YAML[case]
    with hostile.limited_time(), pytest.raises(ValueError, match=expected):
        parse_yaml(text)


def test_aliases_of_honest_files_are_fine():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: [*a, *a]") == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}] * 2}


# ---- code that must not run -------------------------------------------------------------------------------------


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_a_planted_pickle_does_not_run(copy, tmp_path):
    marker = tmp_path / "ran"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(OSError, match="safetensors"):
        transformers.AutoModelForSequenceClassification.from_pretrained(copy)
    assert check_artifact(copy) and not marker.exists()


def test_a_planted_pickle_of_an_expert_does_not_run(world, tmp_path):
    marker, folder = tmp_path / "ran", files.copy_inputs(world.experts("bert"), tmp_path / "in", ("a",))
    (folder / "a" / "model.safetensors").unlink()
    (folder / "a" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(TwinMergingError, match="pickles can run code"):
        open_checkpoint("a", folder, "expert 'a'")
    assert not marker.exists()


def test_code_of_a_checkpoint_does_not_run_without_being_asked_for(world, tmp_path):
    marker, folder = tmp_path / "ran", files.copy_inputs(world.experts("bert"), tmp_path / "in", ("a",))
    (folder / "a" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: ...\n")
    auto_map = {
        "AutoConfig": "evil.C",
        "AutoModelForSequenceClassification": "evil.C",
        "AutoTokenizer": ["evil.C", "evil.C"],
    }
    files.edit_json(folder / "a" / "config.json", auto_map=auto_map, model_type="unknown")
    with pytest.raises(TwinMergingError, match=r"config\.json"):
        open_checkpoint("a", folder, "expert 'a'")
    assert not marker.exists()


def test_an_adapter_beside_an_artifact_is_a_problem(copy):
    (copy / "adapter_config.json").write_text("{}")
    assert any("inject an adapter" in problem for problem in check_artifact(copy))


# ---- sizes ------------------------------------------------------------------------------------------------------

SIZES = {
    "layers": {"num_hidden_layers": 10**6},
    "vocabulary": {"vocab_size": 10**12},
    "width": {"intermediate_size": 2**30},
    "nesting": {"x": hostile._deep(80)},
}


@pytest.mark.parametrize("case", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_allocated(copy, case):
    content = files.read_json(copy / "config.json")
    files.edit_json(copy / "config.json", shared_config={**content["shared_config"], **SIZES[case]})
    memory = hostile._peak()
    with hostile.limited_time():
        assert check_artifact(copy)
        with pytest.raises(ValueError):
            transformers.AutoModelForSequenceClassification.from_pretrained(copy)
    assert hostile._peak() - memory < hostile.MEGABYTES


def test_ranks_that_the_weights_cannot_hold_are_refused_before_anything_is_allocated(copy):
    content = files.read_json(copy / "config.json")
    files.edit_json(copy / "config.json", ranks={name: [1 << 20] * 3 for name in content["ranks"]})
    memory = hostile._peak()
    with pytest.raises(ValueError, match="they do not belong together"):
        transformers.AutoModelForSequenceClassification.from_pretrained(copy)
    assert hostile._peak() - memory < hostile.MEGABYTES


def test_too_many_experts_are_refused(bert):
    expert = {"name": "a", "labels": ["x", "y"], "problem_type": "single_label_classification"}
    with pytest.raises(ValueError, match="more than 1024"):
        TwinMergingConfig(experts=[expert] * 5000)


# ---- paths and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["~nobody_of_that_name/x", "a\0b", "x" * 5000, "../" * 50 + "etc/passwd", "/etc/passwd"]
)
def test_sources_that_are_no_folders(tmp_path, source):
    with pytest.raises(TwinMergingError, match="expert 'a'"):
        resolve(source, tmp_path, "expert 'a'")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_an_index_cannot_point_elsewhere(world, tmp_path, shard):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in", ("a",))
    (folder / "a" / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(TwinMergingError, match="not a file beside it"):
        open_checkpoint("a", folder, "expert 'a'")
    artifact = Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))
    (artifact / "model.safetensors").rename(tmp_path / "model.safetensors")
    (artifact / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    assert "files beside it" in check_artifact(artifact)[0]


def test_companions_are_not_copied_from_or_to_elsewhere(copy, tmp_path):
    (tmp_path / "secret").write_text("x")
    content = files.read_json(copy / "config.json")
    content["provenance"]["companions"] += ["../secret", "/etc/passwd"]
    (copy / "config.json").write_text(json.dumps(content))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(copy)
    model.save_pretrained(tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "secret").exists() and not (tmp_path / "deep" / "out" / "passwd").exists()


def test_tokens_do_not_reach_messages(tmp_path, monkeypatch):
    secret = "hf_secret_of_this_test"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr(checkpoints, "snapshot_download", _refuse)
    with pytest.raises(TwinMergingError) as caught:
        resolve("org/model", tmp_path, "expert 'a'")
    assert secret not in str(caught.value)


def _refuse(*args, **kwargs):
    raise OSError(f"401 for https://huggingface.co/org/model with Bearer {os.environ['HF_TOKEN']}")


@pytest.mark.parametrize("names", [("a", "A"), ("a", "ａ")])
def test_names_that_differ_by_case_only_are_refused(tmp_path, names):
    recipe = tiny.write_recipe(tmp_path, names, data=False)
    with pytest.raises(TwinMergingError, match="ignoring case|not legal"):
        load_recipe(recipe)
