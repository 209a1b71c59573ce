"""`twin-merging space`: a Gradio Space that answers an input and shows who answered."""

from .space import make_space


__all__ = ["make_space"]
