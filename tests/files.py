"""Helpers for tests that damage files or watch folders."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


def environment(**more: str) -> dict[str, str]:
    """Environment of a process that runs this checkout, on one thread and without network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with a digest of its content, hidden ones included."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = content
    return found


def copy_inputs(source: Path, target: Path, names: Iterable[str] = ("base", "a", "b")) -> Path:
    """Copy checkpoints and their data, not the artifacts that lie beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copytree(source / name, target / name)
        if (source / f"{name}.jsonl").is_file():
            shutil.copyfile(source / f"{name}.jsonl", target / f"{name}.jsonl")
    if (source / "images").is_dir():
        shutil.copytree(source / "images", target / "images")
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the names in the files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Let `edit` change the dict of tensors of a folder's one weight file, in place."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file; None removes a key."""
    content = {**read_json(path), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
