"""Ways out of an artifact: one plain checkpoint, PEFT LoRAs on a plain shared model, and the same under vLLM's rules."""

from .adapters import export_adapters
from .merged import export_merged
from .record import FORMATS, Export, check_options, describe_export, parse_weights
from .vllm import export_vllm


__all__ = [
    "FORMATS",
    "Export",
    "check_options",
    "describe_export",
    "export_adapters",
    "export_merged",
    "export_vllm",
    "parse_weights",
]
