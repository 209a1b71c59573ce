"""Pictures that people would rather see than read. Drawn with matplotlib, an extra."""

from pathlib import Path
from typing import Any

from .errors import require_extra


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    matplotlib = require_extra("matplotlib", "plot")
    matplotlib.use("Agg")
    pyplot = require_extra("matplotlib.pyplot", "plot")
    return pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    # No dates or versions in the file, so that the same build gives the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    require_extra("matplotlib.pyplot", "plot").close(figure)


def draw_confusion(
    path: Path, names: list[str], confusion: list[list[int]], title: str = "Router, held-out rows"
) -> None:
    """Draw a router's confusion: rows are the experts that rows belong to, columns those chosen; shares of each row."""
    size = 2.2 + 0.7 * len(names)
    figure, axes = _figure(size + 0.8, size)
    _confusion_panel(axes, names, names, confusion)
    axes.set_title(title)
    _save(figure, path)


def _confusion_panel(axes: Any, chosen: list[str], names: list[str], confusion: list[list[int]]) -> None:
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(chosen)), chosen, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("chosen expert")
    axes.set_ylabel("expert the row belongs to")
    for i, row in enumerate(confusion):
        for j, count in enumerate(row):
            axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")


def draw_evaluation(
    path: Path, names: list[str], confusion: list[list[int]], scores: dict[str, dict[str, dict[str, float | None]]]
) -> None:
    """
    Draw an evaluation: the router's confusion, and bars of raw and of normalised scores by task.

    Args:
        confusion: [expert, chosen expert or none last] counts.
        scores: panel title -> method -> task -> score; one that is undefined (None) has no bar.
    """
    size = 3 + 0.6 * len(names)
    figure, panels = _figure(size * (1 + len(scores)), size, columns=1 + len(scores))
    _confusion_panel(panels[0], [*names, "none"], names, confusion)
    panels[0].set_title("Router, evaluated rows")
    for axes, (title, methods) in zip(panels[1:], scores.items(), strict=True):
        tasks = list(next(iter(methods.values())))
        width = 0.8 / len(methods)
        for index, (method, by_task) in enumerate(methods.items()):
            positions = [i + (index - (len(methods) - 1) / 2) * width for i in range(len(tasks))]
            values = [by_task[task] for task in tasks]
            heights = [float("nan") if value is None else value for value in values]
            axes.bar(positions, heights, width=width, label=method)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_title(title)
    figure.legend(*panels[1].get_legend_handles_labels(), ncols=2, loc="outside lower right", frameon=False)
    _save(figure, path)


def draw_alignment(path: Path, experts: dict[str, dict]) -> None:
    """
    Draw alignments: the objective by sweep against the identity's, and matched similarity by site before and after.

    Args:
        experts: by name, as in an alignment's report.
    """
    figure, panels = _figure(11, 4, columns=2)
    for name, found in experts.items():
        line = panels[0].plot(range(len(found["objectives"])), found["objectives"], marker="o", label=name)[0]
        panels[0].axhline(found["identity_objective"], linestyle=":", color=line.get_color())
        sites = {site: values for site, values in found["sites"].items() if values["similarity"] is not None}
        panels[1].plot(range(len(sites)), [values["similarity"] for values in sites.values()], color=line.get_color())
        identity = [values["identity_similarity"] for values in sites.values()]
        panels[1].plot(range(len(sites)), identity, linestyle=":", color=line.get_color())
        step = max(1, len(sites) // 24)
        panels[1].set_xticks(range(0, len(sites), step), list(sites)[::step], rotation=90)
    panels[0].set_xlabel("sweep")
    panels[0].set_ylabel("mean similarity of matched units")
    panels[1].set_title("by site (dotted: nothing moved)")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=4, loc="outside lower center", frameon=False)
    _save(figure, path)


def draw_scores(path: Path, rows: list[tuple[str, dict[str, float]]], title: str) -> None:
    """Draw a table of scores as grouped bars: for each (method, score by task)."""
    tasks = list(rows[0][1])
    figure, axes = _figure(1.6 + 1.1 * len(rows), 4)
    width = 0.8 / len(tasks)
    for index, task in enumerate(tasks):
        positions = [i + (index - (len(tasks) - 1) / 2) * width for i in range(len(rows))]
        axes.bar(positions, [scores[task] for _, scores in rows], width=width, label=task)
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=15, ha="right")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.set_title(title)
    figure.legend(ncols=len(tasks), loc="outside lower center", frameon=False)
    _save(figure, path)
