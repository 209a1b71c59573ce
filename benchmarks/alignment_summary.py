"""Means over seeds of alignment.py's cells, with intervals of paired differences, as a table and a picture."""

import csv
import math
from pathlib import Path


SUMMARY = ("family", "pairing", "mode", "weight_share", "seeds", "mean", "joint", "over_average", "low", "high")


def write_summary(rows: list[dict], results: Path) -> list[dict]:
    """Write and print alignment_summary.csv and alignment.png; returns the summary's rows."""
    summary = summarise(rows)
    with (results / "alignment_summary.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, SUMMARY)
        writer.writeheader()
        writer.writerows(summary)
    for row in summary:
        print(" ".join(f"{row[key]!s:>10}" if key != "mode" else f"{row[key]:<30}" for key in SUMMARY), flush=True)
    draw(summary, results / "alignment.png")
    return summary


def summarise(rows: list[dict]) -> list[dict]:
    """
    One row a family, pairing, mode and weight share. `over_average`: mean difference from the plain average of the same
    seed, of the joint accuracy (where there is none, of the mean of both tasks); `low`, `high`: its 95 % interval (Student).
    """
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["family"], row["pairing"], row["mode"], str(row["weight_share"]))
        cells.setdefault(key, {})[str(row["seed"])] = row
    summary = []
    for (family, pairing, mode, share), by_seed in cells.items():
        plain = cells[family, pairing, "average", ""]
        seeds = sorted(set(by_seed) & set(plain))
        differences = [_score(by_seed[seed]) - _score(plain[seed]) for seed in seeds]
        low, high = interval(differences)
        joint = [float(row["joint"]) for row in by_seed.values() if row["joint"] != ""]
        summary.append(
            {
                "family": family,
                "pairing": pairing,
                "mode": mode,
                "weight_share": share,
                "seeds": len(seeds),
                "mean": _mean([float(row["mean"]) for row in by_seed.values()]),
                "joint": _mean(joint) if joint else "",
                "over_average": _mean(differences),
                "low": low,
                "high": high,
            }
        )
    return summary


def _score(row: dict) -> float:
    return float(row["mean"] if row["joint"] == "" else row["joint"])


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 2)


def interval(differences: list[float]) -> tuple[float | str, float | str]:
    """95 % interval of the mean of paired differences; empty for fewer than two."""
    count = len(differences)
    if count < 2:
        return "", ""
    from scipy.stats import t

    mean = sum(differences) / count
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1))
    half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return round(mean - half, 2), round(mean + half, 2)


def draw(summary: list[dict], file: Path) -> None:
    """Accuracy by weight share, one panel for each family and pairing; the other modes as level lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["family"], row["pairing"]) for row in summary))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.8 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = [row for row in summary if (row["family"], row["pairing"]) == panel]
        for mode, style in (("align", "o-"), ("zip", "m^-")):
            curve = sorted((float(row["weight_share"]), _score(row)) for row in own if row["mode"].startswith(mode))
            if curve:
                axis.plot(*zip(*curve, strict=True), style, label=mode)
        for mode, style in (("experts", "k:"), ("average", "r--"), ("least_squares", "g-.")):
            for row in (row for row in own if row["mode"] == mode):
                axis.plot([0, 1], [_score(row)] * 2, style, label=mode)
        axis.set(title=" ".join(panel), xlabel="weight share", ylabel="accuracy in %", ylim=(0, 101))
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
