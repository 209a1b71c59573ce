"""Language artifacts in the hands of people without the plugin: the code that travels with them writes the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.modeling.language import GREEDY, NAMES, LanguageWorld, prompts, side_of


SCRIPT = Path(__file__).with_name("remote_generation.py")
AUTO = {
    "llama-lm": "AutoModelForCausalLM",
    "gpt2-lm": "AutoModelForCausalLM",
    "t5-lm": "AutoModelForSeq2SeqLM",
    "bart-lm": "AutoModelForSeq2SeqLM",
    "bert-lm": "AutoModelForMaskedLM",
}


@torch.no_grad()
def expected(language: LanguageWorld, kind: str) -> dict:
    model, inputs = language.model(kind), prompts(side=side_of(kind))
    case = {
        "auto": AUTO[kind],
        "folder": str(language.artifact(kind)),
        "inputs": {name: value.tolist() for name, value in inputs.items()},
        "experts": NAMES,
        "options": GREEDY,
    }
    if not model.can_generate():
        return {**case, "tokens": model(**inputs, experts=NAMES).logits.argmax(dim=-1).tolist()}
    return {
        **case,
        "sequences": model.generate(**inputs, experts=NAMES, **GREEDY).tolist(),
        "beams": model.generate(**inputs, experts=NAMES, num_beams=2, **GREEDY).tolist(),
    }


def test_artifacts_without_the_plugin_write_the_same_and_save_again(tmp_path):
    language = LanguageWorld(tmp_path / "language")
    cases = {kind: expected(language, kind) for kind in AUTO}
    (tmp_path / "expected.json").write_text(json.dumps(cases), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "expected.json"), str(tmp_path / "saved")],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0 and result.stdout.endswith("all is well\n"), result.stdout + result.stderr
