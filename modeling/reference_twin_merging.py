"""
A shared model that is the base model itself, by reference: the artifact names it, and loading fetches and checks it.

Five LoRA experts of one base then need no second copy of the base. What is stored is where the base is, the commit if it is
on the Hub, and the SHA-256 of its weight files; a base with other weights is refused.
"""

import copy
import hashlib
import json
import os
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.utils import cached_file, logging

from .shared_twin_merging import find_shared_class


_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only")
"""Arguments of `from_pretrained` that say how files are fetched; they hold for artifact and base alike."""


def weight_files(folder: str, options: dict) -> list:
    """
    Paths of a model's safetensors files, sorted by name, from a folder or the Hub. As in Transformers, an index counts where
    there is no whole file.

    Raises:
        ValueError: there are none.
    """
    whole = _fetch(folder, _WEIGHTS, options)
    index = None if whole else _fetch(folder, _INDEX, options)
    if index is None:
        names, files = [_WEIGHTS], [whole]
    else:
        with open(index, encoding="utf-8") as stream:
            names = sorted(set(json.load(stream)["weight_map"].values()))
        files = [_fetch(folder, name, options) for name in names]
    if None in files:
        raise ValueError(f"{folder} has no {names[files.index(None)]}")
    return files


def _fetch(folder: str, name: str, options: dict) -> str | None:
    return cached_file(
        folder,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )


def fingerprint(files: list) -> str:
    """SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def is_referenced(name: str, config: Any) -> bool:
    """Whether a tensor of the wrapper's state dict is the base's, and so not stored in the artifact."""
    if not config.shared_reference or not name.startswith("shared."):
        return False
    return not name.startswith(tuple(f"shared.{module}." for module in config.head_modules))


def base_state(config: Any, source: str | None, hub: dict, dtype: Any = "auto") -> dict:
    """
    The referenced base's tensors, by their names in the wrapper's state dict.

    Args:
        source: a folder or Hub id to take it from instead of the recorded one; its weights must be the same.
        hub: how files are fetched, by `HUB_OPTIONS`.

    Raises:
        ValueError: the base is not to be had, or its weights are not those that the artifact was built on.
    """
    reference = config.shared_reference
    model = source or reference["model"]
    options = dict(hub)
    if source is None and reference.get("revision"):
        options["revision"] = reference["revision"]
    remedy = (
        "give the folder or Hub id where it is by `from_pretrained(..., shared_model=...)`, or for good (and for commands) as "
        "`model` of `shared_reference` in the artifact's config.json"
    )
    try:
        files = weight_files(model, options)
    except (OSError, ValueError) as error:
        gone = os.path.isabs(model) and not os.path.isdir(model)
        why = "no such folder" if gone else error  # the Hub's complaint about a path as an id tells nothing
        raise ValueError(
            f"this artifact keeps its shared model by reference, and the base {model!r} is not to be had ({why}); {remedy}"
        ) from error
    found = fingerprint(files)
    if found != reference["sha256"]:
        raise ValueError(
            f"the base {model!r} is not the one that the artifact was built on: its weights have SHA-256 {found[:12]}..., "
            f"expected {reference['sha256'][:12]}...; {remedy}"
        )
    shared_class = find_shared_class(config.shared_class)[0]
    shared_config = copy.deepcopy(config.shared_config)
    with _quiet():
        # The head of this model is thrown away: the base's may have another size, or be missing.
        base = shared_class.from_pretrained(
            os.path.dirname(files[0]),
            config=shared_config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    state = {f"shared.{name}": value for name, value in base.state_dict().items()}
    return {name: value for name, value in state.items() if is_referenced(name, config)}


@contextmanager
def _quiet():
    """Leave out Transformers' report on the head that is thrown away."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def own_state(folder: str, options: dict) -> dict:
    """The tensors that an artifact stores itself, read lazily from its files."""
    state = {}
    for file in weight_files(folder, options):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                state[key] = handle.get_tensor(key)
    return state


def generation_settings(folder: str, options: dict) -> GenerationConfig | None:
    """An artifact's generation_config.json, if it has one."""
    if _fetch(folder, "generation_config.json", options) is None:
        return None
    return GenerationConfig.from_pretrained(folder, **options)


def refuse_changed(state: dict, expected: dict) -> None:
    """
    Raise ValueError where shared tensors are no longer the base's: saved by reference, the change would be lost.

    Args:
        state: tensors of the model. expected: those of the base, in any float type.
    """
    for name, value in expected.items():
        mine = state[name]
        if mine.device.type == "meta":
            raise ValueError(f"{name!r} is offloaded, so it cannot be compared with the base; load without offloading")
        if mine.shape != value.shape or not torch.equal(mine.cpu(), value.to(mine.dtype)):
            raise ValueError(
                f"{name!r} differs from the base that this artifact refers to (was the shared model trained?), and saving by "
                "reference would lose that; set `model.config.shared_reference = None` to save the shared model as well"
            )
