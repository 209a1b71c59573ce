"""Specifications by model type, the built-in ones and users' own."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TwinMergingError
from .families import BUILT_IN
from .spec import Layout, Spec, work_out
from .verification import check_function


@dataclass(frozen=True)
class Family:
    """
    How models of one type are aligned.

    spec: (config, names of the model's tensors) -> the specification.
    example: a small model of the same type and settings as the given one, random weights, for verification.
    inputs: (model) -> a batch of model inputs for verification; default: random tokens or pixels.
    """

    spec: Callable[[Any, set[str]], Spec]
    example: Callable[[Any], Any]
    inputs: Callable[[Any], dict] | None = None


_FAMILIES: dict[str, Family] = {}


def register_spec(
    model_type: str,
    spec: Callable[[Any, set[str]], Spec],
    example: Callable[[], Any],
    inputs: Callable[[Any], dict] | None = None,
) -> None:
    """
    Make models of your own type alignable.

    Args:
        model_type: as in the model's config.
        spec: given config and names of all tensors of a model, its specification.
        example: makes a small task model of the type; the specification is verified on it now and before each alignment.
        inputs: makes a batch for a model; default: random `input_ids` or `pixel_values`, by its `main_input_name`.

    Raises:
        ValueError: the specification does not cover the example, or a random permutation that it allows changes the
            example's outputs.
    """
    family = Family(spec, lambda model: example(), inputs)
    check_function(*_example(family, None), inputs)
    _FAMILIES[model_type] = family


def family_of(model: Any) -> Family:
    """
    How a model is aligned.

    Raises:
        TwinMergingError: nobody has written down the symmetries of its type; or it has no head.
    """
    model_type = model.config.model_type
    if model_type in _FAMILIES:
        return _FAMILIES[model_type]
    if model_type not in BUILT_IN:
        known = ", ".join(sorted({*BUILT_IN, *_FAMILIES}))
        raise TwinMergingError(
            f"models of type {model_type!r} cannot be aligned: their symmetries are not known here (known: {known}); "
            "`twin_merging_hf.alignment.register_spec` adds a type"
        )
    prefix = model.base_model_prefix
    if not hasattr(model, prefix):
        raise TwinMergingError(f"{type(model).__name__} has no head; align task models, such as ...ForMaskedLM")
    spec, small = BUILT_IN[model_type]
    return Family(spec, lambda model: _shrunk(model, small))


def layout_of(model: Any) -> Layout:
    """The specification of a model, worked out. Raises as `family_of`, and `ValueError` where it does not fit."""
    family = family_of(model)
    return work_out(family.spec(model.config, set(model.state_dict())), model)


def verify_spec(model: Any) -> None:
    """
    Check the specification that a model would be aligned by: it covers every tensor of the model, and a random legal
    permutation of a small random model of the same class and settings leaves its outputs as they were, to 1e-5.

    Raises:
        TwinMergingError: as `family_of`.
        ValueError: the check fails; nothing should be aligned then.
    """
    family = family_of(model)
    layout_of(model)
    check_function(*_example(family, model), family.inputs)


def _example(family: Family, model: Any) -> tuple[Any, Layout]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = family.example(model)
    return small, work_out(family.spec(small.config, set(small.state_dict())), small)


def _shrunk(model: Any, small: Callable[[Any], dict]) -> Any:
    """A model of the same class with a smaller config: everything that changes which symmetries hold stays."""
    config = copy.deepcopy(model.config)
    for key, value in small(config).items():
        setattr(config, key, value)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, key, None)
        if hasattr(config, "vocab_size") and (
            token is None or not isinstance(token, int) or token >= config.vocab_size
        ):
            setattr(config, key, 1 if key == "pad_token_id" else None)
    config.dtype = None
    return type(model)(config)
