"""The router of an export, off the event loop: what has come in by the time it is free is one batch."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from twin_merging_hf import modeling  # noqa: F401  registers the model type

from .prompts import BadRequestError, Prompt, token_ids
from .served import NONE


_MOST_ROWS = 64
_MOST_TOKENS = 8192  # of a batch, padding included; one longer prompt is a batch of its own


@dataclass(frozen=True)
class Route:
    """Where a prompt goes: an expert and its weight, or the shared model (`base`, weight 0) where the router knows no expert."""

    model: str
    weight: float


class PromptRouter:
    """
    The router of `export --format vllm`. `route` may be called by many tasks at once; one thread computes.

    Args:
        folder: `router/` of the export.
        observe: called with the rows and seconds of every batch.
    """

    def __init__(self, folder: Path, observe: Callable[[int, float], None] = lambda rows, seconds: None):
        self.model = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        text = self.model.config.shared_config.get_text_config()
        self.vocabulary: int = text.vocab_size
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        self._observe = observe
        self._waiting: list[tuple[Prompt, asyncio.Future]] = []
        self._task: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="router")

    async def route(self, prompts: Sequence[Prompt]) -> list[Route]:
        """Routes of prompts, in their order. Raises `BadRequestError`: one of them is none that the model takes."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in prompts]
        self._waiting += zip(prompts, futures, strict=True)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._work())
        found = await asyncio.gather(*futures, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return [each for each in found if isinstance(each, Route)]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST_ROWS], self._waiting[_MOST_ROWS:]
            batch = [(prompt, future) for prompt, future in batch if not future.done()]  # its client may be gone
            started = loop.time()
            try:
                found: list = await loop.run_in_executor(self._thread, self.compute, [prompt for prompt, _ in batch])
            except Exception as error:
                found = [error] * len(batch)
            self._observe(len(batch), loop.time() - started)
            for (_, future), each in zip(batch, found, strict=True):
                if future.done():
                    continue
                if isinstance(each, Route):
                    future.set_result(each)
                else:
                    future.set_exception(each)

    def compute(self, prompts: Sequence[Prompt]) -> list[Route | BadRequestError]:
        """Routes of a batch, or what is wrong with a prompt, in their order; in the calling thread."""
        found: dict[int, Route | BadRequestError] = {}
        rows: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            try:
                rows[i] = token_ids(prompt, self.tokenizer, self.vocabulary, self.longest)
            except BadRequestError as error:
                found[i] = error
        for batch in _batches(rows):
            for i, route in zip(batch, self._routes([rows[i] for i in batch]), strict=True):
                found[i] = route
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _routes(self, rows: list[list[int]]) -> list[Route]:
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        weights = self.model.route(input_ids=ids, attention_mask=mask)
        names = self.model.expert_names
        return [
            Route(names[int(row.argmax())], float(row.max())) if float(row.max()) > 0 else Route(NONE, 0.0)
            for row in weights
        ]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _batches(rows: dict[int, list[int]]) -> list[list[int]]:
    """Rows of like length together, so that little is padding; indices."""
    batches: list[list[int]] = []
    for i in sorted(rows, key=lambda i: len(rows[i])):
        if batches and (len(batches[-1]) + 1) * len(rows[i]) <= _MOST_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
