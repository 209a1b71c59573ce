"""What is installed: one package, whole, and nothing beside it."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.files import ROOT
from twin_merging_hf import __version__


PACKAGE = "twin_merging_hf"
FOLDERS = {PACKAGE: "", "modeling": "modeling/", "hub_upload": "hub_upload/"}
NOT_SOURCE = ("__pycache__", "*.egg-info", ".*", "build", "dist", "tests", "twin-merging-demo")


def run(*args: str | Path, cwd: Path, **environment: str) -> str:
    """Run Python with arguments, outside of the checkout; its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Source distribution, and the wheel that was built from it (not from the checkout)."""
    home = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, home / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run("-m", "build", "--no-isolation", "--outdir", home / "out", home / "source", cwd=home)
    return home / "out"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_the_version_is_the_packages(dist):
    assert {path.name for path in dist.iterdir()} == {
        f"twin_merging_hf-{__version__}.tar.gz",
        f"twin_merging_hf-{__version__}-py3-none-any.whl",
    }


def test_a_wheel_installs_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {PACKAGE, f"{PACKAGE}-{__version__}.dist-info"}


def test_a_wheel_holds_every_source_and_nothing_else(wheel):
    expected = set()
    for folder, target in FOLDERS.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
        files += [path for pattern in ("*.md", "*.txt") for path in (ROOT / folder).rglob(pattern)]
        expected |= {f"{PACKAGE}/{target}{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    archive = zipfile.ZipFile(wheel)
    assert {name for name in archive.namelist() if name.startswith(f"{PACKAGE}/")} == expected
    for name in (f"{PACKAGE}/py.typed", f"{PACKAGE}/hub_upload/card_template.md", f"{PACKAGE}/modeling/__init__.py"):
        assert name in expected
    source = (ROOT / "modeling" / "modeling_twin_merging.py").read_bytes()
    assert archive.read(f"{PACKAGE}/modeling/modeling_twin_merging.py") == source


def test_a_wheel_brings_its_licence_and_its_command(wheel):
    archive, info = zipfile.ZipFile(wheel), f"{PACKAGE}-{__version__}.dist-info"
    assert "twin-merging = twin_merging_hf.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    licence = (ROOT / "LICENSE").read_bytes()
    assert licence in [archive.read(name) for name in archive.namelist() if name.startswith(info)]
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "\nRequires-Python: >=3.10\n" in metadata and "\nName: twin-merging-hf\n" in metadata


def test_a_source_distribution_holds_what_a_build_needs(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md", "hub_upload/card_template.md"):
        assert name in names
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*.py"):
            assert source.relative_to(ROOT).as_posix() in names


def test_twine_is_content(dist):
    output = run("-m", "twine", "--no-color", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert output.count("PASSED") == 2


def test_an_installed_wheel_works_from_anywhere(wheel, tmp_path):
    target = tmp_path / "target"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    script = """
import importlib.util, pathlib, sys
import twin_merging_hf.modeling, twin_merging_hf.hub_upload.model_card as card
from twin_merging_hf import builder, cli, starter
for name, module in list(sys.modules.items()):
    if name.startswith("twin_merging_hf"):
        assert module.__file__.startswith(sys.argv[1]), module.__file__
assert card._TEMPLATE.is_file()
for name in ("modeling", "hub_upload", "merging", "tests"):
    assert importlib.util.find_spec(name) is None, name
assert len(list(pathlib.Path(twin_merging_hf.modeling.__file__).parent.glob("*_twin_merging.py"))) >= 6
sys.argv = ["twin-merging", "--version"]
cli.main()
"""
    output = run("-c", script, target, cwd=Path("/"), PYTHONPATH=str(target))
    assert output == f"twin-merging-hf {__version__}\n"
    command = (target / "bin" / "twin-merging").read_text()
    assert "from twin_merging_hf.cli import main" in command


# ---- what is needed besides -------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """The requirements of the package as setup.cfg states them, extras included."""
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    required = re.search(r"install_requires =\n((?: .*\n)+)", text)
    extras = re.search(r"\[options.extras_require\]\n((?:.+\n)+)", text)
    assert required and extras
    lines = [*required.group(1).splitlines(), *(line.split("=", 1)[-1] if line[0] != " " else line
                                                for line in extras.group(1).splitlines())]  # fmt: skip
    return [Requirement(line.strip()) for line in lines if line.strip() and "%" not in line and line.strip() != "="]


def brought_along(names: set[str]) -> set[str]:
    """Distributions that these need, in turn, without extras."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        needed = [Requirement(line) for line in lines]
        names |= {canonical(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})}
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_that_is_imported_is_required():
    stated = {canonical(requirement.name) for requirement in requirements()}
    available = brought_along(set(stated))
    distributions = importlib.metadata.packages_distributions()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in item.names] if isinstance(item, ast.Import) else []
                if isinstance(item, ast.ImportFrom) and not item.level:
                    names = [item.module or ""]
                for name in {name.split(".")[0] for name in names} - {PACKAGE, *sys.stdlib_module_names}:
                    provided = {canonical(found) for found in distributions.get(name, [])}
                    assert provided & available, f"{path.name} imports {name}, which nothing that is required brings"
