"""Imports point one way. What each module may import is written down here; a new arrow is a decision, not an accident."""

import ast
import graphlib
import re
import shutil
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = "twin_merging_hf"

# Module -> modules of this project that it may import. Folders (modeling, hub_upload, merging, demo) count as one.
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "distributed": set(),
    "errors": set(),
    "modeling": set(),
    "merging": set(),
    "low_rank": set(),
    "shapes": set(),
    "adapters": {"errors"},
    "adapted": {"adapters", "checkpoints", "errors", "low_rank", "modeling"},
    "product_space": {"adapted", "checkpoints", "low_rank", "modeling", "preflight", "shapes", "shared_merge"},
    "compression": {"low_rank"},
    "budget": set(),
    "quantisation": {"low_rank"},
    "sparsification": set(),
    "prompt_rows": {"errors"},
    "prompts": {"errors"},
    "data": {"errors", "prompt_rows"},
    "pictures": {"errors"},
    "processing": {"errors", "prompts"},
    "recipe": {"errors", "merging", "modeling", "safe_yaml"},
    "batch_statistics": set(),
    "checkpoints": {"adapters", "batch_statistics", "errors", "modeling"},
    "folder_check": {"modeling"},
    "safe_yaml": set(),
    "source_card": {"safe_yaml"},
    "reload_script": set(),
    "reload": {"artifact", "modeling"},
    "verification": {"artifact", "checkpoints", "errors"},
    "artifact": {"distributed", "errors", "folder_check", "modeling"},
    "publish": {"artifact", "errors", "modeling"},
    "hub_upload": {"artifact", "errors", "modeling", "publish", "reload"},
    "inference": {"distributed", "processing", "prompt_rows"},
    "language_evaluation": {"errors", "metrics", "processing", "prompts"},
    "temperature": set(),
    "closed_form": {"errors", "modeling", "temperature"},
    "router_training": {"closed_form", "compression", "errors", "modeling", "recipe", "temperature"},
    "router_choice": {"recipe", "router_training"},
    "metrics": {"errors"},
    "timing": set(),
    "row_hashes": {"data", "errors", "prompt_rows", "recipe"},
    "scoring": {"errors", "evaluation", "metrics"},
    "evaluate_task": {"evaluation", "language_evaluation", "metrics", "processing", "scoring"},
    "evaluate_table": {"artifact", "errors", "pictures"},
    "evaluate_artifact": {
        "align_experts", "artifact", "data", "errors", "evaluate_task", "evaluation", "inference", "language_evaluation",
        "merging", "metrics", "modeling", "preflight", "processing", "progress", "recipe", "row_hashes", "scoring", "timing",
        "verdict",
    },
    "alignment": {"errors", "modeling", "recipe"},
    "late": {"checkpoints", "modeling", "probe", "recipe"},
    "preflight": {
        "adapted", "batch_statistics", "checkpoints", "data", "errors", "late", "modeling", "processing", "recipe",
    },
    "deferred": set(),
    "probe": {"artifact", "deferred", "errors", "modeling"},
    "exclusive": {"artifact", "compression", "errors", "low_rank", "modeling", "quantisation", "sparsification"},
    "separation": {
        "artifact", "budget", "checkpoints", "compression", "errors", "exclusive", "journal", "late", "low_rank",
        "modeling", "preflight", "product_space", "recipe", "shapes", "shared_merge", "workers",
    },
    "journal": set(),
    "workers": set(),
    "evaluation": {"checkpoints", "deferred", "inference", "preflight", "processing", "recipe", "shared_merge"},
    "least_squares": {"modeling"},
    "fitted_merge": {"checkpoints", "errors", "inference", "least_squares", "preflight"},
    "shared_merge": {"checkpoints", "errors", "fitted_merge", "merging", "preflight", "recipe"},
    "token_evaluation": {"errors", "evaluation", "inference", "processing"},
    "verdict": {"checkpoints", "evaluation", "language_evaluation", "preflight", "router_training"},
    "starter": {"adapted", "checkpoints", "data", "errors", "initialisation", "modeling", "preflight", "processing"},
    "progress": set(),
    "build_router": {
        "checkpoints", "closed_form", "data", "deferred", "errors", "inference", "modeling", "preflight", "probe",
        "progress", "recipe", "router_choice", "router_training", "separation",
    },
    "calibration": {"evaluation", "modeling", "preflight", "temperature"},
    "initialisation": {"checkpoints"},
    "align_experts": {
        "alignment", "checkpoints", "data", "errors", "evaluation", "inference", "initialisation", "preflight", "progress",
        "recipe",
    },
    "align_folders": {
        "align_experts", "alignment", "artifact", "checkpoints", "errors", "inference", "pictures", "preflight", "progress",
        "recipe",
    },
    "builder": {
        "_version", "align_experts", "artifact", "build_router", "calibration", "checkpoints", "deferred", "errors",
        "hub_upload", "journal", "modeling", "pictures", "preflight", "probe", "progress", "recipe", "row_hashes",
        "separation", "source_card", "verdict",
    },
    "tuned_recipe": {"distributed", "errors", "recipe"},
    "tuning": {
        "align_experts", "compression", "errors", "evaluation", "language_evaluation", "merging", "modeling", "preflight",
        "progress", "recipe", "separation", "shapes", "shared_merge", "token_evaluation", "tuned_recipe",
    },
    "demo": {
        "artifact", "builder", "data", "errors", "evaluation", "pictures", "preflight", "progress", "recipe",
        "shared_merge", "verdict",
    },
    "export": {"artifact", "errors", "modeling", "probe", "progress"},
    "serving": {"errors", "export", "modeling"},
    "space": {"artifact", "errors", "modeling", "publish"},
    "materialise": {"modeling"},
    "grouping": {"errors", "evaluation", "inference", "materialise", "modeling", "processing"},
    "coverage": {"modeling"},
    "stacking": {"artifact", "coverage", "errors", "modeling", "separation"},
    "drift": {"preflight", "separation"},
    "edit_source": {"artifact", "checkpoints", "deferred", "errors", "modeling", "preflight", "progress", "stacking"},
    "edit_recipe": {"errors", "recipe", "safe_yaml"},
    "edit_newcomer": {
        "adapted", "checkpoints", "edit_source", "errors", "modeling", "preflight", "recipe", "separation", "shapes",
    },
    "edit_router": {
        "build_router", "checkpoints", "edit_source", "errors", "modeling", "preflight", "progress", "router_training",
        "separation",
    },
    "edit_record": {
        "artifact", "builder", "coverage", "drift", "edit_router", "edit_source", "modeling", "preflight", "row_hashes",
        "stacking", "verdict",
    },
    "edit_folder": {
        "artifact", "builder", "drift", "edit_record", "edit_router", "edit_source", "errors", "hub_upload", "pictures",
        "preflight", "probe", "progress", "row_hashes", "stacking", "verdict",
    },
    "editing": {
        "align_experts", "artifact", "drift", "edit_folder", "edit_newcomer", "edit_recipe", "edit_record", "edit_router",
        "edit_source", "errors", "modeling", "preflight", "processing", "progress", "recipe", "separation", "stacking",
        "verdict",
    },
    "cli": {
        "_version", "align_folders", "distributed", "artifact", "builder", "demo", "editing", "errors", "evaluate_artifact",
        "evaluate_table", "export", "hub_upload", "progress", "reload", "serving", "space", "starter", "tuning", "verdict",
        "verification",
    },
    "__init__": {"_version", "errors", "modeling"},
}  # fmt: skip
TRAVELS_WITH = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
# Transformers reads the code that travels line by line, text in docstrings included.
LOOKS_LIKE_IMPORT = re.compile(r"^\s*(import\s+\S+\s*$|from\s+\S+\s+import\b)")


def sources(root: Path) -> dict[str, Path]:
    """Every Python file of the project by its dotted name below the package, such as `merging.methods`."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), ("modeling", "modeling."), ("hub_upload", "hub_upload.")):
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join(path.relative_to(root / folder).with_suffix("").parts)
            found[f"{prefix}{name}"] = path
    return found


def node(name: str) -> str:
    """The module of the table that a dotted name below the package belongs to."""
    return name.split(".")[0] or "__init__"


def imported(name: str, tree: ast.Module) -> list[tuple[int, str, str]]:
    """(line, dotted name, `relative` / `package` / `other`) of everything that a module imports, wherever it stands."""
    folder = [PACKAGE, *name.split(".")][:-1]
    found = []
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            found += [(item.lineno, alias.name, "other") for alias in item.names]
        elif isinstance(item, ast.ImportFrom):
            level = folder[: len(folder) - (item.level - 1)] if item.level else []
            module = ".".join([*level, item.module] if item.module else level)
            # In `from package import x`, x may be a module.
            names = [f"{module}.{alias.name}" for alias in item.names] if module == PACKAGE else [module]
            found += [(item.lineno, target, "relative" if item.level else "other") for target in names]
    return [
        (line, target, "package" if kind == "other" and target.split(".")[0] == PACKAGE else kind)
        for line, target, kind in found
    ]


def arrows(root: Path) -> dict[str, set[str]]:
    """For each module of the table, the other modules that it imports."""
    found: dict[str, set[str]] = {}
    for name, path in sources(root).items():
        targets = found.setdefault(node(name), set())
        for _, target, kind in imported(name, ast.parse(path.read_text(encoding="utf-8"))):
            if kind in ("relative", "package"):
                targets.add(node(target.removeprefix(PACKAGE).lstrip(".")))
        targets.discard(node(name))
    return found


def broken_arrows(root: Path) -> list[str]:
    found = arrows(root)
    problems = [f"{name} is not in the table of modules" for name in found.keys() - ALLOWED.keys()]
    problems += [f"{name} is in the table, but gone" for name in ALLOWED.keys() - found.keys()]
    for name, targets in found.items():
        problems += [f"{name} must not import {target}" for target in sorted(targets - ALLOWED.get(name, targets))]
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as error:
        problems.append(f"cycle: {' -> '.join(error.args[1])}")
    return problems


def broken_travel_rules(root: Path) -> list[str]:
    """What would keep the code in `modeling/` from loading with `trust_remote_code`."""
    folders = [path for path in (root / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"]
    problems = [f"folder {path.name} in modeling" for path in folders]
    siblings = {path.stem for path in (root / "modeling").glob("*.py")}
    for name, path in sources(root).items():
        if node(name) == "modeling":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = [offence for item in ast.walk(tree) for offence in travel_offences(item, siblings)]
            found += [
                f"code that travels must not import {target}"
                for _, target, kind in imported(name, tree)
                if kind == "package" or (kind == "other" and target.split(".")[0] not in TRAVELS_WITH)
            ]
            problems += [f"{path.name}: {offence}" for offence in found]
    main = ast.parse((root / "modeling" / "modeling_twin_merging.py").read_text(encoding="utf-8"))
    reached = {target.rsplit(".", 1)[1] for _, target, kind in imported("modeling.x", main) if kind == "relative"}
    for sibling in sorted(siblings - reached - {"__init__", "modeling_twin_merging"}):
        problems.append(f"modeling_twin_merging.py does not import {sibling} itself; older loaders would not copy it")
    return problems


def travel_offences(item: ast.AST, siblings: set[str]) -> list[str]:
    """What one node of code that travels does wrong."""
    if isinstance(item, ast.ImportFrom) and item.level:
        plain = item.level == 1 and item.module in siblings and not any(alias.name == "*" for alias in item.names)
        return [] if plain else [f"line {item.lineno}: only `from .sibling import name` travels"]
    if isinstance(item, ast.ClassDef) and "attention" in item.name.lower():
        return [f"line {item.lineno}: Transformers takes class {item.name} for an attention module"]
    if isinstance(item, ast.Constant) and isinstance(item.value, str) and "\n" in item.value:
        lines = [line.strip() for line in item.value.splitlines() if LOOKS_LIKE_IMPORT.match(line)]
        return [f"line {item.lineno}: a line of text looks like an import: {line}" for line in lines]
    return []


def prints(root: Path) -> list[str]:
    """Calls of print outside the command."""
    problems = []
    for name, path in sources(root).items():
        if name == "cli":
            continue
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and item.func.id == "print":
                problems.append(f"{name}:{item.lineno}: print")
    return problems


CHECKS = {"arrows": broken_arrows, "travel": broken_travel_rules, "prints": prints}


@pytest.mark.parametrize("check", CHECKS)
def test_the_rules_hold(check):
    assert CHECKS[check](ROOT) == []


def test_the_table_itself_has_no_cycle_and_holds_no_name_twice():
    graphlib.TopologicalSorter(ALLOWED).prepare()
    assert {target for targets in ALLOWED.values() for target in targets} <= ALLOWED.keys()
    assert "builder" not in ALLOWED["hub_upload"] and ALLOWED["modeling"] == set()


def test_every_module_is_seen():
    names = {node(name) for name in sources(ROOT)}
    assert {"cli", "builder", "modeling", "hub_upload", "merging", "demo"} <= names
    assert arrows(ROOT)["builder"] >= {"separation", "hub_upload", "modeling"}


# where, what is planted, check, what it must say
PLANTED = [
    ("twin_merging_hf/compression.py", "from .builder import Plan", "arrows", "compression must not import builder"),
    ("twin_merging_hf/data.py", "from twin_merging_hf import artifact", "arrows", "data must not import artifact"),
    ("twin_merging_hf/errors.py", "import twin_merging_hf.recipe", "arrows", "errors must not import recipe"),
    (
        "twin_merging_hf/merging/methods.py",
        "from ..checkpoints import x",
        "arrows",
        "merging must not import checkpoints",
    ),
    ("twin_merging_hf/recipe.py", "def f():\n    from .cli import app", "arrows", "recipe must not import cli"),
    ("twin_merging_hf/artifact.py", "from .probe import probe", "arrows", "cycle"),
    ("twin_merging_hf/news.py", "", "arrows", "news is not in the table"),
    (
        "hub_upload/model_card.py",
        "from twin_merging_hf.builder import Plan",
        "arrows",
        "hub_upload must not import builder",
    ),
    (
        "modeling/mix_twin_merging.py",
        "from twin_merging_hf.errors import x",
        "arrows",
        "modeling must not import errors",
    ),
    (
        "modeling/mix_twin_merging.py",
        "from twin_merging_hf.errors import x",
        "travel",
        "must not import twin_merging_hf",
    ),
    ("modeling/mix_twin_merging.py", "import yaml", "travel", "must not import yaml"),
    ("modeling/mix_twin_merging.py", "def f():\n    from numpy import x", "travel", "must not import numpy"),
    ("modeling/mix_twin_merging.py", "from . import heads_twin_merging", "travel", "only `from .sibling"),
    ("modeling/mix_twin_merging.py", "from .heads_twin_merging import *", "travel", "only `from .sibling"),
    ("modeling/mix_twin_merging.py", "from ..errors import x", "travel", "only `from .sibling"),
    ("modeling/mix_twin_merging.py", "class MyAttentionMask: ...", "travel", "MyAttentionMask"),
    ("modeling/mix_twin_merging.py", '"""\nfrom x import y\n"""', "travel", "looks like an import"),
    ("modeling/sub/__init__.py", "", "travel", "folder sub"),
    ("modeling/extra_twin_merging.py", "", "travel", "does not import extra_twin_merging"),
    ("twin_merging_hf/builder.py", "print('x')", "prints", "builder"),
    ("modeling/mix_twin_merging.py", "def f():\n    print('x')", "prints", "modeling.mix_twin_merging"),
]


@pytest.mark.parametrize(("file", "text", "check", "expected"), PLANTED)
def test_a_planted_offence_is_found(tmp_path, file, text, check, expected):
    for folder in (PACKAGE, "modeling", "hub_upload"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert CHECKS[check](tmp_path) == []
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n\n{text}\n")
    assert any(expected in problem for problem in CHECKS[check](tmp_path))
