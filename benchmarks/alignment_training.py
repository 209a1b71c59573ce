"""Experts of alignment.py: trained once, kept in a folder."""

from pathlib import Path
from typing import Any

import torch
from alignment_data import Source, Task, make_task
from alignment_models import new_model
from safetensors.torch import load_file, save_file


EPOCHS = {"mlp": 12, "resnet-bn": 8, "resnet-gn": 8, "vit": 15, "bert": 6}
_LEARNING_RATES = {"vit": 2e-3, "bert": 1e-3}
_BATCH = 64
PAIRINGS = {
    "same": ("all", "all"),
    "disjoint": ("low", "high"),
    "prime-odd": ("prime", "odd"),
    "start": ("low", "high"),
}
"""What the two experts of a pair were trained on; those of `start` began as one pre-trained model."""


def pair(family: str, pairing: str, seed: int, source: Source, cache: Path) -> list[tuple[Any, Task]]:
    """The two experts of a pair, and their tasks."""
    tasks = [make_task(source, name) for name in PAIRINGS[pairing]]
    if pairing != "start":
        return [(expert(family, task, 2 * seed + i, cache), task) for i, task in enumerate(tasks)]
    start = expert(family, make_task(source, "all"), 100 + seed, cache)
    return [(expert(family, task, 2 * seed + i, cache, start), task) for i, task in enumerate(tasks)]


def expert(family: str, task: Task, seed: int, cache: Path, start: Any = None) -> Any:
    """Train a model on a task, or read it; `start`: whose backbone it begins with."""
    model = new_model(family, task.names, seed)
    file = cache / family / f"{task.name}-{seed}{'-start' if start is not None else ''}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    if start is not None:
        prefix = f"{model.base_model_prefix}."
        backbone = {key: value for key, value in start.state_dict().items() if key.startswith(prefix)}
        model.load_state_dict(backbone, strict=False)
    train(model, task, EPOCHS[family], _LEARNING_RATES.get(family, 3e-3), seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    print(f"{file.relative_to(cache)}: accuracy {accuracy(model, task):.1%}", flush=True)
    return model.eval()


def train(model: Any, task: Task, epochs: int, learning_rate: float, seed: int) -> None:
    """Adam under a one-cycle schedule."""
    generator, rows = torch.Generator().manual_seed(seed), len(task.train_labels)
    steps = epochs * (rows // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.2)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(rows, generator=generator)[: rows // _BATCH * _BATCH]
            for chosen in order.split(_BATCH):
                logits = model(**{key: value[chosen] for key, value in task.train.items()}).logits
                torch.nn.functional.cross_entropy(logits, task.train_labels[chosen]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()


@torch.no_grad()
def accuracy(model: Any, task: Task) -> float:
    """Share of a task's test rows that a model labels right."""
    predicted = model.eval()(**task.test).logits.argmax(dim=1)
    return float((predicted == task.test_labels).float().mean())
