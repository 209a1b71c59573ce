"""
Requests: which fields are read, what is wrong with them, and the token ids that the router sees.

Only what routing needs is checked; every other field goes to the engine as it came, which answers for it.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


AUTO = "auto"  # the model name that asks for routing; so does no name at all


class BadRequestError(Exception):
    """A request that is refused. status: of the response, 4xx. param: the field at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Prompt:
    """One prompt in the form it came in: text, token ids, or a chat with what its template is given."""

    content: str | tuple[int, ...] | list[dict]
    special_tokens: bool = True
    template: dict | None = None


def check_object(body: Any) -> dict:
    """A request's JSON as an object with sound `model` and `stream`. Raises `BadRequestError`."""
    if not isinstance(body, dict):
        raise BadRequestError("the body must be a JSON object")
    for name, kind, what in (("model", str, "text"), ("stream", bool, "true or false")):
        if not isinstance(body.get(name), kind | None):
            raise BadRequestError(f"`{name}` must be {what}", param=name)
    return body


def completion_prompts(body: dict) -> list[Prompt]:
    """The prompts of a request to /v1/completions: a text or token ids, or a list of these. Raises `BadRequestError`."""
    prompt, special = body.get("prompt"), body.get("add_special_tokens")
    special = True if special is None else special
    if not isinstance(special, bool):
        raise BadRequestError("`add_special_tokens` must be true or false", param="add_special_tokens")
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(p, str) or _is_ids(p) for p in prompt):
        raise BadRequestError(
            "`prompt` must be text, a list of token ids, or a list of these; and not empty", param="prompt"
        )
    return [Prompt(p if isinstance(p, str) else tuple(p), special) for p in prompt]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def chat_prompt(body: dict) -> Prompt:
    """The prompt of a request to /v1/chat/completions. Raises `BadRequestError`."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("`messages` must be a list of messages, and not empty", param="messages")
    settings = body.get("chat_template_kwargs")
    if not isinstance(settings, dict | None):
        raise BadRequestError("`chat_template_kwargs` must be an object", param="chat_template_kwargs")
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    template = {key: value for key, value in (settings or {}).items() if key not in own}
    for name, default in (("add_generation_prompt", True), ("continue_final_message", False)):
        value = default if body.get(name) is None else body[name]
        if not isinstance(value, bool):
            raise BadRequestError(f"`{name}` must be true or false", param=name)
        template[name] = value
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRequestError("`tools` must be a list of objects", param="tools")
    return Prompt([_message(i, message) for i, message in enumerate(messages)], False, {**template, "tools": tools})


def _message(index: int, message: Any) -> dict:
    """A message whose content is one text. Raises `BadRequestError`."""
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequestError(f"`{where}` must be an object with a `role`", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise BadRequestError(f"`{where}.content` may hold parts of type text only", param="messages")
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise BadRequestError(f"`{where}.content` must be text", param="messages")
    return {**message, "content": content or ""}


def token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, vocabulary: int, longest: int | None) -> list[int]:
    """
    The token ids of a prompt, as the engine makes them.

    Args:
        vocabulary: ids must be below it. longest: most tokens that the model takes; None: no bound.

    Raises:
        BadRequestError: no tokens, too many, ids out of range, or a chat that the template does not take.
    """
    content = prompt.content
    if isinstance(content, tuple):
        ids = list(content)
    else:
        text = _chat_text(content, prompt.template or {}, tokenizer) if isinstance(content, list) else content
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BadRequestError("the prompt holds half of a surrogate pair, which is no character", param="prompt")
        ids = tokenizer(text, add_special_tokens=prompt.special_tokens)["input_ids"]
    if not ids:
        raise BadRequestError("the prompt is empty", param="prompt")
    if longest is not None and len(ids) > longest:
        raise BadRequestError(f"the prompt has {len(ids)} tokens, the model takes at most {longest}", param="prompt")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise BadRequestError(f"token ids must be from 0 to {vocabulary - 1}", param="prompt")
    return ids


def _chat_text(messages: list[dict], template: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise BadRequestError("this model has no chat template; use /v1/completions", param="messages")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **template))
    except Exception as error:  # templates are programs: what they raise depends on the messages
        raise BadRequestError(f"the chat template does not take these messages: {error}", param="messages") from error
