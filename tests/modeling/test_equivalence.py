"""Theorem: for every row, the model is the dense model `shared + sum_t w_t * delta_t`, whoever shares the batch."""

import copy
from typing import Any

import pytest
import torch

from tests import tiny
from tests.modeling.dense import (
    EXPERTS,
    MIXED,
    assert_close,
    columns,
    dense_hidden,
    dense_logits,
    dense_state,
    row,
    stock,
)
from twin_merging_hf.modeling import TwinMergingModel


def one_hot(expert: str) -> torch.Tensor:
    return torch.eye(len(EXPERTS))[EXPERTS.index(expert)][None]


def own_columns(model: Any, output: Any, expert: str) -> torch.Tensor:
    return output.expert_logits[:, columns(model, expert)]


# ---- full rank, one expert: the expert itself -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("expert", EXPERTS)
def test_one_hot_at_full_rank_is_that_expert_s_stock_model(world, kind, model, expert):
    inputs = tiny.batch(kind, 3)
    expected = stock(kind, world.experts(kind) / expert)(**inputs).logits
    for i in range(3):
        output = model(**row(inputs, i), expert_weights=one_hot(expert))
        assert_close(own_columns(model, output, expert), expected[i : i + 1], 1e-4)


@torch.no_grad()
def test_a_batch_that_mixes_experts_gives_each_row_its_own_expert_s_stock_logits(world, kind, model):
    names = ["c", "a", "b", "b", "a", "c"]
    inputs = tiny.batch(kind, len(names))
    output = model(**inputs, experts=names)
    for i, name in enumerate(names):
        expected = stock(kind, world.experts(kind) / name)(**row(inputs, i)).logits
        assert_close(output.expert_logits[i : i + 1, columns(model, name)], expected, 1e-4)


@torch.no_grad()
def test_the_experts_differ_so_that_the_theorem_above_can_fail(world, kind, model):
    inputs = tiny.batch(kind, 3)
    expected = stock(kind, world.experts(kind) / "a")(**inputs).logits
    wrong = model(**inputs, experts="c").expert_logits[:, columns(model, "a")]
    shared = model(**inputs, experts="__shared__").expert_logits[:, columns(model, "a")]
    assert (wrong - expected).abs().max() > 1e-2
    assert (shared - expected).abs().max() > 1e-2


# ---- no expert: the shared model ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("call", [{"experts": "__shared__"}, {"expert_weights": torch.zeros(1, 3)}], ids=["name", "0"])
def test_no_expert_is_the_dense_mean_of_the_experts(world, kind, model, call):
    inputs, folder = tiny.batch(kind, 3), world.experts(kind)
    output = model(**inputs, **call)
    states = [stock(kind, folder / name).state_dict() for name in EXPERTS]
    for name, own in zip(EXPERTS, states, strict=True):
        prefix = stock(kind, folder / name).base_model_prefix
        mean = {k: torch.stack([s[k].float() for s in states]).mean(0) for k in own if k.startswith(f"{prefix}.")}
        reference = copy.deepcopy(stock(kind, folder / name))
        reference.load_state_dict({**own, **mean})
        assert_close(own_columns(model, output, name), reference(**inputs).logits)


@torch.no_grad()
def test_a_row_without_experts_stays_shared_beside_rows_with_experts(kind, model):
    inputs = tiny.batch(kind, len(MIXED))
    mixed = model(**inputs, expert_weights=MIXED).expert_logits
    shared = model(**inputs, experts="__shared__").expert_logits
    none = MIXED.sum(dim=1) == 0
    assert_close(mixed[none], shared[none])
    assert (mixed[~none] - shared[~none]).abs().amax(dim=1).min() > 1e-3


# ---- any weights: the dense model -----------------------------------------------------------------------------------


@torch.no_grad()
def test_every_row_of_a_mixed_batch_equals_its_dense_model(world, kind, model):
    inputs = tiny.batch(kind, len(MIXED))
    output = model(**inputs, expert_weights=MIXED)
    for i, weights in enumerate(MIXED):
        for name in EXPERTS:
            expected = dense_logits(model, kind, world.experts(kind), weights, name, row(inputs, i))
            assert_close(output.expert_logits[i : i + 1, columns(model, name)], expected)


@torch.no_grad()
def test_every_hidden_state_of_a_mixed_batch_equals_its_dense_model(world, kind, artifact):
    body = TwinMergingModel.from_pretrained(artifact).eval()
    inputs = tiny.batch(kind, len(MIXED))
    output = body(**inputs, expert_weights=MIXED, output_hidden_states=True)
    assert len(output.hidden_states) == tiny.LAYERS + 1
    for i, weights in enumerate(MIXED):
        expected = dense_hidden(body, kind, world.experts(kind), weights, row(inputs, i))
        assert_close(output.last_hidden_state[i : i + 1], expected.last_hidden_state)
        for mine, other in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_close(mine[i : i + 1], other)


@torch.no_grad()
def test_routed_weights_act_like_the_same_weights_given(kind, model):
    inputs = tiny.batch(kind, 5)
    routed = model(**inputs)
    assert_close(routed.expert_weights.sum(dim=1), torch.ones(5))
    given = model(**inputs, expert_weights=routed.expert_weights)
    assert_close(given.logits, routed.logits, 1e-6)
    assert_close(given.expert_logits, routed.expert_logits, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("router", [{"type": "mlp", "pass": "full"}, {"type": "projection"}], ids=["mlp", "projection"])
def test_low_rank_artifacts_with_other_routers_equal_their_dense_models(world, router):
    model = world.model("bert", router=router, exclusive={"rank": 3}, merge_method="task_arithmetic")
    inputs = tiny.batch("bert", 4)
    for call in ({}, {"expert_weights": MIXED[2:6]}):
        output = model(**inputs, **call)
        for i, weights in enumerate(output.expert_weights):
            expected = dense_logits(model, "bert", world.experts("bert"), weights, "b", row(inputs, i))
            assert_close(output.expert_logits[i : i + 1, columns(model, "b")], expected)


# ---- where shared cancels -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shared_cancels_exactly_where_weights_sum_to_one_at_full_rank(world, kind, model):
    other = world.model(kind, shared_model="base", data=False)
    inputs = tiny.batch(kind, len(MIXED))
    mine = model(**inputs, expert_weights=MIXED).expert_logits
    theirs = other(**inputs, expert_weights=MIXED).expert_logits
    sums_to_one = torch.isclose(MIXED.sum(dim=1), torch.tensor(1.0))
    assert_close(mine[sums_to_one], theirs[sums_to_one])
    assert (mine - theirs)[~sums_to_one].abs().amax(dim=1).min() > 1e-3


# ---- rank -----------------------------------------------------------------------------------------------------------


def truncated(model: Any, rank: int) -> Any:
    """The artifact of a smaller rank: the leading columns of each expert's factors."""
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    for name, ranks in config.ranks.items():
        place, keep, start = f"deltas.{name.replace('.', '-')}", [], 0
        for own in ranks:
            keep += range(start, start + min(rank, own))
            start += own
        state[f"{place}.up"] = state[f"{place}.up"][:, keep]
        state[f"{place}.down"] = state[f"{place}.down"][keep]
        config.ranks[name] = [min(rank, own) for own in ranks]
    smaller = type(model)(config).eval()
    smaller.load_state_dict(state)
    return smaller


RANKS = (1, 8, 24, 32)


@torch.no_grad()
def test_the_error_of_answers_falls_monotonically_with_rank(world, kind, model):
    # Over all experts and many rows: for a single one, two errors may cancel by chance.
    inputs, errors = tiny.batch(kind, 32), []
    for rank in RANKS:
        smaller, total = truncated(model, rank), 0.0
        for expert in EXPERTS:
            expected = stock(kind, world.experts(kind) / expert)(**inputs).logits
            total += float((own_columns(model, smaller(**inputs, experts=expert), expert) - expected).pow(2).mean())
        errors.append(total**0.5)
    assert errors == sorted(errors, reverse=True), errors
    assert errors[0] > 1e-2 and errors[-1] < 1e-5, errors


@torch.no_grad()
def test_the_error_of_weights_is_the_least_possible_at_every_rank(world, kind, model):
    # Eckart and Young: no matrix of rank r is nearer than the truncated SVD, whose error is the tail of the spectrum.
    weights = one_hot("b")[0]
    expert = stock(kind, world.experts(kind) / "b").state_dict()
    shared = dense_state(model, torch.zeros(3))
    for rank in RANKS:
        near = dense_state(truncated(model, rank), weights)
        for name in model.config.ranks:
            delta = expert[name] - shared[name]
            delta = delta[0] if delta.dim() == 3 else delta.flatten(1)
            least = torch.linalg.svdvals(delta)[rank:].pow(2).sum().sqrt()
            assert_close((expert[name] - near[name]).pow(2).sum().sqrt(), least, 1e-4)


@torch.no_grad()
def test_a_build_of_rank_r_keeps_the_r_leading_directions(world, bert):
    built, sliced = world.model("bert", exclusive={"rank": 4}), truncated(bert, 4)
    inputs = tiny.batch("bert", len(MIXED))
    assert built.config.ranks == sliced.config.ranks
    assert_close(
        built(**inputs, expert_weights=MIXED).expert_logits, sliced(**inputs, expert_weights=MIXED).expert_logits
    )


# ---- batch mates, order, padding ------------------------------------------------------------------------------------

CALLS = {"routed": None, "given": MIXED}


def answers(model: Any, inputs: dict, weights: torch.Tensor | None) -> torch.Tensor:
    output = model(**inputs, expert_weights=weights)
    # Probabilities: far from any decision their logarithms are large, and so is the rounding of them.
    return torch.cat([output.logits.exp(), output.expert_logits, output.expert_weights], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("weights", CALLS.values(), ids=CALLS)
def test_a_row_alone_answers_as_in_a_batch(kind, model, weights):
    inputs = tiny.batch(kind, len(MIXED))
    together = answers(model, inputs, weights)
    for i in range(len(MIXED)):
        alone = answers(model, row(inputs, i), None if weights is None else weights[i : i + 1])
        assert_close(alone, together[i : i + 1])


@torch.no_grad()
@pytest.mark.parametrize("weights", CALLS.values(), ids=CALLS)
def test_the_order_of_rows_changes_no_row(kind, model, weights):
    inputs, order = tiny.batch(kind, len(MIXED)), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {name: value[order] for name, value in inputs.items()}
    expected = answers(model, inputs, weights)[order]
    assert_close(answers(model, shuffled, None if weights is None else weights[order]), expected)


def padded(inputs: dict, left: int, right: int, pad: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.nn.functional.pad(inputs["input_ids"], (left, right), value=pad)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (left, right), value=0)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("weights", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("text_kind", tiny.TEXT_KINDS)
def test_the_amount_of_padding_changes_no_row(models, text_kind, weights):
    model, inputs = models(text_kind), tiny.text_batch(len(MIXED))
    expected = answers(model, inputs, weights)
    assert_close(answers(model, padded(inputs, 0, 7), weights), expected)


def scattered(inputs: dict, width: int = 14) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same rows in a wider batch, each begun at another column, and those columns: left, right, both sides."""
    lengths = inputs["attention_mask"].sum(dim=1)
    starts = torch.tensor([(3 * i) % int(width - n + 1) for i, n in enumerate(lengths)])
    moved = {name: torch.zeros(len(lengths), width, dtype=value.dtype) for name, value in inputs.items()}
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for name, value in inputs.items():
            moved[name][i, start : start + length] = value[i, :length]
    return moved, starts


@torch.no_grad()
@pytest.mark.parametrize("weights", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("text_kind", tiny.TEXT_KINDS)
def test_the_side_of_padding_changes_no_row(models, text_kind, weights):
    # Here we promise more than a stock BERT or DistilBERT, which counts left padding as positions and pools it in the
    # place of the first token; so the reference is the right-padded batch, where stock models and ours agree.
    model, inputs = models(text_kind), tiny.text_batch(len(MIXED))
    expected = answers(model, inputs, weights)
    assert_close(answers(model, padded(inputs, 5, 0), weights), expected)
    moved, starts = scattered(inputs)
    assert (starts > 0).sum() > 2
    assert_close(answers(model, moved, weights), expected)


@torch.no_grad()
@pytest.mark.parametrize("text_kind", tiny.TEXT_KINDS)
def test_states_and_attentions_of_padded_rows_stand_where_the_tokens_stood(world, text_kind):
    model = TwinMergingModel.from_pretrained(world.artifact(text_kind), attn_implementation="eager").eval()
    inputs = tiny.text_batch(len(MIXED))
    moved, starts = scattered(inputs)
    options = {"expert_weights": MIXED, "output_hidden_states": True, "output_attentions": True}
    expected, output = (model(**i, **options) for i in (inputs, moved))
    for i, (start, length) in enumerate(zip(starts, inputs["attention_mask"].sum(dim=1), strict=True)):
        here = slice(int(start), int(start + length))
        for mine, other in zip(
            (output.last_hidden_state, *output.hidden_states),
            (expected.last_hidden_state, *expected.hidden_states),
            strict=True,
        ):
            assert_close(mine[i, here], other[i, :length])
        for mine, other in zip(output.attentions, expected.attentions, strict=True):
            assert_close(mine[i, :, here, here], other[i, :, :length, :length])


@torch.no_grad()
@pytest.mark.parametrize("text_kind", tiny.TEXT_KINDS)
def test_all_experts_answer_padded_rows_alike(models, text_kind):
    model, inputs = models(text_kind), tiny.text_batch(len(MIXED))
    expected, output = (model(**i, experts="all") for i in (inputs, scattered(inputs)[0]))
    assert_close(output.expert_logits, expected.expert_logits)
    assert torch.equal(output.expert_weights, expected.expert_weights)


@torch.no_grad()
def test_what_the_caller_gives_for_each_token_moves_with_it(models):
    model, inputs = models("bert"), tiny.text_batch(len(MIXED))
    inputs["token_type_ids"] = torch.randint(0, 2, inputs["input_ids"].shape) * inputs["attention_mask"]
    inputs["position_ids"] = torch.randint(0, 60, inputs["input_ids"].shape) * inputs["attention_mask"]
    expected = answers(model, inputs, None)
    assert_close(answers(model, scattered(inputs)[0], None), expected)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    moved = {name: torch.nn.functional.pad(v, (*[0] * 2 * (v.dim() - 2), 4, 0)) for name, v in inputs.items()}
    assert_close(answers(model, moved, MIXED), answers(model, inputs, MIXED))


@torch.no_grad()
def test_positions_given_once_for_all_rows_mean_the_same_for_one_row_and_for_many(models):
    model, inputs = models("bert"), padded(tiny.text_batch(3), 4, 0)
    positions = torch.arange(inputs["input_ids"].shape[1])[None] + 1
    together = answers(model, {**inputs, "position_ids": positions}, MIXED[3:6])
    repeated = answers(model, {**inputs, "position_ids": positions.expand(3, -1)}, MIXED[3:6])
    assert_close(together, repeated)
    for i in range(3):
        alone = answers(model, {**row(inputs, i), "position_ids": positions}, MIXED[3 + i : 4 + i])
        assert_close(alone, together[i : i + 1])


@torch.no_grad()
@pytest.mark.parametrize("weights", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("text_kind", ["bert", "distilbert"])
def test_what_stands_in_the_padding_changes_no_row(models, text_kind, weights):
    # Not RoBERTa: it finds its positions by the padding id.
    model, inputs = models(text_kind), tiny.text_batch(len(MIXED))
    expected = answers(model, inputs, weights)
    rubbish = torch.randint(5, tiny.VOCABULARY, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(9))
    inputs["input_ids"] = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], rubbish)
    assert_close(answers(model, inputs, weights), expected)
