"""
Twin-Merging on top of alignment: what the routed artifact of two experts of different initialisation scores for its bytes.

    python benchmarks/alignment_routed.py work/alignment --seeds 2

The BERT pairs of alignment.py on disjoint labels, as checkpoints; artifacts built by the package, with and without `alignment`
and with the least-squares fit as shared model, over ranks. Writes alignment_routed.csv and .png to --results.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from alignment_data import Source, Task, load_source
from alignment_training import pair
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, logging

from twin_merging_hf.builder import build_artifact
from twin_merging_hf.evaluate_artifact import evaluate_artifact
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import parse_recipe


FAMILY, PAIRING = "bert", "disjoint"
RANKS = (1, 2, 4, 8, 16, 32, 64)
VARIANTS: dict[str, dict[str, Any]] = {
    "average": {},
    "aligned": {"alignment": {"method": "mudsc", "weight_share": 0.5}},
    "least squares": {"merge_method": "least_squares"},
    "aligned, least squares": {
        "merge_method": "least_squares",
        "alignment": {"method": "mudsc", "weight_share": 0.5},
    },
}
COLUMNS = ("seed", "shared", "rank", "storage_ratio", "relative_error", "given", "routed", "worst", "router")
_VALIDATION = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for trained experts and data, as of alignment.py")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    logging.set_verbosity_error()
    options.results.mkdir(parents=True, exist_ok=True)
    source, rows = load_source(FAMILY, options.work), []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            entries = write_pair(pair(FAMILY, PAIRING, seed, source, options.work), source, Path(scratch))
            for shared, parts in VARIANTS.items():
                for rank in options.ranks:
                    rows.append(measure(entries, parts, rank, seed, Path(scratch)) | {"seed": seed, "shared": shared})
                    print(" ".join(f"{rows[-1][key]!s:>10}" for key in COLUMNS), flush=True)
                    write(rows, options.results / "alignment_routed.csv")
    draw(rows, options.results / "alignment_routed.png")


def write_pair(experts: list[tuple[Any, Task]], source: Source, folder: Path) -> list[dict]:
    """Checkpoints with a tokenizer, and their rows as JSONL; returns the recipe's `experts`."""
    entries = []
    for model, task in experts:
        place = folder / task.name
        model.save_pretrained(place)
        tokenizer(source).save_pretrained(place)
        order = torch.randperm(len(task.train_labels), generator=torch.Generator().manual_seed(0))
        parts = {
            "train": (task.train, task.train_labels, order[_VALIDATION:].tolist()),
            "validation": (task.train, task.train_labels, order[:_VALIDATION].tolist()),
            "test": (task.test, task.test_labels, range(len(task.test_labels))),
        }
        data = {}
        for split, (inputs, labels, chosen) in parts.items():
            data[split] = str(folder / f"{task.name}.{split}.jsonl")
            lines = dict.fromkeys(
                json.dumps({"text": text(inputs["input_ids"][i], source), "label": task.names[labels[i]]}) + "\n"
                for i in chosen
            )
            Path(data[split]).write_text("".join(lines), encoding="utf-8")
        drop_seen(data)
        entries.append({"name": task.name, "model": str(place), "data": data})
    return entries


def text(ids: torch.Tensor, source: Source) -> str:
    """The words of a row, behind its first token."""
    return " ".join(source.words[i] for i in ids.tolist()[1:] if i)  # type: ignore[index]


def drop_seen(data: dict[str, str]) -> None:
    """Leave out held-out rows that are also among those before them (posts sent twice)."""
    seen: set[str] = set()
    for split in ("train", "validation", "test"):
        lines = [line for line in Path(data[split]).read_text(encoding="utf-8").splitlines(True)]
        kept = [line for line in lines if json.loads(line)["text"] not in seen]
        seen |= {json.loads(line)["text"] for line in kept}
        Path(data[split]).write_text("".join(kept), encoding="utf-8")


def tokenizer(source: Source) -> PreTrainedTokenizerFast:
    """The ids that alignment_data.py gives its words."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(source.words or [])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", model_max_length=64
    )


def measure(entries: list[dict], parts: dict, rank: int, seed: int, scratch: Path) -> dict[str, Any]:
    """One artifact: bytes and scores on test rows, relative to the experts."""
    recipe = {"merge_method": "linear", **parts, "seed": seed, "router": {"type": "auto"}}
    recipe |= {"exclusive": {"method": "svd", "rank": rank, "dtype": "int4"}}
    recipe["experts"] = [
        {**entry, "data": {k: v for k, v in entry["data"].items() if k != "test"}} for entry in entries
    ]
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder = Path(place) / "artifact"
        report = build_artifact(parse_recipe(recipe), folder, Progress(quiet=True)).report
        found = evaluate_artifact(folder, {entry["name"]: entry["data"]["test"] for entry in entries})
    return {
        "rank": rank,
        "storage_ratio": round(found["storage"]["ratio"], 4),
        "relative_error": round(report["exclusive"]["relative_error"], 4),
        "given": round(found["given"]["normalised_mean"], 2),
        "routed": round(found["routed"]["normalised_mean"], 2),
        "worst": round(found["routed"]["minimum"]["normalised"], 2),
        "router": round(100 * found["router"]["accuracy"], 2),
    }


def write(rows: list[dict], file: Path) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict], file: Path) -> None:
    """Normalised scores over bytes, a line for each shared model (mean over seeds)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, column in zip(axes, ("given", "routed"), strict=True):
        for shared in VARIANTS:
            points: dict[int, list[dict]] = {}
            for row in rows:
                if row["shared"] == shared:
                    points.setdefault(row["rank"], []).append(row)
            means = [
                [sum(r[key] for r in each) / len(each) for key in ("storage_ratio", column)] for each in points.values()
            ]
            axis.plot(*zip(*means, strict=True), "o-", ms=4, label=shared)
        axis.set(title=f"task {column}" if column == "given" else column, xlabel="bytes / one model")
    axes[0].set_ylabel("normalised score in %")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
