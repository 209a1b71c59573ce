"""Artifacts in the hands of people with and without the plugin: one process for each, started from nowhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests import files, tiny
from twin_merging_hf.modeling import TwinMergingModel


ROWS = 9
# A high temperature keeps logits small, whose rounding errors are then small too.
NONE = {"type": "lexical", "layer": [0, 1], "none": 0.3, "temperature": 20.0}
SCRIPT = Path(__file__).with_name("remote_script.py")


def expected(world, kind: str) -> dict:
    """What the plugin answers in this process."""
    labels = tiny.TAGS if kind == "bert-tokens" else None
    recipe = {"router": NONE} if kind == "bert-none" else {}
    kind = kind.removesuffix("-none")
    folder = world.artifact(kind, labels, **recipe)
    if kind == "vit":
        rows = [str(world.experts(kind) / "images" / f"{'abc'[i % 3]}{i}.png") for i in range(ROWS)]
        processor = AutoImageProcessor.from_pretrained(folder)
        inputs = processor([Image.open(row) for row in rows], return_tensors="pt")
        names = ("AutoModelForImageClassification", "image-classification")
    else:
        rows = [" ".join(tiny.WORDS[9 * i : 9 * i + 2 + i % 4]) for i in range(ROWS)]
        inputs = AutoTokenizer.from_pretrained(folder)(rows, padding=True, return_tensors="pt")
        names = ("AutoModelForSequenceClassification", "text-classification")
        if kind == "bert-tokens":
            names = ("AutoModelForTokenClassification", "token-classification")
    model = world.model(kind, labels, **recipe)
    with torch.no_grad():
        output = model(**inputs)
        state = TwinMergingModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[:, 0]
        expert = model(**inputs, experts="b").expert_logits
    pipe = pipeline(names[1], model=str(folder))
    if kind == "bert-tokens":
        # With the expert given: left to themselves, random models may find `O` everywhere.
        with pipe.model.use_experts("b"):
            found = [entity for row in pipe(rows, aggregation_strategy="simple") for entity in row]
        answers = [{"label": entity["entity_group"], "score": float(entity["score"])} for entity in found]
    else:
        answers = [answer[0] for answer in pipe(rows, top_k=1)]
    return {
        "folder": str(folder),
        "auto": names[0],
        "task": names[1],
        "rows": rows,
        "logits": output.logits.tolist(),
        "expert_weights": output.expert_weights.tolist(),
        "expert_b": expert.tolist(),
        "first_state": state.tolist(),
        "labels": [answer["label"] for answer in answers],
        "scores": [answer["score"] for answer in answers],
    }


@pytest.mark.parametrize("plugin", ["without", "with"])
def test_artifacts_load_answer_and_save_again(world, tmp_path, plugin):
    cases = {kind: expected(world, kind) for kind in ("bert", "vit", "bert-tokens", "bert-none")}
    assert all(len(set(case["labels"])) > 1 for case in cases.values()), "answers that are all equal prove little"
    (tmp_path / "expected.json").write_text(json.dumps(cases), encoding="utf-8")
    totals = [round(sum(row), 3) for row in cases["bert-none"]["expert_weights"]]
    assert set(totals) == {0.0, 1.0}, "some rows go to the shared model, and some do not"
    before = {kind: files.listing(Path(case["folder"])) for kind, case in cases.items()}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if plugin == "with":
        environment["PYTHONPATH"] = str(files.ROOT)
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), plugin, str(tmp_path / "expected.json"), str(tmp_path / "saved")],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0 and result.stdout.endswith("all is well\n"), result.stdout + result.stderr
    for kind, listing in before.items():
        assert files.listing(Path(cases[kind]["folder"])) == listing
        assert files.listing(tmp_path / "saved" / kind) == listing
