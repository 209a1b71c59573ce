"""What plans and passes cost, by count: operations of one forward and bytes that stay. Times are the benchmark's."""

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.modeling.dense import assert_close
from tests.modeling.random_model import random_bert
from twin_merging_hf.modeling import costs_twin_merging
from twin_merging_hf.modeling.costs_twin_merging import (
    DEFAULTS,
    Constants,
    Costs,
    Sizes,
    constants_for,
    measure_constants,
)


BATCH, TOKENS, RANK = 8, 32, 4
INPUTS = {"input_ids": torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % 100}


def dense(experts: int) -> torch.Tensor:
    return torch.rand(BATCH, experts, generator=torch.Generator().manual_seed(0)).softmax(1)


def one_hot(experts: int, *chosen: int) -> torch.Tensor:
    return torch.eye(experts)[[chosen[i % len(chosen)] for i in range(BATCH)]]


def flops(model: Any, weights: torch.Tensor | None, plan: str = "auto") -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, model.use_plan(plan):
        model(**INPUTS, expert_weights=weights)
    return counter.get_total_flops()


def base_flops(model: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.shared.base_model(**INPUTS)
    return counter.get_total_flops()


def test_switched_off_experts_cost_nothing():
    model = random_bert(4, RANK)
    assert flops(model, torch.zeros(BATCH, 4)) == base_flops(model)


@pytest.mark.parametrize(("experts", "rank"), [(2, 4), (8, 4), (16, 4), (4, 16)])
def test_factored_costs_its_share_of_ranks(experts, rank):
    model = random_bert(experts, rank)
    sizes = model._sizes()
    ratio = 1 + sum(sizes.thin) / sizes.owned
    assert flops(model, dense(experts), "factored") / base_flops(model) == pytest.approx(ratio, rel=0.15)


@pytest.mark.parametrize("plan", ["factored", "gathered", "materialised", "auto"])
def test_nothing_grows_with_experts_that_no_row_uses(plan):
    few, many = (flops(random_bert(n, RANK), one_hot(n, 0, 1), plan) for n in (2, 12))
    assert few == many


def test_gathered_costs_one_expert_a_row():
    model = random_bert(12, RANK)
    sizes = model._sizes()
    # Tables act by the factors of all experts of the batch in every plan: a hundredth of it here is theirs.
    ratio = 1 + sizes.thin[0] / sizes.owned
    found = flops(model, one_hot(12, *range(BATCH)), "gathered") / base_flops(model)
    assert ratio <= found < 1.1 * ratio < flops(model, one_hot(12, *range(BATCH)), "factored") / base_flops(model)


def test_a_merged_group_costs_ranks_over_tokens():
    model = random_bert(4, RANK)
    found = flops(model, dense(4)[:1], "materialised") / base_flops(model)
    assert found == pytest.approx(1 + 4 * RANK / (BATCH * TOKENS), rel=0.15)


PASSES = {"full": 2.0, "prefix": 1.25, "late": 1.0}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_runs_the_layers_that_it_says(name):
    layer = None if name == "full" else 1
    model = random_bert(2, RANK, router_pass=name, router_layer=layer)
    runs: list = []
    for index, one in enumerate(model.shared.bert.encoder.layer):
        one.register_forward_pre_hook(lambda m, args, index=index: runs.append(index))
    with torch.no_grad():
        model(**INPUTS)
    expected = {"full": [*range(4), *range(4)], "prefix": [0, *range(4)], "late": [*range(4)]}[name]
    assert runs == expected
    given = flops(model, dense(2))
    assert flops(model, None) <= given + (PASSES[name] - 1) * base_flops(model) * 1.02 + 1e5


# ---- bytes ----------------------------------------------------------------------------------------------------------


def held(model: Any) -> int:
    """Bytes of all tensors that live because of a model."""
    gc.collect()
    places = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            places[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(places.values())


STEP = {"input_ids": torch.ones(BATCH, 1, dtype=torch.long)}


@torch.no_grad()
@pytest.mark.parametrize("plan", ["factored", "gathered", "materialised", "auto"])
def test_a_forward_leaves_nothing_behind(plan):
    model = random_bert(4, RANK)
    with model.use_plan(plan):
        model(**INPUTS, expert_weights=dense(4))
        before = held(model)
        model(**INPUTS, expert_weights=dense(4))
        assert held(model) == before


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2])
def test_a_generation_keeps_one_copy_a_group_and_drops_it(groups):
    model = random_bert(4, RANK)
    sizes, weights = model._sizes(), dense(4)[torch.arange(BATCH) % groups].clone()
    before = held(model)
    with model.use_plan("materialised"):
        expected = model(**STEP, expert_weights=weights).last_hidden_state
        with model.generating(100):
            for _ in range(3):
                assert_close(model(**STEP, expert_weights=weights).last_hidden_state, expected)
            copies = held(model) - before
        # What else there is of a copy, its vectors, is small.
        assert 0 <= copies - groups * sizes.owned * sizes.entry < 0.05 * sizes.owned * sizes.entry
    del expected
    assert held(model) - before < 10_000


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_memory_budget_is_obeyed(share):
    model = random_bert(4, RANK, storage="int4")
    weights, before = dense(4)[:1].expand(BATCH, -1).clone(), held(model)
    budget = int(share * model._sizes().owned * 4)
    with model.use_plan("auto", memory_budget=budget), model.generating(1000):
        for _ in range(3):
            model(**STEP, expert_weights=weights)
        assert held(model) - before <= budget + 10_000


@torch.no_grad()
def test_a_generation_merges_once_and_unpacks_once():
    model = random_bert(4, RANK, storage="int4")
    calls: list = []
    for delta in model.deltas.values():
        delta.register_forward_hook(lambda *_: calls.append(1))
    weights = dense(4)[:1].expand(BATCH, -1).clone()
    for plan in ("materialised", "factored"):
        with model.use_plan(plan), model.generating(50):
            model(**STEP, expert_weights=weights)
            first = len(calls)
            model(**STEP, expert_weights=weights.clone())
            assert len(calls) - first <= 3, "only the tables are looked up again"
            calls.clear()
            model(**STEP, expert_weights=weights.flip(1))
            assert len(calls) > 20, "other weights are merged anew"
        calls.clear()


@torch.no_grad()
def test_a_generation_of_unknown_length_merges_once_it_is_long(monkeypatch):
    monkeypatch.setattr(Costs, "merging", lambda self, experts: 0.05)  # seconds, as of a larger model
    model = random_bert(4, RANK)
    weights = dense(4)[:1].expand(BATCH, -1).clone()
    with model.generating(None):
        plans = []
        for _ in range(300):
            model(**STEP, expert_weights=weights)
            plans.append(model._generation.get().find(weights, "step")[0].method)
    assert plans[0] == "factored" and plans[-1] == "materialised"


# ---- integers, narrow types -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_integer_factors_act_alike_in_every_plan(storage):
    model = random_bert(6, RANK, storage=storage)
    for weights in (dense(6), one_hot(6, 0, 3, 5), dense(6)[:1].expand(BATCH, -1)):
        outputs = []
        for plan in ("factored", "gathered", "materialised", "auto"):
            with model.use_plan(plan):
                outputs.append(model(**INPUTS, expert_weights=weights).last_hidden_state)
        for other in outputs[1:]:
            assert_close(other, outputs[0])


@torch.no_grad()
@pytest.mark.parametrize("plan", ["factored", "gathered", "materialised"])
def test_bf16_is_as_near_to_the_truth_as_the_base_model_s_own_bf16(plan):
    model = random_bert(4, RANK)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    weights = dense(4)
    exact, plain = (
        m(**INPUTS, expert_weights=w).last_hidden_state for m, w in ((model, weights), (model, 0 * weights))
    )
    with narrow.use_plan(plan):
        mine = narrow(**INPUTS, expert_weights=weights).last_hidden_state.float()
    base = narrow(**INPUTS, expert_weights=0 * weights).last_hidden_state.float()
    assert (exact - plain).abs().mean() > 0.02
    assert (mine - exact).pow(2).mean().sqrt() <= 1.5 * (base - plain).pow(2).mean().sqrt()


def test_a_measured_device_is_believed_from_then_on(monkeypatch):
    monkeypatch.setattr(costs_twin_merging, "_measured", {})
    device = torch.device("cpu")
    assumed, other = (constants_for(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    found = measure_constants(device, torch.float32)
    assert assumed == DEFAULTS["cpu", torch.float32] and other == DEFAULTS["cpu", torch.bfloat16]
    assert constants_for(torch.device("cuda"), torch.float16) == DEFAULTS["cuda", torch.bfloat16]
    assert found != assumed and constants_for(device, torch.bfloat16) is other  # only the type that was measured
    assert constants_for(device, torch.float32) is found is measure_constants(device, torch.float32)
    assert 1e-3 < found.thin <= 1 and 1e-3 < found.batched <= 1
    # A processor of any age lies within these, and a mistaken unit or an inverted ratio does not.
    assert 1e8 < found.flops < 1e14 and 1e8 < found.bandwidth < 1e13 and 1e-8 < found.launch < 1e-2


CONSTANTS = Constants(flops=1e3, thin=0.5, batched=0.25, bandwidth=1e6, launch=1e-3)
SIZES = Sizes(matrices=2, base=1000, owned=600, thin=(10, 20), full=(100, 200), largest=400, entry=4, sides=70)


def test_times_are_those_worked_out_by_hand():
    """Three rows of five tokens. Operations bound every product here, so an entry and a token take two thousandths."""
    costs = Costs(SIZES, CONSTANTS, rows=3, width=5)
    expected = {
        30.002: costs.base,  # 15 tokens * 1000 entries; two launches
        1.806: costs.factored((0, 1), 3, copied=False),  # 15 * 30 at half the rate; six launches
        1.81024: costs.factored((0, 1), 3, copied=True),  # 240 bytes are moved; four more launches
        # 5 * 30 for each of three rows at a quarter; 1080 bytes; 14 launches
        3.61508: costs.gathered([(0,), (0, 1), (1,)]),
        0.8072: costs.merging((1,)),  # 200 at half the rate; 600 entries moved three times
        0.0204: costs.split([1, 2]),  # 15 * 70 entries copied twice; 12 launches
        0.0144: costs.split([2]),  # as much copied; six launches
    }
    for seconds, found in expected.items():
        assert found == pytest.approx(seconds, rel=1e-9)
    assert costs.split([3]) == 0 and SIZES.crossover == 10
    assert replace(SIZES, thin=(0,)).crossover == float("inf")
    memory_bound = Costs(SIZES, replace(CONSTANTS, flops=1e12), rows=3, width=5)
    assert memory_bound.product(1, 1000) == pytest.approx(4e-3)
    sparse = Costs(replace(SIZES, sparse=True), CONSTANTS, rows=3, width=5)
    assert sparse.factored((0, 1), 3, copied=False) == pytest.approx(36.0144)
    assert sparse.merging((0, 1)) == pytest.approx(0.0192)


def test_training_takes_factors_unless_told_otherwise():
    model, weights = random_bert(12, RANK), one_hot(12, *range(BATCH))

    def forward(plan: str) -> int:
        with FlopCounterMode(display=False) as counter, model.use_plan(plan):
            model(**INPUTS, expert_weights=weights)
        return counter.get_total_flops()

    # `auto` takes the factors of all experts, unasked.
    assert flops(model, weights) <= forward("gathered") < forward("factored") < forward("auto")
