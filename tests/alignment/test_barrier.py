"""Why align: networks trained from different seeds average to nothing as they are, and to something aligned (T4, T5)."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from twin_merging_hf.alignment import Hook, Site, Spec, merge_models, register_spec, registry, rule


CLASSES, FEATURES, WIDTH, DEPTH = 8, 20, 48, 3
SEEDS = range(4)


class WideConfig(PretrainedConfig):
    model_type = "twin_merging_test_wide"


class Wide(PreTrainedModel):
    """A multi-layer perceptron."""

    config_class = WideConfig
    main_input_name = "inputs"

    def __init__(self, config):
        super().__init__(config)
        sizes = [FEATURES, *[WIDTH] * DEPTH]
        self.body = nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])
        self.head = nn.Linear(WIDTH, CLASSES)
        self.post_init()

    def forward(self, inputs, labels=None):
        for layer in self.body:
            inputs = layer(inputs).relu()
        return SequenceClassifierOutput(logits=self.head(inputs))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def _spec(config, names):
    return Spec(
        sites=tuple(Site(f"u.{i}", WIDTH, zips=True) for i in range(DEPTH)),
        rules=(
            rule("body.0.weight", "+u.0", None),
            *(rule(f"body.{i}.weight", f"+u.{i}", f"-u.{i - 1}") for i in range(1, DEPTH)),
            rule("head.weight", None, f"-u.{DEPTH - 1}"),
        ),
        hooks=(
            *(Hook("in", f"body.{i}", f"u.{i - 1}") for i in range(1, DEPTH)),
            Hook("in", "head", f"u.{DEPTH - 1}"),
        ),
    )


def _data(seed: int, rows: int = 1200) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clusters, three to a class, so that no linear model solves it."""
    centres = torch.randn(CLASSES, 3, FEATURES, generator=torch.Generator().manual_seed(99)) * 1.1
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    which = torch.randint(3, (rows,), generator=generator)
    return centres[labels, which] + torch.randn(rows, FEATURES, generator=generator), labels


def _trained(seed: int, classes: list[int]) -> Wide:
    torch.manual_seed(seed)
    model, (inputs, labels) = Wide(WideConfig()), _data(1)
    keep = torch.isin(labels, torch.tensor(classes))
    inputs, labels = inputs[keep], labels[keep]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs).logits, labels).backward()
        optimizer.step()
    return model.eval()


def _accuracy(model: Wide) -> float:
    inputs, labels = _data(2)
    with torch.no_grad():
        return float((model(inputs).logits.argmax(1) == labels).float().mean())


def _merged(models: list, **options) -> float:
    batches = [{"inputs": _data(3)[0][i : i + 300]} for i in range(0, 1200, 300)]
    merged = Wide(WideConfig()).eval()
    merge_models(models, batches, **options).apply(merged)
    return _accuracy(merged)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    before = dict(registry._FAMILIES)
    inputs = {"inputs": _data(4, 16)[0]}
    register_spec(WideConfig.model_type, _spec, lambda: Wide(WideConfig()), lambda model: inputs)
    yield
    registry._FAMILIES.clear()
    registry._FAMILIES.update(before)


def _mean(pairs: list, **options) -> float:
    return sum(_merged(list(pair), **options) for pair in pairs) / len(pairs)


def test_networks_of_one_task_average_far_better_when_aligned():
    everything = list(range(CLASSES))
    pairs = [(_trained(2 * seed, everything), _trained(2 * seed + 1, everything)) for seed in SEEDS]
    own = sum(_accuracy(model) for pair in pairs for model in pair) / (2 * len(pairs))
    plain, aligned = _mean(pairs, mode="average"), _mean(pairs)
    assert own > 0.7 and aligned > plain + 0.3


def test_dual_space_on_disjoint_tasks_beats_weights_alone_and_zip_beats_align():
    halves = [list(range(CLASSES // 2)), list(range(CLASSES // 2, CLASSES))]
    pairs = [(_trained(2 * seed, halves[0]), _trained(2 * seed + 1, halves[1])) for seed in SEEDS]
    zipped = {share: _mean(pairs, mode="zip", weight_share=share) for share in (0.0, 0.5, 1.0)}
    assert zipped[0.5] >= zipped[1.0] + 0.05
    assert zipped[0.5] >= zipped[0.0] - 0.03
    assert zipped[0.5] > _mean(pairs) + 0.05 > _mean(pairs, mode="average") + 0.1
