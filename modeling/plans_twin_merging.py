"""Plans: in which order the exact mixture of a batch is computed. Each gives the same answers; they differ in cost."""

from contextlib import contextmanager


class PlansMixin:
    """What lets a Twin-Merging model choose how it computes."""

    @contextmanager
    def generating(self, max_new_tokens: int | None = None):
        """
        Within the block, forwards of this thread belong to one generation: calls with equal expert weights may share what
        was computed for them once. All of it is dropped at the end.

        Args:
            max_new_tokens: how many forwards are expected; None: not known.
        """
        yield self
