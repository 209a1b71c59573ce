"""The same table on a GPU: a random model of an 8B Llama's shape in bfloat16, with and without CUDA graphs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import inference_rivals as rivals
import torch
import transformers
from inference_measure import Cell
from inference_sections import COPIES, LOOP, PEFT, Bench, Sizes
from inference_work import DecodeWork, ForwardWork
from inference_world import LLAMA_8B, Shape, World, dense_weights, few_rows, one_hot


class Graphed:
    """
    A run as a CUDA graph that is replayed; without a GPU the plain run, so that everything but the graph can be tested.

    The output is written over by the next replay.
    """

    def __init__(self, run: rivals.Run):
        self.run, self.graph = run, None
        if not torch.cuda.is_available():
            return
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = run()

    def __call__(self) -> torch.Tensor:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.output


class StaticDecodeWork(DecodeWork):
    """A decoding step behind a cache of fixed size, as graphs need it; its length is a tensor that the step winds back."""

    def new_cache(self, rows: list[int] | None, dtype: torch.dtype) -> Any:
        filled = super().new_cache(rows, dtype)
        cache = transformers.StaticCache(config=self.world.stock.config, max_cache_len=self.cached + 1)
        for layer, states in enumerate(filled.layers):
            cache.update(states.keys, states.values, layer)
        return cache

    def wind_back(self, cache: Any) -> None:
        for layer in cache.layers:  # whose `crop` Transformers 5.17 has not
            layer.cumulative_length.sub_(1)


def cuda_sections(device: str, shape: Shape = LLAMA_8B) -> dict[str, Callable[[Sizes], Iterator[Cell]]]:
    """Sections by name, as `inference_sections.SECTIONS`."""
    return {
        "prefill": lambda sizes: prefill(sizes, shape, device),
        "decode": lambda sizes: decode(sizes, shape, device, graphed=False),
        "decode_graph": lambda sizes: decode(sizes, shape, device, graphed=True),
    }


def prefill(sizes: Sizes, shape: Shape, device: str) -> Iterator[Cell]:
    """2048 tokens of one prompt, and of four with weights of their own."""
    world = World(shape, [sizes.rank] * sizes.few, dtype=torch.bfloat16, device=device)
    wrapper = world.wrapper()
    for rows in (1, 4):
        work = ForwardWork(world, rows, 4 * sizes.long_tokens // rows)
        bench = Bench(work, dense_weights(rows, sizes.few)).add_off(wrapper).add_plans(wrapper)
        bench.add(LOOP, rivals.loop_over_experts(work, bench.weights))
        yield bench.cell("prefill", f"B={rows} T={sizes.few} dense", tokens=4 * sizes.long_tokens // rows)


def decode(sizes: Sizes, shape: Shape, device: str, graphed: bool) -> Iterator[Cell]:
    """Decoding steps: dense weights, one expert a row, one row of weights for all."""
    section = "decode_graph" if graphed else "decode"
    for experts in (sizes.few, sizes.many):
        world = World(shape, [sizes.rank] * experts, dtype=torch.bfloat16, device=device)
        wrapper = world.wrapper()
        rows = sizes.decode_rows
        for name, weights in (("dense", dense_weights(rows, experts)), ("one-hot", one_hot(rows, experts)),
                              ("one row", few_rows(rows, experts, 1))):  # fmt: skip
            work = (StaticDecodeWork if graphed else DecodeWork)(world, rows, sizes.cached)
            bench = Bench(work, weights).add_plans(wrapper)
            if graphed:
                bench.variants = [replace(v, run=Graphed(v.run)) for v in bench.variants]
            elif name == "one-hot":
                bench.add(PEFT, rivals.peft_mixed(work, rivals.peft_model(world), bench.weights))
            elif name == "one row":
                bench.add(COPIES, rivals.merged_copies(work, bench.weights))
            yield bench.cell(section, f"B={rows} T={experts} {name}", tokens=1)
