"""
Kill -9 while saving and uploading; run by test_kills in a process of its own, which forks the victims.

usage: kills.py ARTIFACT FOLDER COUNT STEPS SEED   (prints one line of JSON for each kill)

COUNT kills come after a random time, STEPS at a step: a save's are what it does to files, an upload's are its requests.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import constants
from tqdm import tqdm

from tests.conftest import load
from tests.stub_hub import TOKEN, StubHub
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.hub_upload import push_artifact, upload


SHARDS = "40KB"


class FileSteps:
    """Counts what this process does to files, and kills it with step `last`; a fork has a count of its own."""

    CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")

    def __init__(self) -> None:
        self.count, self.last = 0, 0
        sys.addaudithook(self._note)

    def _note(self, event: str, details: tuple) -> None:
        if event in self.CHANGES or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(action: Callable[[], object]) -> int:
    """Start `action` in a fork; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def was_killed(child: int) -> bool:
    """Wait for a fork's end; whether it was still at it when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_after(action: Callable[[], object], delay: float) -> bool:
    """Kill `action` after `delay` seconds."""
    child = forked(action)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


def killed_at_step(action: Callable[[], object], steps: FileSteps, last: int) -> bool:
    """Kill `action` at its step `last` (from 1), before it is done."""

    def stepping() -> None:
        steps.count, steps.last = 0, last
        action()

    return was_killed(forked(stepping))


def killed_at_request(action: Callable[[], object], stub: StubHub, last: int) -> bool:
    """Kill `action` when its request `last` (from 1) has arrived; the Hub still does what it was asked for."""
    goal, reached, dead = len(stub.requests) + last, threading.Event(), threading.Event()

    def arrive() -> None:
        if len(stub.requests) == goal:
            reached.set()
            dead.wait()

    stub.arrive = arrive
    child = forked(action)
    reached.wait(60)
    os.kill(child, signal.SIGKILL)
    was = was_killed(child)
    dead.set()
    stub.arrive = lambda: None
    return was


def moved(model, by: float):
    """The model with other numbers of the same shapes, so that a mixture of two saves would load."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(by)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor] | None:
    """What loads from a folder, or None if it does not load."""
    try:
        return load(folder).state_dict()
    except (OSError, ValueError, RuntimeError, KeyError):
        return None


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def kill_saves(artifact: Path, folder: Path, count: int, number: int, rng: random.Random) -> None:
    """Save a changed model over the artifact, in shards."""
    out, steps = folder / "saved", FileSteps()
    load(artifact).save_pretrained(out, max_shard_size=SHARDS)
    old, model = tensors(out), moved(load(artifact), 1.0)
    new = model.state_dict()
    timed = Path(shutil.copytree(out, folder / "timed"))
    start, steps.count = time.monotonic(), 0
    model.save_pretrained(timed, max_shard_size=SHARDS)
    whole, total = time.monotonic() - start, steps.count
    # Of the random moments a few come too late, which shows that the rest did not.
    kills = [lambda save: killed_after(save, rng.uniform(0, 1.3 * whole))] * count
    kills += [lambda save, k=k: killed_at_step(save, steps, k) for k in spread(total, number)]
    for kill in kills:
        trial = Path(shutil.copytree(out, folder / "trial"))
        was = kill(lambda: model.save_pretrained(trial, max_shard_size=SHARDS))  # noqa: B023
        found = tensors(trial)
        state = "nothing" if found is None else "old" if same(found, old) else "new" if same(found, new) else "MIXED"
        model.save_pretrained(trial, max_shard_size=SHARDS)
        after = same(tensors(trial) or {}, new) and check_artifact(trial) == [] and not list(trial.glob(".saving*"))
        print(json.dumps({"what": "save", "killed": was, "state": state, "next": after}), flush=True)
        shutil.rmtree(trial)


def kill_uploads(artifact: Path, folder: Path, count: int, number: int, rng: random.Random) -> None:
    """Upload a changed artifact over an older one."""
    stub = StubHub(large=True)
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = stub.url, False, True
    upload.check_whole = check_artifact
    os.environ["HF_TOKEN"] = TOKEN
    load(artifact).save_pretrained(folder / "one", max_shard_size=SHARDS)
    moved(load(artifact), 1.0).save_pretrained(folder / "two", max_shard_size=SHARDS)
    push_artifact(folder / "one", "timed")
    start, before = time.monotonic(), len(stub.requests)
    push_artifact(folder / "two", "timed")
    whole, total = time.monotonic() - start, len(stub.requests) - before
    kills = [lambda push: killed_after(push, rng.uniform(0, whole))] * count
    kills += [lambda push, k=k: killed_at_request(push, stub, k) for k in spread(total, number)]
    for trial, kill in enumerate(kills):
        name = f"trial{trial}"
        stub.objects.clear()  # else only the first trial has anything to send
        push_artifact(folder / "one", name)
        was = kill(lambda: push_artifact(folder / "two", name))  # noqa: B023
        states = {label: in_repo(stub, name, folder / label) for label in ("one", "two")}
        state = "old" if states["one"] else "new" if states["two"] else "MIXED"
        push_artifact(folder / "two", name)
        after = in_repo(stub, name, folder / "two")
        print(json.dumps({"what": "upload", "killed": was, "state": state, "next": after}), flush=True)
    stub.close()


def spread(total: int, number: int) -> list[int]:
    """At most `number` of the steps 1 to `total`, evenly, with the first and the last."""
    return sorted({round(1 + (total - 1) * i / max(1, number - 1)) for i in range(number)})


def in_repo(stub: StubHub, name: str, folder: Path) -> bool:
    """Whether the repository holds exactly this artifact's weights and config."""
    found = stub.files(f"me/{name}")
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".py")]
    return all(found.get(name) == (folder / name).read_bytes() for name in names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # By default forks share the lock of progress bars, and whoever is killed while it has it stops all others.
    tqdm.set_lock(threading.RLock())
    where, (total_count, total_steps, seed) = Path(sys.argv[2]), map(int, sys.argv[3:])
    for kill_all in (kill_saves, kill_uploads):
        kill_all(Path(sys.argv[1]), where, total_count, total_steps, random.Random(seed))
