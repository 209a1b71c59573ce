"""The last check of an artifact: a clean process, without this package, loads it with the code that it carries."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.modeling.shared_twin_merging import find_shared_class

from .artifact import check_artifact, expected_tensors, read_config


_SCRIPT = Path(__file__).with_name("reload_script.py")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_SECONDS = 1800


def check_whole(folder: str | Path) -> list[str]:
    """
    `check_artifact`, and then a reload in a clean process without this package; an empty list means that all is well.

    The reload runs the artifact's own code. It does so only after `check_artifact` has found that this code is the
    installed package's, byte for byte.
    """
    folder = Path(folder)
    return check_artifact(folder) or reload_problems(folder)


def reload_problems(folder: Path) -> list[str]:
    """
    Tell what is wrong with an artifact that another process loads with `trust_remote_code` and without this package.

    Call it for artifacts that `check_artifact` finds whole: it runs their code.
    """
    config = read_config(folder)
    auto_class = find_shared_class(config.shared_class)[1]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {key: value for key, value in os.environ.items() if key not in _SECRETS}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch}
        command = [sys.executable, "-c", _SCRIPT.read_text(encoding="utf-8"), str(folder.resolve()), auto_class]
        try:
            result = subprocess.run(
                command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [f"a clean process did not load it within {_SECONDS} seconds"]
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return [f"a clean process without twin-merging-hf cannot load it: {last}"]
    found = json.loads(result.stdout.splitlines()[-1])
    problems = []
    if (found["module"], found["class"]) != ("transformers_modules", AUTO_MAP[auto_class].split(".")[-1]):
        problems.append(f"a clean process loads {found['class']} of {found['module']}, not the artifact's own class")
    expected = expected_tensors(config)
    problems += [f"tensor {name!r} is not there after loading" for name in sorted(expected - set(found["tensors"]))]
    problems += [f"tensor {name!r} holds NaN or infinity after loading" for name in found["not_finite"]]
    return problems
