"""What both commands do once there is a bench: options, the table, the router comparison, the sweeps."""

import argparse
import time
from pathlib import Path

import torch
import transformers
import yaml
from bench import Bench
from methods import Method, Methods
from router_comparison import compare_routers
from scores import Answers
from sweeps import SWEEPS
from table import draw, make_lines, show, write_csv


ROUTERS = "routers"  # among the keys: the comparison of routers


def parser(description: str) -> argparse.ArgumentParser:
    """Options that both commands have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--cache", type=Path, default=Path("~/.cache/twin-merging-benchmarks"), metavar="DIR",
                         help="models and answers; a second run continues there (%(default)s)")  # fmt: skip
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR",
                         help="CSV files and pictures (%(default)s)")  # fmt: skip
    options.add_argument("--seeds", type=int, default=3, help="of routers, splits, DARE, sketches (%(default)s)")
    options.add_argument("--rows", type=int, metavar="N", help="at most N test rows of each task (all)")
    options.add_argument("--only", metavar="A,B", help="only these methods, by the keys of the CSV file")
    options.add_argument("--sweeps", metavar="A,B", help=f"instead of the table: {', '.join(SWEEPS)}, or all")
    options.add_argument("--ours", type=Path, metavar="FILE", help="YAML with other parts of our recipe")
    options.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    return options


def prepare(args: argparse.Namespace) -> None:
    """Threads, messages and the cache's place, before any model."""
    set_up(args.threads)
    args.cache = args.cache.expanduser().absolute()


def set_up(threads: int) -> None:
    """What each process of a command needs."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def our_recipe(args: argparse.Namespace) -> dict:
    return yaml.safe_load(args.ours.read_text(encoding="utf-8")) if args.ours else {}


def run_table(bench: Bench, args: argparse.Namespace, name: str, notes: list[str]) -> None:
    """Print and write the table and the router comparison."""
    methods = Methods(bench)
    wanted = None if args.only is None else args.only.split(",")
    listed = [m for m in methods.all() if wanted is None or m.key in wanted]
    unknown = set(wanted or ()) - {m.key for m in listed} - {ROUTERS}
    if unknown:
        raise SystemExit(
            f"--only: no method {sorted(unknown)[0]!r}; there are {', '.join(m.key for m in methods.all())}, {ROUTERS}"
        )
    found = [(method, _answers(method, args.seeds)) for method in listed]
    gold = methods.part.gold
    experts = bench.answer(methods.experts.get(gold.task), gold.task)
    lines = make_lines(found, experts, gold)
    sizes = ", ".join(f"{task.name} {int((gold.task == i).sum())}" for i, task in enumerate(bench.tasks))
    print(f"\nTest rows: {sizes}. Scores in %; regressions: Pearson's correlation. {args.seeds} seeds.")
    print(show(lines, bench.names))
    for note in notes:
        print(note)
    write_csv(args.out / f"{name}.csv", lines, bench.names)
    draw(args.out / f"{name}.png", lines, f"{name.replace('_', ' ')}: normalised score, 95 % intervals over rows")
    if wanted is None or ROUTERS in wanted:
        print("\n" + compare_routers(methods, args.seeds, args.out / f"{name}_router_layers"))


def _answers(method: Method, seeds: int) -> list[Answers]:
    started = time.monotonic()
    found = [method.answers(seed) for seed in range(seeds if method.seeded else 1)]
    print(f"{method.key}: {time.monotonic() - started:.0f} s", flush=True)
    return found


def run_sweeps(bench: Bench, args: argparse.Namespace, name: str, train_longer=None) -> None:
    """Run the chosen sweeps; a CSV file and a picture each."""
    chosen = list(SWEEPS) if args.sweeps == "all" else args.sweeps.split(",")
    for sweep in chosen:
        if sweep not in SWEEPS:
            raise SystemExit(f"--sweeps: no sweep {sweep!r}; there are {', '.join(SWEEPS)}")
    for sweep in chosen:
        print(f"\n{sweep}: " + SWEEPS[sweep](bench, args.out / f"{name}_{sweep}", train_longer), flush=True)
