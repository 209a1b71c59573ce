"""Merges of whole checkpoints: the split and the static merges against naive code over concatenated task vectors."""

import pytest
import torch

from tests import files, tiny
from tests.merging.test_methods import naive_ties
from twin_merging_hf import TwinMergingError, evaluation, shared_merge
from twin_merging_hf.preflight import preflight
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.separation import separate


def opened(folder, **recipe):
    return preflight(load_recipe(tiny.write_recipe(folder, data=False, file="whole.yaml", **recipe)))


def flat_vectors(folder) -> tuple[dict, list[torch.Tensor]]:
    """The base's backbone tensors, and each expert's task vector over all of them as one vector."""
    base, *experts = (files.tensors_of(folder / name) for name in ("base", *tiny.LABELS))
    base = {key: value for key, value in base.items() if key.startswith("bert.")}
    return base, [torch.cat([(expert[key] - base[key]).flatten() for key in base]) for expert in experts]


def test_ties_trims_by_one_threshold_over_all_tensors(world):
    folder = world.experts("bert")
    inputs = opened(folder, merge_method="ties", parameters={"density": 0.3, "lambda": 0.8})
    base, vectors = flat_vectors(folder)
    size = len(vectors[0])
    limits = [float(torch.topk(vector.abs(), int(0.3 * size)).values[-1]) for vector in vectors]
    merged = torch.tensor(naive_ties([v.tolist() for v in vectors], (1, 1, 1), limits))
    result, start = separate(inputs).state, 0
    statics = evaluation.static_merge(inputs, 1, "ties").state_dict()
    for key, origin in base.items():
        expected = origin + 0.8 * merged[start : start + origin.numel()].reshape(origin.shape)
        torch.testing.assert_close(result[f"shared.{key}"], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(statics[key], expected, rtol=0, atol=1e-6)
        start += origin.numel()
    inputs.close()


def test_thresholds_are_counted_once(world, monkeypatch):
    inputs = opened(world.experts("bert"), merge_method="ties")
    calls = []
    original = shared_merge.trim_thresholds
    monkeypatch.setattr(shared_merge, "trim_thresholds", lambda *args: calls.append(1) or original(*args))
    separate(inputs)
    for index in range(3):
        evaluation.static_merge(inputs, index, "ties")
    assert len(calls) == 1
    inputs.close()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "tsv_m"])
def test_static_merges_are_the_artifacts_shared_model_whatever_the_order(world, method):
    folder = world.experts("bert")
    inputs, turned = opened(folder, merge_method=method), opened(folder, names=("c", "a", "b"), merge_method=method)
    shared, other = separate(inputs).state, separate(turned).state
    for name, value in evaluation.merged_backbone(inputs, method).items():
        torch.testing.assert_close(shared[f"shared.{name}"], value, rtol=0, atol=0)
        torch.testing.assert_close(other[f"shared.{name}"], value, rtol=0, atol=1e-5)
    inputs.close(), turned.close()


def test_a_method_of_task_vectors_without_a_base_says_so(world):
    inputs = opened(world.experts("bert"), base_model=None)
    with pytest.raises(TwinMergingError, match="'ties' needs `base_model`"):
        evaluation.static_merge(inputs, 0, "ties")
    inputs.close()
