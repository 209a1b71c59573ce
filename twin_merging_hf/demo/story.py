"""The demo from end to end: train experts, build the artifact, load it back, use it, and score everything on test rows."""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils import logging as transformers_logging

from twin_merging_hf.artifact import refuse_existing, write_json
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.data import read_rows
from twin_merging_hf.errors import require_extra
from twin_merging_hf.evaluation import (
    accuracy,
    artifact_outputs,
    checkpoint_model,
    model_outputs,
    static_merge,
)
from twin_merging_hf.pictures import draw_confusion, draw_scores
from twin_merging_hf.preflight import Inputs, preflight
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.shared_merge import merge_settings
from twin_merging_hf.verdict import describe


RECIPE = """\
base_model: base
merge_method: linear
experts:
{experts}
exclusive: {{method: svd, rank: 16}}
router: {{type: linear}}
seed: {seed}
"""
EXPERT = """\
  - name: {name}
    model: experts/{name}
    data: {{train: data/{name}/train.jsonl, validation: data/{name}/validation.jsonl, test: data/{name}/test.jsonl}}
"""


@dataclass(frozen=True)
class Scores:
    """One line of the table: a method and its accuracy on each task's test rows."""

    method: str
    by_task: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.by_task.values()) / len(self.by_task)

    def normalised(self, experts: "Scores") -> float:
        """Mean over tasks of score / own expert's score."""
        return sum(score / experts.by_task[task] for task, score in self.by_task.items()) / len(self.by_task)


def tell(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """
    Run the whole demo into `folder`.

    Raises:
        TwinMergingError: `folder` exists, or a package of the demo extra is missing.
    """
    refuse_existing(folder)
    for module in ("sklearn", "PIL", "matplotlib"):
        require_extra(module, extra="demo")
    start = time.monotonic()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        from .experts import one_thread

        with one_thread():
            _tell(folder, seed, say)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    say(f"\nThe whole demo took {time.monotonic() - start:.0f} seconds.")


def _tell(folder: Path, seed: int, say: Callable[[str], None]) -> None:
    say("1. Four experts, fine-tuned from one small ViT on scikit-learn's handwritten digits")
    recipe = make_experts(folder, seed, say)
    say("\n2. One artifact: shared backbone, small deltas, router")
    built = build_artifact(recipe, folder / "artifact", Progress())
    for line in describe(built.verdict):
        say(f"   {line}")
    say("\n3. Loaded back like any other model")
    model = AutoModelForImageClassification.from_pretrained(built.folder).eval()
    inputs = preflight(load_recipe(recipe))
    show_pipeline(built.folder, inputs, say)
    say("\n4. Test rows, which nothing above has seen")
    table, confusion = score_all(model, inputs, say)
    inputs.close()
    report(folder, table, confusion, inputs, built.report["storage"], say)


def make_experts(folder: Path, seed: int, say: Callable[[str], None]) -> Path:
    """Train base and experts, write their data and the recipe; return the recipe's path."""
    # Imported here, after the check that the packages of the demo extra are there.
    from .digits import TASKS, load_splits, write_task_files
    from .experts import fine_tune, pretrain

    splits = load_splits(seed)
    base = pretrain(splits, folder, seed, say)
    for task in TASKS:
        write_task_files(folder / "data", task, splits)
        fine_tune(base, task, splits, folder, seed, say)
    recipe = folder / "recipe.yaml"
    experts = "".join(EXPERT.format(name=task.name) for task in TASKS)
    recipe.write_text(RECIPE.format(experts=experts.rstrip("\n"), seed=seed), encoding="utf-8")
    return recipe


def test_rows(inputs: Inputs, expert: int) -> list[dict]:
    """Test rows of an expert's task."""
    data = inputs.recipe.experts[expert].data
    assert data is not None and data.test is not None
    return read_rows(data.test, inputs.kind, inputs.entries[expert]["labels"], regression=False)


def show_pipeline(artifact: Path, inputs: Inputs, say: Callable[[str], None]) -> None:
    """Give one image of each task to a pipeline, in one batch, and say what comes back."""
    rows = [test_rows(inputs, expert)[0] for expert in range(len(inputs.experts))]
    pipe = pipeline("image-classification", model=str(artifact))
    answers = pipe([str(row["image"]) for row in rows], batch_size=len(rows))
    for row, entry, answer in zip(rows, inputs.entries, answers, strict=True):
        truth = f"{entry['name']}/{entry['labels'][row['label']]}"
        say(
            f"   {row['image'].parent.parent.parent.name:<8} image -> {answer[0]['label']} ({answer[0]['score']:.2f}), is {truth}"
        )


def score_all(
    model: torch.nn.Module, inputs: Inputs, say: Callable[[str], None]
) -> tuple[list[Scores], list[list[int]]]:
    """
    Accuracy of every method on every task's test rows, and the artifact's routing confusion.

    Static merges get each task's own head; so does the artifact "with the task given". Routed by itself, a label of
    another expert counts as wrong.
    """
    names = inputs.recipe.names
    methods = ("base", "linear", "task_arithmetic")
    table: dict[str, dict[str, float]] = {}
    confusion = []
    for index, name in enumerate(names):
        rows, processing = test_rows(inputs, index), inputs.processing
        assert processing is not None
        for method in methods:
            table.setdefault(method, {})[name] = accuracy(
                model_outputs(static_merge(inputs, index, method), rows, processing), rows
            )
        expert = checkpoint_model(inputs.experts[index])
        table.setdefault("expert", {})[name] = accuracy(model_outputs(expert, rows, processing), rows)
        columns = model.label_space.columns(index)  # type: ignore[union-attr, operator]
        routed = artifact_outputs(model, rows, processing)
        given = artifact_outputs(model, rows, processing, name)
        table.setdefault("routed", {})[name] = accuracy(routed.logits, rows, columns)
        table.setdefault("given", {})[name] = accuracy(given.logits, rows, columns)
        chosen = routed.expert_weights.argmax(dim=1)
        confusion.append(torch.bincount(chosen, minlength=len(names)).tolist())
    titles = {
        "base": "pretrained",
        "linear": "mean of the experts",
        "task_arithmetic": f"task arithmetic ({merge_settings(inputs.recipe, 'task_arithmetic').scaling:g})",
        "routed": "artifact, routed by itself",
        "given": "artifact, task given",
        "expert": "each task's own expert",
    }
    return [Scores(title, table[key]) for key, title in titles.items()], confusion


def report(
    folder: Path, table: list[Scores], confusion: list, inputs: Inputs, size: dict, say: Callable[[str], None]
) -> None:
    """Print the table, draw it and the confusion, and say where everything lies and how to use it."""
    experts, names = table[-1], inputs.recipe.names
    example = test_rows(inputs, 1)[0]["image"]
    shown = Table(title="Accuracy on test rows")
    shown.add_column("method")
    for name in [*names, "mean", "normalised"]:
        shown.add_column(name, justify="right")
    for line in table:
        cells = [f"{line.by_task[name]:.1%}" for name in names]
        shown.add_row(line.method, *cells, f"{line.mean:.1%}", f"{line.normalised(experts):.1%}")
    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(shown)
    say(text.getvalue().rstrip())
    results = [{"method": x.method, **x.by_task, "mean": x.mean, "normalised": x.normalised(experts)} for x in table]
    write_json(folder / "scores.json", {"scores": results, "confusion": confusion, "experts": names})
    draw_scores(folder / "scores.png", [(x.method, x.by_task) for x in table], "Accuracy on test rows")
    draw_confusion(folder / "confusion.png", names, confusion, title="Router, test rows")
    say(
        f"\nFour checkpoints would be {4 * size['shared'] / 1e6:.2f} MB; the artifact is {size['total'] / 1e6:.2f} MB "
        f"({size['ratio']:.2f} times one).\n"
        "Rank 16 is much beside matrices 64 wide; beside those of real models it is little.\n\n"
        f"artifact: {folder / 'artifact'}\npictures: {folder / 'scores.png'}, {folder / 'confusion.png'}\n"
        "use it:\n"
        "  import twin_merging_hf\n"
        "  from transformers import pipeline\n"
        f'  pipe = pipeline("image-classification", model="{folder / "artifact"}")\n'
        f'  pipe("{example}")'
    )
