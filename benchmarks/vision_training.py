"""Training for vision_experts.py: a small ViT from scratch, its experts, the ceiling router and one multi-task model."""

import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from text_tasks import Task
from torch.nn import functional as F
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification
from vision_tasks import IMAGE_SIZE

from twin_merging_hf.demo.experts import ImageProcessor
from twin_merging_hf.inference import batches
from twin_merging_hf.processing import Processing


# Chosen on validation rows, once, and the same for every expert.
PRETRAINING = {"epochs": 12, "learning_rate": 1e-3}
FINE_TUNING = {"epochs": 20, "learning_rate": 1e-3}
BATCH, WARMUP, WEIGHT_DECAY = 64, 0.1, 0.05
TURNS = 4  # the base learns which quarter turn a picture was given


def processor() -> ImageProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return ImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def new_model(labels: tuple[str, ...]) -> ViTForImageClassification:
    """Six layers of width 96 over sixteen patches."""
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=192, image_size=IMAGE_SIZE,
        patch_size=7, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def pixels(rows: list[dict]) -> torch.Tensor:
    """Pictures of rows [row, 3, size, size]."""
    found = torch.empty(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE)
    for positions, inputs in batches(rows, Processing("image", processor()), 256):
        found[positions] = inputs["pixel_values"]
    return found


def _moved(batch: torch.Tensor, order: random.Random) -> torch.Tensor:
    """The pictures moved by up to two pixels, all alike: so small a set needs it."""
    return torch.roll(batch, (order.randint(-2, 2), order.randint(-2, 2)), dims=(2, 3))


def _train(model: ViTForImageClassification, data: tuple, schedule: dict, seed: int, title: str) -> None:
    images, targets = data
    steps = schedule["epochs"] * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule["learning_rate"], weight_decay=WEIGHT_DECAY)
    rise = max(1, int(WARMUP * steps))
    factor = lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))  # noqa: E731
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    model.train()
    for _ in tqdm(range(schedule["epochs"]), desc=f"training {title}", unit="epoch", disable=None):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(pixel_values=_moved(images[rows], order)).logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
    model.eval()


def _finished(folder: Path, settings: dict) -> bool:
    note = folder / "training.json"
    if not note.is_file():
        return False
    if json.loads(note.read_text())["settings"] != settings:
        shutil.rmtree(folder)
        return False
    return True


def _save(model: ViTForImageClassification, folder: Path, settings: dict, started: float) -> Path:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor().save_pretrained(partial)
    note = {"settings": settings, "seconds": round(time.monotonic() - started, 1)}
    (partial / "training.json").write_text(json.dumps(note) + "\n")
    partial.rename(folder)
    return folder


def pretrain(tasks: list[Task], models: Path, seed: int) -> Path:
    """The base: which quarter turn was a train picture given? It sees both sources and no label."""
    folder, settings = (
        models / f"base-seed{seed}",
        {**PRETRAINING, "seed": seed, "tasks": [task.name for task in tasks]},
    )
    if _finished(folder, settings):
        return folder
    started = time.monotonic()
    torch.manual_seed(seed)
    images = pixels([row for task in tasks for row in task.rows["train"]])
    turned = torch.cat([torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)])
    targets = torch.arange(TURNS).repeat_interleave(len(images))
    model = new_model(tuple(str(turn) for turn in range(TURNS)))
    _train(model, (turned, targets), PRETRAINING, seed, "base")
    return _save(model, folder, settings, started)


def fine_tune(
    name: str, base: Path, rows: list[dict], targets: list[int], labels: tuple[str, ...], models: Path, how: dict
) -> Path:
    """All weights of the base and a new head on rows; `how`: `epochs`, `learning_rate`, `seed`."""
    folder = models / f"{name}-seed{how['seed']}-epochs{how['epochs']}"
    settings = {**how, "rows": len(rows), "labels": list(labels)}
    if _finished(folder, settings):
        return folder
    started = time.monotonic()
    torch.manual_seed(how["seed"])
    model = new_model(labels)
    model.vit.load_state_dict(ViTForImageClassification.from_pretrained(base).vit.state_dict())
    _train(model, (pixels(rows), torch.tensor(targets)), how, how["seed"], name)
    return _save(model, folder, settings, started)


def train_expert(task: Task, base: Path, models: Path, seed: int, epochs: int = FINE_TUNING["epochs"]) -> Path:
    """One task's expert."""
    assert task.labels is not None
    rows = task.rows["train"]
    how = {**FINE_TUNING, "epochs": epochs, "seed": seed}
    targets = [task.labels.index(row["label"]) for row in rows]
    return fine_tune(f"expert-{task.name}", base, rows, targets, task.labels, models, how)


def train_whole(tasks: list[Task], base: Path, models: Path, seed: int) -> tuple[Path, Path]:
    """The ceiling router (which task?) and the multi-task model (which label of which task?) on all experts' rows."""
    rows = [row for task in tasks for row in task.rows["train"]]
    owner = [index for index, task in enumerate(tasks) for _ in task.rows["train"]]
    union = [f"{task.name}/{label}" for task in tasks for label in task.labels or ()]
    targets = [union.index(f"{tasks[i].name}/{row['label']}") for i, row in zip(owner, rows, strict=True)]
    how = {**FINE_TUNING, "seed": seed}
    names = tuple(task.name for task in tasks)
    ceiling = fine_tune("ceiling", base, rows, owner, names, models, how)
    return ceiling, fine_tune("multi-task", base, rows, targets, tuple(union), models, how)


def seconds(folder: Path) -> float:
    """How long a model's training took."""
    return json.loads((folder / "training.json").read_text())["seconds"]
