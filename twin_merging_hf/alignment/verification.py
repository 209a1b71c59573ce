"""Proof by example that a specification's permutations leave the function of a model unchanged."""

from collections.abc import Callable
from typing import Any

import torch

from .activations import evaluating, run
from .permutation import Permutation
from .spec import Layout


TOLERANCE = 1e-5
"""Relative to the largest output."""
_SEEDS = (0, 1)


def check_function(model: Any, layout: Layout, inputs: Callable[[Any], dict] | None = None) -> None:
    """
    Permute a small model at random, as the specification allows, and compare its outputs.

    Raises:
        ValueError: they differ by more than 1e-5 of the largest.
    """
    randomise(model, seed=0)
    model.double()
    batch = (inputs or random_inputs)(model)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    before = outputs(model, batch)
    for seed in _SEEDS:
        permutation = Permutation.random(layout, seed)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        permutation.apply(model)
        deviation = float((outputs(model, batch) - before).abs().max() / before.abs().max())
        model.load_state_dict(state)
        if not deviation <= TOLERANCE:
            raise ValueError(
                f"the permutation spec of {type(model).__name__} is wrong: a permutation that it allows changes the outputs "
                f"of a small random model by {deviation:.1e} of the largest (at most {TOLERANCE:.0e})"
            )


def outputs(model: Any, batch: dict) -> torch.Tensor:
    """The first output of a model, such as its logits."""
    with evaluating(model):
        found = run(model, batch)
    return found[0] if isinstance(found, tuple) else found.to_tuple()[0]


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Give every tensor random values, norms and biases too: an untrained model hides wrong rules behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and tensor.dim() > 0 and id(tensor) not in done:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            scale = tensor.shape[1:].numel() ** -0.5 if tensor.dim() > 1 else 0.2
            # Positive offsets keep variances positive, gains away from 0, and units behind a ReLU alive.
            if tensor.dim() > 1 or name.endswith("running_mean"):
                tensor.copy_(noise * scale)
            else:
                tensor.copy_((noise * scale).abs() + 0.5)
        done.add(id(tensor))


def random_inputs(model: Any, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, the last ones of some rows padding, or random pixels: what the model's main input is."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(rows, config.num_channels, height, width, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (rows, 9), generator=generator)
    mask = torch.ones(rows, 9, dtype=torch.long)
    for row in range(rows):
        mask[row, 9 - row % 4 :] = 0
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    return {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
