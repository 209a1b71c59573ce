"""
Loads artifacts as users do and compares with expected answers; run by test_remote_code in a process of its own.

usage: remote_script.py with|without EXPECTED.json OUT   (with or without the plugin)
"""

import importlib
import json
import logging
import sys
from pathlib import Path


MODE, EXPECTED, OUT = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3])
PLUGIN = "twin_merging_hf"


class Block:
    """Finds no plugin, however it may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PLUGIN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


class Record(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


if MODE == "without":
    sys.meta_path.insert(0, Block())
    try:
        importlib.import_module(PLUGIN)
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("the plugin can be imported, so this proves nothing")
else:
    importlib.import_module(PLUGIN)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402


ERRORS = Record()
logging.getLogger().addHandler(ERRORS)
logging.getLogger("transformers").addHandler(ERRORS)
TRUST = {"trust_remote_code": True} if MODE == "without" else {}
HOME = "transformers_modules" if MODE == "without" else PLUGIN


def close(value, expected) -> None:
    torch.testing.assert_close(value, torch.tensor(expected), rtol=0, atol=1e-4)


def check_model(case: dict, folder: str, inputs: dict):
    model = getattr(transformers, case["auto"]).from_pretrained(folder, **TRUST).eval()
    assert type(model).__module__.split(".")[0] == HOME, type(model).__module__
    with torch.no_grad():
        together = model(**inputs)
        close(together.logits, case["logits"])
        close(together.expert_weights, case["expert_weights"])
        for row in range(len(case["logits"])):
            single = {name: value[row : row + 1] for name, value in inputs.items()}
            close(model(**single).logits, case["logits"][row : row + 1])
        close(model(**inputs, experts="b").expert_logits, case["expert_b"])
    return model


def check_tagger(case: dict, pipe) -> None:
    with pipe.model.use_experts("b"):
        answers = pipe(case["rows"], batch_size=4, aggregation_strategy="simple")
    found = [entity for row in answers for entity in row]
    assert [entity["entity_group"] for entity in found] == case["labels"], found
    for entity, score in zip(found, case["scores"], strict=True):
        assert abs(entity["score"] - score) < 1e-4, (entity, score)
    assert {label.split("/")[0] for label in case["labels"]} == {"b"}


def check_pipeline(case: dict, folder: str) -> None:
    pipe = pipeline(case["task"], model=folder, **TRUST)
    if case["task"] == "token-classification":
        check_tagger(case, pipe)
        return
    for size in (1, 8):
        answers = pipe(case["rows"], batch_size=size, top_k=1)
        assert [answer[0]["label"] for answer in answers] == case["labels"], answers
        for answer, score in zip(answers, case["scores"], strict=True):
            assert abs(answer[0]["score"] - score) < 1e-4, (answer, score)
    with pipe.model.use_experts("b"):
        assert {answer[0]["label"].split("/")[0] for answer in pipe(case["rows"], top_k=1)} == {"b"}


def check_refusal(case: dict, folder: str) -> None:
    for options in ({}, {"trust_remote_code": False}):
        for load in (AutoConfig.from_pretrained, getattr(transformers, case["auto"]).from_pretrained):
            try:
                load(folder, **options)
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
            else:
                raise AssertionError("loaded without being trusted")


for kind, case in EXPECTED.items():
    folder = case["folder"]
    if MODE == "without":
        check_refusal(case, folder)
    processor = (AutoImageProcessor if kind == "vit" else AutoTokenizer).from_pretrained(folder, **TRUST)
    if kind == "vit":
        from PIL import Image

        inputs = dict(processor([Image.open(row) for row in case["rows"]], return_tensors="pt"))
    else:
        inputs = dict(processor(case["rows"], padding=True, return_tensors="pt"))
    model = check_model(case, folder, inputs)
    with torch.no_grad():
        backbone = AutoModel.from_pretrained(folder, **TRUST).eval()
        close(backbone(**inputs).last_hidden_state[:, 0], case["first_state"])
    check_pipeline(case, folder)
    model.save_pretrained(OUT / kind)
    check_model(case, str(OUT / kind), inputs)
    check_pipeline(case, str(OUT / kind))

assert ERRORS.messages == [], ERRORS.messages
assert MODE == "with" or not any(name.split(".")[0] == PLUGIN for name in sys.modules)
print("all is well")
