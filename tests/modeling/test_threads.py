"""Theorem: calls do not meet. Threads, copies and pickles of one model each have their own experts."""

import contextlib
import copy
import pickle
import sys
import threading
from typing import Any

import pytest
import torch

from tests import tiny
from tests.modeling.dense import MIXED, assert_close
from tests.modeling.shallow import shallow


CALLS = 200


def short(kind: str) -> dict[str, torch.Tensor]:
    return tiny.image_batch(1) if kind == "vit" else tiny.text_batch(1, longest=4)


def answers(model: Any, inputs: dict, given: dict, forced: Any, grad: bool, start: threading.Barrier) -> list:
    """The answers of `CALLS` calls, with the experts of `given` or within `use_experts(forced)`."""
    found = []
    start.wait(timeout=60)
    with torch.enable_grad() if grad else torch.no_grad():
        with model.use_experts(forced) if forced is not None else contextlib.nullcontext():
            for _ in range(CALLS):
                output = model(**inputs, **given)
                found.append(torch.cat([output.logits, output.expert_logits, output.expert_weights], dim=1).detach())
    return found


# The text kinds keep their experts in one and the same kind of hook; ViT also stands in for a module's forward.
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_two_threads_with_their_own_experts_get_what_they_get_alone(models, kind, grad):
    model, inputs = shallow(models(kind)), short(kind)
    jobs: list[tuple[dict, Any]] = [({"experts": "a"}, None), ({}, {"b": 0.3, "c": 0.6})]
    expected = [answers(model, inputs, *job, grad, threading.Barrier(1))[0] for job in jobs]
    assert (expected[0] - expected[1]).abs().max() > 1e-2

    start, found = threading.Barrier(len(jobs)), {}

    def work(index: int) -> None:
        found[index] = answers(model, inputs, *jobs[index], grad, start)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # so that the threads take turns within a call
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for index, serial in enumerate(expected):
        assert len(found[index]) == CALLS
        for answer in found[index]:
            assert_close(answer, serial, 1e-6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_behaves_as_the_model_and_is_independent(world, kind, duplicate):
    model = world.model(kind)
    other, inputs = duplicate(model), tiny.batch(kind, len(MIXED))
    with torch.no_grad():
        for weights in (None, MIXED):
            expected = model(**inputs, expert_weights=weights)
            assert torch.equal(other(**inputs, expert_weights=weights).logits, expected.logits)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(model(**inputs, expert_weights=MIXED).expert_logits, expected.expert_logits)
        assert (other(**inputs, expert_weights=MIXED).expert_logits - expected.expert_logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_made_within_use_experts_starts_without_a_choice(world, kind, duplicate):
    model = world.model(kind)
    inputs = tiny.batch(kind, 2)
    routed = model(**inputs).expert_weights
    with model.use_experts("c"):
        other = duplicate(model)
        assert torch.equal(other(**inputs).expert_weights, routed)
    with other.use_experts("a"):
        assert torch.equal(model(**inputs).expert_weights, routed)
        assert torch.equal(other(**inputs).expert_weights, torch.eye(3)[[0, 0]])


@torch.no_grad()
def test_the_delta_modules_of_a_copy_are_its_own(kind, model):
    other = copy.deepcopy(model)
    for delta in other.deltas.values():
        for parameter in delta.parameters():
            parameter.zero_()
    inputs = tiny.batch(kind, 3)
    shared = model(**inputs, experts="__shared__").expert_logits
    assert_close(other(**inputs, experts=["a", "b", "c"]).expert_logits, shared, 1e-6)
