"""
What alignment is worth: pairs of small experts with and without a common initialisation, merged in every mode.

    python benchmarks/alignment.py work/alignment --families mlp resnet-bn --seeds 4

Writes alignment.csv (one row a cell), alignment_summary.csv (means over seeds with intervals of paired differences from the
plain average) and pictures to --results; experts are kept in the work folder. Prints every cell.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from alignment_data import load_source
from alignment_merges import DUAL, SHARES, aligned, average, calibration, fitted, scores, zipped
from alignment_models import FAMILIES, register_perceptron
from alignment_summary import write_summary
from alignment_training import PAIRINGS, pair


COLUMNS = ("family", "pairing", "seed", "mode", "weight_share", "first", "second", "mean", "joint", "seconds")
_DIGITS = ("mlp", "resnet-bn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for trained experts and data")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--pairings", nargs="+", choices=list(PAIRINGS), default=list(PAIRINGS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    register_perceptron()
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "alignment.csv"
    rows = _read(file)
    for family in options.families:
        source = load_source(family, options.work)
        for seed in range(options.seeds):
            for pairing in options.pairings:
                if (pairing == "prime-odd" and family not in _DIGITS) or _is_done(rows, family, pairing, seed):
                    continue
                rows += cells(family, pairing, seed, source, options.work)
                _write(file, rows)
    write_summary(rows, options.results)


def cells(family: str, pairing: str, seed: int, source: Any, work: Path) -> list[dict]:
    """All modes of one pair."""
    experts, tasks = (list(part) for part in zip(*pair(family, pairing, seed, source, work), strict=True))
    batches, same = calibration(tasks), pairing == "same"
    rows: list[dict] = []

    def note(mode: str, models: list[Any], share: float | None, start: float) -> None:
        found = {key: round(100 * value, 2) for key, value in scores(models, tasks).items()}
        taken = round(time.process_time() - start, 2)
        rows.append(_row(family, pairing, seed, mode, share, found, taken))

    start = time.process_time()
    note("experts", experts, None, start)
    plain = average(experts, batches, same)
    note("average", plain.models, None, start)
    start = time.process_time()
    fit, report = fitted(plain, experts, tasks)
    note("least_squares of the average", fit.models, None, start)
    print(f"  loss of the last state: average {report.mean_loss:.3f}, fitted {report.loss:.3f}", flush=True)
    for share in SHARES:
        start = time.process_time()
        moved = aligned(experts, batches, share, seed)
        merge = average(moved, batches, same)
        note(_mode(share), merge.models, share, start)
        if share == DUAL:
            start = time.process_time()
            fit, report = fitted(merge, moved, tasks)
            note("least_squares", fit.models, share, start)
            print(f"  loss of the last state: aligned {report.mean_loss:.3f}, fitted {report.loss:.3f}", flush=True)
        start = time.process_time()
        zip_merge = zipped(experts, batches, share, seed, same)
        if zip_merge is not None:
            note(_mode(share, "zip"), zip_merge.models, share, start)
    return rows


def _mode(share: float, mode: str = "align") -> str:
    return f"{mode}, " + {0.0: "activations", 1.0: "weights"}.get(share, "dual")


def _row(family, pairing, seed, mode, share, found, seconds) -> dict:
    row = {
        "family": family,
        "pairing": pairing,
        "seed": seed,
        "mode": mode,
        "weight_share": "" if share is None else share,
    }
    row |= {key: found.get(key, "") for key in COLUMNS[5:9]} | {"seconds": seconds}
    print(" ".join(f"{row[key]!s:>8}" if key not in ("mode",) else f"{row[key]:<30}" for key in COLUMNS), flush=True)
    return row


def _read(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _is_done(rows: list[dict], family: str, pairing: str, seed: int) -> bool:
    return any((row["family"], row["pairing"], str(row["seed"])) == (family, pairing, str(seed)) for row in rows)


def _write(file: Path, rows: list[dict]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
