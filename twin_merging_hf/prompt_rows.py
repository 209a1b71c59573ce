"""Rows of language models as they stand in JSONL files: a prompt and its completion, messages, or a text to fill."""

from typing import Any

from .errors import TwinMergingError


_ROLES = ("system", "user", "assistant", "tool")


def prompt_row(row: dict, where: str) -> dict:
    """
    Check a row of a model that goes on from prompts or answers them.

    Returns:
        `{"prompt": a text, or a list of messages, "completion": a text}`. Of `messages` the last is the completion.

    Raises:
        TwinMergingError: other keys, empty texts, or messages that do not end with the assistant's.
    """
    if "messages" in row:
        _check_keys(row, ("messages",), where)
        messages = row["messages"]
        if not isinstance(messages, list) or len(messages) < 2:
            raise TwinMergingError(f"{where}: `messages` must be a list of at least 2, got {str(messages)[:80]}")
        messages = [_message(message, i, where) for i, message in enumerate(messages)]
        if messages[-1]["role"] != "assistant":
            raise TwinMergingError(
                f"{where}: the last of `messages` must be the assistant's, which is the completion; it is the "
                f"{messages[-1]['role']}'s"
            )
        return {"prompt": messages[:-1], "completion": messages[-1]["content"]}
    _check_keys(row, ("prompt", "completion"), where)
    return {key: _text(row, key, where) for key in ("prompt", "completion")}


def masked_row(row: dict, where: str) -> dict:
    """Check a row of a model that fills masked tokens: `{"text": ...}`. Raises `TwinMergingError`."""
    _check_keys(row, ("text",), where)
    return {"text": _text(row, "text", where)}


def prompt_key(row: dict) -> list[str]:
    """A prompt as a list of texts, for comparison: the text, or each message with its role before it."""
    if isinstance(row["prompt"], str):
        return [row["prompt"]]
    return [part for message in row["prompt"] for part in (message["role"], message["content"])]


def _check_keys(row: dict, keys: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(row) - set(keys))
    if unknown:
        raise TwinMergingError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(keys)})")


def _text(row: dict, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise TwinMergingError(f"{where}: `{key}` must be a non-empty string, got {str(value)[:80]!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TwinMergingError(f"{where}: `{key}` holds half of a character: {error}") from error
    return value


def _message(message: Any, position: int, where: str) -> dict:
    where = f"{where}, message {position}"
    if not isinstance(message, dict):
        raise TwinMergingError(f'{where}: expected {{"role": ..., "content": ...}}, got {str(message)[:80]}')
    _check_keys(message, ("role", "content"), where)
    if message.get("role") not in _ROLES:
        raise TwinMergingError(f"{where}: `role` must be one of {', '.join(_ROLES)}, got {message.get('role')!r}")
    return {"role": message["role"], "content": _text(message, "content", where)}
