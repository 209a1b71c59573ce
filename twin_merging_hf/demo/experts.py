"""The demo's checkpoints: one small pre-trained ViT and the experts fine-tuned from it, one per task."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from twin_merging_hf.demo.digits import IMAGE_SIZE, TASKS, Splits, Task, render, shift, task_labels


try:  # Transformers 5 without torchvision: the PIL version has a name of its own.
    from transformers import ViTImageProcessorPil as ImageProcessor
except ImportError:
    from transformers import ViTImageProcessor as ImageProcessor  # type: ignore[assignment]


Progress = Callable[[str], None]

# The pre-training task's labels: which way the digit was moved by one pixel, as (down, right).
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


@dataclass(frozen=True)
class Schedule:
    """Length and step size of one training run; AdamW, a linear warm-up, then a linear decay to zero."""

    epochs: int
    learning_rate: float
    batch_size: int = 64
    warmup_share: float = 0.1
    weight_decay: float = 0.05


# Chosen once on validation rows; test rows played no part.
PRETRAINING = Schedule(epochs=4, learning_rate=2e-3, batch_size=128)
FINE_TUNING = Schedule(epochs=40, learning_rate=1.5e-3)


@dataclass(frozen=True)
class Views:
    """Training rows in several views: `pixels` float [n, views, 3, 16, 16] and `labels` int64 [n, views]."""

    pixels: torch.Tensor
    labels: torch.Tensor


def model_config(labels: tuple[str, ...]) -> ViTConfig:
    """
    A ViT with six layers of width 64 over four patches of 8 x 8 pixels.

    Patches of 4 x 4 pixels cost three times as much an epoch and need twice the epochs on so few images.
    """
    return ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_channels=3,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


def image_processor() -> ImageProcessor:
    """The processor saved with every checkpoint: RGB pixels in [0, 255] to [-1, 1], 16 x 16."""
    return ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def pixel_values(images: np.ndarray, rendering: str, move: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Originals (uint8 [n, 8, 8]), moved, rendered and processed: float [n, 3, 16, 16]."""
    pictures = [render(shift(image, *move), rendering) for image in images]
    return image_processor()(pictures, return_tensors="pt")["pixel_values"]


def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows (pixels float [n, 3, 16, 16], labels int64 [n]) whose largest logit is the right one."""
    model.eval()
    with torch.inference_mode(), one_thread():
        found = [model(pixel_values=batch).logits.argmax(-1) for batch in pixels.split(256)]
    return (torch.cat(found) == labels).float().mean().item()


def pretrain(splits: Splits, folder: str | Path, seed: int, progress: Progress = print) -> Path:
    """
    Pre-train the base on the training rows of all renderings and save it to `folder/base`.

    The task is self-supervised (which way was the digit moved?), so the base has seen every rendering and no
    digit label: it has features to start from, and the experts have everything about their tasks to learn.
    """
    target = Path(folder) / "base"
    torch.manual_seed(seed)
    model = ViTForImageClassification(model_config(tuple(MOVES)))
    _train(model, _pretraining_views(splits, "train"), PRETRAINING, seed, "pre-training")
    held_out = _pretraining_views(splits, "validation")
    score = accuracy(model, held_out.pixels.flatten(0, 1), held_out.labels.flatten())
    progress(f"base: validation accuracy {score:.3f} on the pre-training task ({', '.join(MOVES)})")
    return _save(model, target)


def fine_tune(
    base_folder: str | Path, task: Task, splits: Splits, folder: str | Path, seed: int, progress: Progress = print
) -> Path:
    """Fine-tune all weights of the base, with a new head; save to `folder/experts/<task name>`."""
    target = Path(folder) / "experts" / task.name
    torch.manual_seed(seed)  # The new head is drawn at random.
    model = ViTForImageClassification(model_config(task.labels))
    base = ViTForImageClassification.from_pretrained(base_folder)
    model.vit.load_state_dict(base.vit.state_dict())
    _train(model, _task_views(task, splits), FINE_TUNING, seed, task.name)
    score = accuracy(model, *task_rows(task, splits, "validation"))
    progress(f"expert {task.name}: validation accuracy {score:.3f} on {task.rendering} digits")
    return _save(model, target)


def task_rows(task: Task, splits: Splits, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One split of a task, in the order of its JSONL file: pixels float [n, 3, 16, 16], labels int64 [n]."""
    rows = splits.rows(split)
    labels = torch.from_numpy(task_labels(task, splits.digits[rows]))
    return pixel_values(splits.images[rows], task.rendering), labels


def _task_views(task: Task, splits: Splits) -> Views:
    """Training rows as they are and moved by one pixel each way: so small a set needs the augmentation."""
    images = splits.images[splits.train]
    views = [pixel_values(images, task.rendering, move) for move in ((0, 0), *MOVES.values())]
    labels = torch.from_numpy(task_labels(task, splits.digits[splits.train]))
    return Views(torch.stack(views, 1), labels[:, None].expand(-1, len(views)))


def _pretraining_views(splits: Splits, split: str) -> Views:
    """The four moves of each row of a split in each rendering; a row's label is the index of its move."""
    images = splits.images[splits.rows(split)]
    pixels = [torch.stack([pixel_values(images, task.rendering, move) for move in MOVES.values()], 1) for task in TASKS]
    labels = torch.arange(len(MOVES)).expand(len(TASKS) * len(images), -1)
    return Views(torch.cat(pixels), labels)


def _train(model: ViTForImageClassification, data: Views, schedule: Schedule, seed: int, title: str) -> None:
    """Train in place; each epoch shows each row once, in one of its views drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    rows, views = data.labels.shape
    steps = schedule.epochs * math.ceil(rows / schedule.batch_size)
    optimizer, scheduler = _optimizer(model, schedule, steps)
    model.train()
    with one_thread():
        for _ in tqdm(range(schedule.epochs), desc=title, unit="epoch", disable=None):
            order = torch.randperm(rows, generator=generator)
            view = torch.randint(views, (rows,), generator=generator)
            for batch in order.split(schedule.batch_size):
                chosen = batch, view[batch]
                loss = model(pixel_values=data.pixels[chosen], labels=data.labels[chosen]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """
    Compute on one thread inside the block.

    When other work holds a core, two threads that wait for each other after every small matrix made an epoch
    over ten times slower (measured); one thread costs a little speed on an idle machine, and never that. It
    also gives the same weights whatever the number of threads torch starts with.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _optimizer(
    model: torch.nn.Module, schedule: Schedule, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its step-size schedule over `steps` updates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    warmup = max(1, round(schedule.warmup_share * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _save(model: ViTForImageClassification, target: Path) -> Path:
    """Save the model (safetensors) and the image processor it was trained with to `target`."""
    model.eval()
    model.save_pretrained(target)
    image_processor().save_pretrained(target)
    return target
