"""Model cards and uploads to the Hub. Never builds."""

from .model_card import render_card, write_card
from .upload import Pushed, push_artifact


__all__ = ["Pushed", "push_artifact", "render_card", "write_card"]
