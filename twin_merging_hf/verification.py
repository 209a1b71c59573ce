"""Is an artifact still what its sources would give? Compares recorded fingerprints with the sources of today."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from .artifact import LAYOUT, read_config
from .checkpoints import local_folder, resolve, settings_fingerprint, weights_fingerprint
from .errors import TwinMergingError


@dataclass(frozen=True)
class SourceState:
    """
    One source of an artifact today.

    name: `base`, `shared`, an expert's name, or the recipe's file. model: where it came from, as the recipe says.
    changed: what differs from the build (`weights`, `config`, `recipe`); empty if all is the same. unknown: why nothing
    could be compared, such as a folder that is gone.
    """

    name: str
    model: str
    changed: tuple[str, ...] = ()
    unknown: str | None = None

    @property
    def is_same(self) -> bool:
        return not self.changed and self.unknown is None


def verify_artifact(artifact: str | Path, sources_in: str | Path = ".") -> list[SourceState]:
    """
    Compare every source of an artifact with the fingerprints that its build recorded.

    Args:
        sources_in: what relative paths of the recipe are relative to: the folder where the recipe lay.

    Raises:
        TwinMergingError: the folder is no artifact, or it records no sources.
    """
    folder = Path(artifact)
    provenance = read_config(folder).provenance
    sources = provenance.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise TwinMergingError(
            f"{folder / LAYOUT.config}: `provenance.sources` is missing, so there is nothing to verify"
        )
    states = [_recipe_state(folder, provenance.get("recipe_sha256"))]
    return states + [_state(str(name), recorded, Path(sources_in)) for name, recorded in sources.items()]


def describe_state(state: SourceState) -> str:
    """One line for people."""
    if state.unknown is not None:
        return f"{state.name}: cannot be compared: {state.unknown}"
    if state.changed:
        return f"{state.name}: changed since the build: {', '.join(state.changed)} ({state.model})"
    return f"{state.name}: as at the build ({state.model})"


def _recipe_state(folder: Path, recorded: object) -> SourceState:
    path = folder / LAYOUT.recipe
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return SourceState(LAYOUT.recipe, str(path), unknown=f"{path}: {error.strerror}")
    return SourceState(LAYOUT.recipe, str(path), changed=() if found == recorded else ("recipe",))


def _state(name: str, recorded: object, sources_in: Path) -> SourceState:
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(key), str) for key in ("model", "sha256")):
        return SourceState(name, "?", unknown="the artifact records no `model` and `sha256` of it")
    model = recorded["model"]
    # What was a folder at the build is not looked for on the Hub, where anybody may have a model of that name.
    where = local_folder(model, sources_in)
    if recorded.get("from_hub") is False and not os.path.isdir(where):
        return SourceState(
            name, model, unknown=f"folder {where} is not there; `--from FOLDER` says where the recipe lay"
        )
    try:
        path = resolve(model, sources_in, f"source {name!r}")
        found = {"weights": weights_fingerprint(path, f"source {name!r}"), "config": settings_fingerprint(path)}
    except TwinMergingError as error:
        return SourceState(name, model, unknown=str(error))
    # Artifacts of earlier builds have no fingerprint of the config.
    expected = {"weights": recorded["sha256"], "config": recorded.get("config_sha256", found["config"])}
    return SourceState(name, model, changed=tuple(what for what in found if found[what] != expected[what]))
