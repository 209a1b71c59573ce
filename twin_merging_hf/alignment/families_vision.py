"""Permutation specs of ViT, ResNet (BatchNorm) and BiT (GroupNorm)."""

from typing import Any

from .families_text import NORMED, attention_sites, small_bert
from .spec import Hook, Rule, Site, Spec, rule


def vit(config: Any, names: set[str]) -> Spec:
    """ViT with an image classifier."""
    layer = "vit.layers.{i}"
    return Spec(
        sites=attention_sites(config.hidden_size, config.num_attention_heads, config.intermediate_size),
        rules=(
            rule("vit.embeddings.{cls_token,mask_token,position_embeddings}", None, None, "+res"),
            rule("vit.embeddings.patch_embeddings.projection.weight", "+res", None, None, None),
            rule(f"{layer}.{{layernorm_before,layernorm_after}}.weight", "*res"),
            rule("vit.layernorm.weight", "*res"),
            rule(f"{layer}.attention.{{q_proj,k_proj}}.weight", "+h.{i}/qk.{i}", "-res"),
            rule(f"{layer}.attention.v_proj.weight", "+h.{i}/vo.{i}", "-res"),
            rule(f"{layer}.attention.o_proj.weight", "+res", "-h.{i}/vo.{i}"),
            rule(f"{layer}.mlp.fc1.weight", "+ff.{i}", "-res"),
            rule(f"{layer}.mlp.fc2.weight", "+res", "-ff.{i}"),
            rule("classifier.weight", None, "-res", compared=False),
        ),
        hooks=(
            Hook("in", f"{layer}.{{attention.q_proj,mlp.fc1}}", "res"),
            Hook("out", "vit.layernorm", "res"),
            Hook("out", f"{layer}.attention.{{q_proj,k_proj}}", "h.{i}/qk.{i}"),
            Hook("in", f"{layer}.attention.o_proj", "h.{i}/vo.{i}"),
            Hook("in", f"{layer}.mlp.fc2", "ff.{i}"),
        ),
        layers=config.num_hidden_layers,
    )


def small_vit(config: Any) -> dict:
    """Fields of a small ViT with the same settings."""
    fields = {
        key: value for key, value in small_bert(config).items() if "hidden" in key or "num" in key or "inter" in key
    }
    return {**fields, "image_size": 12, "patch_size": 4}


def resnet(config: Any, names: set[str]) -> Spec:
    """
    ResNet with BatchNorm: one site for each width of the residual stream (it changes at every shortcut), one for the
    channels inside each block. ReLU leaves no signs free.
    """
    sites = [Site("r.stem", config.embedding_size, zips=True)]
    rules = [*_with_batch_norm("resnet.embedder.embedder", "r.stem", None)]
    hooks: list[Hook] = []
    stream = "r.stem"
    inner_width = {"basic": 1, "bottleneck": 4}[config.layer_type]
    for stage, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        for block in range(depth):
            at = f"resnet.encoder.stages.{stage}.layers.{block}"
            before = stream
            if f"{at}.shortcut.convolution.weight" in names:
                stream = f"r.{stage}.{block}"
                sites.append(Site(stream, width, zips=True))
                rules += _with_batch_norm(f"{at}.shortcut", stream, before)
            count = 2 if config.layer_type == "basic" else 3
            inner = [f"m.{stage}.{block}.{k}" for k in range(count - 1)]
            sites += [Site(name, width // inner_width, zips=True) for name in inner]
            for k, (into, out) in enumerate(zip([before, *inner], [*inner, stream], strict=True)):
                rules += _with_batch_norm(f"{at}.layer.{k}", out, into)
                hooks.append(Hook("in", f"{at}.layer.{k}.convolution", into))
    rules.append(rule("classifier.1.weight", None, f"-{stream}", compared=False))
    hooks.append(Hook("in", "resnet.pooler", stream))
    return Spec(tuple(sites), tuple(rules), tuple(hooks))


def _with_batch_norm(at: str, out: str, into: str | None) -> list[Rule]:
    return [
        rule(f"{at}.convolution.weight", f"+{out}", into and f"-{into}", None, None),
        rule(f"{at}.normalization.weight", f"*{out}"),
    ]


def small_resnet(config: Any) -> dict:
    """Fields of a small ResNet in which the first stage has a shortcut exactly where the given one has."""
    widths = [16 * (1 + stage) for stage in range(len(config.hidden_sizes))]
    stem = widths[0] if config.embedding_size == config.hidden_sizes[0] else 8
    return {"embedding_size": stem, "hidden_sizes": widths, "depths": [min(2, depth) for depth in config.depths]}


def bit(config: Any, names: set[str]) -> Spec:
    """
    BiT, with activations before (`preactivation`) or after its convolutions: groups of a GroupNorm move as wholes, channels
    inside their group.
    """
    builder = _BitSpec(config, names)
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            builder.block(f"bit.encoder.stages.{stage}.layers.{block}", f"{stage}.{block}")
    return builder.finish()


class _BitSpec:
    def __init__(self, config: Any, names: set[str]):
        from transformers.models.bit.modeling_bit import make_div

        self.groups, self.names, self.preactivated = config.num_groups, names, config.layer_type == "preactivation"
        self.widths = [make_div(width * config.width_factor) for width in config.hidden_sizes]
        self.inner = [make_div(width * 0.25) for width in self.widths]
        self.sites: list[Site] = []
        self.hooks: list[Hook] = []
        self.stream = self._site("stem", config.embedding_size)
        self.rules = [
            rule("bit.embedder.convolution.weight", f"+{self.stream}", None, None, None),
            rule("bit.embedder.norm.weight", f"*{self.stream}"),
        ]

    def _site(self, name: str, width: int) -> str:
        channels = Site(f"c.{name}", width // self.groups, parent=f"g.{name}", why_not=NORMED)
        self.sites += [Site(f"g.{name}", self.groups), channels]
        return f"g.{name}/c.{name}"

    def block(self, at: str, name: str) -> None:
        stage = int(name.split(".")[0])
        before = self.stream
        if f"{at}.downsample.conv.weight" in self.names:
            self.stream = self._site(f"r.{name}", self.widths[stage])
            self.rules += [
                rule(f"{at}.downsample.conv.weight", f"+{self.stream}", f"-{before}", None, None),
                rule(f"{at}.downsample.norm.weight", f"*{self.stream}"),
            ]
        inner = [self._site(f"{kind}.{name}", self.inner[stage]) for kind in "ab"]
        places = [before, *inner, self.stream]
        for k in range(3):
            self.rules.append(rule(f"{at}.conv{k + 1}.weight", f"+{places[k + 1]}", f"-{places[k]}", None, None))
            normed = places[k] if self.preactivated else places[k + 1]
            self.rules.append(rule(f"{at}.norm{k + 1}.weight", f"*{normed}"))
            self.hooks.append(Hook("in", f"{at}.conv{k + 1}", places[k]))

    def finish(self) -> Spec:
        self.rules += [
            rule("bit.norm.weight", f"*{self.stream}"),
            rule("classifier.1.weight", None, f"-{self.stream}", compared=False),
        ]
        self.hooks.append(Hook("in", "bit.pooler", self.stream))
        return Spec(tuple(self.sites), tuple(self.rules), tuple(self.hooks))


def small_bit(config: Any) -> dict:
    """Fields of a small BiT with the same settings; its groups hold several channels wherever the given one's do."""
    return {
        "embedding_size": 8,
        "hidden_sizes": [32 * (1 + stage) for stage in range(len(config.hidden_sizes))],
        "depths": [min(2, depth) for depth in config.depths],
        "num_groups": 1 if config.num_groups == 1 else 4,
        "width_factor": 1,
    }
