"""What must not lie in an artifact's folder, and whether its papers belong to its config."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace


# Formats that can run code when they are read.
_PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# What Transformers reads beside the model; any of them may name code, here or in another repository.
_SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
             "special_tokens_map.json", "tokenizer_config.json")  # fmt: skip
_CODE_KEYS = ("auto_map", "custom_pipelines")
_MOST_BYTES = 1 << 24


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
        if name == "model.safetensors.index.json" and (folder / "model.safetensors").is_file():
            problems.append(f"{name} is of other weights: beside model.safetensors nobody reads it; remove it")
        if name == "adapter_config.json":
            problems.append(f"{name} makes Transformers inject an adapter into the shared model; remove it")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            problems.append(f"{other} and {name} are one file where case does not count; rename one")
    return problems


def settings_problems(folder: Path) -> list[str]:
    """
    Problems of the JSON files that Transformers reads beside the model: one that is none, or that leads to code.

    `trust_remote_code` runs what `auto_map` or `custom_pipelines` name, also from another repository (`NAME/NAME--file.Class`).
    The model's own `auto_map` in config.json is compared elsewhere.
    """
    problems = []
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, more than {_MOST_BYTES}")
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{name} cannot be read: {type(error).__name__}: {error}")
            continue
        # A model's config counts as a whole: nobody follows what the shared model's config in it says about code.
        keys = {"custom_pipelines"} & set(content) if name == "config.json" else set(_CODE_KEYS) & set(_keys(content))
        problems += [
            f"{name}: `{key}` names code that `trust_remote_code` would run and that is not the package's; remove it"
            for key in sorted(keys)
        ]
    return problems


def _keys(content: Any) -> Iterator[str]:
    """All keys of a JSON value, at any depth."""
    if isinstance(content, dict):
        yield from content
        content = list(content.values())
    if isinstance(content, list):
        for item in content:
            yield from _keys(item)


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
