"""An evaluation in words and files: lines for people, JSON and a picture beside it."""

from pathlib import Path

from .artifact import write_json
from .errors import TwinMergingError
from .pictures import draw_evaluation


# Of language models, encoder-decoders having no pipeline.
_WITHOUT_HEADS = ("text-generation", None)


def table(evaluation: dict) -> list[str]:
    """The scores of `evaluate_artifact` in lines of equal columns, and what else was measured."""
    columns = {"expert": evaluation["experts"]["scores"]}
    columns |= {method: scores["raw"] for method, scores in _methods(evaluation).items()}
    percent = {f"{method} %": scores["normalised"] for method, scores in _methods(evaluation).items()}
    width = max(12, *(len(name) + 2 for name in evaluation["data"]))
    lines = [_row("task", width, "metric", ["rows", *columns, *percent])]
    for name, task in evaluation["data"].items():
        raw = [_number(scores[name], 4) for scores in columns.values()]
        relative = [_number(scores[name], 2) for scores in percent.values()]
        lines.append(_row(name, width, task["metric"], [str(task["rows"]), *raw, *relative]))
    means = [_number(scores["raw_mean"], 4) for scores in _methods(evaluation).values()]
    relative = [_number(scores["normalised_mean"], 2) for scores in _methods(evaluation).values()]
    lines.append(_row("mean", width, "", ["", "", *means, *relative]))
    lowest = [_number((scores["minimum"] or {}).get("normalised"), 2) for scores in _methods(evaluation).values()]
    lines.append(_row("minimum", width, "", ["", "", *("" for _ in means), *lowest]))
    lines.append(f"% of the own expert's score; experts: {evaluation['experts']['source']}")
    if evaluation["merges"] and evaluation["task"] not in _WITHOUT_HEADS:
        lines.append(f"static merges ({', '.join(evaluation['merges'])}) have the true task's head, which no user has")
    return [*lines, "", *_measured(evaluation), *(f"note: {note}" for note in evaluation["notes"])]


def _methods(evaluation: dict) -> dict[str, dict]:
    return {"routed": evaluation["routed"], "given": evaluation["given"], **evaluation["merges"]}


def _row(task: str, width: int, metric: str, cells: list[str]) -> str:
    return f"{task:<{width}}{metric:<17}" + "".join(f"{cell:>{max(10, len(cell) + 2)}}" for cell in cells)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _measured(evaluation: dict) -> list[str]:
    router, sizes, times = evaluation["router"], evaluation["storage"], evaluation["time"]
    lines = ["routed minus given, with the 95 % interval of a paired bootstrap:"]
    for name, found in evaluation["difference"].items():
        lines.append(f"  {name}: {found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]")
    lines.append(f"router accuracy: {router['accuracy']:.2%} of {router['rows']} rows, {router['none']} routed to none")
    lines += [f"  {line}" for line in _confusion(evaluation)]
    if evaluation["calibration"] is None:
        lines.append("calibration: no rows of classes, so neither ECE nor NLL")
    else:
        found = evaluation["calibration"]
        lines.append(f"calibration, routed: ECE {found['ece']:.4f}, NLL {found['nll']:.4f} ({found['rows']} rows)")
    lines.append(f"storage: {sizes['total'] / 1e6:.2f} MB, {sizes['ratio']:.4f} times the shared backbone")
    low, high = times["ratio_spread"]
    lines.append(
        f"time: {times['ratio']:.2f} times the shared model alone ({low:.2f} to {high:.2f} in {times['repeats']} runs of "
        f"{times['batch']} rows on {times['device']})"
    )
    return lines


def _confusion(evaluation: dict) -> list[str]:
    columns, counts = evaluation["router"]["confusion_columns"], evaluation["router"]["confusion"]
    rows = [(name, row) for name, row in zip(columns, counts, strict=False) if sum(row)]
    width = max(9, *(len(name) + 2 for name in columns))
    lines = [" " * width + "".join(f"{name:>{width}}" for name in columns) + "   (chosen)"]
    return lines + [f"{name:<{width}}" + "".join(f"{count:>{width}}" for count in row) for name, row in rows]


def refuse_existing_files(out: Path) -> None:
    """Raise `TwinMergingError` if the JSON or the picture would be written over something, or cannot be written."""
    if out.suffix != ".json":
        raise TwinMergingError(f"{out} must end in .json; the picture goes beside it with .png")
    for path in (out, out.with_suffix(".png")):
        if path.exists():
            raise TwinMergingError(f"{path} exists already; choose another file with -o")


def write_evaluation(out: Path, evaluation: dict) -> list[Path]:
    """
    Write JSON to `out` and a picture beside it; return the files written.

    Without matplotlib there is no picture, and `notes` of the evaluation gets one line that says so.
    """
    picture = out.with_suffix(".png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        written = [out]
        try:
            _draw(picture, evaluation)
            written.append(picture)
        except TwinMergingError:
            evaluation["notes"].append(
                "no picture, because matplotlib is not installed; run `pip install 'twin-merging-hf[evaluate]'`"
            )
        write_json(out, evaluation)
    except OSError as error:
        raise TwinMergingError(f"{out} cannot be written: {error}") from error
    return written


def _draw(path: Path, evaluation: dict) -> None:
    router = evaluation["router"]
    methods = {name: evaluation[name] for name in ("routed", "given")}
    scores = {
        "Raw score": {name: found["raw"] for name, found in methods.items()},
        "Normalised score, % of the own expert's": {name: found["normalised"] for name, found in methods.items()},
    }
    draw_evaluation(path, router["confusion_columns"][:-1], router["confusion"], scores)
