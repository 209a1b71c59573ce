"""
The benchmark of the inference engine: how much slower than the base model is a mixed batch, by each way to answer it?

    python benchmarks/inference.py                         # everything
    python benchmarks/inference.py --quick                 # fewer rounds and layers: minutes; no figures to publish
    python benchmarks/inference.py --only encoder,decode   # some sections; the others' lines stay in the CSV file
    python benchmarks/inference.py --device cuda           # on a GPU: an 8B-shaped model in bfloat16, with CUDA graphs

Every variant's output is compared with dense models first; a table that has a wrong one is not printed, and the command
ends with status 1. See benchmarks/README.md for what the columns mean.
"""

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from inference_cuda import cuda_sections
from inference_goals import outcomes
from inference_measure import LEAST_REPEATS, Cell, OutputDiffersError, Row, measure
from inference_memory import PLANS as MEMORY_PLANS
from inference_memory import footprint
from inference_sections import SECTIONS, Sizes, full_sizes
from inference_table import draw, read, show, show_outcomes, write, write_outcomes


MEMORY = "memory"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--only", metavar="A,B", help=f"sections: {', '.join((*SECTIONS, MEMORY))}")
    parser.add_argument(
        "--tables", default="", metavar="TEXT", help="only tables whose name contains this, such as 'T=8'"
    )
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="rounds of each table (%(default)s)")
    parser.add_argument(
        "--layers", type=int, default=4, help="of the encoder's 12; ratios hardly depend on it (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds, 1 layer")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR",
                        help="CSV files and the picture (%(default)s)")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """
    Args:
        sizes: other ones than BERT-base's and SmolLM2-135M's, for tests.
    """
    args = options().parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.quick:
        args.repeats, args.layers = 3, 1
    sizes = sizes or full_sizes(args.layers)
    sections = SECTIONS if args.device == "cpu" else cuda_sections(args.device)
    name = "inference" if args.device == "cpu" else "inference_cuda"
    chosen = _chosen(args.only, [*sections, *([MEMORY] if args.device == "cpu" else [])])
    rows = [row for row in read(args.out / f"{name}.csv") if row.section not in chosen or args.tables not in row.cell]
    try:
        for section in chosen:
            for found in _tables(sections[section], sizes, args) if section != MEMORY else ():
                rows += found
                # After each table: a run that is cut off has not been for nothing.
                write(args.out, rows, outcomes(rows), name)
    except OutputDiffersError as error:
        sys.exit(f"error: {error}")
    if rows:
        print(show_outcomes(outcomes(rows)))
        draw(args.out / f"{name}.png", rows)
    if MEMORY in chosen:
        in_memory = [outcome for plan in MEMORY_PLANS for outcome in footprint(*plan).outcomes()]
        print(show_outcomes(in_memory))
        write_outcomes(args.out / f"{name}_memory.csv", in_memory)


def _chosen(only: str | None, sections: list[str]) -> list[str]:
    chosen = sections if only is None else only.split(",")
    for section in chosen:
        if section not in sections:
            sys.exit(f"error: --only: no section {section!r}; there are {', '.join(sections)}")
    return chosen


def _tables(section: Callable[[Sizes], Iterator[Cell]], sizes: Sizes, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure and print the tables of a section, one after the other."""
    for cell in section(sizes):
        if args.tables in cell.name:
            found = measure(cell, args.repeats, quiet=False)
            print(show(found), flush=True)
            yield found
        for close in cell.close:
            close()
        del cell
        gc.collect()


if __name__ == "__main__":
    main()
