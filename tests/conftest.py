"""Fixtures of all tests: no network, one thread, and tiny artifacts that are built once."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from twin_merging_hf import modeling
from twin_merging_hf.builder import Progress, build_artifact


# Tiny matrices gain nothing from threads, and lose much where several tests share two cores.
torch.set_num_threads(1)


class World:
    """Tiny experts and artifacts on disk, each made once; tests must not change the files."""

    def __init__(self, root: Path):
        self.root = root
        self._experts: dict[str, Path] = {}
        self._built: dict[str, Path] = {}

    def experts(self, kind: str, labels: Mapping[str, Sequence[str]] | None = None) -> Path:
        """Folder of base and experts of a kind: `tiny.LABELS`, or others by name (one label: a regression)."""
        key = f"{kind}-{json.dumps(labels)}"
        if key not in self._experts:
            folder = self.root / (kind if labels is None else f"{kind}{len(self._experts)}")
            self._experts[key] = tiny.make_experts(kind, folder, labels)
        return self._experts[key]

    def artifact(self, kind: str, labels: Mapping[str, Sequence[str]] | None = None, **overrides: Any) -> Path:
        """
        Folder of an artifact: full rank in fp32, router `linear`, unless the recipe's keys say otherwise.

        Args:
            labels: other experts than `tiny.LABELS`, as in `experts`.
            overrides: as in `tiny.write_recipe`.
        """
        key = f"{kind}-{json.dumps(labels)}-{json.dumps(overrides, sort_keys=True)}"
        if key not in self._built:
            folder = self.experts(kind, labels)
            name = f"artifact{len(self._built)}"
            overrides = {"exclusive": {"rank": tiny.FULL_RANK}, **overrides}
            recipe = tiny.write_recipe(folder, list(labels or tiny.LABELS), file=f"{name}.yaml", **overrides)
            self._built[key] = build_artifact(recipe, folder / name, Progress(quiet=True)).folder
        return self._built[key]

    def model(self, kind: str, labels: Mapping[str, Sequence[str]] | None = None, **overrides: Any) -> Any:
        """A fresh classification model of an artifact, in eval mode, for a test to use as it likes."""
        return load(self.artifact(kind, labels, **overrides))


def load(folder: Path, **kwargs: Any) -> Any:
    """Load an artifact by its own classification class."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(modeling, content["architectures"][0]).from_pretrained(folder, **kwargs).eval()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test draws the same numbers alone as among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session", params=tiny.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def artifact(world: World, kind: str) -> Path:
    """Full-rank fp32 artifact of a kind."""
    return world.artifact(kind)


@pytest.fixture(scope="session")
def models(world: World) -> Callable[[str], Any]:
    """The full-rank fp32 model by kind. Shared by tests: read only; `world.model(kind)` gives one to change."""
    return functools.cache(world.model)


@pytest.fixture
def model(models: Callable[[str], Any], kind: str) -> Any:
    """The full-rank fp32 model of each kind: read only."""
    return models(kind)


@pytest.fixture
def bert(models: Callable[[str], Any]) -> Any:
    """The full-rank fp32 BERT model: read only."""
    return models("bert")
