"""
Write one golden artifact of every kind for the current format: `python -m tests.golden.make`.

Run once a format is released; a folder that exists stays as it is. The model code is left out (it would be the current one
forever), pictures too.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import load
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.modeling.configuration_twin_merging import FORMAT_VERSION
from twin_merging_hf.progress import Progress


FOLDER = Path(__file__).parent
_TWO = {"a": ["x", "y"], "b": ["p", "q", "r"]}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {"exclusive": {"rank": 4, "dtype": "int4"}},
    "roberta": {"exclusive": {"rank": 2, "dtype": "bf16"}, "router": {"type": "mlp", "none": True}},
    "distilbert": {"exclusive": {"method": "magnitude", "ratio": 0.05}, "router": "centroid"},
    "vit": {"exclusive": {"rank": 2, "dtype": "int8"}, "router": "knn"},
    "resnet": {"exclusive": {"rank": 2, "dtype": "bf16"}},
    "bert-tokens": {"exclusive": {"rank": 2}, "router": {"type": "linear", "pass": "full"}},
    "llama-lm": {"exclusive": {"rank": 2}, "router": "lexical"},
    "gpt2-lm": {"exclusive": {"rank": 2, "dtype": "int8"}, "router": {"type": "linear", "pass": "late", "layer": 1}},
    "t5-lm": {"exclusive": {"rank": 2, "dtype": "bf16"}},
    "bert-lm": {"exclusive": {"rank": 2, "dtype": "int4"}},
}
"""Kind of tiny model -> recipe keys; between them every type of router, pass and stored delta."""
SMALLER: dict[str, dict[str, Any]] = {
    "distilbert": {"n_layers": 2},
    "gpt2-lm": {"n_layer": 2},
    "t5-lm": {"num_layers": 1},
    "resnet": {},
}
"""Fields of a model's config, default two layers: an artifact must be small enough for a repository."""
LABELS: dict[str, dict[str, list[str]]] = {"bert-tokens": {"a": tiny.TAGS["a"], "b": tiny.TAGS["b"]}}


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    inputs = tiny.batch(kind, 4)
    if kind == "t5-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3]
    return inputs


@torch.no_grad()
def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What must stay: expert weights, the routed outputs, and those of each expert."""
    asked = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    found = {"weights": model.route(**asked), "routed": model(**inputs).logits}
    found |= {name: model(**inputs, experts=name).logits for name in model.expert_names}
    return {name: value.float().contiguous() for name, value in found.items()}


def make(kind: str, out: Path) -> None:
    labels = LABELS.get(kind, {"a": [], "b": []} if kind.endswith("-lm") else _TWO)
    with tempfile.TemporaryDirectory() as scratch:
        fields = SMALLER.get(kind, {"num_hidden_layers": 2})
        folder = tiny.make_experts(kind, Path(scratch) / kind, labels, **fields)
        recipe = tiny.write_recipe(folder, list(labels), **KINDS[kind])
        built = build_artifact(recipe, folder / "artifact", Progress(quiet=True)).folder
        out.mkdir(parents=True)
        for file in built.iterdir():
            if file.suffix not in (".py", ".png"):
                shutil.copy(file, out / file.name)
        inputs = inputs_of(kind)
        expected = outputs_of(load(built), inputs)
    tensors = {f"input.{name}": value.contiguous() for name, value in inputs.items()}
    tensors |= {f"output.{name}": value for name, value in expected.items()}
    save_file(tensors, out / "golden.safetensors")
    size = sum(file.stat().st_size for file in out.iterdir())
    print(json.dumps({"kind": kind, "bytes": size}))


if __name__ == "__main__":
    for each in KINDS:
        target = FOLDER / f"format{FORMAT_VERSION}" / each
        if not target.exists():
            make(each, target)
