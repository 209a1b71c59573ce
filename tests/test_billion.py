"""
A build at full size: eight bfloat16 experts of a random model of 1.1 billion parameters; and what makes it fast.

    pytest -m slow -s tests/test_billion.py       # 25 GB of disk, a quarter of an hour on two cores
"""

import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_large_builds import MEGABYTE, language_recipe, peak
from twin_merging_hf.compression import exact_svd, randomised_svd
from twin_merging_hf.deferred import empty_model
from twin_merging_hf.preflight import preflight
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.separation import separate


pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
GIGABYTE = 1 << 30
EXPERTS = 8


def write_experts(folder: Path, config: LlamaConfig, count: int) -> int:
    """A random base and experts of it, bfloat16; the number of parameters of each."""
    model = empty_model(lambda: LlamaForCausalLM(config), torch.bfloat16)
    with torch.no_grad():
        for name in ["base", *(f"e{i}" for i in range(count))]:
            generator = torch.Generator().manual_seed(len(list(folder.iterdir())))
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.fill_(1.0)
                elif name == "base":
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
                else:  # a task vector of falling spectrum, and noise
                    left = torch.randn(parameter.shape[0], 24, generator=generator) * 0.8 ** torch.arange(24.0)
                    parameter.addmm_(
                        left.bfloat16(), torch.randn(24, parameter.shape[1], generator=generator).bfloat16(), alpha=2e-3
                    )
            model.save_pretrained(folder / name)
    return sum(parameter.numel() for parameter in model.parameters())


def test_eight_experts_of_a_billion_parameters(tmp_path):
    if shutil.disk_usage(tmp_path).free < 30 * GIGABYTE:
        pytest.skip("needs 30 GB of free disk")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    parameters = write_experts(tmp_path, config, EXPERTS)
    assert parameters > 1e9
    recipe = language_recipe(tmp_path, EXPERTS, exclusive={"rank": 16, "dtype": "int8"}, router={"type": "projection"})
    largest, workers = 4 * config.vocab_size * config.hidden_size, 2
    begin = time.monotonic()
    found = peak(recipe, tmp_path / "out", workers, "1GB")
    bound = 4 * largest * workers + GIGABYTE
    print(
        f"\n{EXPERTS} experts of {parameters / 1e9:.2f} billion parameters, {workers} workers: peak of anonymous memory "
        f"{found / MEGABYTE:.0f} MiB above the imports (bound {bound / MEGABYTE:.0f}), {time.monotonic() - begin:.0f} s"
    )
    assert found <= bound


@pytest.mark.parametrize("shape", [(768, 3072), (2048, 2048), (4096, 4096)], ids=str)
def test_a_matrix_is_compressed_faster_than_by_a_full_svd(shape):
    """At rank 16, one thread: at least 20 times, at an error of at most 1e-3 above the best."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rank, full = 16, min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], full, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], full, generator=generator)).Q
    matrix = (left * torch.arange(1, full + 1).float().pow(-0.6)) @ right.T  # the spectrum of fine-tuned layers' deltas
    begin = time.process_time()
    s = exact_svd(matrix)[1]
    exact = time.process_time() - begin
    times = []
    for repeat in range(3):
        begin = time.process_time()
        u, values, vh = randomised_svd(matrix, rank, str(repeat))
        times.append(time.process_time() - begin)
    best = float(s[rank:].double().pow(2).sum().sqrt())
    error = float((matrix - (u * values) @ vh).double().pow(2).sum().sqrt())
    ratio = exact / sorted(times)[1]
    print(f"\n{shape}: {ratio:.1f} times faster, error {error / best - 1:.1e} above the best")
    assert error <= best * (1 + 1e-3) and ratio >= 20


def test_two_workers_are_faster_than_one(tmp_path):
    """At least 1.5 times on merging and compressing; needs two cores with nothing else to do."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    write_experts(tmp_path, config, 2)
    recipe = language_recipe(tmp_path, 2, exclusive={"rank": 16}, router={"type": "projection"})
    inputs = preflight(load_recipe(recipe))
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for workers, taken in times.items():
            begin = time.monotonic()
            separate(inputs, workers=workers)
            taken.append(time.monotonic() - begin)
    one, two = (sorted(taken)[1] for taken in times.values())
    print(f"\none worker {one:.1f} s, two {two:.1f} s: {one / two:.2f} times")
    assert one / two >= 1.5
