"""Token classification over the union of tags: the row is routed, every token of it is answered."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .classification_twin_merging import ClassificationMixin


@dataclass
class TwinMergingTokenClassifierOutput(ModelOutput):
    """
    Output of the token classification model; [batch, expert, ...] for `experts="all"`.

    loss: scalar, mean negative log-probability of the tags of all tokens whose label is not -100.
    logits: [batch, token, label], log-probabilities over the union of tags (`config.id2label`), so that
        `exp(logits).sum(-1) == 1`.
    expert_logits: [batch, token, label], each expert's own raw head outputs in its columns; in the column of the shared
        `O`, as wherever experts share a column, their raw outputs' mean by weight.
    expert_weights: the weights that acted, [batch, expert]: one choice for a whole row.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    expert_logits: torch.FloatTensor | None = None
    expert_weights: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class TokenClassificationMixin(ClassificationMixin):
    """What makes a Twin-Merging model a classifier of tokens."""

    _output_class: type = TwinMergingTokenClassifierOutput
    _per_token = ("logits", "expert_logits")

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ) -> TwinMergingTokenClassifierOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds:
                As in the shared model.
            labels: [batch, token]; integers in the union of tags (`config.label2id`), -100 where none counts.
            expert_weights: [batch, expert] or [1, expert], not negative; none given: the router decides.
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, a dict of weights
                by name, or `"all"` (each row by every expert, outputs [batch, expert, ...]).

        Raises:
            ValueError: unknown expert or argument, wrong shape or sign of weights, labels of another shape or type, or
                labels together with `experts="all"`.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
                 "position_ids": position_ids, "inputs_embeds": inputs_embeds}  # fmt: skip
        return self._classify(named, kwargs, labels, experts, expert_weights)

    def _loss(self, labels, logits, expert_logits, weights, items) -> Any:
        if labels.shape != logits.shape[:2] or labels.is_floating_point():
            raise ValueError(
                f"`labels` must be integers [batch, token] = {list(logits.shape[:2])}, got {labels.dtype} "
                f"{list(labels.shape)}"
            )
        labels = labels.to(logits.device).view(-1)
        total = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum")
        return total / ((labels != -100).sum() if items is None else items)
