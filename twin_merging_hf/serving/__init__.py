"""`twin-merging serve`: a stateless OpenAI-compatible front that routes each request to an adapter of a vLLM engine."""

from .command import serve
from .limits import Limits
from .served import Served, read_served


__all__ = ["Limits", "Served", "read_served", "serve"]
