"""What must not lie in an artifact's folder, and whether its papers belong to its config."""

import hashlib
import json
from pathlib import Path

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace


# Formats that can run code when they are read.
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")


def stray_files(folder: Path, code: set[str]) -> list[str]:
    """
    Problems with files that an artifact must not have: pickles, code that is not the package's, two names that are one
    where case does not count.
    """
    problems: list[str] = []
    seen: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in _PICKLES:
            problems.append(f"{name} may be a pickle, which can run code when it is read; remove it")
        if path.suffix == ".py" and name not in code and "__pycache__" not in path.parts:
            problems.append(f"{name} is not model code of the installed package; remove it")
        if name == "adapter_config.json":
            problems.append(f"{name} makes Transformers inject an adapter into the shared model; remove it")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            problems.append(f"{other} and {name} are one file where case does not count; rename one")
    return problems


def paper_problems(config: TwinMergingConfig, report: Path, recipe: Path) -> list[str]:
    """Problems of the report and the recipe that stand in an artifact's list of companions."""
    problems = []
    if config.label_names != list(LabelSpace.of(config.experts).labels):
        problems.append("config.json: `id2label` does not follow from the labels of `experts`")
    if report.is_file():
        try:
            content = json.loads(report.read_text(encoding="utf-8"))
            names = [expert["name"] for expert in content["experts"]]
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            return [*problems, f"{report.name} cannot be read: {type(error).__name__}: {error}"]
        if names != config.expert_names:
            problems.append(f"{report.name} is about other experts ({', '.join(map(str, names))}) than config.json")
    recorded = config.provenance.get("recipe_sha256")
    if recorded is not None and recipe.is_file() and hashlib.sha256(recipe.read_bytes()).hexdigest() != recorded:
        problems.append(f"{recipe.name} is not the recipe that config.json records (`provenance.recipe_sha256`)")
    return problems
