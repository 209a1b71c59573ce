"""Builds of models that are large beside the memory: bounded, resumable, and the same whoever does how much of the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests import files, tiny
from twin_merging_hf import separation
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.deferred import Deferred, empty_model, put, widened
from twin_merging_hf.journal import Journal
from twin_merging_hf.progress import Progress
from twin_merging_hf.workers import each


MEGABYTE = 1 << 20


def language_experts(folder: Path, count: int, config: LlamaConfig) -> None:
    """A base and `count` experts of it, bfloat16, with random weights."""
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    for expert in range(count):
        torch.manual_seed(expert)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.002 * torch.randn_like(parameter)
        base.save_pretrained(folder / f"e{expert}")


def language_recipe(folder: Path, count: int, **settings) -> Path:
    experts = [{"name": f"e{i}", "model": f"e{i}"} for i in range(count)]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "experts": experts, **settings}
    path = folder / f"recipe{count}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def peak(recipe: Path, out: Path, workers: int, shard: str) -> int:
    """Bytes of anonymous memory that a build takes at most above what the imports take, in a process of its own."""
    # Freed memory goes back at once, else what the allocator keeps for later is counted.
    plain = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-m", "tests.memory", str(recipe), str(out), str(workers), shard]
    run = subprocess.run(command, cwd=files.ROOT, env={**os.environ, **plain}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_experts(tmp_path):
    config = LlamaConfig(
        vocab_size=6000, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    language_experts(tmp_path, 6, config)
    largest = 4 * config.vocab_size * config.hidden_size
    settings = {"exclusive": {"rank": 8}, "router": {"type": "projection"}}
    few, many = (
        peak(language_recipe(tmp_path, count, **settings), tmp_path / f"out{count}", 1, "8MB") for count in (2, 6)
    )
    assert len(list((tmp_path / "out6").glob("model-*.safetensors"))) > 1  # shards
    fixed = 24 * MEGABYTE  # configs, skeletons, the interpreter's own
    assert many <= 4 * largest + 8 * MEGABYTE + fixed, f"{many / MEGABYTE:.0f} MiB"
    assert many - few <= largest // 2, f"{few / MEGABYTE:.0f} -> {many / MEGABYTE:.0f} MiB"


@pytest.mark.parametrize("exclusive", [{"rank": 4}, {"budget": 0.3, "dtype": "int8"}], ids=["rank", "budget"])
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_neither_workers_nor_memory_change_a_byte(world, tmp_path, method, exclusive):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    recipe = tiny.write_recipe(folder, ("a", "b"), merge_method=method, base_model="base", exclusive=exclusive)
    ways = ({"workers": 1}, {"workers": 3}, {"workers": 2, "low_memory": True})
    for number, way in enumerate(ways):
        build_artifact(recipe, tmp_path / f"out{number}", Progress(quiet=True), **way)
    first, *others = (files.listing(tmp_path / f"out{number}") for number in range(len(ways)))
    assert all(other == first for other in others)


def test_a_narrow_language_model_builds_the_same_in_little_memory(tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    language_experts(tmp_path, 3, config)
    recipe = language_recipe(tmp_path, 3, exclusive={"rank": 4, "dtype": "int4"}, router={"type": "projection"})
    for low_memory in (False, True):
        build_artifact(recipe, tmp_path / f"out{low_memory}", Progress(quiet=True), low_memory=low_memory)
    assert files.listing(tmp_path / "outTrue") == files.listing(tmp_path / "outFalse")


DIE_AFTER = """
import os, sys
from twin_merging_hf import cli, journal
real, left = journal.Journal.write, [int(sys.argv.pop())]
def write(*args):
    real(*args)
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)
journal.Journal.write = write
cli.main()
"""


@pytest.mark.parametrize("exclusive", [{"rank": 4}, {"budget": 0.3}], ids=["rank", "budget"])
def test_a_killed_build_goes_on_where_it_was(world, tmp_path, monkeypatch, exclusive):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    recipe, out = tiny.write_recipe(folder, ("a", "b"), exclusive=exclusive), tmp_path / "artifacts" / "out"
    build_artifact(recipe, tmp_path / "undisturbed", Progress(quiet=True))
    # A second time goes on from the first; 30 are into the second pass of a budget.
    kills = (7, 12) if "rank" in exclusive else (30,)
    for parts in kills:
        command = [sys.executable, "-c", DIE_AFTER, "build", str(recipe), str(out), "--quiet", str(parts)]
        assert subprocess.run(command, env=files.environment(), capture_output=True).returncode == 9
    said: list[str] = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    split = []
    real = separation._split_tensor
    monkeypatch.setattr(separation, "_split_tensor", lambda name, **rest: split.append(name) or real(name, **rest))
    build_artifact(recipe, out, progress)
    assert any(line.startswith(f"{sum(kills)} finished tensors") for line in said), said
    assert files.listing(out) == files.listing(tmp_path / "undisturbed")
    assert list(out.parent.iterdir()) == [out]
    assert len(split) == len(set(split))


def test_parts_of_other_inputs_are_thrown_away(tmp_path):
    first = Journal(tmp_path / "parts", "one")
    first.write("split-00000", {"state.a": torch.ones(2)}, {"n": 1})
    assert first.read("split-00000")[1] == {"n": 1} and first.found == 0
    again = Journal(tmp_path / "parts", "one")
    assert torch.equal(again.read("split-00000")[0]["state.a"], torch.ones(2)) and again.found == 1
    assert again.read("split-00001") is None
    assert Journal(tmp_path / "parts", "two").read("split-00000") is None


def test_half_a_part_is_none(tmp_path):
    journal = Journal(tmp_path / "parts", "one")
    journal.write("split-00000", {"state.a": torch.ones(500)}, {})
    path = tmp_path / "parts" / "split-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert journal.read("split-00000") is None


def test_workers_keep_the_order_and_pass_errors_on():
    threads = torch.get_num_threads()
    assert each(str.upper, "abcdef", workers=3, size=ord) == list("ABCDEF")

    def fail(name: str) -> str:
        if name == "c":
            raise ValueError("no c")
        return name

    with pytest.raises(ValueError, match="no c"):
        each(fail, "abcdef", workers=2)
    assert torch.get_num_threads() == threads


def test_a_worker_has_one_thread():
    assert each(lambda name: torch.get_num_threads(), "ab", workers=2) == [1, 1]


def test_a_widened_model_computes_as_one_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(300, 160), nn.Linear(160, 160), nn.LayerNorm(160), nn.Linear(160, 200)
    ).bfloat16()
    wide = nn.Sequential(nn.Embedding(300, 160), nn.Linear(160, 160), nn.LayerNorm(160), nn.Linear(160, 200))
    wide.load_state_dict(model.state_dict())
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected, found = wide(ids), widened(model)(ids)
    assert isinstance(model[1].weight, Deferred) and model[1].weight.dtype == torch.float32
    assert not isinstance(model[1].bias, Deferred)  # small
    assert torch.equal(found, expected)


def test_a_model_without_values_takes_those_that_are_put_there():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    full = LlamaForCausalLM(config).eval()
    state = {name: value for name, value in full.state_dict().items() if name != "lm_head.weight"}
    model = empty_model(lambda: LlamaForCausalLM(config))
    assert put(model, state) == [] and model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids).logits, full(ids).logits)
    assert put(model, {}) == [name for name in full.state_dict() if name != "lm_head.weight"]
    with pytest.raises(RuntimeError, match="nothing"):
        put(model, {"nothing": torch.ones(1)})
