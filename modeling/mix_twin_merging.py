"""Which expert weights act in the call that runs now: per thread, per model, never left behind."""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch


ALL = "all"
"""In the place of an expert's name: each row is answered by every expert."""

# Weights of the running calls, by the id of the model's mix. A context variable, so that threads do not meet; never
# changed in place, so that what an outer call sees stays as it is.
_ACTIVE: ContextVar[dict] = ContextVar("twin_merging_active", default={})  # noqa: B039
# What `use_experts` chose, likewise.
_FORCED: ContextVar[dict] = ContextVar("twin_merging_forced", default={})  # noqa: B039


class CallWeights:
    """Expert weights of one call, [batch, expert], and the same spread over rank columns."""

    def __init__(self, weights: torch.Tensor):
        self.weights = weights
        self._columns: dict = {}

    def columns(self, ranks: tuple) -> torch.Tensor:
        """Repeat each expert's weight over its ranks: [batch, sum(ranks)]."""
        if ranks not in self._columns:
            spread = [self.weights[:, t : t + 1].expand(-1, rank) for t, rank in enumerate(ranks) if rank]
            self._columns[ranks] = torch.cat(spread, dim=1)
        return self._columns[ranks]


class ExpertMix:
    """
    The one object through which a model and its hooks agree on the weights of the running call.

    Eager calls keep the weights in a context variable. A compiled graph reads an attribute instead, because dynamo
    refuses context variables. Activation checkpointing recomputes during backward, after forward has returned and
    possibly in another thread: `CheckpointWithWeights` brings the weights of the forward along.
    """

    def __init__(self):
        self.latest: CallWeights | None = None  # read by compiled graphs only
        self.forced = None

    def __getstate__(self):
        return {}  # the weights of a call belong to that call: copies and pickles start clean

    def __setstate__(self, state):
        self.latest = self.forced = None

    def current(self) -> CallWeights | None:
        """Return the weights acting now, or None when the experts are off."""
        if torch.compiler.is_compiling():
            return self.latest
        return _ACTIVE.get().get(id(self))

    def current_forced(self):
        """Return the choice of the enclosing `use_experts`, or None."""
        if torch.compiler.is_compiling():
            return self.forced
        return _FORCED.get().get(id(self))

    @contextmanager
    def applied(self, call: CallWeights | None):
        """Let `call` act (None: experts off) until the block ends, whatever happens inside."""
        # The attribute is set in eager code too: where a graph breaks, compiled frames run inside eager ones.
        before, self.latest = self.latest, call
        if torch.compiler.is_compiling():
            try:
                yield
            finally:
                self.latest = before
            return
        token = _ACTIVE.set({**_ACTIVE.get(), id(self): call})
        try:
            yield
        finally:
            _ACTIVE.reset(token)
            self.latest = before

    @contextmanager
    def force(self, choice):
        """Make `choice` the answer of `current_forced` until the block ends."""
        token, before = _FORCED.set({**_FORCED.get(), id(self): choice}), self.forced
        self.forced = choice
        try:
            yield
        finally:
            self.forced = before
            _FORCED.reset(token)


class CheckpointWithWeights:
    """A checkpointing function that recomputes a layer with the expert weights that acted in its forward."""

    def __init__(self, mix: ExpertMix, checkpoint: Callable):
        self.mix, self.checkpoint = mix, checkpoint

    def __call__(self, function: Callable, *args, **kwargs):
        call = self.mix.current()

        def with_weights(*inputs, **named):
            with self.mix.applied(call):
                return function(*inputs, **named)

        return self.checkpoint(with_weights, *args, **kwargs)
