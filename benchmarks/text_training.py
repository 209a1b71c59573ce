"""Fine-tuning for text_experts.py: the experts, a router that is a whole model (the ceiling), and one multi-task model."""

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from text_tasks import Task  # noqa: E402

from examples.text.make_experts import TOKENIZER_FILES, bf16_pays, fresh_folder  # noqa: E402


# Chosen before the first run and the same for every model; nothing here was tuned on a test row.
EPOCHS, LEARNING_RATE, WARMUP, BATCH, MAX_TOKENS = 3, 1.5e-4, 0.1, 32, 48

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def tokenize(tokenizer, rows: list[dict]) -> dict[str, torch.Tensor]:
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if rows and rows[0].get("text_pair") is not None else None
    return tokenizer(texts, pairs, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


def fine_tune(model, tokenizer, rows: list[dict], targets: torch.Tensor, loss_of: Loss, settings: dict) -> None:
    """AdamW with linear warm-up and decay over all weights, in place."""
    steps = settings["epochs"] * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    order, bf16 = random.Random(settings["seed"]), bf16_pays()
    model.train()
    with tqdm(total=steps, desc=f"training {settings['name']}", unit="step", mininterval=10) as bar:
        for _ in range(settings["epochs"]):
            shuffled = order.sample(range(len(rows)), len(rows))
            for start in range(0, len(rows), BATCH):
                chosen = shuffled[start : start + BATCH]
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    output = model(**tokenize(tokenizer, [rows[i] for i in chosen])).logits
                loss = loss_of(output.float(), targets[chosen])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
    model.eval()


def trained(folder: Path, base: Path, rows: list[dict], targets: torch.Tensor, config: dict, how: dict) -> Path:
    """
    Fine-tune the base on rows unless `folder` holds exactly that already; return `folder`.

    Args:
        config: label settings of the model. how: `name`, `seed`, `epochs`, `loss` (a name in `LOSSES`).
    """
    content = json.dumps([rows, targets.tolist(), how["loss"]])
    sizes = {"batch": BATCH, "max_tokens": MAX_TOKENS, "learning_rate": LEARNING_RATE}
    settings = {**how, **sizes, "rows_sha256": hashlib.sha256(content.encode()).hexdigest()}
    note_file = folder / "training.json"
    if note_file.is_file():
        if json.loads(note_file.read_text())["settings"] == settings:
            return folder
        sys.exit(f"{folder} was trained with other settings or rows; remove it, or give another cache folder.")
    started = time.monotonic()
    transformers.set_seed(how["seed"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **config)
    fine_tune(model, tokenizer, rows, targets, LOSSES[how["loss"].split(":")[0]](how["loss"]), settings)
    partial = fresh_folder(folder)
    model.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copy(base / name, partial)
    note = {"settings": settings, "seconds": round(time.monotonic() - started, 1)}
    (partial / "training.json").write_text(json.dumps(note, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def union_loss(name: str) -> Loss:
    """
    Cross-entropy over all tasks' labels, squared error of a regression's number beside it.

    `name` is "union:<width>"; a target row is [column, number's column or -1, number].
    """
    width = int(name.split(":")[1])

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = F.cross_entropy(output[:, :width], targets[:, 0].long())
        numbers = targets[:, 1] >= 0
        if numbers.any():
            found = output[numbers].gather(1, targets[numbers, 1].long()[:, None])[:, 0]
            total = total + F.mse_loss(found, targets[numbers, 2]) * numbers.float().mean()
        return total

    return loss


LOSSES: dict[str, Callable[[str], Loss]] = {
    "classes": lambda name: lambda output, targets: F.cross_entropy(output, targets),
    "number": lambda name: lambda output, targets: F.mse_loss(output[:, 0], targets),
    "union": union_loss,
}


def train_expert(task: Task, base: Path, cache: Path, seed: int, epochs: int = EPOCHS) -> Path:
    """One task's expert, as an ordinary checkpoint."""
    rows = task.rows["train"]
    if task.labels is None:
        config: dict = {"num_labels": 1, "problem_type": "regression"}
        targets = torch.tensor([float(row["label"]) for row in rows])
    else:
        ids = {label: i for i, label in enumerate(task.labels)}
        config = {"id2label": dict(enumerate(task.labels)), "label2id": ids}
        targets = torch.tensor([ids[str(row["label"])] for row in rows])
    kind = "number" if task.regression else "classes"
    how = {"name": task.name, "seed": seed, "epochs": epochs, "loss": kind}
    return trained(cache / f"expert-{task.name}-seed{seed}-epochs{epochs}", base, rows, targets, config, how)


def train_ceiling(tasks: list[Task], base: Path, cache: Path, seed: int) -> Path:
    """The base fine-tuned to tell the tasks apart, on all rows that the experts were trained on."""
    rows = [row for task in tasks for row in task.rows["train"]]
    targets = torch.tensor([index for index, task in enumerate(tasks) for _ in task.rows["train"]])
    how = {"name": "ceiling", "seed": seed, "epochs": EPOCHS, "loss": "classes"}
    return trained(cache / f"ceiling-{_digest(tasks)}-seed{seed}", base, rows, targets, {"num_labels": len(tasks)}, how)


def train_multi_task(tasks: list[Task], base: Path, cache: Path, seed: int) -> Path:
    """One model fine-tuned on all tasks' rows at once, over the union of their labels."""
    width = sum(len(task.labels or ("value",)) for task in tasks)
    rows, targets, start, number = [], [], 0, width
    for task in tasks:
        for row in task.rows["train"]:
            rows.append(row)
            if task.labels is None:
                targets.append([start, number, float(row["label"])])
            else:
                targets.append([start + task.labels.index(str(row["label"])), -1, 0.0])
        start += len(task.labels or ("value",))
        number += task.regression
    how = {"name": "multi-task", "seed": seed, "epochs": EPOCHS, "loss": f"union:{width}"}
    folder = cache / f"multi-task-{_digest(tasks)}-seed{seed}"
    return trained(folder, base, rows, torch.tensor(targets), {"num_labels": number}, how)


def _digest(tasks: list[Task]) -> str:
    return hashlib.sha256("\n".join(task.name for task in tasks).encode()).hexdigest()[:8]


def seconds(folder: Path) -> float:
    """How long a model's training took."""
    return json.loads((folder / "training.json").read_text())["seconds"]
