"""
The proof at the end of every build: a batch that mixes experts equals, row by row, a plain dense model.

The dense side is written without the delta code: it takes the artifact's tensors, adds each row's deltas to the shared
weights of a stock task model, and runs that.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from .artifact import exact_key, factor_keys
from .errors import TwinMergingError


TOLERANCE = 1e-4
_TOKENS = 12


def random_inputs(shared: PreTrainedModel, rows: int, seed: int, tokens: int = _TOKENS) -> dict[str, torch.Tensor]:
    """Random model inputs for a probe: token ids with padding on some rows, or pixels."""
    generator = torch.Generator().manual_seed(seed)
    config = shared.config
    if shared.main_input_name == "pixel_values":
        size = config.image_size
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
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}


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
    task_config.num_labels = len(config.experts[head]["labels"])
    model = find_shared_class(config.shared_class)[0](task_config).float().eval()
    state = {}
    for name, parameter in model.state_dict().items():
        module = next((m for m in config.head_modules if name.startswith(f"{m}.")), None)
        if module is not None:
            state[name] = tensors[f"shared.{module}.heads.{head}.{name.removeprefix(f'{module}.')}"].float()
        else:
            state[name] = tensors[f"shared.{name}"].float() + _dense_delta(
                config, tensors, weights, name, parameter.shape
            )
    model.load_state_dict(state)
    return model


def _dense_delta(config, tensors, weights, name, shape) -> torch.Tensor:
    if name in config.exact_deltas:
        return torch.tensordot(weights, tensors[exact_key(name)].float(), dims=1)
    if name not in config.ranks:
        return torch.zeros(())
    up, down = (tensors[key].float() for key in factor_keys(name))
    total = torch.zeros(up.shape[0], down.shape[1])
    start = 0
    for weight, rank in zip(weights, config.ranks[name], strict=True):
        total += weight * (up[:, start : start + rank] @ down[start : start + rank])
        start += rank
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
        model: a loaded classification artifact, float32.

    Returns:
        The largest absolute difference of `expert_logits`, relative to their spread where that exceeds 1.

    Raises:
        TwinMergingError: it exceeds `TOLERANCE`: the deltas do not act as they should in this architecture.
    """
    config: TwinMergingConfig = model.config  # type: ignore[assignment]
    tensors = dict(model.state_dict())
    weights = probe_weights(len(config.experts))
    inputs = random_inputs(model.shared, len(weights), seed)  # type: ignore[arg-type]
    try:
        outputs = model.eval()(**inputs, expert_weights=weights).expert_logits
    except (RuntimeError, ValueError, IndexError) as error:
        raise TwinMergingError(
            f"a batch that mixes experts does not run in {config.shared_class}: {str(error).splitlines()[0]}. One of its "
            "modules works across rows in a way that no rule covers; please report this architecture"
        ) from error
    differences = []
    for row, row_weights in enumerate(weights):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = _expected_row(model, config, tensors, row_weights, single)
        spread = max(1.0, float(expected.abs().max()))
        differences.append((outputs[row] - expected).abs().max() / spread)
    worst = float(torch.stack(differences).max())  # NaN where any is
    if not worst <= TOLERANCE:
        raise TwinMergingError(
            f"the finished artifact does not compute what it should: a batch that mixes experts differs by {worst:.1e} from "
            f"dense models (tolerance {TOLERANCE:.0e}). The rules for {config.shared_class}'s modules do not fit it; "
            "please report this architecture"
        )
    return worst


def _expected_row(model, config, tensors, weights, single) -> torch.Tensor:
    space = model.label_space
    prior = weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / len(weights))
    expected = torch.zeros(len(space.labels))
    for t in range(len(config.experts)):
        dense = dense_model(config, tensors, weights, t)
        own = dense(**single).logits[0].float()
        share = 1.0 if space.kind == "union" else float(prior[t])
        expected[space.columns(t)] += share * own
    return expected


def dense_delta(
    config: TwinMergingConfig, tensors: dict[str, torch.Tensor], weights: torch.Tensor, name: str, shape: torch.Size
) -> torch.Tensor:
    """What weights [expert] add to a parameter of the shared task model, float32; a zero where it has no delta."""
    return _dense_delta(config, tensors, weights, name, shape)
