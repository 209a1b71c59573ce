"""Which expert weights act in the call that runs now: per thread, per model, never left behind."""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .call_twin_merging import CallWeights


ALL = "all"
"""In the place of an expert's name: each row is answered by every expert."""

# Values of all `Scoped`, by their ids. A context variable, so that threads do not meet; never changed in place, so that
# what an outer block sees stays as it is.
_VALUES: ContextVar[dict] = ContextVar("twin_merging_values", default={})  # noqa: B039


class Scoped:
    """
    A value that holds in one thread until a block ends; None outside of every block.

    A compiled graph reads an attribute instead, because dynamo refuses context variables. It is set in eager code too:
    where a graph breaks, compiled frames run inside eager ones.
    """

    def __init__(self) -> None:
        self.latest: Any = None

    def __getstate__(self):
        return {}  # the values of a block belong to that block: copies and pickles start clean

    def __setstate__(self, state):
        self.latest = None

    def get(self) -> Any:
        if torch.compiler.is_compiling():
            return self.latest
        return _VALUES.get().get(id(self))

    @contextmanager
    def set(self, value: Any):
        """Let `value` hold until the block ends, whatever happens inside."""
        before, self.latest = self.latest, value
        if torch.compiler.is_compiling():
            try:
                yield
            finally:
                self.latest = before
            return
        token = _VALUES.set({**_VALUES.get(), id(self): value})
        try:
            yield
        finally:
            _VALUES.reset(token)
            self.latest = before

    def replace(self, value: Any) -> None:
        """Let another value hold from here to the end of the innermost block, which takes it away again."""
        self.latest = value
        if not torch.compiler.is_compiling():
            _VALUES.set({**_VALUES.get(), id(self): value})


class ExpertMix:
    """
    The one object through which a model and its modules agree on the weights of the running call.

    Activation checkpointing recomputes during backward, after forward has returned and possibly in another thread:
    `CheckpointWithWeights` brings the weights of the forward along.
    """

    def __init__(self) -> None:
        self._active, self._forced = Scoped(), Scoped()

    def current(self) -> CallWeights | None:
        """Return the weights acting now, or None when the experts are off."""
        return self._active.get()

    def current_forced(self):
        """Return the choice of the enclosing `use_experts`, or None."""
        return self._forced.get()

    def applied(self, call: CallWeights | None):
        """Let `call` act (None: experts off) until the block ends."""
        return self._active.set(call)

    def go_on_with(self, call: CallWeights | None) -> None:
        """Let `call` act from here to the end of the block of `applied`."""
        self._active.replace(call)

    def force(self, choice):
        """Make `choice` the answer of `current_forced` until the block ends."""
        return self._forced.set(choice)


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
