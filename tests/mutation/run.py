"""
Mutation testing: which share of small faults, planted in the core one at a time, do the tests notice?

usage: python tests/mutation/run.py FOLDER [--coverage FILE] [--count 300] [--seed 0] [--tests 60] [--budget 30]
       [--again] [--extra TEST ...]

A mutant is killed if a test fails or hangs on it. It gets the tests that ran its line, by the coverage data of
`make coverage`: at most `--tests`, in turns of their files, until `--budget` seconds are spent. Everything happens in a copy
of the working tree in FOLDER, each mutant in a child of one process that has imported the heavy libraries. At the end the
tests that killed run on the copy without a mutant: a mutant that was killed by a test that fails there is no finding.
Results are kept in FOLDER/results.jsonl: a run that was cut off goes on, and `--again` runs survivors once more,
with `--extra` tests that were written since (files will do).
"""

import argparse
import compileall
import contextlib
import gc
import importlib
import json
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mutants
from mutants import ROOT


WARM = [
    "accelerate", "hypothesis", "matplotlib.pyplot", "peft", "PIL.Image", "pytest", "safetensors.torch", "scipy.optimize",
    "sklearn.metrics", "torch", "torch.func", "transformers.trainer", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip
"""What tests import from elsewhere: a child that is forked after these imports starts within a second."""
HANG = 60  # seconds for one test, most of which take less than one
GRACE = 2 * HANG  # seconds beyond the budget after which a child is taken to hang


class Watch:
    """A pytest plugin: writes down what failed, and ends the run when the time is up."""

    def __init__(self, report: Path, budget: float):
        self.report, self.end = report, time.monotonic() + budget
        self.found: dict[str, Any] = {"failed": [], "passed": 0}

    def pytest_sessionstart(self, session: Any) -> None:
        self.session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.found["passed"] += report.when == "call" and report.passed
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found["failed"].append(report.nodeid)
            self.pytest_sessionfinish()  # a process that dies on a later test has this on disk

    def pytest_runtest_logfinish(self) -> None:
        self.session.shouldstop = time.monotonic() > self.end and "no time left"

    def pytest_sessionfinish(self) -> None:
        self.report.write_text(json.dumps(self.found), encoding="utf-8")


def run_tests(tests: Sequence[str], budget: float, *flags: str) -> dict[str, Any]:
    """
    Run tests in a fork of this process.

    Returns:
        `failed`: the tests that failed, ["timeout"] if the child had to be stopped, ["crash"] if it ended without a word
        (the tests cannot even be imported); `passed`: how many passed; `seconds`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report, start = Path(scratch, "report.json"), time.monotonic()
        child = os.fork()
        if child == 0:
            _child(tests, Path(scratch), Watch(report, budget), flags)
        found = _wait(child, budget + GRACE)
        if report.exists():
            outcome = json.loads(report.read_text(encoding="utf-8"))
        else:
            outcome = {"failed": ["timeout" if found is None else "crash"], "passed": 0}
        return {**outcome, "seconds": round(time.monotonic() - start, 1)}


def _child(tests: Sequence[str], scratch: Path, watch: Watch, flags: Sequence[str]) -> None:
    """Never returns: whatever happens here must not go on in a second copy of the caller."""
    try:
        os.setsid()
        output = os.open(scratch / "output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
        options = f"-q --tb=short -p pytest_timeout -p no:cacheprovider --timeout={HANG} --basetemp={scratch / 'tests'}"
        import pytest

        pytest.main([*options.split(), *flags, *tests], plugins=[watch])
    finally:
        os._exit(0)


def _wait(child: int, seconds: float) -> int | None:
    """The child's exit status, or None if it took longer; it and all it started are gone afterwards."""
    end, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < end:
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else None
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # where nothing of it is left
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def copied_tree(folder: Path) -> Path:
    """
    The files of the working tree, compiled so that a changed file is never taken from a stale cache: caches are checked
    by content (several changes happen within a second), and nobody writes new ones.
    """
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    for part in ("modeling", "hub_upload", "twin_merging_hf"):
        compileall.compile_dir(tree / part, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return tree


def prepare(tree: Path, folder: Path) -> None:
    """Make this process one whose children import the package and the tests from the copy."""
    os.chdir(tree)
    sys.path[0] = str(tree)
    sys.dont_write_bytecode = True
    os.environ |= {
        "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage thoroughly, twice a run; what was imported here is none
    loaded = [name for name in sys.modules if name.split(".")[0] in ("twin_merging_hf", "tests")]
    if loaded:
        raise RuntimeError(f"{loaded} are imported already: children would test these instead of the mutants")


def coverage_of(file: Path, tree: Path) -> tuple[dict[str, dict[int, set[str]]], Counter[str]]:
    """Path -> line -> tests that ran it, of the files to mutate; and test -> lines that it ran there."""
    from coverage import CoverageData

    data = CoverageData(str(file))
    data.read()
    ran: dict[str, dict[int, set[str]]] = {}
    breadth: Counter[str] = Counter()
    for path in mutants.files(tree):
        # The data's paths are those of the tree that was measured, wherever it stood.
        found = [measured for measured in data.measured_files() if measured.endswith(f"/{path}")]
        lines: dict[int, set[str]] = defaultdict(set)
        for measured in found:
            for line, contexts in data.contexts_by_lineno(measured).items():
                lines[line] |= {context.rpartition("|")[0] for context in contexts if "|" in context}
        ran[path] = lines
        breadth.update(test for tests in lines.values() for test in tests)
    return ran, breadth


def run_mutant(tree: Path, mutant: mutants.Mutant, tests: list[str], budget: float) -> dict[str, Any]:
    file = tree / mutant.path
    source = file.read_text(encoding="utf-8")
    changed = mutants.mutated(source, mutant)
    try:
        file.write_text(changed, encoding="utf-8")
        outcome = run_tests(tests, budget, "-x") if tests else {"failed": [], "passed": 0, "seconds": 0.0}
        if outcome["failed"] == ["timeout"]:  # or the machine was stopped for a while: only a second one is believed
            outcome = run_tests(tests, budget, "-x")
    finally:
        file.write_text(source, encoding="utf-8")
    by = next(iter(outcome.pop("failed")), "")
    known = {"mutant": mutant.name, "path": mutant.path, "diff": mutants.difference(source, changed)}
    return {**known, "by": by, "tests": len(tests), **outcome}


def run_all(
    tree: Path,
    drawn: Sequence[mutants.Mutant],
    args: argparse.Namespace,
    done: dict[str, dict],
    keep: Callable[[dict], None],
) -> None:
    ran, breadth = coverage_of(args.coverage, tree)
    for number, mutant in enumerate(drawn, 1):
        known = done.get(mutant.name)
        if known and (known["by"] or not args.again):
            continue
        source = (tree / mutant.path).read_text(encoding="utf-8")
        tests = mutants.in_order(mutants.seen_by(source, mutant.line, ran[mutant.path]), breadth, mutant.path)
        extra = [test for test in args.extra if test not in tests]
        result = run_mutant(tree, mutant, [*extra, *tests[: args.tests]], args.budget)
        keep(result)
        print(f"{number:3} {result['seconds']:6.1f} s  {mutant.name}: {result['by'] or 'SURVIVED'}", flush=True)


def failing_without_mutant(tests: Sequence[str]) -> set[str]:
    """Those of the killing tests that fail on the code as it is: what they killed proves nothing."""
    named = [test for test in tests if test not in ("timeout", "crash")]
    return set(run_tests(named, HANG * len(named))["failed"]) if named else set()


def report(done: dict[str, dict], drawn: Sequence[mutants.Mutant]) -> str:
    """Counts by part and the survivors, each with what was changed."""
    results = [done[mutant.name] for mutant in drawn if mutant.name in done]
    lines = []
    for part in [*mutants.SUBJECTS, "all"]:
        mine = [result for result in results if part in ("all", mutants.part_of(result["path"]))]
        killed = sum(bool(result["by"]) for result in mine)
        hung = sum(result["by"] == "timeout" for result in mine)
        share = f"{killed / len(mine):.1%}" if mine else "-"
        lines.append(f"{part:12} {killed:3} of {len(mine):3} killed ({share}), {hung} of them by a timeout")
    survivors = [result for result in results if not result["by"]]
    lines += [
        f"\n{one['mutant']}  ({one['passed']} of {one['tests']} tests passed)\n{one['diff']}" for one in survivors
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--budget", type=float, default=30)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--extra", nargs="*", default=[], help="tests that every mutant of this call gets first")
    args = parser.parse_args()
    args.folder, args.coverage = args.folder.resolve(), args.coverage.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = {result["mutant"]: result for result in map(json.loads, lines)}

    def keep(result: dict) -> None:
        done[result["mutant"]] = result
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")

    tree = copied_tree(args.folder)
    prepare(tree, args.folder)
    drawn, of = mutants.sample(tree, args.count, args.seed)
    print(f"{len(drawn)} of {of} mutants, seed {args.seed}", flush=True)
    run_all(tree, drawn, args, done, keep)
    killers = {done[mutant.name]["by"] for mutant in drawn if done[mutant.name]["by"]}
    wrong = failing_without_mutant(sorted(killers))
    for result in [done[mutant.name] for mutant in drawn if done[mutant.name]["by"] in wrong]:
        print(f"{result['mutant']}: {result['by']} fails without it too")
        keep({**result, "by": ""})
    print(report(done, drawn))


if __name__ == "__main__":
    main()
