"""How often routers find a row's task, by type, layer and model they read, beside a whole fine-tuned model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from artifacts import OURS, stored
from features import Features, features
from methods import Methods
from published import train_mlp
from running import backbone
from scores import calibration_error, right
from table import new_figure, save, write_rows


TRAIN_ROWS = 1000  # of each task, as many as a build takes
Predict = Callable[[np.ndarray], np.ndarray]


def linear(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> Predict:
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=300)).fit(x, y).predict


def centroid(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> Predict:
    """Nearest mean in whitened space, closed form: discriminant analysis with equal priors and shrinkage."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    priors = np.full(int(y.max()) + 1, 1 / (int(y.max()) + 1))
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors).fit(x, y).predict


def knn(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> Predict:
    """Ten nearest rows by cosine, around the train rows' mean."""
    from sklearn.neighbors import KNeighborsClassifier

    centre = x.mean(0)
    model = KNeighborsClassifier(10, metric="cosine").fit(x - centre, y)
    return lambda rows: model.predict(rows - centre)


def mlp(x: np.ndarray, y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> Predict:
    """The paper's network; its epoch by held-out rows."""
    tensors = [torch.tensor(each) for each in (x, y, held_x, held_y)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        router = train_mlp(*tensors, experts=int(y.max()) + 1)
    return lambda rows: router(torch.tensor(rows)).argmax(1).numpy()


TYPES = {"linear": linear, "mlp": mlp, "centroid": centroid, "knn": knn}


def accuracies(found: Features, fit: Callable[..., Predict], layer: int | None) -> tuple[float, float]:
    """Accuracy on validation and test rows of a router at a layer (None: all layers side by side)."""
    x = {s: (v.reshape(len(v), -1) if layer is None else v[:, layer]) for s, v in found.masked.items()}
    predict = fit(x["train"], found.task["train"], x["validation"], found.task["validation"])
    validation, test = (float((predict(x[s]) == found.task[s]).mean()) for s in ("validation", "test"))
    return validation, test


def compare_routers(methods: Methods, seeds: int, out: Path) -> str:
    """The comparison as text; CSV and picture beside it."""
    bench = methods.bench
    mean = lambda: methods.static.state("linear", {}, 0)  # noqa: E731
    models = {"base": lambda: backbone(bench, bench.base), "shared (mean)": mean}
    rows: list[list] = []
    for model, state in models.items():
        found = features(bench, f"routing-{model.split()[0]}", state, TRAIN_ROWS)
        layers = list(range(found.masked["train"].shape[1]))
        for kind, fit in TYPES.items():
            rows += [[model, kind, layer, *accuracies(found, fit, layer)] for layer in layers]
        rows.append([model, "linear", "all", *accuracies(found, linear, None)])
    rows += [_projection(methods), ["our artifact", *_ours(methods, seeds)]]
    if bench.ceiling is not None:
        truth = {split: bench.part(split).gold.task for split in ("validation", "test")}
        found_by = [float((methods.ceiling(s).argmax(1) == truth[s]).mean()) for s in truth]
        rows.append(["base, fine-tuned whole", "ceiling", "all", *found_by])
    write_rows(out.with_suffix(".csv"), ["model", "router", "layer", "validation", "test"], rows)
    _draw(out.with_suffix(".png"), rows)
    lines = [f"{'model':<24}{'router':<22}{'layer':<8}{'validation':>12}{'test':>8}"]
    lines += [f"{model:<24}{kind!s:<22}{at!s:<8}{held:>12.1%}{test:>8.1%}" for model, kind, at, held, test in rows]
    return "Router accuracy\n" + "\n".join([*lines, _calibration(methods, seeds)])


def _projection(methods: Methods) -> list:
    """The package's data-free router, at the middle layer, as a recipe without data gets it."""
    artifact = stored(methods.bench, "projection", {**OURS, **methods.bench.ours}["exclusive"])
    truth = {split: methods.bench.part(split).gold.task for split in ("validation", "test")}
    found = [float((artifact.weights(split).argmax(1) == truth[split]).mean()) for split in truth]
    artifact.close()
    return ["deltas, no data", "projection", "middle", *found]


def _ours(methods: Methods, seeds: int) -> list:
    truth = {split: methods.bench.part(split).gold.task for split in ("validation", "test")}
    found = [
        [float((methods.ours(s).weights(split).argmax(1) == truth[split]).mean()) for split in truth]
        for s in range(seeds)
    ]
    report = methods.ours(0).report["router"]
    return [report["type"], str(report["layers"]), *np.mean(found, axis=0)]


def _calibration(methods: Methods, seeds: int) -> str:
    answers = [methods.ours(seed).routed() for seed in range(seeds)]
    if np.isnan(answers[0].confidence).any():
        return ""
    errors = [calibration_error(a.confidence, right(a, methods.part.gold)) for a in answers]
    return f"ECE of our routed mixture on test rows (15 bins, top label, misrouted rows in): {np.mean(errors):.3f}"


def _draw(path: Path, rows: list[list]) -> None:
    figure, axes = new_figure(7, 4)
    colours = dict(zip(TYPES, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    for model, style in (("base", "-"), ("shared (mean)", "--")):
        for kind, colour in colours.items():
            points = [(r[2], r[4]) for r in rows if r[0] == model and r[1] == kind and isinstance(r[2], int)]
            axes.plot(*zip(*points, strict=True), style, color=colour, label=f"{kind}, {model}", marker="o", ms=3)
    for row in rows:
        if row[1] == "ceiling" or row[0] == "our artifact":
            axes.axhline(row[4], color="black" if row[1] == "ceiling" else "tab:purple", lw=1, label=row[0])
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("router accuracy, test rows")
    axes.legend(fontsize=7, ncols=2)
    save(figure, path)
