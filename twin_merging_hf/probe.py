"""
The proof at the end of every build: a batch that mixes experts equals, row by row, a plain dense model.

The dense side is written without the delta code: it takes the artifact's tensors, adds each row's deltas to the shared
weights of a stock task model, and runs that.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class
from twin_merging_hf.modeling.tags_twin_merging import OUTSIDE

from .artifact import exact_key, factor_keys, scale_key, sparse_keys
from .deferred import deferred, empty_model, put
from .errors import TwinMergingError


TOLERANCE = 1e-4
_TOKENS = 12
_PIXELS = 64


def random_inputs(shared: PreTrainedModel, rows: int, seed: int, tokens: int = _TOKENS) -> dict[str, torch.Tensor]:
    """Random model inputs for a probe: token ids with padding on some rows (a decoder's without), or pixels."""
    generator = torch.Generator().manual_seed(seed)
    config = shared.config
    if shared.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or _PIXELS  # convolutional models take any size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {
            "pixel_values": torch.randn(rows, getattr(config, "num_channels", 3), height, width, generator=generator)
        }
    longest = min(tokens, getattr(config, "max_position_embeddings", tokens) - 2)
    ids = torch.randint(0, config.vocab_size, (rows, longest), generator=generator)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    mask = torch.ones(rows, longest, dtype=torch.long)
    for row in range(1, rows, 2):
        mask[row, longest - 1 - row % 3 :] = 0
    inputs = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids.flip(0))
    return inputs


def dense_model(
    config: TwinMergingConfig, tensors: dict[str, torch.Tensor], weights: torch.Tensor, head: int
) -> PreTrainedModel:
    """
    A stock task model, float32, whose weights are `shared + sum_t weights[t] * delta_t`, with one expert's head.

    Args:
        tensors: the artifact's tensors by in-memory name.
        weights: [expert].
    """
    task_config = copy.deepcopy(config.shared_config)
    if config.head_modules:
        task_config.num_labels = len(config.experts[head]["labels"])
    model: Any = empty_model(lambda: find_shared_class(config.shared_class)[0](task_config))
    state = {}
    for name, parameter in model.state_dict().items():
        if name in model.all_tied_weights_keys:  # comes with the one that it is tied to
            continue
        module = next((m for m in config.head_modules if name.startswith(f"{m}.")), None)
        if module is not None:
            state[name] = tensors[f"shared.{module}.heads.{head}.{name.removeprefix(f'{module}.')}"].float()
        elif not parameter.is_floating_point():
            state[name] = tensors[f"shared.{name}"]
        else:
            state[name] = deferred(
                parameter.shape, partial(_dense_tensor, config, tensors, weights, name, parameter.shape)
            )
    put(model, state)
    return model


def _dense_tensor(
    config: TwinMergingConfig, tensors: dict[str, torch.Tensor], weights: torch.Tensor, name: str, shape: torch.Size
) -> torch.Tensor:
    return dense_delta(config, tensors, weights, name, shape) + tensors[f"shared.{name}"]


def dense_delta(
    config: TwinMergingConfig, tensors: dict[str, torch.Tensor], weights: torch.Tensor, name: str, shape: torch.Size
) -> torch.Tensor:
    """What weights [expert] add to a parameter of the shared task model, float32; a zero where it has no delta."""
    if name in config.exact_deltas:
        return torch.tensordot(weights, tensors[exact_key(name)].float(), dims=1)
    if name in config.sparse_deltas:
        values, indices = (tensors[key] for key in sparse_keys(name))
        return _dense_sparse(config.sparse_deltas[name], values, indices, weights, shape)
    if name not in config.ranks:
        return torch.zeros(())
    m, n = (shape[1], shape[2]) if len(shape) == 3 else (shape[0], shape[1:].numel())
    up, down = (tensors[key] for key in factor_keys(name))
    if config.factor_dtype == "int4":
        up, down = _nibbles(up.T, m).T, _nibbles(down, n)
    up, down = up.float(), down.float()
    if config.factor_dtype in ("int8", "int4"):
        levels = 128.0 if config.factor_dtype == "int8" else 8.0
        up, down = up / levels * tensors[scale_key(name)].float(), down / levels
    total = torch.zeros(m, n)
    start = 0
    for weight, rank in zip(weights, config.ranks[name], strict=True):
        if weight != 0:
            total.addmm_(up[:, start : start + rank], down[start : start + rank], alpha=float(weight))
        start += rank
    return total.reshape(shape)


def _nibbles(packed: torch.Tensor, length: int) -> torch.Tensor:
    """Two values in -8..7 from each byte of a row, the low half first."""
    values = torch.zeros(packed.shape[0], 2 * packed.shape[1])
    values[:, 0::2] = (packed % 16).float() - 8
    values[:, 1::2] = (packed // 16).float() - 8
    return values[:, :length]


def _dense_sparse(counts, values, indices, weights, shape) -> torch.Tensor:
    total = torch.zeros(shape.numel())
    start = 0
    for weight, count in zip(weights, counts, strict=True):
        for_this = slice(start, start + count)
        total[indices[for_this].long()] += weight * values[for_this].float()
        start += count
    return total.reshape(shape)


def probe_weights(experts: int) -> torch.Tensor:
    """Weights of a probe batch [experts + 3, experts]: each expert alone, none, an even mix, an uneven mix."""
    uneven = torch.arange(1, experts + 1, dtype=torch.float32)
    return torch.cat(
        [
            torch.eye(experts),
            torch.zeros(1, experts),
            torch.full((1, experts), 1 / experts),
            (uneven / uneven.sum())[None],
        ]
    )


@torch.no_grad()
def probe(model: nn.Module, seed: int = 0) -> float:
    """
    Run a mixed batch of random inputs and compare each row with its dense model.

    Args:
        model: a loaded artifact, float32.

    Returns:
        The largest absolute difference of `expert_logits` (of a language model's `logits`), relative to their spread where
        that exceeds 1.

    Raises:
        TwinMergingError: it exceeds `TOLERANCE`: the deltas do not act as they should in this architecture.
    """
    config: TwinMergingConfig = model.config  # type: ignore[assignment]
    tensors = dict(model.state_dict())
    weights = probe_weights(len(config.experts))
    inputs = random_inputs(model.shared, len(weights), seed)  # type: ignore[arg-type]
    try:
        output = model.eval()(**inputs, expert_weights=weights)
        outputs = output.logits if model.label_space.kind == "language" else output.expert_logits  # type: ignore[union-attr]
    except (RuntimeError, ValueError, IndexError) as error:
        raise TwinMergingError(
            f"a batch that mixes experts does not run in {config.shared_class}: {str(error).splitlines()[0]}. One of its "
            "modules works across rows in a way that no rule covers; please report this architecture"
        ) from error
    differences = []
    for row, row_weights in enumerate(weights):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        expected, actual = _expected_row(model, config, tensors, row_weights, single), outputs[row]
        # [token, label]: what stands at padding is nobody's answer; a decoder's tokens have none
        if actual.dim() == 2 and "decoder_input_ids" not in single:
            valid = single["attention_mask"][0] > 0
            expected, actual = expected[valid], actual[valid]
        spread = max(1.0, float(expected.abs().max()))
        differences.append((actual - expected).abs().max() / spread)
    worst = float(torch.stack(differences).max())  # NaN where any is
    if not worst <= TOLERANCE:
        raise TwinMergingError(
            f"the finished artifact does not compute what it should: a batch that mixes experts differs by {worst:.1e} from "
            f"dense models (tolerance {TOLERANCE:.0e}). The rules for {config.shared_class}'s modules do not fit it; "
            "please report this architecture"
        )
    return worst


def _expected_row(model, config, tensors, weights, single) -> torch.Tensor:
    if model.label_space.kind == "language":
        return dense_model(config, tensors, weights, 0)(**single).logits[0].float()
    space = model.label_space
    """Raw outputs [label] or [token, label] of one row; in columns that several experts own, their mean by weight."""
    prior = weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / len(weights))
    columns = [space.columns(t) for t in range(len(config.experts))]
    expected: torch.Tensor | float = 0.0
    for t in range(len(config.experts)):
        dense = dense_model(config, tensors, weights, t)
        own = dense(**single).logits[0].float()
        share = torch.where(_shared_columns(space)[columns[t]], prior[t], torch.ones(()))
        placed = torch.zeros(*own.shape[:-1], len(space.labels))
        placed[..., columns[t]] = share * own
        expected = expected + placed
    return expected  # type: ignore[return-value]


def _shared_columns(space: Any) -> torch.Tensor:
    """[label]: whether a column is every expert's (`same`, `value`), or that of the `O` which taggers share."""
    every = space.kind in ("same", "value")
    return torch.tensor([every or (space.kind == "tags" and label == OUTSIDE) for label in space.labels])
