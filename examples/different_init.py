"""Experts that do not share an initialisation: with and without alignment (MuDSC).

    python examples/different_init.py different

Trains two small ViTs from different random weights on the two halves of the digits (0-4 and 5-9), and builds one
artifact of them with `alignment: auto` and one without, at a rank so low that the shared model matters.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import ViTForImageClassification

from twin_merging_hf.builder import build_artifact
from twin_merging_hf.demo.digits import load_splits, render
from twin_merging_hf.demo.experts import image_processor, model_config, pixel_values


HALVES = {"low": range(5), "high": range(5, 10)}
RANK, EPOCHS = 2, 30


def train(name, digits, splits, folder, seed):
    """A ViT from random weights of its own, on one half of the digits."""
    torch.manual_seed(seed)
    labels = tuple(str(digit) for digit in digits)
    model = ViTForImageClassification(model_config(labels))
    rows = [i for i in splits.rows("train") if splits.digits[i] in digits]
    pixels = pixel_values(splits.images[rows], "upright")
    targets = torch.tensor([int(splits.digits[i]) - digits[0] for i in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(rows)).split(64):
            model(pixel_values=pixels[batch], labels=targets[batch]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder / name)
    image_processor().save_pretrained(folder / name)


def write_rows(name, digits, splits, folder):
    """The half's rows as pictures and JSONL, for the router."""
    (folder / "images").mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        lines = []
        for i in splits.rows(split):
            if splits.digits[i] in digits:
                file = folder / "images" / f"{i}.png"
                render(splits.images[i], "upright").save(file)
                lines.append(json.dumps({"image": f"images/{file.name}", "label": str(splits.digits[i])}))
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("out", type=Path)
    args = options.parse_args()
    args.out.mkdir(parents=True)
    splits = load_splits(0)
    for seed, (name, digits) in enumerate(HALVES.items()):
        train(name, digits, splits, args.out, seed)
        write_rows(name, digits, splits, args.out)
    experts = [
        {
            "name": name,
            "model": name,
            "data": {split: f"{name}.{split}.jsonl" for split in ("train", "validation", "test")},
        }
        for name in HALVES
    ]
    for title, alignment in (("plain", {}), ("aligned", {"alignment": "auto"})):
        recipe = {
            "merge_method": "linear",
            "experts": experts,
            "exclusive": {"rank": RANK},
            "router": "auto",
            **alignment,
        }
        (args.out / f"{title}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        result = build_artifact(args.out / f"{title}.yaml", args.out / title)
        routed = np.mean(list(result.verdict.agreement.values()))
        given = np.mean(list(result.verdict.given.values()))
        print(
            f"{title}: agrees with the experts on {routed:.1%} of held-out rows (expert given: {given:.1%}), rank {RANK}"
        )


if __name__ == "__main__":
    main()
