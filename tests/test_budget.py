"""One budget for all matrices: nothing that fits keeps more, and the limit holds."""

import itertools

import pytest
import torch

from twin_merging_hf.budget import Candidate, allocate


def candidates_of(seed: int, count: int = 6, most: int = 5) -> list[Candidate]:
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        squares = torch.rand(int(torch.randint(1, most, (1,), generator=rng)), generator=rng).double()
        made.append(Candidate(squares.sort(descending=True).values, int(torch.randint(1, 6, (1,), generator=rng))))
    return made


def kept(candidates, ranks) -> float:
    return sum(float(c.squares[:r].sum()) for c, r in zip(candidates, ranks, strict=True))


def cost(candidates, ranks) -> int:
    return sum(c.cost * r for c, r in zip(candidates, ranks, strict=True))


def test_known_answer():
    tall = Candidate(torch.tensor([9.0, 4.0, 1.0]), 3)  # 3, 1.33, 0.33 for a byte
    small = Candidate(torch.tensor([2.0, 1.9]), 1)  # 2, 1.9
    assert allocate([tall, small], 0) == [0, 0]
    assert allocate([tall, small], 2) == [0, 2]
    assert allocate([tall, small], 3) == [1, 0]
    assert allocate([tall, small], 4) == [1, 1]
    assert allocate([tall, small], 7) == [1, 2]
    assert allocate([tall, small], 8) == [2, 2]
    assert allocate([tall, small], 1000) == [3, 2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limit", [0, 5, 13, 29, 1000])
def test_the_limit_holds_and_nothing_left_out_would_fit(seed, limit):
    candidates = candidates_of(seed)
    ranks = allocate(candidates, limit)
    left = limit - cost(candidates, ranks)
    assert left >= 0
    assert all(left < c.cost or r == len(c.squares) for c, r in zip(candidates, ranks, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_where_all_cost_the_same_it_is_the_best_of_all_choices(seed):
    candidates = [Candidate(c.squares, 2) for c in candidates_of(seed, count=4, most=4)]
    for limit in range(0, 14, 3):
        fitting = [
            ranks
            for ranks in itertools.product(*(range(len(c.squares) + 1) for c in candidates))
            if cost(candidates, ranks) <= limit
        ]
        best = max(kept(candidates, ranks) for ranks in fitting)
        assert kept(candidates, allocate(candidates, limit)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_where_costs_differ_it_misses_the_best_by_less_than_one_direction(seed):
    candidates = candidates_of(seed, count=4, most=4)
    largest = max(float(c.squares[0]) for c in candidates)
    for limit in (5, 11, 17):
        fitting = itertools.product(*(range(len(c.squares) + 1) for c in candidates))
        best = max(kept(candidates, ranks) for ranks in fitting if cost(candidates, ranks) <= limit)
        assert kept(candidates, allocate(candidates, limit)) >= best - largest


def test_directions_of_no_energy_are_never_stored():
    assert allocate([Candidate(torch.tensor([1.0, 0.0, 0.0]), 1), Candidate(torch.zeros(3), 1)], 100) == [1, 0]
    assert allocate([], 100) == []


def test_equal_gains_go_to_the_first():
    assert allocate([Candidate(torch.ones(3), 1)] * 2, 3) == [3, 0]
