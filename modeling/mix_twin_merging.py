"""Which expert weights act in the call that runs now: per thread, per model, never left behind."""

from contextlib import contextmanager
from contextvars import ContextVar

import torch


# The weights of the running call: (owner, weights or None). A context variable, so that threads do not meet.
_ACTIVE: ContextVar = ContextVar("twin_merging_active", default=None)
# What `use_experts` chose: (owner, choice).
_FORCED: ContextVar = ContextVar("twin_merging_forced", default=None)


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

    Eager calls keep the weights in a context variable. Two cases cannot use it and read an attribute instead: a
    compiled graph (dynamo refuses context variables) and activation checkpointing, whose recomputation runs during
    backward, after forward has returned and possibly in another thread.
    """

    def __init__(self):
        self.latest: CallWeights | None = None
        self.forced = None

    def __getstate__(self):
        return {}  # the weights of a call belong to that call: copies and pickles start clean

    def __setstate__(self, state):
        self.latest = self.forced = None

    def current(self) -> CallWeights | None:
        """Return the weights acting now, or None when the experts are off."""
        if torch.compiler.is_compiling():
            return self.latest
        entry = _ACTIVE.get()
        if entry is not None and entry[0] is self:
            return entry[1]
        return self.latest if _in_backward() else None

    def current_forced(self):
        """Return the choice of the enclosing `use_experts`, or None."""
        if torch.compiler.is_compiling():
            return self.forced
        entry = _FORCED.get()
        return entry[1] if entry is not None and entry[0] is self else None

    @contextmanager
    def applied(self, call: CallWeights | None):
        """Let `call` act (None: experts off) until the block ends, whatever happens inside."""
        if torch.is_grad_enabled():
            self.latest = call
        token = _ACTIVE.set((self, call))
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    @contextmanager
    def force(self, choice):
        """Make `choice` the answer of `current_forced` until the block ends."""
        token, before = _FORCED.set((self, choice)), self.forced
        self.forced = choice
        try:
            yield
        finally:
            self.forced = before
            _FORCED.reset(token)


def _in_backward() -> bool:
    graph_task = getattr(torch._C, "_current_graph_task_id", None)
    return graph_task is not None and graph_task() != -1
