"""The k-th largest magnitude from a stream is the one of the whole vector."""

import pytest
import torch

from twin_merging_hf.merging import kth_largest_magnitude, trim_thresholds


RNG = torch.Generator().manual_seed(0)
DENORMAL = 2.0**-149
TASK_VECTORS = {
    "normal": [torch.randn(40, 30, generator=RNG), torch.randn(7, generator=RNG)],
    "equal values": [torch.randint(-3, 4, (50, 20), generator=RNG).float(), torch.full((9,), 2.0)],
    "mostly zeros": [torch.zeros(100, 9), torch.randn(11, generator=RNG), -torch.zeros(5)],
    "denormals": [torch.arange(-500, 500).float() * DENORMAL, torch.tensor([2.0**-126, 2.0**-127])],
    "neighbours": [torch.arange(1 << 23, (1 << 23) + 900, dtype=torch.int32).view(torch.float32)],
    "far apart": [10.0 ** torch.linspace(-40, 38, 700), torch.tensor([torch.finfo(torch.float32).max])],
    "scalar": [torch.tensor(-3.0), torch.tensor([1.0, 2.0])],
    "one": [torch.tensor([5.0])],
}


@pytest.mark.parametrize("kind", TASK_VECTORS)
def test_it_equals_kthvalue_of_everything_at_once(kind):
    tensors = TASK_VECTORS[kind]
    whole = torch.cat([tensor.flatten() for tensor in tensors]).abs()
    count = len(whole)
    for k in sorted({1, 2, count // 5, count // 2, count - 1, count} & set(range(1, count + 1))):
        expected = float(torch.kthvalue(whole, count - k + 1).values)
        assert kth_largest_magnitude(lambda: tensors, k) == expected
        assert kth_largest_magnitude(lambda: reversed(tensors), k) == expected


def test_it_reads_one_tensor_at_a_time_and_twice():
    read = []

    def stream():
        for index in range(3):
            read.append(index)
            yield torch.full((2,), float(index))

    assert kth_largest_magnitude(stream, 3) == 1.0
    assert read == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("k", [0, -1, 4])
def test_there_must_be_a_kth_value(k):
    with pytest.raises(ValueError, match="k|largest"):
        kth_largest_magnitude(lambda: [torch.ones(3)], k)


def test_the_threshold_is_one_for_the_whole_task_vector():
    small, large = torch.arange(1, 51) / 100, torch.arange(51, 101) / 100
    (whole,) = trim_thresholds([lambda: [small, large]], 0.2, 100)
    assert whole == pytest.approx(0.81)
    (alone,) = trim_thresholds([lambda: [small]], 0.2, 50)  # per tensor it would be another one
    assert alone == pytest.approx(0.41)


@pytest.mark.parametrize(("density", "kept"), [(1.0, 100), (0.29, 29), (0.2, 20), (0.001, 1), (0.205, 20)])
def test_how_many_entries_reach_the_threshold(density, kept):
    vector = torch.randperm(100, generator=torch.Generator().manual_seed(1)).float() + 1
    (threshold,) = trim_thresholds([lambda: [vector]], density, 100)
    assert int((vector >= threshold).sum()) == kept


def test_equal_entries_at_the_threshold_all_stay():
    vector = torch.tensor([4.0, -3.0, 3.0, 3.0, 1.0])
    (threshold,) = trim_thresholds([lambda: [vector]], 0.4, 5)
    assert threshold == 3.0 and int((vector.abs() >= threshold).sum()) == 4
