"""Padding on the left, made to change nothing: rows are computed as if padded on the right and given back in order."""

import torch


TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
# Labels of tokens move with them; those of whole rows are no model inputs.
_MOVED = (*TOKEN_INPUTS, "labels")


def align_left(inputs: dict) -> tuple[dict, torch.Tensor | None]:
    """
    Move each row's padding behind its tokens, so that padding on the left changes nothing: stock encoders would count
    it as positions and pool it in place of the first token.

    Returns:
        The inputs, and by how much each row moved [batch] (None: not at all).
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or "pixel_values" in inputs:
        return inputs, None
    moved = (mask > 0).to(torch.int64).argmax(dim=1)
    if not torch.compiler.is_compiling() and not bool(moved.any()):
        return inputs, None
    aligned = {name: inputs[name] for name in inputs}
    for name in _MOVED:
        value = inputs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == mask.shape[1]:
            # Positions may be given once for all rows, which now move apart.
            aligned[name] = _roll_rows(value.expand(len(mask), *value.shape[1:]), moved, 1)
    return aligned, moved


def _roll_rows(value: torch.Tensor, by: torch.Tensor, dim: int) -> torch.Tensor:
    """Roll each row of a [batch, ...] tensor along `dim`: out[b, i] = value[b, i + by[b]], cyclic."""
    size = value.shape[dim]
    index = (torch.arange(size, device=value.device)[None] + by.to(value.device)[:, None]) % size
    shape = [1] * value.dim()
    shape[0], shape[dim] = index.shape
    return value.gather(dim, index.reshape(shape).expand(value.shape))


def _move_back(value, moved: torch.Tensor | None, dims: tuple = (1,)):
    """Give per-token outputs (a tensor, a tuple of them, or None) the order that the caller's rows had."""
    if moved is None or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_move_back(item, moved, dims) for item in value)
    for dim in dims:
        value = _roll_rows(value, -moved, dim)
    return value


def restore_order(output, moved: torch.Tensor | None, per_token: tuple = ()):
    """
    Give an output's per-token fields the order that the caller's rows had before `align_left`.

    Args:
        per_token: more fields [batch, token, ...] than hidden states and attentions.
    """
    fields = (("last_hidden_state", (1,)), ("hidden_states", (1,)), ("attentions", (2, 3)))
    for name, dims in (*fields, *((name, (1,)) for name in per_token)):
        if moved is not None and output.get(name) is not None:
            output[name] = _move_back(output[name], moved, dims)
    return output
