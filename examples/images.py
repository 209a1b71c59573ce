"""An image artifact in a pipeline: each picture is answered by its own expert.

twin-merging demo                                  # makes twin-merging-demo: four tasks on handwritten digits
python examples/images.py twin-merging-demo
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from transformers import pipeline

import twin_merging_hf  # noqa: F401  registers the model type


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--rows", type=int, default=3, help="pictures of each task (%(default)s)")
    args = options.parse_args()

    pictures = []  # the experts' test rows, one after the other: every batch mixes tasks
    for file in sorted(args.folder.glob("data/*/test.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines()[: args.rows]:
            row = json.loads(line)
            pictures.append((Image.open(file.parent / row["image"]), f"{file.parent.name}/{row['label']}"))

    classify = pipeline("image-classification", model=str(args.folder / "artifact"))
    answers = classify([picture for picture, _ in pictures], batch_size=4, top_k=1)
    right = 0
    for (_, truth), answer in zip(pictures, answers, strict=True):
        right += answer[0]["label"] == truth
        print(f"{truth:<20} {answer[0]['label']:<20} {answer[0]['score']:.2f}")
    print(f"{right} of {len(pictures)} right; nobody said which task a picture belongs to")


if __name__ == "__main__":
    main()
