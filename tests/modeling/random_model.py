"""A Twin-Merging BERT with random weights, made from sizes alone: for tests of what a forward costs."""

from typing import Any

import torch
from transformers import BertConfig, BertModel

from twin_merging_hf.modeling import TwinMergingConfig, TwinMergingModel
from twin_merging_hf.modeling.deltas_twin_merging import is_vector


def random_bert(
    experts: int, rank: int, *, hidden: int = 64, layers: int = 4, storage: str = "float32", **routing: Any
):
    """Its backbone with deltas of `rank` on every matrix; `routing`: fields of the config."""
    shared = BertConfig(
        vocab_size=100,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=66,
    )
    with torch.device("meta"):
        names = {f"bert.{name}": parameter.shape for name, parameter in BertModel(shared).named_parameters()}
    below = ()
    if routing.get("router_pass") == "late":
        below = ("bert.embeddings.", *(f"bert.encoder.layer.{i}." for i in range(routing["router_layer"])))
    names = {name: shape for name, shape in names.items() if not name.startswith(below or ("-",))}
    config = TwinMergingConfig(
        shared_config=shared,
        shared_class="BertForSequenceClassification",
        head_modules=["classifier"],
        layers_path="bert.encoder.layer",
        experts=[
            {"name": f"e{i}", "labels": ["x", "y"], "problem_type": "single_label_classification"}
            for i in range(experts)
        ],
        ranks={name: [rank] * experts for name, shape in names.items() if not is_vector(shape)},
        exact_deltas=[name for name, shape in names.items() if is_vector(shape)],
        factor_dtype=storage,
        router_input_size=hidden,
        **{"router_pass": "prefix", "router_layer": layers // 4, **routing},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = TwinMergingModel(config).eval()
        with torch.no_grad():
            for tensor in (*model.deltas.parameters(), *model.deltas.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(std=0.02)
                else:
                    tensor.random_(0, 127)
    return model
