"""What an export wrote and what it could not carry, as export.json and as lines for people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twin_merging_hf.errors import TwinMergingError


EXPORT_FILE = "export.json"
_OPTIONS = {
    "merged": ("--expert", "--weights", "--head"),
    "peft": ("--base-id",),
    "vllm": ("--base-id", "--allow-embeddings"),
}
FORMATS = tuple(_OPTIONS)


@dataclass(frozen=True)
class Export:
    """
    One finished export.

    folder: where it lies. format: `merged`, `peft` or `vllm`. content: what export.json holds.
    next: what to do with it.
    """

    folder: Path
    format: str
    content: dict[str, Any] = field(default_factory=dict)
    next: str = ""


def check_options(format: str, given: set[str]) -> None:
    """Raise `TwinMergingError` for an unknown format, and for options that mean nothing with it."""
    if format not in _OPTIONS:
        raise TwinMergingError(f"--format must be one of {', '.join(FORMATS)}, got {format!r}")
    for option in sorted(given - set(_OPTIONS[format])):
        having = ", ".join(name for name, options in _OPTIONS.items() if option in options)
        raise TwinMergingError(f"{option} has no meaning with --format {format}, only with {having}")
    if format == "merged" and ("--expert" in given) == ("--weights" in given):
        raise TwinMergingError("--format merged needs either --expert NAME or --weights NAME=NUMBER,...")


def parse_weights(text: str) -> dict[str, float]:
    """Parse `sst2=0.7,qqp=0.3`. Raises `TwinMergingError`."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not name or not abs(number) < 1e6:
            raise TwinMergingError(
                f"weights must be NAME=NUMBER with commas between, such as sst2=0.7,qqp=0.3; got {part!r}"
            )
        if name in weights:
            raise TwinMergingError(f"weights name {name!r} twice")
        weights[name] = number
    return weights


def left_out_summary(name: str, rank: int, size: int, energy: float, left_out: Sequence[dict]) -> dict:
    """What one expert's adapter holds and lacks."""
    lost = sum(item["energy"] for item in left_out)
    return {
        "name": name,
        "rank": rank,
        "bytes": size,
        "left_out": [{**item, "energy": float(f"{item['energy']:.6g}")} for item in left_out],
        "left_out_bytes": sum(item["bytes"] for item in left_out),
        "left_out_energy": float(f"{lost / energy:.6g}") if energy else 0.0,
    }


def describe_export(export: Export) -> list[str]:
    """Lines for people."""
    lines = []
    for expert in export.content.get("experts", []):
        line = f"{expert['name']}: LoRA of rank {expert['rank']}, {expert['bytes'] / 1e6:.2f} MB"
        if expert["left_out"]:
            names = ", ".join(item["name"] for item in expert["left_out"][:3])
            more = ", ..." if len(expert["left_out"]) > 3 else ""
            line += (
                f"; NOT carried: {len(expert['left_out'])} tensors ({names}{more}), {expert['left_out_bytes']} bytes, "
                f"{expert['left_out_energy']:.2%} of the delta's energy"
            )
        else:
            line += "; everything is carried"
        lines.append(line)
    return [*lines, *(f"note: {note}" for note in export.content.get("notes", []))]
