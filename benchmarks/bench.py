"""What all methods share: tasks, models, rows in one list, and a cache of answers that survives a restart."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scores import Answers, Gold  # noqa: E402
from text_tasks import Task  # noqa: E402

import twin_merging_hf  # noqa: E402
from twin_merging_hf import modeling  # noqa: E402
from twin_merging_hf.processing import Processing, load_processing  # noqa: E402


@dataclass(frozen=True)
class Part:
    """One split of all tasks, in one list: rows, and what is right."""

    rows: list[dict]
    gold: Gold

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.rows, self.gold.task.tolist()], default=str).encode()).hexdigest()[:16]


@dataclass
class Bench:
    """
    Tasks, checkpoints and where results are kept.

    data: folder of `{task}.{split}.jsonl`, for recipes. limit: at most so many test rows of each task.
    ours: the parts of our recipe that are not experts and base.
    """

    tasks: list[Task]
    base: Path
    experts: list[Path]
    data: Path
    cache: Path
    kind: str = "text"
    ceiling: Path | None = None
    multi_task: Path | None = None
    limit: int | None = None
    ours: dict = field(default_factory=dict)
    """What differs from `artifacts.OURS`."""
    _parts: dict = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @cached_property
    def spans(self) -> list[slice]:
        """Columns of each task in all heads' outputs side by side."""
        spans, start = [], 0
        for task in self.tasks:
            spans.append(slice(start, start + len(task.labels or ("value",))))
            start = spans[-1].stop
        return spans

    @property
    def width(self) -> int:
        return self.spans[-1].stop

    @cached_property
    def processing(self) -> Processing:
        found = load_processing(self.experts[0], self.kind, "the first expert")
        assert found is not None
        config = AutoConfig.from_pretrained(self.base)
        limit = getattr(config, "max_position_embeddings", found.max_tokens)
        return Processing(found.kind, found.processor, min(found.max_tokens, limit))

    def part(self, split: str, limit: int | None = None) -> Part:
        """Rows of a split of all tasks; `limit` rows of each task at most (of `test`: the bench's own limit)."""
        limit = self.limit if split == "test" and limit is None else limit
        if (split, limit) not in self._parts:
            chosen = [task.rows[split][:limit] for task in self.tasks]
            self._parts[split, limit] = Part([r for rows in chosen for r in rows], _gold(self.tasks, chosen))
        return self._parts[split, limit]

    def subset(self, indices: list[int]) -> "Bench":
        """The same bench with some of its tasks."""
        tasks, experts = [self.tasks[i] for i in indices], [self.experts[i] for i in indices]
        return Bench(tasks, self.base, experts, self.data, self.cache, self.kind, limit=self.limit, ours=self.ours)

    @cached_property
    def fingerprint(self) -> list[str]:
        return [fingerprint(path) for path in (self.base, *self.experts)]

    def cached(self, name: str, key: object, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays from the cache, or computed and kept. `key` must name all they depend on besides base and experts."""
        file = self.file(name, key, "npz")
        if file.is_file():
            with np.load(file) as arrays:
                return dict(arrays)
        arrays = compute()
        store(file, arrays)
        return arrays

    def file(self, name: str, key: object, suffix: str) -> Path:
        text = json.dumps([key, self.fingerprint, self.names], default=str, sort_keys=True)
        return self.cache / "answers" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.{suffix}"

    def answer(self, raw: np.ndarray, chosen: np.ndarray) -> Answers:
        """
        Answers from all heads' raw outputs [row, width] where the head of task `chosen` [row] answers.
        """
        label, value = np.zeros(len(raw), int), np.zeros(len(raw))
        for task, span in enumerate(self.spans):
            rows = chosen == task
            label[rows] = raw[rows, span].argmax(1)
            value[rows] = raw[rows, span.start]
        return Answers(chosen, label, value, np.full(len(raw), np.nan))


def _gold(tasks: list[Task], chosen: list[list[dict]]) -> Gold:
    task = np.repeat(np.arange(len(tasks)), [len(rows) for rows in chosen])
    label, value, means = [], [], []
    for each, rows in zip(tasks, chosen, strict=True):
        if each.labels is None:
            label += [0] * len(rows)
            value += [float(row["label"]) for row in rows]
            means.append(float(np.mean([float(row["label"]) for row in each.rows["train"]])))
        else:
            label += [each.labels.index(str(row["label"])) for row in rows]
            value += [0.0] * len(rows)
            means.append(0.0)
    one_space = len(tasks) > 1 and all(each.labels == tasks[0].labels for each in tasks)
    regression = tuple(each.regression for each in tasks)
    return Gold(task, np.array(label), np.array(value), regression, tuple(means), one_space)


def store(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays so that a file that exists is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **arrays)  # type: ignore[arg-type]
    partial.rename(file)


def fingerprint(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]


def code_digest() -> str:
    """Of the package's own files: an artifact is built again when they change."""
    folders = (Path(twin_merging_hf.__file__).parent, Path(modeling.__file__).parent)
    files = sorted({path for folder in folders for path in folder.rglob("*.py")})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
