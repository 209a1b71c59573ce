"""Our side of the tables: artifacts built by the package from recipes, loaded as any user would load them."""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench import Bench, Part, code_digest
from running import WEIGHTS, OnDemand, run
from scores import Answers
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from twin_merging_hf.builder import build_artifact
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import parse_recipe


# What `twin-merging init` writes.
OURS: dict[str, Any] = {
    "merge_method": "linear",
    "exclusive": {"method": "svd", "rank": 16, "dtype": "int4"},
    "router": {"type": "auto"},
}
AS_BUILT = "as built"


class Artifact:
    """
    One artifact and its answers; built when something is asked that the cache does not hold.

    Args:
        parts: the recipe but for base and experts.
        with_data: without, the build trains no router (for scores with the task given, and data-free routing).
        keep: whether the folder stays; the answers always do.
        held_out: at most so many validation rows of each task.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        parts: dict,
        seed: int = 0,
        with_data: bool = True,
        keep: bool = False,
        held_out: int | None = None,
    ):
        self.bench, self.name, self.keep, self.held_out = bench, name, keep, held_out
        self.recipe = {"base_model": str(bench.base), **parts, "experts": self._experts(with_data), "seed": seed}
        rows = [bench.part(split, 10**9).digest for split in ("train", "validation")] if with_data else []
        self.key = [self.recipe, rows, code_digest()]
        self.report_file = bench.file(name, [self.key, "report"], "json")
        self.folder = bench.cache / "artifacts" / self.report_file.stem
        self._model: Any = None

    def _experts(self, with_data: bool) -> list[dict]:
        entries = []
        for name, path in zip(self.bench.names, self.bench.experts, strict=True):
            entry: dict[str, Any] = {"name": name, "model": str(path)}
            if with_data:
                train = self.bench.data / f"{name}.train.jsonl"
                entry["data"] = {"train": str(train), "validation": str(self._validation(name))}
            entries.append(entry)
        return entries

    def _validation(self, name: str) -> Path:
        whole = self.bench.data / f"{name}.validation.jsonl"
        if self.held_out is None:
            return whole
        lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
        short = whole.with_name(f"{name}.validation-{self.held_out}.jsonl")
        short.write_text("".join(lines[: self.held_out]), encoding="utf-8")
        return short

    def _build(self) -> None:
        if self.folder.exists():
            return
        text = yaml.safe_dump(self.recipe, sort_keys=False)
        recipe = parse_recipe(yaml.safe_load(text), text=text)
        print(f"building {self.name}", flush=True)
        result = build_artifact(recipe, self.folder, Progress(quiet=True))
        self.report_file.parent.mkdir(parents=True, exist_ok=True)
        self.report_file.write_text(json.dumps(result.report))

    @cached_property
    def report(self) -> dict:
        """The build's report."""
        if not self.report_file.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._build()
        return json.loads(self.report_file.read_text())

    @property
    def ratio(self) -> float:
        """All bytes of the artifact's tensors / the base's."""
        return self.report["storage"]["ratio"]

    @property
    def model(self) -> Any:
        if self._model is None:
            self._build()
            kind = self.bench.kind
            auto: Any = AutoModelForImageClassification if kind == "image" else AutoModelForSequenceClassification
            self._model = auto.from_pretrained(self.folder, dtype=torch.float32).eval()
        return self._model

    def close(self) -> None:
        """Forget the model; remove the folder unless it is to stay."""
        _ = self.report
        self._model = None
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- answers ----------------------------------------------------------------------------------------------

    def routed(self, split: str = "test", top_k: int | str | None = AS_BUILT) -> Answers:
        """Answers of the artifact left to itself."""
        arrays = self._routed(split, top_k)
        return Answers(arrays["task"], arrays["label"], arrays["value"], arrays["confidence"])

    def weights(self, split: str = "test") -> np.ndarray:
        """Expert weights [row, expert] that its router gives."""
        return self._routed(split, AS_BUILT)["weights"]

    def _routed(self, split: str, top_k: int | str | None) -> dict[str, np.ndarray]:
        part = self.bench.part(split)
        if top_k != AS_BUILT and self._routed(split, AS_BUILT)["top_k"] == (top_k or 0):
            top_k = AS_BUILT
        return self.bench.cached(
            f"{self.name}-routed", [self.key, part.digest, top_k], lambda: self._run_routed(part, top_k)
        )

    def _run_routed(self, part: Part, top_k: int | str | None) -> dict[str, np.ndarray]:
        model, built = self.model, self.model.config.router_top_k
        model.config.router_top_k = built if top_k == AS_BUILT else top_k

        def step(inputs: dict) -> torch.Tensor:
            output = model(**inputs)
            return torch.cat([output.logits, output.expert_logits, output.expert_weights], dim=1)

        try:
            joined = run(self.bench, part.rows, model, step, f"{self.name}, routed")
        finally:
            model.config.router_top_k = built
        width = len(model.label_space.labels)
        found = union_answers(self.bench, joined[:, :width], joined[:, width : 2 * width], joined[:, 2 * width :])
        return {**found, "top_k": np.array(built or 0)}

    @cached_property
    def on_demand(self) -> OnDemand:
        """Raw outputs of test rows by chosen experts."""
        return OnDemand(self.bench, self.bench.part("test"), f"{self.name}-given", self.key, self._by_hand)

    def chosen(self, experts: np.ndarray) -> Answers:
        """Answers where each test row is given its expert [row] by hand."""
        return self.bench.answer(self.on_demand.get(experts), experts)

    def given(self) -> Answers:
        """Answers with the task given."""
        return self.chosen(self.bench.part("test").gold.task)

    def _by_hand(self, expert: int, rows: list[dict]) -> np.ndarray:
        return all_head_outputs(
            self, rows, f"{self.name}, {self.bench.names[expert]} given", experts=self.bench.names[expert]
        )


def union_answers(bench: Bench, logits: np.ndarray, raw: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What an artifact's outputs over its label space say, as arrays of `Answers` and the expert weights."""
    top, count = logits.argmax(1), len(logits)
    if logits.shape[1] == bench.width:
        owner = np.repeat(np.arange(len(bench.tasks)), [span.stop - span.start for span in bench.spans])
        starts = np.array([span.start for span in bench.spans])
        task, label = owner[top], top - starts[owner[top]]
        value, sure = raw[np.arange(count), starts[task]], np.exp(logits.max(1))
    else:
        task, label, value = weights.argmax(1), top, raw[:, 0]
        sure = np.exp(logits.max(1)) if logits.shape[1] > 1 else np.full(count, np.nan)
    return {"task": task, "label": label, "value": value, "confidence": sure, "weights": weights}


def ours(bench: Bench, seed: int, held_out: int | None = None, **changes: Any) -> Artifact:
    """Our artifact, or a variant of it: `changes` replace parts of the recipe."""
    parts = {**OURS, **bench.ours, **changes}
    name = "ours" if not changes else f"ours-{'-'.join(changes)}"
    return Artifact(bench, name, parts, seed, keep=not changes, held_out=held_out)


def stored(bench: Bench, name: str, exclusive: dict, **parts: Any) -> Artifact:
    """An artifact whose deltas are stored in a certain way; its own router is never asked."""
    shared = {} if "shared_model" in parts else {"merge_method": "linear"}
    recipe = {**shared, **parts, "exclusive": exclusive, "router": {"type": "projection"}}
    return Artifact(bench, name, recipe, with_data=False)


def chosen_router(bench: Bench) -> dict:
    """Router settings that `auto` chose for our artifact: variants of it do not compare again."""
    report = ours(bench, 0).report["router"]
    for entry in report["comparison"]:
        if entry["chosen"]:
            layers = {"layer": entry["layers"]} if entry["pass"] == "prefix" else {}
            return {"type": entry["type"], "pass": entry["pass"], **layers}
    return {**OURS["router"], **bench.ours.get("router", {})}


def all_head_outputs(
    artifact: Artifact, rows: list[dict], title: str, head: nn.Module | None = None, **how: Any
) -> np.ndarray:
    """
    Raw outputs [row, width] of all heads, before they are mixed.

    Args:
        head: instead, one that the artifact does not have, on the features that its own heads read.
        how: arguments of the call, such as `experts`; `expert_weights` [row, expert] is cut into batches.
    """
    model, seen = artifact.model, []
    place = model.shared.get_submodule(model.config.head_modules[0])
    hook = place.register_forward_hook(
        lambda module, args, output: seen.append(output if head is None else head(args[0]))
    )
    weights = how.pop("expert_weights", None)
    rows = rows if weights is None else [{**row, WEIGHTS: w} for row, w in zip(rows, weights, strict=True)]

    def step(inputs: dict) -> torch.Tensor:
        seen.clear()
        given = {} if weights is None else {"expert_weights": inputs.pop(WEIGHTS)}
        model(**inputs, **how, **given)
        return seen[-1]

    try:
        return run(artifact.bench, rows, model, step, title)
    finally:
        hook.remove()
