"""Kill -9 at any moment: never something that loads and is wrong, and the next run completes."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import files, interrupts, tiny
from tests.conftest import load
from twin_merging_hf.artifact import LAYOUT, check_artifact
from twin_merging_hf.modeling import saving_twin_merging as saving


KILLS = 20


def lines(*command: object, cwd: Path) -> list[dict]:
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=files.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def kill_all(artifact: Path, folder: Path, count: int, steps: int) -> dict[str, list[dict]]:
    """What became of saves and uploads after `count` kills at random and `steps` at a step of theirs; nothing was wrong."""
    found = lines("-m", "tests.kills", artifact, folder, count, steps, 0, cwd=files.ROOT)
    assert len(found) == 2 * (count + steps) and all(entry["next"] for entry in found)
    saves, uploads = ([entry for entry in found if entry["what"] == what] for what in ("save", "upload"))
    assert {entry["state"] for entry in saves} <= {"nothing", "old", "new"}
    assert {entry["state"] for entry in uploads} <= {"old", "new"}
    return {"save": saves, "upload": uploads}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_saves_and_uploads_that_are_killed(world, tmp_path):
    for found in kill_all(world.artifact("bert"), tmp_path, KILLS, 0).values():
        assert sum(entry["killed"] for entry in found) > KILLS / 2, "hardly any was in time"


def test_saves_and_uploads_that_are_killed_at_a_step(world, tmp_path):
    found = kill_all(world.artifact("bert"), tmp_path, 0, 4)
    assert all(entry["killed"] for entry in [*found["save"], *found["upload"]])
    assert {entry["state"] for entry in found["save"]} == {"old", "nothing", "new"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_builds_that_are_killed(world, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    recipe = tiny.write_recipe(files.copy_inputs(world.experts("bert"), tmp_path / "in"), ("a", "b"))
    before = files.listing(tmp_path / "in")
    rng = random.Random(0)
    moments = [f"SIGKILL:{rng.uniform(0, 1.5):.4f}" for _ in range(KILLS)]
    found = lines(Path(interrupts.__file__), recipe, folder, *moments, cwd=tmp_path)
    assert len(found) == KILLS + 1 and found[-1]["code"] == 0 and found[-1]["names"] == [interrupts.OUT]
    for artifact in [folder / interrupts.OUT, *tmp_path.glob("finished-*")]:
        assert check_artifact(artifact) == []
    assert files.listing(tmp_path / "in") == before


class BrokenError(Exception):
    """Stands for whatever ends a save."""


@pytest.mark.parametrize("step", ["save_pretrained", "rename weights", "rename config"])
def test_a_save_that_ends_half_way_mixes_nothing(world, tmp_path, monkeypatch, step):
    """The same as a kill at that moment, but for the removal of what was staged."""
    folder = Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))
    model = load(folder)
    before, replace = files.listing(folder), saving.os.replace

    def broken(source, target):
        if step == "rename config" and target.endswith(LAYOUT.config):
            raise BrokenError
        if step == "rename weights" and target.endswith(LAYOUT.weights):
            raise BrokenError
        return replace(source, target)

    if step == "save_pretrained":
        monkeypatch.setattr(saving, "_move", lambda staging, target: (_ for _ in ()).throw(BrokenError))
    else:
        monkeypatch.setattr(saving.os, "replace", broken)
    with pytest.raises(BrokenError):
        model.save_pretrained(folder)
    monkeypatch.undo()
    if step == "save_pretrained":
        assert files.listing(folder) == before
    else:
        assert not (folder / LAYOUT.config).exists()
    model.save_pretrained(folder)
    assert check_artifact(folder) == [] and not list(folder.glob(".saving*"))


def test_a_save_clears_what_a_dead_one_left_and_leaves_one_that_runs(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid()):
        (tmp_path / f".saving-{pid}-x").mkdir()
    with saving.staged_save(str(tmp_path)) as staging:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [f".saving-{os.getpid()}-x", Path(staging).name]
        )
