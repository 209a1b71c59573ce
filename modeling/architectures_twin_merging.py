"""
Single architectures' modules that need a rule of their own, by class name: everything that is no plain `nn.Linear`,
`nn.Embedding` or norm, and yet can carry a delta per row. What stands neither here nor among the plain rules is refused.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .mix_twin_merging import ExpertMix
from .terms_twin_merging import looked_up, tables


RMS_NORMS = ("T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm")
"""Root-mean-square norms that are called otherwise."""

# Subclasses of `nn.Embedding`, by what their forward does.
SCALED_EMBEDDINGS = (
    "BartScaledWordEmbedding",
    "MBartScaledWordEmbedding",
    "M2M100ScaledWordEmbedding",
    "XGLMScaledWordEmbedding",
    "BioGptScaledWordEmbedding",
    "GemmaTextScaledWordEmbedding",
    "Gemma2TextScaledWordEmbedding",
    "Gemma3TextScaledWordEmbedding",
)
LOOKED_UP_EMBEDDINGS = (
    "BartLearnedPositionalEmbedding",
    "MBartLearnedPositionalEmbedding",
    "OPTLearnedPositionalEmbedding",
    "BioGptLearnedPositionalEmbedding",
)

_HEADS_WITH_TIED_BIAS = (
    "BertLMPredictionHead",
    "RobertaLMHead",
    "XLMRobertaLMHead",
    "CamembertLMHead",
)
_RELATIVE_ATTENTION = ("T5Attention", "MT5Attention", "UMT5Attention")

CHILD_RULES = {name: {"relative_attention_bias": "relative_bias"} for name in _RELATIVE_ATTENTION}
"""Children whose weight is used by their parent in a way of its own: the parent holds the parameter, under their name."""


def architecture_rule(owner: nn.Module, attribute: str) -> str | None:
    """
    Name the rule of a single architecture by which a parameter's delta can act per row, or None.

    `unread` is a parameter that no forward reads: it is tied to another that is.
    """
    kind = type(owner).__name__
    if not type(owner).__module__.startswith("transformers."):  # a namesake may compute something else
        return None
    if attribute in CHILD_RULES.get(kind, {}):
        return CHILD_RULES[kind][attribute]
    if isinstance(owner, nn.Embedding) and attribute == "weight" and owner.max_norm is None:
        if kind in SCALED_EMBEDDINGS:
            return "scaled_embedding"
        if kind in LOOKED_UP_EMBEDDINGS:
            return "looked_up_embedding"
    if kind in _HEADS_WITH_TIED_BIAS and attribute == "bias":
        return "unread"
    return None


def shell_of(module: nn.Module) -> Any:
    """A shallow copy of a module that shares everything with it, to run the class's own code on changed parts."""
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    return shell


class LookedUpRows:
    """
    Stands in for the forward of an embedding that finds its rows by itself, such as BART's positions.

    Which rows these are, the class's own forward tells when it looks them up in a table of row numbers.
    """

    def __init__(self, module: nn.Embedding, mix: ExpertMix, delta: nn.Module):
        self.module, self.mix, self.delta = module, mix, delta

    def __call__(self, *args, **kwargs):
        module, call = self.module, self.mix.current()
        output = type(module).forward(module, *args, **kwargs)
        if call is None:
            return output
        shell = shell_of(module)
        numbers = torch.arange(module.num_embeddings, dtype=torch.float64, device=output.device)[:, None]
        shell.__dict__["_parameters"] = {"weight": numbers}
        rows = type(module).forward(shell, *args, **kwargs)[..., 0].long()
        return output + looked_up(self.delta, rows, call).to(device=output.device, dtype=output.dtype)


class _Lookup:
    """What the class's own code takes for its table of biases: every row's delta side by side."""

    def __init__(self, tables: torch.Tensor):
        self.weight = tables.permute(1, 0, 2).flatten(1)  # [bucket, batch * head]

    def __call__(self, buckets: torch.Tensor) -> torch.Tensor:
        return F.embedding(buckets.to(self.weight.device), self.weight)


class PerRowRelativeBias:
    """
    Stands in for `compute_bias` of T5's attention, whose result has no batch dimension: [1, head, query, key].

    The class's own code runs once more on the deltas of all rows, as if they were more heads, and adds them: [batch, ...].
    """

    def __init__(self, module: Any, mix: ExpertMix, delta: nn.Module):
        self.module, self.mix, self.delta = module, mix, delta

    def __call__(self, *args, **kwargs):
        module, call = self.module, self.mix.current()
        compute: Any = type(module).compute_bias
        bias = compute(module, *args, **kwargs)
        if call is None:
            return bias
        tables_of_rows = tables(self.delta, call)  # [batch, bucket, head]
        shell = shell_of(module)
        shell.__dict__["relative_attention_bias"] = _Lookup(tables_of_rows)
        more = compute(shell, *args, **kwargs)  # [1, batch * head, query, key]
        more = more.reshape(tables_of_rows.shape[0], tables_of_rows.shape[2], *more.shape[2:])
        return bias + more.to(device=bias.device, dtype=bias.dtype)
