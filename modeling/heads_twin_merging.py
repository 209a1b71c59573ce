"""Task heads of all experts side by side, and the union label space in which their answers are one distribution."""

from dataclasses import dataclass

import torch
from torch import nn

from .configuration_twin_merging import LANGUAGE
from .tags_twin_merging import OUTSIDE, TOKEN_CLASSES, union_tags


@dataclass(frozen=True)
class LabelSpace:
    """
    The labels of all experts as one list.

    kind:
        `union`: experts in order, each one's labels as "{expert}/{label}"; `same`: all experts have one set of label
        names, which are the labels; `value`: all experts are regressions, one number; `tags`: experts tag tokens, each
        with labels of its own but one shared `O` (see `union_tags`); `language`: experts write tokens, no labels.
    labels: names of the columns of `logits` and `expert_logits`.
    spans: for each expert, its columns (start, stop) in the concatenated head outputs.
    orders: for each expert, the order that brings its outputs to `labels` (`same`), or the column of each of its own
        labels (`tags`).
    regression: for each expert, whether it is a regression.
    temperatures: what each expert's outputs are divided by before they become probabilities in `logits`; 1 unless the
        expert was found too sure of itself on held-out rows (its config entry's `temperature`).
    """

    kind: str
    labels: tuple
    spans: tuple
    orders: tuple
    regression: tuple
    temperatures: tuple

    @classmethod
    def of(cls, experts: list) -> "LabelSpace":
        """
        Build the space of config entries `{"name", "labels", "problem_type"}`.

        Raises:
            ValueError: tags of two experts would get one name.
        """
        regression = tuple(expert["problem_type"] == "regression" for expert in experts)
        spans, start = [], 0
        for expert in experts:
            spans.append((start, start + len(expert["labels"])))
            start = spans[-1][1]
        first = list(experts[0]["labels"])
        orders: tuple = ()
        labels: tuple = ()
        if all(expert["problem_type"] == LANGUAGE for expert in experts):
            kind = "language"
        elif all(regression):
            names = {label for expert in experts for label in expert["labels"]}
            kind, labels = "value", tuple(names if len(names) == 1 else ["value"])
        elif not any(regression) and all(_mergeable(expert["labels"], first) for expert in experts):
            kind, labels = "same", tuple(first)
            orders = tuple(tuple(expert["labels"].index(label) for label in first) for expert in experts)
        elif all(expert["problem_type"] == TOKEN_CLASSES for expert in experts):
            kind = "tags"
            labels, orders = union_tags(experts)
        else:
            kind = "union"
            labels = tuple(f"{expert['name']}/{label}" for expert in experts for label in expert["labels"])
        temperatures = tuple(float(expert.get("temperature", 1.0)) for expert in experts)
        return cls(kind, labels, tuple(spans), orders, regression, temperatures)

    def columns(self, expert: int) -> list:
        """Columns of `logits` that an expert's own outputs, in its own label order, stand in."""
        if self.kind == "value":
            return [0]
        if self.kind == "same":
            order = self.orders[expert]
            return [order.index(i) for i in range(len(order))]
        if self.kind == "tags":
            return list(self.orders[expert])
        return list(range(*self.spans[expert]))

    def compose(self, outputs: torch.Tensor, weights: torch.Tensor) -> tuple:
        """
        Mix the experts' outputs.

        Args:
            outputs: concatenated raw head outputs [batch, sum of widths], or [batch, token, sum of widths].
            weights: expert weights [batch, expert], not negative; they need not sum to one.

        Returns:
            `(logits, expert_logits)`, both [batch, label] or [batch, token, label]: log-probabilities over the union (for
            `value`: the weighted number) in the dtype of `outputs`, and the raw outputs of the heads. Where experts share
            a column (all of `same`, the `O` of `tags`), their probabilities add up, and so do their raw outputs times
            their weights.
        """
        dtype = outputs.dtype
        raw = outputs.to(torch.promote_types(dtype, torch.float32))
        prior = head_prior(weights.to(raw.device, raw.dtype))
        prior = prior[:, None] if raw.dim() == 3 else prior  # one choice for all tokens of a row
        blocks = [raw[..., start:stop] for start, stop in self.spans]
        if self.kind == "value":
            value = (torch.cat(blocks, dim=1) * prior).sum(dim=1, keepdim=True).to(dtype)
            return value, value
        # Zero has no logarithm; the dtype's tiny keeps losses and gradients finite.
        log_prior = prior.clamp(min=torch.finfo(torch.float32).tiny).log()
        if self.kind == "same":
            blocks = [block[..., list(order)] for block, order in zip(blocks, self.orders, strict=True)]
            terms = [self._log_probability(block, t, log_prior) for t, block in enumerate(blocks)]
            logits = torch.stack(terms).logsumexp(dim=0)
            expert_logits = torch.stack([block * prior[..., t : t + 1] for t, block in enumerate(blocks)]).sum(dim=0)
        else:
            logits = torch.cat([self._log_probability(block, t, log_prior) for t, block in enumerate(blocks)], dim=-1)
            expert_logits = raw
            if self.kind == "tags" and OUTSIDE in self.labels:
                logits, expert_logits = self._share_outside(logits, raw, prior)
        return logits.clamp(min=torch.finfo(dtype).min).to(dtype), expert_logits.to(dtype)

    def _log_probability(self, block: torch.Tensor, t: int, log_prior: torch.Tensor) -> torch.Tensor:
        if self.regression[t]:
            return log_prior[..., t : t + 1]
        # Not dividing by 1 keeps an expert that needs no correction exactly as it is.
        block = block if self.temperatures[t] == 1.0 else block / self.temperatures[t]
        return block.log_softmax(-1) + log_prior[..., t : t + 1]

    def _share_outside(self, logits: torch.Tensor, raw: torch.Tensor, prior: torch.Tensor) -> tuple:
        """Bring the experts' columns [..., sum of widths] to the union of tags, their `O`s together in one column."""
        column = self.labels.index(OUTSIDE)
        flat = [place for order in self.orders for place in order]
        mine = [flat.index(place) for place in range(len(self.labels)) if place != column]
        holders = [t for t, order in enumerate(self.orders) if column in order]
        outside = [position for position, place in enumerate(flat) if place == column]
        together = logits[..., outside].logsumexp(dim=-1, keepdim=True)
        mean = (raw[..., outside] * prior[..., holders]).sum(dim=-1, keepdim=True)
        return tuple(
            torch.cat([values[..., mine[:column]], shared, values[..., mine[column:]]], dim=-1)
            for values, shared in ((logits, together), (raw, mean))
        )


def _mergeable(labels: list, first: list) -> bool:
    # Names that Transformers made up ("LABEL_0") say nothing about meaning, so equal ones are no sign of equal tasks.
    made_up = all(label == f"LABEL_{i}" for i, label in enumerate(labels))
    return not made_up and set(labels) == set(first)


def head_prior(weights: torch.Tensor) -> torch.Tensor:
    """Weights scaled to sum to one, uniform for rows that sum to zero: [batch, expert]."""
    total = weights.sum(dim=-1, keepdim=True)
    uniform = torch.full_like(weights, 1.0 / weights.shape[-1])
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(weights.dtype).tiny), uniform)


class ExpertHeads(nn.Module):
    """
    Stands where a task model's head stood: every expert's head on the same features, outputs side by side.

    Where a task model has several head modules in a row, the later ones get one chunk of features for each expert.
    """

    def __init__(self, heads: list, chained: bool):
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.chained = chained

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """[..., features] (or [..., expert * features] if chained) -> [..., sum of output widths]."""
        inputs = x.chunk(len(self.heads), dim=-1) if self.chained else [x] * len(self.heads)
        return torch.cat([head(row, *args, **kwargs) for head, row in zip(self.heads, inputs, strict=True)], dim=-1)
