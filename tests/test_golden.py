"""Artifacts of every released format load and answer as they did on the day they were made (tests/golden/make.py)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import load
from tests.golden.make import FOLDER, KINDS, outputs_of
from twin_merging_hf.artifact import check_artifact, inspect_artifact
from twin_merging_hf.modeling.configuration_twin_merging import FORMAT_VERSION


ARTIFACTS = sorted(path for path in FOLDER.glob("format*/*") if path.is_dir())


def test_there_are_golden_artifacts_of_every_format_and_kind():
    found = {(path.parent.name, path.name) for path in ARTIFACTS}
    assert {(f"format{FORMAT_VERSION}", kind) for kind in KINDS} <= found
    assert {name for name, _ in found} == {f"format{number}" for number in range(1, FORMAT_VERSION + 1)}


@pytest.mark.parametrize("folder", ARTIFACTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_artifact_answers_as_it_did(folder):
    tensors = load_file(folder / "golden.safetensors")
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
    found = outputs_of(load(folder), inputs)
    assert set(found) == {name.removeprefix("output.") for name in tensors if name.startswith("output.")}
    for name, value in found.items():
        torch.testing.assert_close(
            value, tensors[f"output.{name}"], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not torch.equal(found["a"], found["b"]), "experts that answer alike prove nothing"


@pytest.mark.parametrize("folder", ARTIFACTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_golden_artifact_is_small_known_and_whole_but_for_its_code(folder: Path):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 200_000
    version = json.loads((folder / "config.json").read_text(encoding="utf-8"))["format_version"]
    assert f"format{version}" == folder.parent.name
    assert [each["name"] for each in inspect_artifact(folder).experts] == ["a", "b"]
    left_out = [problem for problem in check_artifact(folder) if ".py" not in problem and "png" not in problem]
    assert left_out == []
