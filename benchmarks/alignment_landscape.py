"""
The loss over the plane through three aligned merges: of activations alone, weights alone, and both (dual).

    python benchmarks/alignment_landscape.py work/alignment --families mlp resnet-bn

Pairs of alignment.py on disjoint labels; the loss is the cross entropy over both heads' labels on the test rows of both tasks.
Writes alignment_landscape.csv (every point) and .png to --results.
"""

import argparse
import copy
import csv
from pathlib import Path
from typing import Any

import torch
from alignment_data import Task, load_source
from alignment_merges import DUAL, aligned, average, calibration
from alignment_models import FAMILIES, register_perceptron
from alignment_training import pair

from twin_merging_hf.alignment import has_batch_norm, reestimate_batch_norm


CORNERS = {"dual": DUAL, "activations": 0.0, "weights": 1.0}
STEPS, MARGIN = 13, 0.4
COLUMNS = ("family", "toward_activations", "toward_weights", "x", "y", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for trained experts and data, as of alignment.py")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["mlp", "resnet-bn"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    register_perceptron()
    options.results.mkdir(parents=True, exist_ok=True)
    points: list[dict] = []
    for family in options.families:
        points += landscape(family, options.seed, options.work)
    with (options.results / "alignment_landscape.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(points)
    draw(points, options.results / "alignment_landscape.png")


@torch.no_grad()
def landscape(family: str, seed: int, work: Path) -> list[dict]:
    """Loss on a grid around the three merges of one pair; `x`, `y` are distances in weight space."""
    found = pair(family, "disjoint", seed, load_source(family, work), work)
    experts, tasks = [model for model, _ in found], [task for _, task in found]
    batches = calibration(tasks)
    merges = [average(aligned(experts, batches, share, seed), batches, False).models for share in CORNERS.values()]
    origin, *others = ([flat(model) for model in models] for models in merges)
    first, second = ([a - b for a, b in zip(other, origin, strict=True)] for other in others)
    # Coordinates that keep lengths and angles of the backbones' plane.
    length = float(first[0].norm())
    along = float(first[0] @ second[0]) / length
    across = max(float(second[0] @ second[0]) - along**2, 0.0) ** 0.5
    models, points = [copy.deepcopy(model) for model in merges[0]], []
    for a in torch.linspace(-MARGIN, 1 + MARGIN, STEPS).tolist():
        for b in torch.linspace(-MARGIN, 1 + MARGIN, STEPS).tolist():
            for model, start, one, two in zip(models, origin, first, second, strict=True):
                put(model, start + a * one + b * two)
                if has_batch_norm(model):
                    reestimate_batch_norm(model, batches)
            loss = joint_loss(models, tasks)
            place = {"x": a * length + b * along, "y": b * across}
            points.append({"family": family, "toward_activations": round(a, 4), "toward_weights": round(b, 4), **place})
            points[-1] |= {"loss": round(loss, 4)}
    for name, corner in (("dual", (0, 0)), ("activations", (1, 0)), ("weights", (0, 1))):
        nearest = min(
            points, key=lambda p: abs(p["toward_activations"] - corner[0]) + abs(p["toward_weights"] - corner[1])
        )
        print(f"{family}: loss near {name} {nearest['loss']:.3f}", flush=True)
    print(f"{family}: least loss {min(point['loss'] for point in points):.3f}", flush=True)
    return points


def flat(model: Any) -> torch.Tensor:
    """All parameters of a model, one after the other."""
    return torch.nn.utils.parameters_to_vector(model.parameters())


def put(model: Any, values: torch.Tensor) -> None:
    torch.nn.utils.vector_to_parameters(values, model.parameters())


def joint_loss(models: list[Any], tasks: list[Task]) -> float:
    """Cross entropy over the labels of both heads, nobody being told the task."""
    width, losses = len(tasks[0].names), []
    for t, task in enumerate(tasks):
        logits = torch.cat([model(**task.test).logits for model in models], dim=1)
        losses.append(torch.nn.functional.cross_entropy(logits, task.test_labels + t * width))
    return float(sum(losses) / len(losses))


def draw(points: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = list(dict.fromkeys(point["family"] for point in points))
    figure, axes = plt.subplots(1, len(families), figsize=(4.6 * len(families), 4), squeeze=False)
    for axis, family in zip(axes.flat, families, strict=True):
        own = [point for point in points if point["family"] == family]
        x, y, loss = ([point[key] for point in own] for key in ("x", "y", "loss"))
        filled = axis.tricontourf(x, y, loss, levels=20)
        figure.colorbar(filled, ax=axis, label="loss")
        for name, corner in (("dual", (0.0, 0.0)), ("activations", (1.0, 0.0)), ("weights", (0.0, 1.0))):
            place = corner_place(own, corner)
            axis.plot(*place, "w^")
            axis.annotate(name, place, color="white", textcoords="offset points", xytext=(5, 5))
        axis.set(title=f"{family}, disjoint labels", xlabel="distance", ylabel="distance")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def corner_place(points: list[dict], corner: tuple[float, float]) -> tuple[float, float]:
    """Where a corner lies; places are linear in the two coordinates, so two grid steps tell."""
    grid = {(p["toward_activations"], p["toward_weights"]): (p["x"], p["y"]) for p in points}
    low, high = min(grid), max(grid)
    ax = (grid[high[0], low[1]][0] - grid[low][0]) / (high[0] - low[0])
    bx, by = ((grid[low[0], high[1]][i] - grid[low][i]) / (high[1] - low[1]) for i in (0, 1))
    return corner[0] * ax + corner[1] * bx, corner[1] * by


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
