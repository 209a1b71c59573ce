"""Model cards and, later, uploads to the Hub. Never builds."""

from .model_card import render_card, write_card


__all__ = ["render_card", "write_card"]
