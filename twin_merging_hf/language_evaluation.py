"""Language models and artifacts on rows of data: which tokens they would write, and what they write."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .errors import TwinMergingError
from .metrics import Difference, Metric, bootstrap_difference
from .processing import Processing
from .prompts import completion_ids, forced_inputs, prompt_inputs


_BATCH = 8
# Share of a row's tokens that are masked, as in BERT's training.
_MASKED = 0.15


@torch.no_grad()
def predicted_tokens(
    model: nn.Module,
    rows: list[dict],
    processing: Processing,
    routed: bool = False,
    experts: str | None = None,
    tick: Callable[[int], Any] = lambda count: None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    The likeliest token at every place of each row's completion, the completion itself given up to there; of a model that
    fills masks, at the masked tokens (a seventh of a row's, at least one, the same ones in every call).

    Args:
        model: a stock language model (`routed` and `experts` left out), or an artifact.
        routed: the artifact routes each row, on its prompt alone.
        experts: instead, the expert that answers all rows.

    Returns:
        For each row, token ids [place]: the likeliest ones, and the row's own.
    """
    predicted: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    own = list(predicted)
    for chunk in _chunks(rows):
        chosen = [rows[i] for i in chunk]
        prompt, inputs = _inputs(model, chosen, processing)
        choice: dict[str, Any] = {"experts": experts} if experts is not None else {}
        if routed:
            choice["expert_weights"] = model.route(**prompt)  # type: ignore[operator]
        logits, labels = model(**inputs, **choice).logits, inputs["labels"]
        if processing.kind == "prompt" and not _is_encoder_decoder(model):
            logits, labels = logits[:, :-1], labels[:, 1:]  # what stands at a token predicts the next
        best, labels = logits.argmax(dim=-1).cpu(), labels.cpu()
        for place, row in enumerate(chunk):
            counts = labels[place] != -100
            predicted[row], own[row] = best[place][counts], labels[place][counts]
        tick(len(chunk))
    return predicted, own


def token_agreement(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Share of all places at which two lists of a row's tokens each are the same."""
    return float((torch.cat(one) == torch.cat(other)).float().mean())


def longest_completion(rows: list[dict], processing: Processing) -> int:
    """Tokens of the longest completion among rows, its end included."""
    return max(map(len, completion_ids(rows, processing.processor)))


def references(rows: list[dict]) -> list[str]:
    """The completions of rows, as texts to compare with."""
    return [row["completion"].strip() for row in rows]


def text_difference(
    one: list[str], other: list[str], rows: list[dict], metric: Metric, seed: str, resamples: int
) -> Difference:
    """Score of `one` minus that of `other`, with a paired interval; the metric is a mean over rows."""
    truth = references(rows)
    first, second = (
        [metric([text], [right]) for text, right in zip(texts, truth, strict=True)] for texts in (one, other)
    )
    mean = lambda found, _: float(found.mean())  # noqa: E731
    return bootstrap_difference(first, second, [0] * len(rows), mean, seed=seed, resamples=resamples)


def _is_encoder_decoder(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def _chunks(rows: list[dict]) -> list[list[int]]:
    """Places of the rows, those of similar length together."""
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i])))
    return [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]


def _inputs(model: Any, rows: list[dict], processing: Processing) -> tuple[dict, dict]:
    """What routes, and the inputs of one forward with `labels`, on the model's device."""
    if processing.kind == "masked":
        inputs = _masked_inputs(rows, processing)
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
    else:
        limit = min(processing.max_tokens, processing.processor.model_max_length)
        prompt, inputs = forced_inputs(rows, processing.processor, limit, _is_encoder_decoder(model))
    device = next(model.parameters()).device
    return tuple({name: value.to(device) for name, value in part.items()} for part in (prompt, inputs))  # type: ignore[return-value]


def _masked_inputs(rows: list[dict], processing: Processing) -> dict[str, torch.Tensor]:
    tokenizer = processing.processor
    if tokenizer.mask_token_id is None:
        raise TwinMergingError("the experts' tokenizer has no mask token, so nothing can be masked in their rows")
    inputs = processing.inputs(rows)
    ids = inputs["input_ids"].clone()
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        special = tokenizer.get_special_tokens_mask(ids[place].tolist(), already_has_special_tokens=True)
        own = [i for i, is_special in enumerate(special) if not is_special and inputs["attention_mask"][place, i]]
        chosen = random.Random(row["text"]).sample(own, max(1, round(_MASKED * len(own)))) if own else []
        labels[place, chosen] = ids[place, chosen]
        ids[place, chosen] = tokenizer.mask_token_id
    return {**inputs, "input_ids": ids, "labels": labels}


@torch.no_grad()
def written_texts(
    model: Any,
    rows: list[dict],
    processing: Processing,
    max_new_tokens: int,
    routed: bool = False,
    experts: str | None = None,
    tick: Callable[[int], Any] = lambda count: None,
) -> tuple[list[str], torch.Tensor | None]:
    """
    What a model writes after each row's prompt, greedily, without special tokens.

    Args:
        model, routed, experts: as of `predicted_tokens`.

    Returns:
        The texts, and of an artifact the weights that acted [row, expert], else None.
    """
    texts, weights = [""] * len(rows), [torch.empty(0)] * len(rows)
    tokenizer, together = processing.processor, _is_encoder_decoder(model)
    limit = min(processing.max_tokens, tokenizer.model_max_length)
    device = next(model.parameters()).device
    for chunk in _chunks(rows):
        inputs = prompt_inputs([rows[i] for i in chunk], tokenizer, limit, "right" if together else "left")
        inputs = {name: value.to(device) for name, value in inputs.items()}
        options: dict[str, Any] = {"experts": experts} if experts is not None else {}
        output = model.generate(
            **inputs,
            **options,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
        )
        written = output.sequences if together else output.sequences[:, inputs["input_ids"].shape[1] :]
        for place, row in enumerate(chunk):
            texts[row] = tokenizer.decode(written[place], skip_special_tokens=True).strip()
            if routed or experts is not None:
                weights[row] = output["expert_weights"][place].float().cpu()
        tick(len(chunk))
    return texts, torch.stack(weights) if routed or experts is not None else None
