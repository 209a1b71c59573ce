"""The demo's data: scikit-learn's handwritten digits in four renderings, one labelling task on each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from twin_merging_hf.errors import require_extra


IMAGE_SIZE = 16
SPLIT_NAMES = ("train", "validation", "test")
TRAIN_SHARE, VALIDATION_SHARE = 0.60, 0.15
STRIPE_PERIOD, STRIPE_VALUE = 4, 128


@dataclass(frozen=True)
class Task:
    """One expert's task: the rendering it owns, its label names, and the label id of each digit."""

    name: str
    rendering: str
    labels: tuple[str, ...]
    label_of: Callable[[int], int]


@dataclass(frozen=True)
class Splits:
    """The originals: `images` uint8 [n, 8, 8], `digits` int64 [n], and the row indices of each split."""

    images: np.ndarray
    digits: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def rows(self, split: str) -> np.ndarray:
        """Row indices (int64 [m]) of `"train"`, `"validation"` or `"test"`."""
        if split not in SPLIT_NAMES:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLIT_NAMES)}")
        return getattr(self, split)


def _label_digit(digit: int) -> int:
    return digit


def _label_parity(digit: int) -> int:
    return digit % 2


def _label_prime(digit: int) -> int:
    return int(digit in (2, 3, 5, 7))


def _label_size(digit: int) -> int:
    return int(digit >= 5)


TASKS = (
    Task("digit", "upright", tuple(str(digit) for digit in range(10)), _label_digit),
    Task("parity", "inverted", ("even", "odd"), _label_parity),
    Task("prime", "rotated", ("not_prime", "prime"), _label_prime),
    Task("size", "striped", ("small", "large"), _label_size),
)


def load_splits(seed: int) -> Splits:
    """
    Load the 1797 digits and split the originals 60/15/25, stratified by digit.

    The split is made once, on originals: an original of the test split is a test row in every rendering.
    """
    datasets = require_extra("sklearn.datasets", extra="demo")
    selection = require_extra("sklearn.model_selection", extra="demo")
    raw = datasets.load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)
    digits = raw.target.astype(np.int64)
    split = partial(selection.train_test_split, random_state=seed)
    train, held_out = split(np.arange(len(digits)), train_size=TRAIN_SHARE, stratify=digits)
    share = VALIDATION_SHARE / (1 - TRAIN_SHARE)
    validation, test = split(held_out, train_size=share, stratify=digits[held_out])
    return Splits(images, digits, np.sort(train), np.sort(validation), np.sort(test))


def shift(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """Move a uint8 [8, 8] image by whole pixels; what enters at the border is empty (0)."""
    height, width = image.shape
    padded = np.pad(image, ((abs(down),) * 2, (abs(right),) * 2))
    top, left = abs(down) - down, abs(right) - right
    return padded[top : top + height, left : left + width]


def render(image: np.ndarray, rendering: str) -> Image.Image:
    """
    Draw a uint8 [8, 8] original as an RGB picture of 16 x 16 pixels in one of the four renderings.

    The picture has the model's own size, so the image processor's resize leaves its pixels alone and every
    resize backend (PIL, torchvision) gives the same tensor; RGB because pipelines convert to RGB anyway.
    """
    large = Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return Image.fromarray(_RENDERINGS[rendering](np.asarray(large))).convert("RGB")


def _striped(pixels: np.ndarray) -> np.ndarray:
    """Overlay thin grey vertical stripes; brighter ink stays visible across them."""
    pixels = pixels.copy()
    stripes = pixels[:, ::STRIPE_PERIOD]
    np.maximum(stripes, STRIPE_VALUE, out=stripes)
    return pixels


_RENDERINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "upright": lambda pixels: pixels,
    "inverted": lambda pixels: 255 - pixels,
    "rotated": lambda pixels: np.ascontiguousarray(np.rot90(pixels)),
    "striped": _striped,
}


def task_labels(task: Task, digits: np.ndarray) -> np.ndarray:
    """Label ids (int64 [n]) of the task for the digits (int64 [n])."""
    return np.array([task.label_of(int(digit)) for digit in digits], dtype=np.int64)


def write_task_files(folder: str | Path, task: Task, splits: Splits) -> dict[str, Path]:
    """
    Write one task as PNG files and one JSONL file per split, under `folder/<task name>`.

    Each row is `{"image": <path relative to the JSONL file>, "label": <label name>}`.
    Returns the JSONL files by split name.
    """
    target = Path(folder) / task.name
    return {split: _write_split(target, split, task, splits) for split in SPLIT_NAMES}


def _write_split(target: Path, split: str, task: Task, splits: Splits) -> Path:
    (target / "images" / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for row in splits.rows(split):
        image = f"images/{split}/{row:04d}.png"
        render(splits.images[row], task.rendering).save(target / image)
        label = task.labels[task.label_of(int(splits.digits[row]))]
        lines.append(json.dumps({"image": image, "label": label}))
    path = target / f"{split}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
