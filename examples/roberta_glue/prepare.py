"""Fetch the authors' GLUE experts and write GLUE rows as JSONL, for recipe.yaml beside this file.

    pip install datasets
    python examples/roberta_glue/prepare.py [OUT]

Router rows come from GLUE's train parts alone; the authors score its validation parts, so these become `test` files.
"""

import json
import sys
from pathlib import Path

from huggingface_hub import snapshot_download


REPOSITORY = "lu-vae/roberta-glue"
FIELDS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}
ROWS = {"train": 1000, "validation": 300, "test": 1000}


def fetch_experts(out: Path) -> None:
    """Link each task's folder of the repository as experts/{task}; a folder is a task's by its name."""
    root = Path(snapshot_download(REPOSITORY))
    folders = {
        path.parent.relative_to(root).as_posix().lower().replace("-", ""): path.parent
        for path in root.rglob("config.json")
    }
    (out / "experts").mkdir(parents=True, exist_ok=True)
    for task in FIELDS:
        matching = [folder for name, folder in folders.items() if task in name]
        if len(matching) != 1:
            sys.exit(
                f"{REPOSITORY}: expected one folder for {task}, found {matching}; link it by hand as experts/{task}"
            )
        link = out / "experts" / task
        if not link.exists():
            link.symlink_to(matching[0], target_is_directory=True)
        if not (link / "model.safetensors").is_file():
            sys.exit(f"{link} holds no model.safetensors; load it once where you trust it and call save_pretrained")


def write_rows(out: Path) -> None:
    """Train, validation (both from GLUE's train) and test (GLUE's validation) of each task."""
    from datasets import load_dataset

    (out / "data").mkdir(parents=True, exist_ok=True)
    for task, fields in FIELDS.items():
        glue = load_dataset("nyu-mll/glue", task)
        shuffled = glue["train"].shuffle(seed=0)
        end = ROWS["validation"] + ROWS["train"]
        parts = {
            "validation": shuffled.select(range(ROWS["validation"])),
            "train": shuffled.select(range(ROWS["validation"], min(end, len(shuffled)))),
            "test": glue["validation_matched" if task == "mnli" else "validation"],
        }
        for split, rows in parts.items():
            lines = []
            for row in list(rows)[: ROWS[split]]:
                texts = dict(zip(("text", "text_pair"), (row[field] for field in fields), strict=False))
                lines.append(json.dumps({**texts, "label": row["label"]}, ensure_ascii=False) + "\n")
            (out / "data" / f"{task}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    fetch_experts(target)
    write_rows(target)
