"""
Kill -9 at random moments of saving and uploading; run by test_kills in a process of its own, which forks the victims.

usage: kills.py ARTIFACT FOLDER COUNT SEED   (prints one line of JSON for each kill)
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import constants

from tests.conftest import load
from tests.stub_hub import TOKEN, StubHub
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.hub_upload import push_artifact, upload


SHARDS = "40KB"


def killed(action, delay: float) -> bool:
    """Fork, run `action`, and kill it after `delay` seconds; whether it was still at it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


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


def kill_saves(artifact: Path, folder: Path, count: int, rng: random.Random) -> None:
    """Save a changed model over the artifact, in shards."""
    out = folder / "saved"
    load(artifact).save_pretrained(out, max_shard_size=SHARDS)
    old, model = tensors(out), moved(load(artifact), 1.0)
    new = model.state_dict()
    start = time.monotonic()
    model.save_pretrained(folder / "timed", max_shard_size=SHARDS)
    whole = time.monotonic() - start
    shutil.rmtree(folder / "timed")
    for _ in range(count):
        trial = Path(shutil.copytree(out, folder / "trial"))
        delay = rng.uniform(0, 1.3 * whole)  # a few come too late, which shows that the rest did not
        was = killed(lambda: model.save_pretrained(trial, max_shard_size=SHARDS), delay)  # noqa: B023
        found = tensors(trial)
        state = "nothing" if found is None else "old" if same(found, old) else "new" if same(found, new) else "MIXED"
        model.save_pretrained(trial, max_shard_size=SHARDS)
        after = same(tensors(trial) or {}, new) and check_artifact(trial) == [] and not list(trial.glob(".saving*"))
        print(json.dumps({"what": "save", "killed": was, "state": state, "next": after}), flush=True)
        shutil.rmtree(trial)


def kill_uploads(artifact: Path, folder: Path, count: int, rng: random.Random) -> None:
    """Upload a changed artifact over an older one."""
    stub = StubHub(large=True)
    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = stub.url, False, True
    upload.check_whole = check_artifact
    os.environ["HF_TOKEN"] = TOKEN
    load(artifact).save_pretrained(folder / "one", max_shard_size=SHARDS)
    moved(load(artifact), 1.0).save_pretrained(folder / "two", max_shard_size=SHARDS)
    start = time.monotonic()
    push_artifact(folder / "one", "timed")
    whole = time.monotonic() - start
    for number in range(count):
        name = f"trial{number}"
        push_artifact(folder / "one", name)
        was = killed(lambda: push_artifact(folder / "two", name), rng.uniform(0, whole))  # noqa: B023
        states = {label: in_repo(stub, name, folder / label) for label in ("one", "two")}
        state = "old" if states["one"] else "new" if states["two"] else "MIXED"
        push_artifact(folder / "two", name)
        after = in_repo(stub, name, folder / "two")
        print(json.dumps({"what": "upload", "killed": was, "state": state, "next": after}), flush=True)
    stub.close()


def in_repo(stub: StubHub, name: str, folder: Path) -> bool:
    """Whether the repository holds exactly this artifact's weights and config."""
    found = stub.files(f"me/{name}")
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".py")]
    return all(found.get(name) == (folder / name).read_bytes() for name in names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, total, dice = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    kill_saves(Path(sys.argv[1]), where, total, dice)
    kill_uploads(Path(sys.argv[1]), where, total, dice)
