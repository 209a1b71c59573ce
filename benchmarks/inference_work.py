"""What is timed: a forward pass over whole rows, one decoding step behind a filled cache, or a whole `generate`."""

import inspect
from functools import cached_property
from typing import Any

import torch
import transformers
from inference_world import World
from torch import nn


_FP32_TOLERANCE = 1e-5
_BF16_FACTOR = 1.5  # of the error that the base model's own rounding makes
# Newer releases call `past_key_values` by another name.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


class Work:
    """
    One batch of a world. `call(model, rows, **extra)` does the work by any model with the stock model's arguments.

    Subclasses give `call`, `batch` and `prompt` (what a router reads).
    """

    exact = False
    """Whether outputs are compared as they are (tokens), not up to rounding."""

    def __init__(self, world: World, rows: int, seed: int = 1):
        self.world, self.batch = world, rows
        self.random = torch.Generator().manual_seed(seed)
        self._known: dict = {}

    def _ids(self, tokens: int) -> torch.Tensor:
        size = self.world.stock.config.vocab_size
        ids = torch.randint(1, size, (self.batch, tokens), generator=self.random)
        return ids.to(self.world.device)

    @property
    def base(self) -> Any:
        """The stock model, as `call` takes it."""
        return self.world.body(self.world.stock)

    def call(self, model: nn.Module, rows: list[int] | None = None, **extra: Any) -> torch.Tensor:
        """Outputs of some rows (None: all)."""
        raise NotImplementedError

    def expected(self, row: int, weights: torch.Tensor, first_layer: int | None = None) -> tuple[torch.Tensor, float]:
        """
        What the dense model of a row's own expert weights [expert] answers on this row alone, and how much another way to
        compute it may differ: 1e-5 of the largest output (at least 1e-5) in float32; in half precision 1.5 times the
        error of the base on any row, or of the same dense model on this one, against float32.
        """
        key = (row, first_layer, tuple(weights.tolist()))
        if key not in self._known:
            world = self.world
            dense = self._answer(world.merged(weights, first_layer, torch.float32), row)
            largest = max(1.0, float(dense.abs().max()))
            allowed = 0.0 if self.exact else _FP32_TOLERANCE * largest
            if world.dtype != torch.float32:
                own = self._answer(world.merged(weights, first_layer), row)
                allowed = _BF16_FACTOR * max(self._base_error, float((own.to(dense.dtype) - dense).abs().max()))
            self._known[key] = dense, allowed
        return self._known[key]

    @cached_property
    def _base_error(self) -> float:
        """Largest error that the base model's own type makes in any row, against float32."""
        none = torch.zeros(self.world.count)
        exact, own = self.world.merged(none, dtype=torch.float32), self.world.stock
        errors = [(self._answer(own, b).float() - self._answer(exact, b)).abs().max() for b in range(self.batch)]
        return float(torch.stack(errors).max())

    def _answer(self, dense: Any, row: int) -> torch.Tensor:
        """One row's output of a model that is used only once."""
        return self.call(self.world.body(dense), [row])[0]


class ForwardWork(Work):
    """Last hidden states [row, token, hidden] of an encoder, or logits of a language model's prompt."""

    def __init__(self, world: World, rows: int, tokens: int, seed: int = 1):
        super().__init__(world, rows, seed)
        ids = self._ids(tokens)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.tokens = rows * tokens

    @property
    def prompt(self) -> dict:
        return self.inputs

    def call(self, model, rows=None, **extra):
        inputs = self.inputs if rows is None else {name: value[rows] for name, value in self.inputs.items()}
        output = model(**inputs, **extra)
        return output.logits if self.world.shape.generates else output.last_hidden_state


class DecodeWork(Work):
    """One token more for each row, behind a cache of random keys and values (the same for every model)."""

    def __init__(self, world: World, rows: int, cached: int, seed: int = 1):
        super().__init__(world, rows, seed)
        self.ids, self.cached, self.tokens = self._ids(1), cached, rows
        self._caches: dict = {}

    @cached_property
    def _states(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        config = self.world.stock.config
        size = (self.batch, config.num_key_value_heads, self.cached, config.hidden_size // config.num_attention_heads)
        return [
            tuple(torch.randn(size, generator=self.random) for _ in range(2))  # type: ignore[misc]
            for _ in range(config.num_hidden_layers)
        ]

    def new_cache(self, rows: list[int] | None, dtype: torch.dtype) -> Any:
        """The cache of some rows, in its own memory."""
        cache = transformers.DynamicCache(config=self.world.stock.config)
        for layer, states in enumerate(self._states):
            keys, values = (
                (s if rows is None else s[rows]).to(device=self.world.device, dtype=dtype).clone() for s in states
            )
            cache.update(keys, values, layer)
        return cache

    def call(self, model, rows=None, **extra):
        dtype = next(model.parameters()).dtype
        key = (id(model), None if rows is None else tuple(rows))
        if key not in self._caches:
            # The model is kept with its cache: another one could get its id.
            self._caches[key] = self.new_cache(rows, dtype), model
        cache = self._caches[key][0]
        ids = self.ids if rows is None else self.ids[rows]
        output = model(input_ids=ids, **{CACHE: cache}, use_cache=True, **extra)
        self.wind_back(cache)
        return output.logits[:, 0]

    def wind_back(self, cache: Any) -> None:
        """Take the token of this step out of the cache again."""
        cache.crop(-1)

    def _answer(self, dense, row):
        body = self.world.body(dense)
        output = self.call(body, [row])[0]
        del self._caches[id(body), (row,)]
        return output


class GenerateWork(Work):
    """New tokens [row, token] after a prompt, greedy: routing, prompt, decoding and all."""

    exact = True

    def __init__(self, world: World, rows: int, prompt: int, new: int, seed: int = 1):
        super().__init__(world, rows, seed)
        ids = self._ids(prompt)
        self.inputs, self.new = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new
        self.tokens = rows * (prompt + new)

    @property
    def prompt(self) -> dict:
        return self.inputs

    def call(self, model, rows=None, **extra):
        inputs = self.inputs if rows is None else {name: value[rows] for name, value in self.inputs.items()}
        lengths = {"max_new_tokens": self.new, "min_new_tokens": self.new}
        answer = model.generate(**inputs, **lengths, do_sample=False, **extra)
        return answer[:, inputs["input_ids"].shape[1] :].float()
