"""
Writes docs/recipe_reference.md from the recipe's dataclasses: python docs/generate_reference.py

Types, defaults and texts are those of the code, so the page cannot say anything else. tests/test_docs.py fails where the
page is out of date.
"""

import ast
import dataclasses
import inspect
from pathlib import Path

from twin_merging_hf import recipe


PAGE = Path(__file__).with_name("recipe_reference.md")
_BLOCKS = (
    ("The recipe", "", recipe.Recipe),
    ("An expert", "experts[].", recipe.ExpertSpec),
    ("Data of an expert", "experts[].data.", recipe.DataFiles),
    ("Exclusive deltas", "exclusive.", recipe.Exclusive),
    ("Router", "router.", recipe.RouterSettings),
    ("Alignment", "alignment.", recipe.AlignmentSettings),
)
_KEYS = {
    "scaling": "parameters.lambda",
    "density": "parameters.density",
    "normalize": "parameters.normalize",
    "experts[].weight": "experts[].parameters.weight",
    "router.layers": "router.layer",
    "router.router_pass": "router.pass",
}
"""Fields whose name is not the key of the YAML."""
_NOT_KEYS = {"folder", "text"}
"""Fields that are the file's, not the user's."""
_CHOICES = {
    "merge_method": recipe.MERGE_METHODS,
    "dtype": recipe.COMPUTE_DTYPES,
    "out_dtype": recipe.OUT_DTYPES,
    "exclusive.method": recipe.EXCLUSIVE_METHODS,
    "exclusive.dtype": tuple(recipe.FACTOR_DTYPES),
    "router.type": ("auto", *recipe.ROUTER_TYPES),
    "router.pass": recipe.ROUTER_PASSES,
}
_HEAD = """# Recipe reference

Every key of a recipe with its type and default, written by `docs/generate_reference.py` from the dataclasses of
`twin_merging_hf.recipe`. What the keys do in a build is explained in [Recipe](recipe.md).
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(_block(title, prefix, block) for title, prefix, block in _BLOCKS)])


def keys() -> set[str]:
    """All keys that the page describes, in full (`router.type`)."""
    return {key for _, prefix, block in _BLOCKS for key, _ in _fields(prefix, block)}


def _fields(prefix: str, block: type) -> list[tuple[str, dataclasses.Field]]:
    fields = [field for field in dataclasses.fields(block) if prefix + field.name not in _NOT_KEYS]
    return [(_KEYS.get(prefix + field.name, prefix + field.name), field) for field in fields]


def _block(title: str, prefix: str, block: type) -> str:
    types, texts = _source(block)
    rows = [
        f"## {title}",
        "",
        _clean(block.__doc__ or ""),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, field in _fields(prefix, block):
        text = texts[field.name]
        if key in _CHOICES:
            text += f" One of {', '.join(f'`{choice}`' for choice in _CHOICES[key])}."
        rows.append(f"| `{key}` | `{types[field.name]}` | {_default(field)} | {text} |")
    return "\n".join([*rows, ""])


def _source(block: type) -> tuple[dict[str, str], dict[str, str]]:
    """Types, and the string below each field, as they stand in the source; by the field's name."""
    [definition] = ast.parse(inspect.getsource(block)).body
    assert isinstance(definition, ast.ClassDef)
    types, texts = {}, {}
    for before, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            types[before.target.id] = _clean(ast.unparse(before.annotation))
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[before.target.id] = _clean(str(after.value.value))
    return types, texts


def _clean(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "see below"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{field.default!r}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
