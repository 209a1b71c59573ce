"""The benchmark's sections: which work, at which sizes, by which variants. Cells are made one by one, so that memory is freed."""

from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import inference_rivals as rivals
import torch
from inference_measure import BASE, Cell, Variant
from inference_work import DecodeWork, ForwardWork, GenerateWork, Work
from inference_world import BERT_BASE, SMOL, Shape, World, dense_weights, few_rows, fit_router, one_hot


PLANS = ("factored", "gathered", "materialised", "auto")
OFF = "experts loaded, off"
PEFT = "PEFT adapter_names"
DENSE = "dense, row by row (published)"
COPIES = "merged copies, by group"
LOOP = "loop over experts"
_HOPELESS = 4.0
_STEPS = 128  # that a generation is said to have


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models and batches. `dense_rows`: how many rows the row-by-row rivals answer of all (counted for all)."""

    encoder: Shape
    decoder: Shape
    rows: int = 16
    tokens: int = 64
    few: int = 8
    many: int = 32
    rank: int = 16
    high_rank: int = 76
    dense_rows: int = 2
    long_tokens: int = 512
    decode_rows: int = 8
    cached: int = 64
    new: int = 128
    growth_experts: tuple = (1, 2, 4, 8, 16, 32, 64)
    growth_ranks: tuple = (4, 8, 16, 32, 64, 128)
    growth_rows: tuple = (1, 4, 16, 32)
    growth_tokens: tuple = (16, 64, 256, 512)
    growth_layers: int = 1
    routed_layers: int = 4

    def encoder_of(self, layers: int) -> Shape:
        return self.encoder.with_sizes(num_hidden_layers=layers)


def full_sizes(layers: int) -> Sizes:
    """BERT-base's width with some of its 12 layers (at least 4 where a quarter of them is wanted), and all of SmolLM2-135M."""
    return Sizes(BERT_BASE.with_sizes(num_hidden_layers=layers), SMOL, routed_layers=max(4, layers))


class Bench:
    """Variants of one piece of work, each with what it must answer."""

    def __init__(self, work: Work, weights: torch.Tensor):
        self.work, self.weights = work, weights.to(work.world.device)
        self.variants, self.open = [self.stock(BASE)], list[Callable[[], None]]()

    def stock(self, name: str) -> Variant:
        """The base itself, which answers as the shared model."""
        none = torch.zeros(self.work.world.count)
        return Variant(
            name, lambda: self.work.call(self.work.base), lambda row: self.work.expected(row, none), self.work.batch
        )

    def add(self, name: str, run: rivals.Run, *, weights: torch.Tensor | None = None, rows: int | None = None,
            first_layer: int | None = None, predicted: float | None = None) -> "Bench":  # fmt: skip
        """A variant that answers by `weights` (None: the cell's), all rows or the first `rows`."""
        mine = self.weights if weights is None else weights
        count = rows or self.work.batch
        variant = Variant(name, run, lambda row: self.work.expected(row, mine[row].cpu(), first_layer), count,
                          self.work.batch / count, predicted)  # fmt: skip
        self.variants.append(variant)
        return self

    def add_off(self, wrapper: Any) -> "Bench":
        none = torch.zeros_like(self.weights)
        return self.add(OFF, lambda: self.work.call(wrapper, experts="__shared__"), weights=none)

    def add_plans(self, wrapper: Any, plans: tuple = PLANS, **fields: Any) -> "Bench":
        """
        Ours by each plan, with the cell's weights given; decoding steps as within `generate`.

        `materialised` is left out where its cost model says that it cannot win: a merge for few tokens, a copy for few rows.
        """
        for plan in plans:
            if plan == "materialised" and self.merge_cost() > _HOPELESS:
                continue
            predicted = self.cost_model() if plan == "factored" else None
            run = planned(self.work, wrapper, plan, expert_weights=self.weights)
            if isinstance(self.work, DecodeWork):
                run = WithinGeneration(wrapper, run, _STEPS)
                self.open.append(run.close)
            self.add(plan, run, predicted=predicted, **fields)
        return self

    def merge_cost(self) -> float:
        """
        What merging adds, over the base: multiply-adds of all merges, the ranks of a group's experts / its tokens; where copies
        are kept for all steps of a generation, the bytes of more than one.
        """
        groups = self.weights.unique(dim=0)
        if isinstance(self.work, DecodeWork):
            return len(groups) - 1
        ranks = torch.tensor(self.work.world.ranks, device=self.weights.device)
        return float((groups != 0).mul(ranks).sum() / self.work.tokens)

    def cost_model(self) -> float:
        """
        1 + phi: multiply-adds of the factors in use over those of the base's matrices and attention (research: the same ratio
        holds for bytes where memory limits).
        """
        world, config = self.work.world, self.work.world.stock.config
        used = [rank for rank, on in zip(world.ranks, (self.weights != 0).any(0).tolist(), strict=True) if on]
        start = dict(world.stock.named_parameters())
        base = sum(start[name].numel() for name in world.factors)
        if world.shape.generates:
            base += config.vocab_size * config.hidden_size
        context = getattr(self.work, "cached", None) or self.work.prompt["input_ids"].shape[1]
        base += 2 * context * config.hidden_size * config.num_hidden_layers
        return 1 + sum(used) * sum(sum(start[name].shape) for name in world.factors) / base

    def cell(self, section: str, name: str, threads: int = 1, **settings: Any) -> Cell:
        world = self.work.world
        shown = {"rows": self.work.batch, "experts": world.count, "rank": max(world.ranks), "dtype": str(world.dtype)[6:],
                 "factors": world.storage, "device": world.device.type, **settings}  # fmt: skip
        return Cell(section, name, self.variants, shown, threads, tuple(self.open))


def planned(work: Work, wrapper: Any, plan: str, **extra: Any) -> rivals.Run:
    """The work by one of our plans."""

    def run() -> torch.Tensor:
        with wrapper.use_plan(plan):
            return work.call(wrapper, **extra)

    return run


class WithinGeneration:
    """Runs something again and again as the steps of one generation, beside which others have theirs."""

    def __init__(self, wrapper: Any, run: rivals.Run, steps: int):
        self.run, self.context, self.block = run, copy_context(), wrapper.generating(max_new_tokens=steps)
        self.context.run(self.block.__enter__)
        self.open = True

    def __call__(self) -> torch.Tensor:
        return self.context.run(self.run)

    def close(self) -> None:
        """What was kept for the steps is dropped; once is enough."""
        if self.open:
            self.open = False
            self.context.run(self.block.__exit__, None, None, None)


# ---- encoder -----------------------------------------------------------------------------------------------------


def encoder(sizes: Sizes) -> Iterator[Cell]:
    """A whole batch through an encoder: dense weights, and one expert a row."""
    for experts, rank in ((sizes.few, sizes.rank), (sizes.many, sizes.rank), (sizes.few, sizes.high_rank)):
        world = World(sizes.encoder, [rank] * experts)
        work = ForwardWork(world, sizes.rows, sizes.tokens)
        wrapper = world.wrapper()
        bench = Bench(work, dense_weights(sizes.rows, experts))
        bench.variants.append(bench.stock("base again"))
        bench.add_off(wrapper).add_plans(wrapper)
        bench.add(LOOP, rivals.loop_over_experts(work, bench.weights))
        bench.add(DENSE, rivals.dense_per_row(work, bench.weights, sizes.dense_rows), rows=sizes.dense_rows)
        yield bench.cell("encoder", f"T={experts} r={rank} dense", tokens=sizes.tokens)
        if rank == sizes.rank:
            del bench
            bench = Bench(work, one_hot(sizes.rows, experts)).add_plans(wrapper)
            _one_hot_rivals(bench)
            bench.add(DENSE, rivals.dense_per_row(work, bench.weights, sizes.dense_rows), rows=sizes.dense_rows)
            yield bench.cell("encoder", f"T={experts} r={rank} top-1", tokens=sizes.tokens)


def _one_hot_rivals(bench: Bench) -> None:
    work = bench.work
    bench.add(PEFT, rivals.peft_mixed(work, rivals.peft_model(work.world), bench.weights))
    bench.add(COPIES, rivals.merged_copies(work, bench.weights))


def complete(sizes: Sizes) -> Iterator[Cell]:
    """Deltas on every parameter, as a build makes them: embeddings, biases and norms too."""
    world = World(sizes.encoder, [sizes.rank] * sizes.few, everything=True)
    work, wrapper = ForwardWork(world, sizes.rows, sizes.tokens), world.wrapper()
    for name, weights in (("dense", dense_weights), ("top-1", one_hot)):
        bench = Bench(work, weights(sizes.rows, sizes.few)).add_off(wrapper).add_plans(wrapper)
        yield bench.cell("complete", f"T={sizes.few} r={sizes.rank} {name}", tokens=sizes.tokens)


def groups(sizes: Sizes) -> Iterator[Cell]:
    """Few different rows of weights, each on more tokens than the crossover."""
    for rows, count in ((4, 2), (4, 1)):
        world = World(sizes.encoder, [sizes.rank] * sizes.few)
        work, wrapper = ForwardWork(world, rows, sizes.long_tokens), world.wrapper()
        bench = Bench(work, few_rows(rows, sizes.few, count)).add_plans(wrapper)
        length = rows // count * sizes.long_tokens
        yield bench.cell("groups", f"{count} of n={length} tokens", tokens=sizes.long_tokens, n=length)


def routed(sizes: Sizes) -> Iterator[Cell]:
    """End to end, the router included: nobody gives the weights."""
    world = World(sizes.encoder_of(sizes.routed_layers), [sizes.rank] * sizes.few)
    work = ForwardWork(world, sizes.rows, sizes.tokens)
    quarter = max(1, world.stock.config.num_hidden_layers // 4)
    bench, weights = Bench(work, dense_weights(sizes.rows, sizes.few)), {}
    for name, layer in (("full", None), ("prefix", quarter), ("late", quarter)):
        wrapper = world.wrapper(name, layer)
        fit_router(wrapper, work.prompt)
        weights[name] = wrapper(**work.inputs).expert_weights
        first = layer if name == "late" else None
        bench.add(f"{name} + auto", planned(work, wrapper, "auto"), weights=weights[name], first_layer=first)
    bench.add("PEFT X-LoRA", rivals.xlora(work, weights["full"]), weights=weights["full"])
    yield bench.cell("routed", f"T={sizes.few} r={sizes.rank} dense", tokens=sizes.tokens)
    wrapper = world.wrapper("full", top_k=1)
    fit_router(wrapper, work.prompt, sharpness=5.0)
    bench = Bench(work, wrapper(**work.inputs).expert_weights)
    bench.add("full + auto", planned(work, wrapper, "auto"))
    bench.add("router + PEFT", rivals.router_and_peft(work, rivals.peft_model(world), wrapper))
    yield bench.cell("routed", f"T={sizes.few} r={sizes.rank} top-1", tokens=sizes.tokens)


# ---- decoder -----------------------------------------------------------------------------------------------------


def decode(sizes: Sizes) -> Iterator[Cell]:
    """One decoding step behind a cache."""
    for experts in (sizes.few, sizes.many):
        world = World(sizes.decoder, [sizes.rank] * experts)
        wrapper = world.wrapper()
        for rows, name, weights in _decode_weights(sizes, experts):
            work = DecodeWork(world, rows, sizes.cached)
            bench = Bench(work, weights)
            if name == "dense" and rows > 1:
                bench.add_off(wrapper)
            bench.add_plans(wrapper)
            if name == "one-hot":
                bench.add(PEFT, rivals.peft_mixed(work, rivals.peft_model(world), bench.weights))
            else:
                bench.add(LOOP, rivals.loop_over_experts(work, bench.weights))
            # Of many different copies the first two stand for all: each is read from memory anew anyway.
            some = min(sizes.dense_rows, rows)
            different = len({tuple(row.tolist()) for row in weights}) == rows
            chosen = some if different else None
            bench.add(COPIES, rivals.merged_copies(work, bench.weights, chosen), rows=chosen)
            yield bench.cell("decode", f"B={rows} T={experts} {name}", tokens=1)


def _decode_weights(sizes: Sizes, experts: int) -> Iterator[tuple[int, str, torch.Tensor]]:
    rows = sizes.decode_rows
    yield rows, "dense", dense_weights(rows, experts)
    yield rows, "one-hot", one_hot(rows, experts)
    if experts == sizes.few:
        yield rows, "one row", few_rows(rows, experts, 1)
        yield 1, "dense", dense_weights(1, experts)


def generate(sizes: Sizes) -> Iterator[Cell]:
    """`generate` of one row, router and materialising included."""
    world = World(sizes.decoder, [sizes.rank] * sizes.few)
    work = GenerateWork(world, 1, sizes.cached, sizes.new)
    wrapper = world.wrapper("full")
    fit_router(wrapper, work.prompt)
    weights = wrapper.route(**work.prompt)
    bench = Bench(work, weights)
    for plan in ("factored", "auto"):
        bench.add(f"router + {plan}", planned(work, wrapper, plan))
    yield bench.cell("generate", f"B=1 T={sizes.few} {sizes.cached}+{sizes.new}", tokens=sizes.new)


# ---- growth, types, threads --------------------------------------------------------------------------------------


def growth(sizes: Sizes) -> Iterator[Cell]:
    """One size after the other, against the cost model 1 + phi."""
    standard = {"experts": sizes.few, "rank": sizes.rank, "rows": sizes.rows, "tokens": sizes.tokens}
    for name, values in (("experts", sizes.growth_experts), ("rank", sizes.growth_ranks), ("rows", sizes.growth_rows),
                         ("tokens", sizes.growth_tokens)):  # fmt: skip
        for value in values:
            yield _growth_cell(sizes, name, dense_weights, **{**standard, name: value})
    for experts in sizes.growth_experts[-3:]:
        yield _growth_cell(sizes, "unused experts", _first_four, **{**standard, "experts": experts})


def _first_four(rows: int, experts: int) -> torch.Tensor:
    """Weights on four experts, however many there are."""
    weights = torch.zeros(rows, experts)
    weights[:, :4] = dense_weights(rows, min(4, experts))
    return weights


def _growth_cell(sizes: Sizes, name: str, weights: Callable, experts: int, rank: int, rows: int, tokens: int) -> Cell:
    world = World(sizes.encoder_of(sizes.growth_layers), [rank] * experts)
    work = ForwardWork(world, rows, tokens)
    bench = Bench(work, weights(rows, experts)).add_plans(world.wrapper(), ("factored", "auto"))
    return bench.cell("growth", f"{name}: T={experts} r={rank} B={rows} S={tokens}", tokens=tokens, grows=name)


def types(sizes: Sizes) -> Iterator[Cell]:
    """Half precision, and factors stored as integers."""
    kinds = (("bf16", torch.bfloat16, "float32"), ("int8", torch.float32, "int8"), ("int4", torch.float32, "int4"))
    for name, dtype, storage in kinds:
        world = World(sizes.encoder, [sizes.rank] * sizes.few, dtype=dtype, storage=storage)
        work, wrapper = ForwardWork(world, sizes.rows, sizes.tokens), world.wrapper()
        for kind, weights in (("dense", dense_weights), ("top-1", one_hot)):
            bench = Bench(work, weights(sizes.rows, sizes.few)).add_plans(wrapper, ("factored", "gathered", "auto"))
            yield bench.cell("types", f"{name} {kind}", tokens=sizes.tokens)


def threads(sizes: Sizes) -> Iterator[Cell]:
    """One and two threads, wall time."""
    world = World(sizes.encoder, [sizes.rank] * sizes.few)
    work, wrapper = ForwardWork(world, sizes.rows, sizes.tokens), world.wrapper()
    for count in (1, 2):
        bench = Bench(work, dense_weights(sizes.rows, sizes.few)).add_plans(wrapper, ("factored", "auto"))
        yield bench.cell("threads", f"{count} thread{'s' * (count > 1)}", count, tokens=sizes.tokens)


SECTIONS: dict[str, Callable[[Sizes], Iterator[Cell]]] = {
    "encoder": encoder, "complete": complete, "groups": groups, "routed": routed, "decode": decode, "generate": generate,
    "growth": growth, "types": types, "threads": threads,
}  # fmt: skip
