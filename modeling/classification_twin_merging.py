"""Classification and regression over the union label space: one answer and one loss for every row."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .heads_twin_merging import LabelSpace
from .mix_twin_merging import ALL


@dataclass
class TwinMergingClassifierOutput(ModelOutput):
    """
    Output of the classification models; [batch, expert, ...] for `experts="all"`.

    loss: scalar, mean negative log-probability of the labels (squared error for float labels).
    logits: [batch, label], log-probabilities over the union label space (`config.id2label`), so that
        `exp(logits).sum(-1) == 1`; the weighted value [batch, 1] if every expert is a regression.
    expert_logits: [batch, label], each expert's own raw head outputs in its columns.
    expert_weights: the weights that acted, [batch, expert].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    expert_logits: torch.FloatTensor | None = None
    expert_weights: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class ClassificationMixin:
    """What makes a Twin-Merging model a classifier: mixed heads, and a loss in the union label space."""

    _mixes_heads = True
    _output_class: type = TwinMergingClassifierOutput
    # Of the model that this is mixed into.
    shared: Any
    label_space: LabelSpace
    _answer: Any
    _run: Any

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ) -> TwinMergingClassifierOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pixel_values:
                As in the shared model.
            labels: [batch]; integers in the union label space (`config.label2id`), or floats for regression rows.
            expert_weights: [batch, expert] or [1, expert], not negative; none given: the router decides.
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, a dict of weights
                by name, or `"all"` (each row by every expert, outputs [batch, expert, ...]).

        Raises:
            ValueError: unknown expert or argument, wrong shape or sign of weights, labels that mix regression and
                classes, or labels together with `experts="all"`.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
                 "position_ids": position_ids, "inputs_embeds": inputs_embeds, "pixel_values": pixel_values}  # fmt: skip
        return self._classify(named, kwargs, labels, experts, expert_weights)

    def _classify(self, named: dict, kwargs: dict, labels, experts, expert_weights) -> Any:
        if labels is not None and isinstance(experts, str) and experts == ALL:
            raise ValueError(
                "`labels` cannot be given together with `experts='all'`: a row has one loss, not one for each"
            )
        items = kwargs.get("num_items_in_batch")

        def answer(inputs, weights):
            inputs = {name: value for name, value in inputs.items() if name != "num_items_in_batch"}
            output, weights = self._run(self.shared, inputs, weights)
            logits, expert_logits = self.label_space.compose(output.logits, weights)
            return self._output_class(
                logits=logits,
                expert_logits=expert_logits,
                expert_weights=weights,
                hidden_states=output.get("hidden_states"),
                attentions=output.get("attentions"),
            )

        def finish(output):
            if labels is None:
                return output
            loss = self._loss(labels, output.logits, output.expert_logits, output.expert_weights, items)
            return self._output_class(loss=loss, **output)  # made anew: the loss stands first

        return self._answer(named, kwargs, experts, expert_weights, answer, finish)

    def _loss(self, labels, logits, expert_logits, weights, items) -> Any:
        """Cross-entropy in the union space for integer labels, squared error of the weighted value for floats."""
        space = self.label_space
        slots = [space.columns(t)[0] for t in range(len(space.regression)) if space.regression[t]]
        if labels.is_floating_point() or space.kind == "value":
            if not slots:
                raise ValueError("float labels need a regression expert; this model has none (labels are class ids)")
            value = logits[:, 0] if space.kind == "value" else self._regression_value(expert_logits, weights, slots)
            if labels.numel() != value.shape[0]:
                raise ValueError(f"got {labels.numel()} labels for {value.shape[0]} rows")
            losses = (value.float() - labels.to(value.device).view(-1).float()).pow(2)
        else:
            if slots and torch.isin(labels, torch.tensor(slots, device=labels.device)).any():
                raise ValueError(
                    "a label is the slot of a regression expert: give float labels for regression rows, in a batch of "
                    "their own (a batch cannot mix regression and classes)"
                )
            losses = nn.functional.cross_entropy(logits.float(), labels.to(logits.device).view(-1), reduction="none")
            losses = losses[labels.to(losses.device).view(-1) != -100]
        return losses.mean() if items is None else losses.sum() / items

    def _regression_value(self, expert_logits, weights, slots) -> torch.Tensor:
        experts = [t for t, is_regression in enumerate(self.label_space.regression) if is_regression]
        shares = weights[:, experts].to(expert_logits.device)
        if not torch.compiler.is_compiling() and (shares.sum(dim=1) == 0).any():
            raise ValueError(
                "float labels were given for a row that no regression expert answers: a batch cannot mix regression "
                "and classes"
            )
        return (expert_logits[:, slots].float() * shares).sum(dim=1) / shares.sum(dim=1)
