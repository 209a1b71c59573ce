"""`router: auto`: which rows its candidates see, what a planted winner looks like, and that a build chooses alike twice."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import files, tiny
from twin_merging_hf import router_choice
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.modeling.routing_twin_merging import new_router
from twin_merging_hf.recipe import parse_recipe
from twin_merging_hf.router_choice import Candidate, choose
from twin_merging_hf.router_training import RouterData, router_report


WIDTH, EXPERTS, ROWS = 6, 2, 120
LAYERS = (0, 1, 2)
WIDTHS = (WIDTH,) * (len(LAYERS) + 1)  # of the layers and the last state
RECIPE = {"experts": [{"name": name, "model": name, "data": f"{name}.jsonl"} for name in "ab"], "router": "auto"}


def planted(telling: tuple[int, ...], seed: int = 0) -> RouterData:
    """States of layers 0 to 2 and the last, side by side; only those in `telling` know the expert."""
    rng = torch.Generator().manual_seed(seed)
    owners = torch.arange(EXPERTS).repeat_interleave(ROWS)

    def draw() -> torch.Tensor:
        states = torch.randn(len(owners), len(LAYERS) + 1, WIDTH, generator=rng)
        for place in telling:
            states[:, place, 0] += 12.0 * owners
        return states.flatten(1)

    return RouterData(draw(), owners, draw(), owners, centres=(1, 1))


def chosen(data: RouterData, say: Callable[[str], None] = lambda message: None):
    choice = choose(data, LAYERS, WIDTHS, new, parse_recipe(RECIPE), say)
    return choice.candidate, choice.comparison


def new(candidate: Candidate) -> torch.nn.Module:
    states = len(candidate.layers) + (candidate.router_pass == "full")
    return new_router(
        SimpleNamespace(
            experts=range(EXPERTS),
            router_type=candidate.type,
            router_input_size=states * WIDTH,
            router_rank=2,
            router_exemplars=20,
            router_neighbours=5,
            router_centres=[1] * EXPERTS,
            router_none_distance=None,
        )
    )


@pytest.mark.parametrize("first", LAYERS)
def test_the_first_layer_that_knows_is_taken(first):
    winner, comparison = chosen(planted(tuple(range(first, len(LAYERS) + 1))))
    assert max(winner.layers) == first and winner.router_pass == "prefix"
    blind = [entry for entry in comparison if entry["layers"] and max(entry["layers"]) < first]
    assert all(entry["accuracy"] < 0.75 for entry in blind)
    assert [entry["accuracy"] for entry in comparison if entry["chosen"]] == [1.0]


def test_a_last_state_that_alone_knows_wins_although_it_costs_a_second_pass():
    winner, comparison = chosen(planted((len(LAYERS),)))
    assert winner.router_pass == "full"
    solved = [e["accuracy"] for e in comparison if e["pass"] == "full" and e["type"] != "mlp"]
    assert solved == [1.0, 1.0]  # the mlp has but a few epochs here


@pytest.mark.parametrize("full,taken", [(0.96, "prefix"), (0.99, "full")])
def test_a_full_pass_must_find_clearly_more_rows(full, taken):
    measured = [
        (Candidate(kind, layers, router_pass), {"accuracy": accuracy, "negative_log_likelihood": 0.1})
        for kind, layers, router_pass, accuracy in (("linear", (1,), "prefix", 0.95), ("linear", (), "full", full))
    ]
    winner = router_choice._winner(measured, 2000)
    assert winner.router_pass == taken
    assert (router_choice._note(winner, measured) is None) == (taken == "prefix")


def test_the_winner_comes_fitted_and_scores_what_the_comparison_says():
    data = planted((1, 2, 3))
    choice = choose(data, LAYERS, WIDTHS, new, parse_recipe(RECIPE), lambda message: None)
    part = choice.candidate.select(data, LAYERS, WIDTHS)
    report = router_report(choice.router, part, choice.candidate.type, None)
    entry = next(entry for entry in choice.comparison if entry["chosen"])
    assert report.accuracy == pytest.approx(entry["accuracy"], abs=1e-4)
    assert report.negative_log_likelihood == pytest.approx(entry["negative_log_likelihood"], abs=1e-4)


def test_candidates_get_their_own_columns_of_train_and_held_out_rows_and_nothing_else(monkeypatch):
    data, seen = planted((1,)), []

    def spy(router, part, settings, seed, *rest):
        seen.append(part)
        return train(router, part, settings, seed, *rest)

    train = router_choice.train_router
    monkeypatch.setattr(router_choice, "train_router", spy)
    _, comparison = chosen(data)
    assert len(seen) == len(comparison)
    for part, entry in zip(seen, comparison, strict=True):
        places = [*entry["layers"], *([len(LAYERS)] if entry["pass"] == "full" else [])]
        for name in ("train", "held_out"):
            states = getattr(data, name).reshape(-1, len(LAYERS) + 1, WIDTH)
            assert torch.equal(getattr(part, name), torch.cat([states[:, place] for place in places], dim=1))
        assert part.train_experts is data.train_experts and part.held_out_experts is data.held_out_experts


def test_held_out_rows_choose_and_train_rows_do_not():
    """Layer 0 knows the train rows only, layer 1 both: whoever looked at train rows would stop at layer 0."""
    both, late = planted((0, 1)), planted((1,), seed=1)
    data = RouterData(both.train, both.train_experts, late.held_out, late.held_out_experts, centres=(1, 1))
    winner, comparison = chosen(data)
    assert max(winner.layers) == 1
    assert all(entry["accuracy"] < 0.75 for entry in comparison if entry["layers"] == [0])


@pytest.mark.parametrize("kind", ["bert", "vit", "bert-tokens"])
def test_the_same_inputs_give_the_same_choice_and_the_same_bytes(world, tmp_path, kind):
    source = world.experts(kind, tiny.TAGS if kind == "bert-tokens" else None)
    found = []
    for number in (1, 2):
        folder = files.copy_inputs(source, tmp_path / f"home{number}")
        torch.manual_seed(number)
        recipe = tiny.write_recipe(folder, ("a", "b"), router="auto", exclusive={"rank": 2})
        found.append(files.listing(built(recipe, tmp_path / f"out{number}")))
    assert found[0] == found[1]


def built(recipe: Path, out: Path) -> Path:
    return build_artifact(recipe, out, Progress(quiet=True)).folder
