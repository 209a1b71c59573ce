"""Static merges: one backbone for all tasks, its coefficients chosen on validation rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from bench import Bench, Part
from running import backbone, expert_runner, outputs, with_all_heads
from scores import normalised, task_scores

from twin_merging_hf.evaluation import static_merge
from twin_merging_hf.merging import MERGE_METHODS
from twin_merging_hf.preflight import Inputs, preflight
from twin_merging_hf.recipe import parse_recipe


TUNING_ROWS = 100
# Coefficients that are tried; `lambda` acts on the sum of task vectors, TIES and TSV-M on one merged vector. The densities
# are those of the methods' authors.
GRIDS: dict[str, list[dict[str, float]]] = {
    "task_arithmetic": [{"lambda": x} for x in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)],
    "ties": [{"density": 0.2, "lambda": x} for x in (0.5, 1.0, 1.5)],
    "dare_linear": [{"density": 0.1, "lambda": x} for x in (0.15, 0.25, 0.4)],
    "tsv_m": [{"lambda": x} for x in (0.5, 1.0, 1.5)],
    "iso_c": [{"lambda": x} for x in (0.5, 1.0, 1.5)],
}
SEEDED = ("dare_linear",)


@dataclass
class StaticMerges:
    """All static merges of a bench, all heads on each."""

    bench: Bench
    _vector: tuple | None = field(default=None, repr=False)

    @cached_property
    def inputs(self) -> Inputs:
        return preflight(self._recipe("linear", {}, 0))

    def _recipe(self, method: str, parameters: dict, seed: int):
        names, paths = self.bench.names, self.bench.experts
        experts = [{"name": name, "model": str(path)} for name, path in zip(names, paths, strict=True)]
        known = method if method in MERGE_METHODS else "linear"
        content = {"base_model": str(self.bench.base), "experts": experts, "merge_method": known, "seed": seed}
        return parse_recipe({**content, "parameters": parameters if known == method else {}})

    def raw(self, method: str, parameters: dict, seed: int, part: Part) -> np.ndarray:
        """Raw outputs of all heads [row, width] on a merged backbone; `base` is the base model's."""

        def compute() -> dict[str, np.ndarray]:
            model = with_all_heads(self.bench, self.state(method, parameters, seed))
            return {"raw": outputs(self.bench, model, part.rows, f"{method} {parameters or ''}")}

        key = [method, parameters, seed if method in SEEDED else 0, part.digest]
        return self.bench.cached(f"static-{method}", key, compute)["raw"]

    def state(self, method: str, parameters: dict, seed: int) -> dict[str, torch.Tensor]:
        """Merged backbone tensors: base + lambda * merged task vector, which is made once for all lambdas."""
        if method in ("base", "linear"):
            return self._merged(method, {}, seed)
        base = backbone(self.bench, self.bench.base)
        rest = {key: value for key, value in parameters.items() if key != "lambda"}
        key = (method, str(rest), seed)
        if self._vector is None or self._vector[0] != key:
            merged = self._merged(method, {**rest, "lambda": 1.0}, seed)
            self._vector = (key, {name: value - base[name] for name, value in merged.items()})
        return {name: base[name] + parameters["lambda"] * value for name, value in self._vector[1].items()}

    def _merged(self, method: str, parameters: dict, seed: int) -> dict[str, torch.Tensor]:
        """By the package, or by `OWN_METHODS` at lambda 1."""
        if method in OWN_METHODS:
            base = backbone(self.bench, self.bench.base)
            experts = [backbone(self.bench, path) for path in self.bench.experts]
            merge = OWN_METHODS[method]
            return {n: start + merge(torch.stack([e[n] - start for e in experts])) for n, start in base.items()}
        merged = static_merge(self.inputs, 0, method, self._recipe(method, parameters, seed))
        return {
            n: v for n, v in merged.state_dict().items() if not n.startswith("classifier.") and v.is_floating_point()
        }

    def tuned(self, method: str, seed: int = 0) -> dict[str, float]:
        """The coefficients with the best normalised score, true heads, on validation rows."""
        part = self.bench.part("validation", TUNING_ROWS)
        gold = part.gold
        own = task_scores(self.bench.answer(expert_runner(self.bench, part).get(gold.task), gold.task), gold)
        scores = []
        for parameters in GRIDS[method]:
            raw = self.raw(method, parameters, 0, part)
            scores.append(normalised(task_scores(self.bench.answer(raw, gold.task), gold), own)[0])
        return GRIDS[method][int(np.argmax(scores))]


def available() -> list[str]:
    """Static methods that can be run: those of this version of the package, and our own."""
    return [method for method in GRIDS if method in MERGE_METHODS or method in OWN_METHODS]


def _as_matrices(vectors: torch.Tensor) -> torch.Tensor | None:
    """Task vectors [expert, *shape] as matrices [expert, m, n], or None where they are no matrices."""
    shape = vectors.shape[1:]
    if sum(size > 1 for size in shape) < 2:
        return None
    return vectors.reshape(len(vectors), -1, shape[-1]) if len(shape) == 3 else vectors.flatten(2)


def tsv_m(vectors: torch.Tensor) -> torch.Tensor:
    """
    TSV-Merge (arXiv 2412.00081): of each task the leading 1/T of singular vectors, made orthogonal across tasks.

    Vectors [expert, n] are averaged, as there.
    """
    matrices = _as_matrices(vectors)
    if matrices is None:
        return vectors.mean(0)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    kept = max(1, s.shape[1] // len(s))
    left, right = torch.cat(list(u[..., :kept]), dim=1), torch.cat(list(vh[:, :kept]), dim=0)
    merged = (_nearest_orthogonal(left) * s[:, :kept].flatten()) @ _nearest_orthogonal(right)
    return merged.reshape(vectors.shape[1:])


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def iso_c(vectors: torch.Tensor) -> torch.Tensor:
    """Iso-C (arXiv 2502.04959): the sum of task vectors with all its singular values set to their mean."""
    matrices = _as_matrices(vectors)
    if matrices is None:
        return vectors.mean(0)
    u, s, vh = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    return (s.mean() * u @ vh).reshape(vectors.shape[1:])


OWN_METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    name: method for name, method in {"tsv_m": tsv_m, "iso_c": iso_c}.items() if name not in MERGE_METHODS
}
