"""Ways out of an artifact: one plain checkpoint, PEFT LoRAs on a plain shared model, and the same under vLLM's rules."""

from .adapters import BASE_FOLDER, export_adapters
from .merged import export_merged
from .record import EXPORT_FILE, FORMATS, Export, check_options, describe_export, parse_weights
from .vllm import ROUTER_FOLDER, export_vllm


__all__ = [
    "BASE_FOLDER",
    "EXPORT_FILE",
    "FORMATS",
    "ROUTER_FOLDER",
    "Export",
    "check_options",
    "describe_export",
    "export_adapters",
    "export_merged",
    "export_vllm",
    "parse_weights",
]
