"""What alignment costs at full size."""

import resource
import time

import pytest
import torch
import transformers as hf

from twin_merging_hf.alignment import align


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pair_of_110m_berts_takes_four_minutes_and_little_more_memory_than_the_two():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(hf.BertForSequenceClassification(hf.BertConfig()))
    ids = torch.randint(3, 30000, (4, 16, 64), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before, start = _peak(), time.monotonic()
        result = align(*models, batches, max_sweeps=5)
        elapsed = time.monotonic() - start
    finally:
        torch.set_num_threads(threads)
    assert result.report.objective > result.report.identity_objective + 0.05
    assert elapsed < 240
    # A similarity of each site in single precision is 0.5 GB, as much again while it is added up; blocks in work the rest.
    assert _peak() - before < 3.0


def _peak() -> float:
    """Largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
