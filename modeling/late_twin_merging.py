"""Late routing: one pass that starts as the shared model's, is routed where the experts begin to act, and goes on with them."""

from typing import Any

import torch
from torch import nn


class LateMixin:
    """What lets a model whose deltas all act above the routing layer route and answer in one pass."""

    # Of the model that this is mixed into.
    config: Any
    mix: Any
    _reader: Any
    _planned: Any
    _weights_of: Any
    _in_own_type: Any

    def _routes_in_the_answer_s_pass(self, inputs: dict) -> bool:
        """
        Whether a call without weights needs no routing pass of its own.

        It does need one where the pass may not begin at the prompt's first token (a cache, an encoder's outputs), and where
        activation checkpointing would run layers again after the weights of the call are gone.
        """
        if self.config.router_pass != "late":
            return False
        begun = any(inputs.get(name) is not None for name in ("cache", "past_key_values", "encoder_outputs"))
        recomputes = torch.is_grad_enabled() and bool(getattr(self, "is_gradient_checkpointing", False))
        return not begun and not recomputes

    def _run_late(self, module: nn.Module, inputs: dict) -> tuple[Any, torch.Tensor]:
        """The module's output and the weights [batch, expert] that the router gave on the way."""
        found: list = []

        def route(states: torch.Tensor) -> None:
            # Not the states' gradients: the router learns from what it reads, as in the other passes.
            weights = self._weights_of(states.detach(), inputs)
            found.append(weights)
            self.mix.go_on_with(self._planned(inputs, weights))

        with self.mix.applied(None), self._reader.reading(route):
            output = module(**self._in_own_type(inputs), return_dict=True)
        if not found:
            raise RuntimeError("the pass ended before the routing layer was reached")
        return output, found[0]
