"""Prompts and completions as token ids, the same way in a build, in scores and in use: texts as they are, messages by the
tokenizer's chat template."""

from typing import Any

import torch

from .errors import TwinMergingError


_IGNORED = -100
_MOST_COMPLETION = 128


def prompt_ids(rows: list[dict], tokenizer: Any, limit: int) -> list[list[int]]:
    """
    Token ids of each row's prompt, at most `limit`, cut where the tokenizer cuts.

    Raises:
        TwinMergingError: a row has messages, and the tokenizer no chat template.
    """
    found = []
    for row in rows:
        text, special = _prompt_text(row, tokenizer), isinstance(row["prompt"], str)
        found.append(tokenizer(text, add_special_tokens=special, truncation=True, max_length=limit)["input_ids"])
    if not all(found):
        raise TwinMergingError("the tokenizer makes nothing of a whole prompt")
    return found


def _prompt_text(row: dict, tokenizer: Any) -> str:
    if isinstance(row["prompt"], str):
        return row["prompt"]
    if getattr(tokenizer, "chat_template", None) is None:
        raise TwinMergingError(
            "rows have `messages`, but the experts' tokenizer has no chat template to write them with; save the experts with "
            "one, or give `prompt` and `completion`"
        )
    return tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)


def completion_ids(rows: list[dict], tokenizer: Any) -> list[list[int]]:
    """
    Token ids of each row's completion, with the end that a model should write: what the chat template puts behind an
    answer, else the tokenizer's end token. Long ones are cut to 128.
    """
    found = []
    for row in rows:
        text, end = row["completion"], tokenizer.eos_token_id
        if not isinstance(row["prompt"], str):
            prompt = _prompt_text(row, tokenizer)
            answer = {"role": "assistant", "content": row["completion"]}
            whole = tokenizer.apply_chat_template([*row["prompt"], answer], tokenize=False)
            if whole.startswith(prompt):
                text, end = whole[len(prompt) :], None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append([*ids, *([end] if end is not None else [])][:_MOST_COMPLETION])
    return found


def padded(rows: list[list[int]], value: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of rows as one tensor [row, token] and their mask; `value` stands where there is none."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[place, where], mask[place, where] = torch.tensor(row), 1
    return ids, mask


def padding_id(tokenizer: Any) -> int:
    """What stands at padding; masks say that it does not count, so that any token will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(value for value in candidates if value is not None)


def prompt_inputs(rows: list[dict], tokenizer: Any, limit: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Prompts of rows as model inputs."""
    ids, mask = padded(prompt_ids(rows, tokenizer, limit), padding_id(tokenizer), side)
    return {"input_ids": ids, "attention_mask": mask}


def forced_inputs(rows: list[dict], tokenizer: Any, limit: int, encoder_decoder: bool) -> tuple[dict, dict]:
    """
    Rows with their completions, as a model gets them in training.

    Returns:
        The prompts alone, on which a row is routed; and the inputs of one forward, with `labels` [row, token] (-100 where
        none counts), of an encoder-decoder those of the decoder.
    """
    completions = completion_ids(rows, tokenizer)
    room = limit if encoder_decoder else max(1, limit - max(map(len, completions)))
    prompts = prompt_ids(rows, tokenizer, room)
    pad = padding_id(tokenizer)
    ids, mask = padded(prompts, pad)
    alone = {"input_ids": ids, "attention_mask": mask}
    if encoder_decoder:
        return alone, {**alone, "labels": padded(completions, _IGNORED)[0]}
    pairs = list(zip(prompts, completions, strict=True))
    ids, mask = padded([[*prompt, *completion] for prompt, completion in pairs], pad)
    labels = padded([[_IGNORED] * len(prompt) + list(completion) for prompt, completion in pairs], _IGNORED)[0]
    return alone, {"input_ids": ids, "attention_mask": mask, "labels": labels}
