"""The artifact that is exported: its model, and the tokenizer or processor files that go along."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twin_merging_hf import modeling
from twin_merging_hf.artifact import LAYOUT, read_config, staged
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class
from twin_merging_hf.progress import no_loading_bars


_NOT_PROCESSING = (LAYOUT.recipe, LAYOUT.report, LAYOUT.card, LAYOUT.confusion, LAYOUT.rows)


@dataclass(frozen=True)
class Source:
    """An opened artifact; nothing here is changed by an export."""

    folder: Path
    model: Any

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def auto_class(self) -> str:
        """Name of the Auto class that serves the artifact."""
        return find_shared_class(self.config.shared_class)[1]

    def copy_processing(self, target: Path) -> None:
        """Copy tokenizer or processor files."""
        for name in self.config.provenance.get("companions", []):
            if name not in _NOT_PROCESSING and (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)


def open_source(folder: Path) -> Source:
    """Load an artifact in the types in which it is stored. Raises `TwinMergingError` if it is none, or damaged."""
    config = read_config(folder)
    model_class = getattr(modeling, AUTO_MAP[find_shared_class(config.shared_class)[1]].split(".")[-1])
    try:
        with no_loading_bars():
            return Source(folder, model_class.from_pretrained(folder, dtype="auto").eval())
    except (ValueError, OSError, RuntimeError) as error:
        raise TwinMergingError(f"{folder} cannot be loaded: {error}") from error


@contextmanager
def output(out: Path) -> Iterator[Path]:
    """A folder that appears as `out` when all is written. Raises `TwinMergingError` for what a user can fix, `out` existing."""
    with staged(out, artifact=False) as folder, no_loading_bars():
        try:
            with torch.no_grad():
                yield folder
        except TwinMergingError:
            raise
        except ValueError as error:  # the model's own words about names, heads and what it cannot carry
            raise TwinMergingError(str(error)) from error
