"""Two processes under `accelerate launch` write the bytes and the scores of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


ROOT = Path(__file__).parents[1]
TIMES = {"time_ratio", "seconds", "times", "time"}


def launched(processes: int, *arguments: object) -> str:
    """Run the command in one process, or in several as `accelerate launch` starts them."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ]
    launch += ["--main_process_port", "0", "-m"] if processes > 1 else []
    start = launch if processes > 1 else [sys.executable, "-m"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*start, "twin_merging_hf.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def without_times(content):
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return [without_times(item) for item in content] if isinstance(content, list) else content


@pytest.mark.parametrize("kind", ["bert", pytest.param("bert-tokens", marks=pytest.mark.slow)])
def test_two_processes_build_and_evaluate_as_one(tmp_path, kind):
    labels = tiny.TAGS if kind.endswith("tokens") else tiny.LABELS
    folder = tiny.make_experts(kind, tmp_path, labels, rows=70)
    router = "linear" if kind.endswith("tokens") else "auto"
    recipe = tiny.write_recipe(folder, list(labels), exclusive={"rank": 4}, router=router)
    said = launched(2, "build", recipe, folder / "two", "--quiet")
    assert said.count("wrote ") == 1, "one process speaks"
    launched(1, "build", recipe, folder / "one", "--quiet")
    one, two = files(folder / "one"), files(folder / "two")
    assert set(one) == set(two) and [name for name in one if one[name] != two[name]] == []
    assert not [path for path in folder.iterdir() if "building" in path.name]
    if kind == "bert":
        fresh = [
            (name, tiny.write_data(kind, folder, f"new-{name}", tiny.LABELS[name], i)) for i, name in enumerate("abc")
        ]
        data = [part for name, file in fresh for part in ("--data", f"{name}={file}")]
        found = []
        for count in (1, 2):
            out = folder / f"scores{count}.json"
            launched(count, "evaluate", folder / "one", *data, "-o", out, "--quiet")
            found.append(without_times(json.loads(out.read_text(encoding="utf-8"))))
        assert found[0] == found[1]


def test_two_processes_tune_as_one(tmp_path):
    folder = tiny.make_experts("bert", tmp_path, rows=40)
    recipe = tiny.write_recipe(folder, exclusive={"rank": 4}, merge_method="task_arithmetic")
    for count in (1, 2):
        launched(count, "tune", recipe, "-o", folder / f"tuned{count}.yaml", "--quiet")
    one, two = ((folder / f"tuned{count}.yaml").read_text() for count in (1, 2))
    assert one == two.replace("tuned2.json", "tuned1.json")
    assert (folder / "tuned1.json").read_text() == (folder / "tuned2.json").read_text()
