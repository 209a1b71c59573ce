"""Disks that are full, read-only, forbidden or shared: one clear message, nothing half, and the sources as they were."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf import artifact as artifact_module
from twin_merging_hf.artifact import LAYOUT, check_artifact, staged
from twin_merging_hf.builder import Progress, build_artifact


NOBODY = 65534


@pytest.fixture
def inputs(world) -> Iterator[Path]:
    """Sources that everybody may read (pytest's own folders are private)."""
    folder = Path(tempfile.mkdtemp(prefix="twin-merging-test-"))
    folder.chmod(0o755)
    for path in files.copy_inputs(world.experts("bert"), folder / "in").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tiny.write_recipe(folder / "in", ("a", "b"), data=False)
    yield folder / "in"
    shutil.rmtree(folder)


def build(inputs: Path, out: Path) -> None:
    build_artifact(inputs / "recipe.yaml", out, Progress(quiet=True))


def in_child(action: Callable[[], None], user: int | None = None) -> Callable[[], str]:
    """Run in a forked process, as another user if one is given; the returned function waits for what came of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no end"
        try:
            if user is not None and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            action()
            text = "done"
        except TwinMergingError as error:
            text = f"our error: {error}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, text.encode()[:4000])
            os._exit(0)
    os.close(writing)

    def wait() -> str:
        with os.fdopen(reading, "rb") as stream:
            text = stream.read().decode()
        os.waitpid(child, 0)
        return text

    return wait


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of a few kilobytes; skips where nobody may mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs root and the right to mount")
    try:
        yield folder
    finally:
        # Lazily: the traceback of a caught error keeps mapped files open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("size", ["40k", "400k"])
def test_a_full_disk(inputs, tmp_path, size):
    """Full at the small files, or at the weights."""
    before = files.listing(inputs)
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(TwinMergingError, match=r"cannot be written: .*[Nn]o space left") as caught:
            build(inputs, disk / "out")
        assert list(disk.iterdir()) == [] and str(disk / "out") in str(caught.value)
    assert files.listing(inputs) == before


def test_a_folder_where_one_may_not_write(inputs):
    before = files.listing(inputs)
    inputs.chmod(0o555)
    try:
        text = in_child(lambda: build(inputs, inputs / "out"), NOBODY)()
    finally:
        inputs.chmod(0o755)
    assert text.startswith("our error: ") and "Permission denied" in text and str(inputs / "out") in text
    assert files.listing(inputs) == before


def test_sources_that_one_may_not_read(inputs):
    weights = inputs / "a" / "model.safetensors"
    weights.chmod(0o000)
    out = inputs.parent / "out"
    inputs.parent.chmod(0o777)
    text = in_child(lambda: build(inputs, out), NOBODY)()
    assert text.startswith("our error: expert 'a'") and "denied" in text.lower() and not out.exists()


def test_rows_that_one_may_not_read(inputs):
    recipe = tiny.write_recipe(inputs, ("a", "b"))
    (inputs / "a.jsonl").chmod(0o000)
    text = in_child(lambda: build_artifact(recipe, inputs.parent / "out", Progress(quiet=True)), NOBODY)()
    assert text == f"our error: expert 'a': {inputs / 'a.jsonl'} cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mix_twin_merging.py"])
def test_an_artifact_that_one_may_not_read(world, inputs, name):
    folder = Path(shutil.copytree(world.artifact("bert"), inputs.parent / "artifact"))
    for path in folder.iterdir():
        path.chmod(0o644)
    (folder / name).chmod(0o000)
    text = in_child(lambda: _fail(check_artifact(folder)), NOBODY)()
    assert f"{folder / name} cannot be read: Permission denied" in text


def _fail(problems: list[str]) -> None:
    raise TwinMergingError("; ".join(problems))


def test_a_folder_that_another_build_made_in_the_last_moment(tmp_path, monkeypatch):
    """Between the last look and the renaming."""
    monkeypatch.setattr(artifact_module, "refuse_existing", lambda out: None)
    with pytest.raises(TwinMergingError, match="cannot be written"), staged(tmp_path / "out") as folder:
        (folder / LAYOUT.unfinished_config).write_text("{}")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


@pytest.mark.slow
def test_builds_at_once_into_one_folder(inputs):
    inputs.parent.chmod(0o777)
    out, before = inputs.parent / "out", files.listing(inputs)
    waits = [in_child(lambda: build(inputs, out)) for _ in range(3)]
    texts = sorted(wait() for wait in waits)
    assert texts.count("done") == 1 and all("exists already" in t or "cannot be written" in t for t in texts[1:])
    assert check_artifact(out) == [] and files.listing(inputs) == before
    assert {path.name for path in inputs.parent.iterdir()} == {"in", "out"}
