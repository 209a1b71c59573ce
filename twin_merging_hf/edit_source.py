"""A finished artifact, opened to be edited: its tensors as stacks, its report, and its shared model as a checkpoint."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twin_merging_hf import modeling
from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from .artifact import LAYOUT, read_config
from .checkpoints import Checkpoint
from .deferred import put
from .errors import TwinMergingError
from .preflight import input_kind
from .progress import no_loading_bars
from .stacking import Stack


class BuiltBackbone(Checkpoint):
    """An artifact's shared model seen as a checkpoint, so that a new expert is compared with it like with another."""

    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path, config: TwinMergingConfig, state: dict[str, torch.Tensor]) -> "BuiltBackbone":
        task_class = find_shared_class(config.shared_class)[0]
        task_config = copy.deepcopy(config.shared_config)
        with torch.device("meta"):
            skeleton = task_class(task_config)
        heads = tuple(f"shared.{module}." for module in config.head_modules)
        names = [
            key.removeprefix("shared.") for key in state if key.startswith("shared.") and not key.startswith(heads)
        ]
        built = cls(
            role=f"the artifact {folder}",
            source=str(folder),
            path=folder,
            config=task_config,
            task_class=task_class,
            skeleton=skeleton,
            places={name: (folder, name) for name in names},
            missing=[],
            extra=[],
            ignored=[],
        )
        built.state = state
        return built

    def stored(self, name: str) -> torch.Tensor:
        return self.state[f"shared.{name}"]

    def shape(self, name: str) -> torch.Size:
        return self.tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensor(name).dtype


@dataclass(frozen=True)
class Source:
    """An opened artifact; nothing here is changed by an edit."""

    folder: Path
    config: TwinMergingConfig
    report: dict
    model: Any
    stack: Stack
    built: BuiltBackbone

    @property
    def kind(self) -> str:
        """`text`, `image` or `tokens`."""
        return input_kind(self.built)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the artifact's weights (the router is always float32)."""
        return next(p.dtype for p in self.model.shared.parameters() if p.is_floating_point())

    @property
    def built_from(self) -> list[str]:
        """The experts that the shared model was made of."""
        return list(self.config.provenance.get("shared_experts") or self.stack.names)

    def position(self, name: str) -> int:
        """Index of an expert. Raises `TwinMergingError` if there is none of that name."""
        if name not in self.stack.names:
            raise TwinMergingError(f"the artifact has no expert {name!r}; it has {', '.join(self.stack.names)}")
        return self.stack.names.index(name)


def open_source(folder: Path) -> Source:
    """Read an artifact. Raises `TwinMergingError` if the folder is none, or it is damaged."""
    config = read_config(folder)
    report = _read_report(folder)
    model = _load(folder, config)
    tied = set(model.all_tied_weights_keys)
    state = {
        key: value for key, value in model.state_dict().items() if not key.startswith("router.") and key not in tied
    }
    stack = Stack(
        config.experts,
        config.head_modules,
        config.ranks,
        config.exact_deltas,
        state,
        report.get("tensors", {}),
        config.sparse_deltas,
    )
    return Source(folder, config, report, model, stack, BuiltBackbone.of(folder, config, state))


def _read_report(folder: Path) -> dict:
    path = folder / LAYOUT.report
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TwinMergingError(
            f"{path} cannot be read ({error}); `twin-merging check` tells what else is wrong"
        ) from error
    if not isinstance(report, dict):
        raise TwinMergingError(f"{path} is no report of a build")
    return report


def _load(folder: Path, config: TwinMergingConfig) -> Any:
    auto_class = find_shared_class(config.shared_class)[1]
    model_class = getattr(modeling, AUTO_MAP[auto_class].split(".")[-1])
    try:
        with no_loading_bars():
            return model_class.from_pretrained(folder, dtype="auto").eval()
    except (ValueError, OSError, RuntimeError) as error:
        raise TwinMergingError(f"{folder} cannot be loaded: {error}") from error


@torch.no_grad()
def assemble(source: Source, stack: Stack, config: TwinMergingConfig) -> Any:
    """A model of the new config with the stack's tensors as they are, type included; its router is still to be filled."""
    model = type(source.model)(config)
    missing = [name for name in put(model, stack.state) if not name.startswith("router.")]
    if missing:
        raise RuntimeError(f"editing: missing {missing[:3]}")
    if model.can_generate():
        model.generation_config = source.model.generation_config
    return model.eval()
