"""A seeded sample of Cosmic Ray's mutants of the core, and the tests that can see each of them."""

import ast
import difflib
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
SUBJECTS = {
    "modeling": ["modeling/*.py"],
    "compression": [
        f"twin_merging_hf/{name}.py"
        for name in (
            "compression",
            "low_rank",
            "product_space",
            "exclusive",
            "quantisation",
            "sparsification",
            "budget",
        )
    ],
    "merging": [
        "twin_merging_hf/merging/*.py",
        *(f"twin_merging_hf/{name}.py" for name in ("shared_merge", "fitted_merge", "separation")),
    ],
    "routing": [
        f"twin_merging_hf/{name}.py"
        for name in ("build_router", "router_training", "router_choice", "closed_form", "temperature", "calibration")
    ],
}
"""What is mutated, by part; `routing_twin_merging.py` is among the files of `modeling`."""

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Mutant:
    """One change of one operator at one place of a file, as Cosmic Ray numbers it."""

    path: str
    operator: str
    occurrence: int
    line: int

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line} {self.operator.removeprefix('core/')} {self.occurrence}"


def files(root: Path) -> list[str]:
    """Paths of the files to mutate, relative to `root`."""
    patterns = [pattern for part in SUBJECTS.values() for pattern in part]
    return sorted({str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)})


def part_of(path: str) -> str:
    return next(part for part, patterns in SUBJECTS.items() if any(Path(path).match(pattern) for pattern in patterns))


def every_mutant(root: Path, path: str) -> Iterator[Mutant]:
    """All that Cosmic Ray's operators without arguments can do to a file."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    nodes = list(ast_nodes(get_ast_from_path(root / path)))
    for name in sorted(plugins.operator_names()):
        operator = plugins.get_operator(name)
        if not operator.arguments():
            instance = operator()
            positions = [position for node in nodes for position in instance.mutation_positions(node)]
            for occurrence, ((line, _), _) in enumerate(positions):
                yield Mutant(path, name, occurrence, line)


def mutated(source: str, mutant: Mutant) -> str:
    """The file's text with the mutant in it."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    return mutate_code(source, plugins.get_operator(mutant.operator)(), mutant.occurrence)


def difference(source: str, changed: str) -> str:
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), n=1, lineterm="")
    return "\n".join(list(lines)[2:])


def sample(root: Path, count: int, seed: int) -> tuple[list[Mutant], int]:
    """`count` mutants, drawn alike from all that change what a program does; and how many there were to draw from."""
    mutants = [mutant for path in files(root) for mutant in every_mutant(root, path)]
    random.Random(seed).shuffle(mutants)
    drawn: list[Mutant] = []
    for mutant in mutants:
        source = (root / mutant.path).read_text(encoding="utf-8")
        if is_a_change(source, mutated(source, mutant)):
            drawn.append(mutant)
        if len(drawn) == count:
            break
    return drawn, len(mutants)


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def is_a_change(source: str, changed: str) -> bool:
    """
    Whether a mutant is a program that differs from the original by more than annotations.

    `int | None` made `int + None` fails at import, whatever the tests are: that would count as killed for nothing.
    """
    try:
        tree = ast.parse(changed)
    except SyntaxError:
        return False
    return ast.dump(_WithoutAnnotations().visit(tree)) != ast.dump(_WithoutAnnotations().visit(ast.parse(source)))


def seen_by(source: str, line: int, contexts: Mapping[int, Collection[str]]) -> set[str]:
    """
    The tests that ran the statement at a line, else those that ran what encloses it (a signature, a constant of a
    module: these run at import, before any test).

    Args:
        contexts: line -> the tests that ran it.
    """
    tree = ast.parse(source)
    around = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and _first(node) <= line <= node.end_lineno]
    around.sort(key=lambda node: node.end_lineno - _first(node))
    spans = [span for node in around for span in (_head(node), (_first(node), node.end_lineno))]
    for first, last in [*spans, (1, len(source.splitlines()))]:
        found = {test for number in range(first, last + 1) for test in contexts.get(number, ())}
        if found:
            return found
    return set()


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _head(node: ast.stmt) -> tuple[int, int]:
    """Lines of a statement without those it holds: of a definition none, for it runs at import."""
    body = getattr(node, "body", None)
    if isinstance(node, DEFINITIONS):
        return (1, 0)
    return (node.lineno, body[0].lineno - 1) if body else (node.lineno, node.end_lineno)


OWN_AT_ONCE = 8


def in_order(tests: Collection[str], breadth: Mapping[str, int], path: str) -> list[str]:
    """
    The tests in turns of the files that hold them: one of each file a turn, and eight of a file that is named like the
    subject. Of one file the narrowest come first (which are quick, and look closest), and of each function one case before
    the second.

    Args:
        breadth: test -> how many lines of the subjects it runs.
        path: the mutant's file.
    """
    words = set(Path(path).stem.removesuffix("_twin_merging").split("_"))
    cases: Counter[str] = Counter()
    keys = {}
    for test in sorted(tests, key=lambda test: (breadth[test], test)):
        function = test.partition("[")[0]
        keys[test] = (cases[function], breadth[test], test)
        cases[function] += 1
    places: Counter[str] = Counter()
    turns = {}
    for test in sorted(tests, key=keys.__getitem__):
        file = test.partition("::")[0]
        own = words & set(Path(file).stem.removeprefix("test_").split("_"))
        turns[test] = places[file] // (OWN_AT_ONCE if own else 1)
        places[file] += 1
    return sorted(tests, key=lambda test: (turns[test], *keys[test]))
