"""The small models of alignment.py: a perceptron of our own with its symmetries registered, and four of Transformers'."""

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitConfig,
    BitForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from twin_merging_hf.alignment import Hook, Site, Spec, register_spec, rule


WIDTH = 128
LAYERS = 3
SIDE = 28


class PerceptronConfig(PreTrainedConfig):
    """Configuration of `PerceptronForImageClassification`."""

    model_type = "benchmark_perceptron"
    width: int = WIDTH
    depth: int = LAYERS


class Perceptron(PreTrainedModel):
    """Pixels through linear layers with ReLU."""

    config_class = PerceptronConfig
    base_model_prefix = "perceptron"
    main_input_name = "pixel_values"

    def __init__(self, config: PerceptronConfig):
        super().__init__(config)
        sizes = [SIDE * SIDE, *[config.width] * config.depth]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(sizes, sizes[1:], strict=False))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return BaseModelOutput(last_hidden_state=hidden)


class PerceptronForImageClassification(PreTrainedModel):
    """A perceptron with a linear head."""

    config_class = PerceptronConfig
    base_model_prefix = "perceptron"
    main_input_name = "pixel_values"

    def __init__(self, config: PerceptronConfig):
        super().__init__(config)
        self.perceptron = Perceptron(config)
        self.classifier = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            nn.init.normal_(module.weight, std=0.05)
            nn.init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> ImageClassifierOutput:
        hidden = self.perceptron(pixel_values).last_hidden_state
        return ImageClassifierOutput(logits=self.classifier(hidden))


def perceptron_symmetries(config: PerceptronConfig, names: set[str]) -> Spec:
    """Each layer's units may change places, together with the columns of the next layer."""
    units = [f"units.{i}" for i in range(config.depth)]
    read_by = [f"perceptron.layers.{i}" for i in range(1, config.depth)] + ["classifier"]
    rules = [
        rule(f"perceptron.layers.{i}.weight", f"+{unit}", f"-{units[i - 1]}" if i else None)
        for i, unit in enumerate(units)
    ]
    rules.append(rule("classifier.weight", None, f"-{units[-1]}", compared=False))
    return Spec(
        tuple(Site(unit, config.width, zips=True) for unit in units),
        tuple(rules),
        tuple(Hook("in", module, unit) for module, unit in zip(read_by, units, strict=True)),
    )


def register_perceptron() -> None:
    """Tell the package how perceptrons may be permuted."""
    register_spec(
        PerceptronConfig.model_type,
        perceptron_symmetries,
        lambda: PerceptronForImageClassification(PerceptronConfig(width=8)),
        lambda model: {"pixel_values": torch.randn(4, 1, SIDE, SIDE)},
    )


_CONVOLUTIONAL = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
_TRANSFORMER = {"num_hidden_layers": 2, "num_attention_heads": 4}


def new_model(family: str, labels: list[str], seed: int) -> Any:
    """A model with random weights; the global random state stays as it was."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "mlp":
            return PerceptronForImageClassification(PerceptronConfig(**names))
        if family == "resnet-bn":
            config = ResNetConfig(**_CONVOLUTIONAL, layer_type="basic", **names)
            return ResNetForImageClassification(config)
        if family == "resnet-gn":
            return BitForImageClassification(BitConfig(**_CONVOLUTIONAL, num_groups=4, global_padding="same", **names))
        if family == "vit":
            shape = {
                "image_size": SIDE,
                "patch_size": 7,
                "num_channels": 1,
                "hidden_size": 64,
                "intermediate_size": 128,
            }
            return ViTForImageClassification(ViTConfig(**_TRANSFORMER, **shape, **names))
        if family == "bert":
            shape = {"vocab_size": 4000, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 64}
            return BertForSequenceClassification(BertConfig(**_TRANSFORMER, **shape, **names))
    raise ValueError(f"unknown family {family!r}")


FAMILIES = ("mlp", "resnet-bn", "resnet-gn", "vit", "bert")
