"""The split: shared tensors by an independent recomputation, deltas, coverage, and what cannot be covered."""

import re

import pytest
import torch
import transformers
import yaml

from tests import files, tiny
from twin_merging_hf import TwinMergingError, compression, preflight, separation
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.compression import spectrum
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.separation import (
    Separation,
    delta_from_base,
    planned_bytes,
    separate,
)
from twin_merging_hf.shapes import as_matrix, matrix_shape


NAMES = ("a", "b", "c")
TABLE = "bert.embeddings.token_type_embeddings.weight"


def split(folder, file="recipe.yaml", **recipe) -> tuple[Separation, preflight.Inputs]:
    recipe = {"exclusive": {"rank": tiny.FULL_RANK}, "data": False, **recipe}
    inputs = preflight.preflight(load_recipe(tiny.write_recipe(folder, file=file, **recipe)))
    return separate(inputs), inputs


def stored(folder, name) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in files.tensors_of(folder / name).items()}


def weights_of(*weights: float) -> dict[str, dict]:
    return {name: {"parameters": {"weight": w}} for name, w in zip(NAMES, weights, strict=True)}


# recipe, and the shared tensor from base, a, b, c in plain arithmetic
METHODS = {
    "mean": ({}, lambda o, a, b, c: (a + b + c) / 3),
    "mean without base": ({"base_model": None}, lambda o, a, b, c: (a + b + c) / 3),
    "weighted mean": ({"experts": weights_of(1, 2, 5)}, lambda o, a, b, c: (a + 2 * b + 5 * c) / 8),
    "weighted sum": (
        {"experts": weights_of(0.5, -1, 2), "parameters": {"normalize": False}},
        lambda o, a, b, c: 0.5 * a - b + 2 * c,
    ),
    "task arithmetic": (
        {"merge_method": "task_arithmetic"},
        lambda o, a, b, c: o + 0.3 * ((a - o) + (b - o) + (c - o)),
    ),
    "weighted task arithmetic": (
        {"merge_method": "task_arithmetic", "experts": weights_of(1, 0, -2), "parameters": {"lambda": 0.7}},
        lambda o, a, b, c: o + 0.7 * ((a - o) - 2 * (c - o)),
    ),
    "base": ({"shared_model": "base"}, lambda o, a, b, c: o),
    "ready model": ({"shared_model": "b"}, lambda o, a, b, c: b),
    "in double": ({"dtype": "float64"}, lambda o, a, b, c: (a + b + c) / 3),
}


@pytest.mark.parametrize("method", METHODS)
def test_shared_equals_plain_arithmetic_and_deltas_give_the_experts_back(world, method):
    recipe, formula = METHODS[method]
    folder = world.experts("bert")
    result, _ = split(folder, "methods.yaml", **recipe)
    checkpoints = [stored(folder, name) for name in ("base", *NAMES)]
    for name in (key for key in checkpoints[0] if not key.startswith("classifier.")):
        expected = formula(*(tensors[name] for tensors in checkpoints))
        shared = result.state[f"shared.{name}"]
        assert shared.dtype == torch.float32
        torch.testing.assert_close(shared.double(), expected, rtol=1e-5, atol=1e-6)
        for index, tensors in enumerate(checkpoints[1:]):
            restored = shared + delta_of(result, name, index)
            torch.testing.assert_close(restored.double(), tensors[name], rtol=0, atol=2e-5)


def delta_of(result: Separation, name: str, index: int) -> torch.Tensor:
    """An expert's delta from the stored pieces."""
    key = f"deltas.{name.replace('.', '-')}"
    if f"{key}.delta" in result.state:
        return result.state[f"{key}.delta"][index]
    shape = result.state[f"shared.{name}"].shape
    if name in result.sparse:
        start = sum(result.sparse[name][:index])
        part = slice(start, start + result.sparse[name][index])
        flat = torch.zeros(shape.numel())
        flat[result.state[f"{key}.indices"][part].long()] = result.state[f"{key}.values"][part].float()
        return flat.reshape(shape)
    if name not in result.ranks:
        return torch.zeros(())
    start = sum(result.ranks[name][:index])
    part = slice(start, start + result.ranks[name][index])
    m, n = matrix_shape(shape)
    up, down = result.state[f"{key}.up"], result.state[f"{key}.down"]
    unit = 1.0
    if up.dtype == torch.uint8:
        up = torch.stack([up % 16, up // 16], dim=1).reshape(-1, up.shape[1])[:m].float() - 8
        down = torch.stack([down % 16, down // 16], dim=2).reshape(len(down), -1)[:, :n].float() - 8
        unit = 1 / 64
    elif up.dtype == torch.int8:
        unit = 1 / 128**2
    if f"{key}.scale" in result.state:
        up = up.float() * result.state[f"{key}.scale"].float() * unit
    return (up.float()[:, part] @ down.float()[part]).reshape(shape)


def losses(inputs: preflight.Inputs, result: Separation) -> dict[str, list[float]]:
    """Squared norm of each expert's delta minus what is stored of it, by tensor."""
    names = [key.removeprefix("shared.") for key in result.state if key.startswith("shared.") and ".heads." not in key]
    return {
        name: [
            float(
                (expert.tensor(name).double() - result.state[f"shared.{name}"] - delta_of(result, name, t)).pow(2).sum()
            )
            for t, expert in enumerate(inputs.experts)
        ]
        for name in names
    }


def test_every_tensor_is_accounted_for(world, kind):
    folder = world.experts(kind)
    result, inputs = split(folder, "coverage.yaml")
    backbone = {name for name in inputs.experts[0].places if name.startswith(f"{inputs.experts[0].prefix}.")}
    heads = {f"{n}:{t}" for n, c in zip(NAMES, inputs.experts, strict=True) for t in c.head_tensors()}
    assert set(result.coverage) == backbone | heads
    assert {entry["treatment"] for entry in result.coverage.values()} == {"factored", "exact", "head"}
    assert {f"shared.{name}" for name in backbone} <= set(result.state)
    factored = {name for name, entry in result.coverage.items() if entry["treatment"] == "factored"}
    assert factored == set(result.ranks)
    for name in factored:
        assert result.coverage[name]["ranks"] == result.ranks[name]
        assert all(kept == pytest.approx(1, abs=1e-5) for kept in result.coverage[name]["energy_kept"])
    delta_bytes = sum(value.nbytes for key, value in result.state.items() if key.startswith("deltas."))
    counted = sum(e["bytes"] for e in result.coverage.values() if e["treatment"] in ("factored", "exact"))
    assert counted == delta_bytes


def test_heads_are_copied_bit_by_bit(world, kind):
    result, inputs = split(world.experts(kind), "heads.yaml")
    for index, checkpoint in enumerate(inputs.experts):
        for name in checkpoint.head_tensors():
            module, _, rest = name.partition(".")
            assert torch.equal(result.state[f"shared.{module}.heads.{index}.{rest}"], checkpoint.tensor(name))


def test_energy_kept_is_that_of_the_leading_singular_values(world):
    folder = world.experts("bert")
    result, _ = split(folder, "energy.yaml", exclusive={"rank": 3})
    name = "bert.encoder.layer.2.output.dense.weight"
    a, b, c = (stored(folder, n)[name] for n in NAMES)
    squares = torch.linalg.svdvals(b - (a + b + c) / 3).pow(2)
    assert result.ranks[name] == [3, 3, 3]
    assert result.coverage[name]["energy_kept"][1] == pytest.approx(float(squares[:3].sum() / squares.sum()), abs=1e-4)


def test_ratio_gives_each_matrix_its_own_rank(world):
    result, _ = split(world.experts("bert"), "ratio.yaml", exclusive={"ratio": 0.25})
    assert result.ranks["bert.encoder.layer.0.output.dense.weight"] == [8, 8, 8]
    assert result.ranks[TABLE] == [1, 1, 1]


def test_narrow_factors_are_stored_narrow_and_vectors_are_not(world):
    result, _ = split(world.experts("bert"), "narrow.yaml", exclusive={"rank": tiny.FULL_RANK, "dtype": "bf16"})
    kinds = {key.rsplit(".", 1)[1]: value.dtype for key, value in result.state.items() if key.startswith("deltas.")}
    assert kinds == {"up": torch.bfloat16, "down": torch.bfloat16, "delta": torch.float32}
    assert {value.dtype for key, value in result.state.items() if key.startswith("shared.")} == {torch.float32}
    wide, _ = split(world.experts("bert"), "wide.yaml")
    key = "deltas.bert-encoder-layer-0-output-dense-weight.up"
    assert result.state[key].nbytes * 2 == wide.state[key].nbytes
    assert torch.equal(result.state[key], wide.state[key].bfloat16())


def test_the_artifact_may_be_narrower_than_its_experts(world):
    result, _ = split(world.experts("bert"), "out.yaml", out_dtype="bfloat16")
    assert {value.dtype for value in result.state.values()} == {torch.bfloat16}


def test_identical_experts_have_no_deltas(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "a")
    model.save_pretrained(folder / "b")
    result, inputs = split(folder, names=("a", "b"), experts={"b": {"labels": ["p", "q"]}})
    assert result.ranks == {} and result.exact == []
    assert not [key for key in result.state if key.startswith("deltas.")]
    assert {entry["treatment"] for entry in result.coverage.values()} == {"equal", "head"}
    inputs.close()


def test_a_recipe_of_identical_experts_builds(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    transformers.BertForSequenceClassification.from_pretrained(folder / "a").save_pretrained(folder / "b")
    files.write_rows(folder / "b.jsonl", [{"text": word, "label": i % 2} for i, word in enumerate(tiny.WORDS[50:60])])
    recipe = tiny.write_recipe(folder, ("a", "b"))
    report = build_artifact(recipe, tmp_path / "out", Progress(quiet=True)).report
    assert report["storage"]["deltas"] == 0


def test_an_expert_that_is_the_shared_model_has_rank_zero(world):
    result, _ = split(world.experts("bert"), "zero.yaml", shared_model="b")
    assert {tuple(ranks)[1] for ranks in result.ranks.values()} == {0}
    assert all(tuple(ranks)[0] > 0 for ranks in result.ranks.values())
    assert all(not result.state[f"deltas.{n.replace('.', '-')}.delta"][1].any() for n in result.exact)


# ---- what no rule covers ----------------------------------------------------------------------------------------


@pytest.fixture
def no_rule_for_table(monkeypatch):
    """As if the rules did not know one kind of parameter."""
    real = preflight.delta_rule

    def rule(owner, attribute, parameter):
        return None if tuple(parameter.shape) == (2, tiny.HIDDEN) else real(owner, attribute, parameter)

    monkeypatch.setattr(preflight, "delta_rule", rule)


def test_a_delta_without_rule_fails_and_the_line_in_the_message_helps(world, no_rule_for_table, tmp_path):
    folder = world.experts("bert")
    with pytest.raises(TwinMergingError) as caught:
        split(folder, "uncovered.yaml")
    message = str(caught.value)
    assert repr(TABLE) in message and "no rule" in message
    line = re.search(r"exclude: \[.*\]", message)
    assert line is not None
    advice = yaml.safe_load(line.group())
    result, _ = split(folder, "advised.yaml", **advice)
    entry = result.coverage[TABLE]
    a, b, c = (stored(folder, name)[TABLE] for name in NAMES)
    mean = (a + b + c) / 3
    energies = [float((expert - mean).pow(2).sum()) for expert in (a, b, c)]
    expected = {"dropped_energy": pytest.approx(sum(energies), rel=1e-4), "energy": pytest.approx(energies, rel=1e-4)}
    assert entry == {"treatment": "excluded", **expected}
    recipe = tiny.write_recipe(folder, file="advised.yaml", **advice)
    report = build_artifact(recipe, tmp_path / "out", Progress(quiet=True)).report
    assert report["tensors"][TABLE]["treatment"] == "excluded"
    assert files.read_json(tmp_path / "out" / "report.json")["tensors"][TABLE]["dropped_energy"] > 0


def test_a_delta_without_rule_is_no_obstacle_where_it_is_zero(world, no_rule_for_table, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    table = torch.ones(2, tiny.HIDDEN)
    for name in ("base", "a", "b"):
        files.edit_tensors(folder / name, lambda tensors: tensors.update({TABLE: table.clone()}))
    result, _ = split(folder, names=("a", "b"))
    assert result.coverage[TABLE] == {"treatment": "equal"}


def test_an_architecture_with_parameters_that_no_rule_knows(tmp_path):
    """BEiT's relative position tables are bare matrices, used inside attention."""
    config = transformers.BeitConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        use_relative_position_bias=True,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.BeitForImageClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(tmp_path / name)
    with pytest.raises(TwinMergingError, match=r"no rule can apply .* exclude: \["):
        split(tmp_path, names=("a", "b"), base_model=None)


def test_excluded_tensors_are_the_shared_ones_for_everybody(world):
    pattern = r"bert\.encoder\.layer\.[01]\..*"
    result, _ = split(world.experts("bert"), "exclude.yaml", exclude=[pattern])
    excluded = {name for name, entry in result.coverage.items() if entry["treatment"] == "excluded"}
    assert excluded == {name for name in result.coverage if re.fullmatch(pattern, name)}
    assert not excluded & {*result.ranks, *result.exact}
    included, _ = split(world.experts("bert"), "include.yaml", include=[pattern])
    assert {*included.ranks, *included.exact} == excluded


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_a_mistake(world, key):
    with pytest.raises(TwinMergingError, match=rf"`{key}`: 'encoder.*' matches no backbone tensor in full"):
        split(world.experts("bert"), "pattern.yaml", **{key: ["encoder.*"]})


def test_matrices_of_tables_and_kernels():
    assert matrix_shape(torch.Size([4, 5])) == (4, 5)
    assert matrix_shape(torch.Size([1, 6, 7])) == (6, 7)
    assert matrix_shape(torch.Size([8, 3, 2, 2])) == (8, 12)
    delta = torch.arange(8 * 12.0).reshape(8, 3, 2, 2)
    assert torch.equal(as_matrix(delta), delta.reshape(8, 12))


def test_what_an_expert_changed_is_measured_from_the_base_or_else_from_the_shared_model(world):
    folder, name = world.experts("bert"), "bert.encoder.layer.0.attention.self.key.weight"
    result, inputs = split(folder, "origin.yaml")
    a, base = stored(folder, "a")[name], stored(folder, "base")[name]
    expert = inputs.experts[0]
    torch.testing.assert_close(delta_from_base(expert, inputs.base, {}, name).double(), a - base, atol=1e-6, rtol=0)
    from_shared = delta_from_base(expert, None, result.state, name)
    torch.testing.assert_close(from_shared, expert.tensor(name) - result.state[f"shared.{name}"])


# ---- how many bytes, and for what --------------------------------------------------------------------------------

STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("dtype", STORAGES)
def test_report_and_plan_say_what_is_stored_and_what_is_lost(world, kind, dtype):
    folder, recipe = world.experts(kind), {"exclusive": {"rank": 5, "dtype": dtype}}
    result, inputs = split(folder, "said.yaml", **recipe)
    for name in result.ranks:
        place = f"deltas.{name.replace('.', '-')}"
        assert result.state[f"{place}.up"].dtype == result.state[f"{place}.down"].dtype == STORAGES[dtype]
        assert (f"{place}.scale" in result.state) == dtype.startswith("int")
    nothing = Separation(state={key: value for key, value in result.state.items() if key.startswith("shared.")})
    lost, origin = losses(inputs, result), losses(inputs, nothing)
    for name, entry in result.coverage.items():
        if entry["treatment"] == "factored":
            expected = [(part / whole) ** 0.5 for part, whole in zip(lost[name], origin[name], strict=True)]
            assert entry["relative_error"] == pytest.approx(expected, abs=2e-3)
            assert entry["bytes"] == sum(
                value.nbytes
                for key, value in result.state.items()
                if key.startswith(f"deltas.{name.replace('.', '-')}.")
            )
    whole = sum(map(sum, origin.values()))
    assert result.summary()["relative_error"] == pytest.approx((sum(map(sum, lost.values())) / whole) ** 0.5, abs=1e-3)
    planned = planned_bytes(inputs)
    assert (planned.shared, planned.deltas, planned.note) == (result.shared_bytes, result.delta_bytes, None)


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("rank", [2, 6])
def test_a_budget_loses_less_than_one_rank_for_all_at_equal_bytes(world, kind, dtype, rank):
    folder = world.experts(kind)
    uniform, inputs = split(folder, "uniform.yaml", exclusive={"rank": rank, "dtype": dtype})
    budget = uniform.delta_bytes / uniform.shared_bytes
    free, _ = split(folder, "budget.yaml", exclusive={"budget": budget, "dtype": dtype})
    assert free.delta_bytes <= uniform.delta_bytes
    before, after = (sum(map(sum, losses(inputs, result).values())) for result in (uniform, free))
    assert after < before
    assert free.ranks != uniform.ranks


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.5, 100])
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_a_budget_is_never_exceeded_and_nearly_used_up(world, dtype, budget):
    result, inputs = split(world.experts("bert"), "limit.yaml", exclusive={"budget": budget, "dtype": dtype})
    limit = int(budget * result.shared_bytes)
    assert result.shared_bytes == sum(v.nbytes for k, v in result.state.items() if k.startswith("shared.bert."))
    assert result.delta_bytes <= limit
    planned = planned_bytes(inputs)
    assert result.delta_bytes <= planned.deltas <= limit and "decided in the build" in str(planned.note)
    if budget < 1:
        assert result.delta_bytes > limit - 200  # less than one more direction


def test_a_budget_too_small_for_the_vectors_says_what_would_do(world):
    with pytest.raises(TwinMergingError, match=r"`exclusive.budget` is 0.001.*vectors.*give at least 0\.\d+"):
        split(world.experts("bert"), "small.yaml", exclusive={"budget": 0.001})


def test_what_a_budget_gives_nothing_is_reported(world):
    folder = world.experts("bert")
    recipe = {"exclusive": {"budget": 0.13, "dtype": "int4"}}
    result, inputs = split(folder, "tight.yaml", **recipe)
    dropped = [name for name, entry in result.coverage.items() if entry["treatment"] == "dropped"]
    assert dropped and not set(dropped) & {*result.ranks, *result.exact}
    lost = losses(inputs, result)
    for name in dropped:
        assert result.coverage[name]["dropped_energy"] == pytest.approx(sum(lost[name]), rel=1e-4)
        assert result.coverage[name]["bytes"] == sum(
            v.nbytes for k, v in result.state.items() if k.startswith(f"deltas.{name.replace('.', '-')}.")
        )
    assert list(result.coverage)[: len(inputs.experts[0].backbone)] == list(inputs.experts[0].backbone)


def test_a_budget_knows_enough_of_every_spectrum(world, monkeypatch):
    """Where only leading singular values are computed, more follow until none is missing."""
    folder, recipe = world.experts("bert"), {"exclusive": {"budget": 0.6}}
    expected, _ = split(folder, "whole.yaml", **recipe)
    caps = []

    def capped(matrix, seed_text, cap=2):
        caps.append(cap)
        return spectrum(matrix, seed_text, cap)

    monkeypatch.setattr(compression, "_GRAM_BELOW", 0)
    monkeypatch.setattr(separation, "FIRST_CAP", 2)
    monkeypatch.setattr(separation, "spectrum", capped)
    found, _ = split(folder, "whole.yaml", **recipe)
    assert found.ranks == expected.ranks and max(caps) > 2
    assert max(rank for ranks in found.ranks.values() for rank in ranks) > 2


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_energy_gives_each_matrix_and_expert_its_smallest_rank(world, share):
    folder = world.experts("bert")
    result, inputs = split(folder, "share.yaml", exclusive={"energy": share, "dtype": "int8"})
    experts = [stored(folder, name) for name in NAMES]
    for name, ranks in result.ranks.items():
        for t, rank in enumerate(ranks):
            squares = torch.linalg.svdvals(experts[t][name] - result.state[f"shared.{name}"]).pow(2)
            kept = squares.cumsum(0) / squares.sum()
            assert kept[rank - 1] >= share - 1e-6 and (rank == 1 or kept[rank - 2] < share)
    assert min(entry["energy_kept"][0] for entry in result.coverage.values() if "ranks" in entry) >= share - 1e-5
    planned = planned_bytes(inputs)
    assert planned.deltas > result.delta_bytes and "full rank" in str(planned.note)


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("method", ["magnitude", "bernoulli"])
def test_sparse_deltas_store_entries_of_the_delta(world, kind, method):
    folder = world.experts(kind)
    result, inputs = split(folder, "sparse.yaml", exclusive={"method": method, "ratio": 0.25})
    assert result.sparse and not result.ranks
    for name, counts in result.sparse.items():
        for t, count in enumerate(counts):
            delta = (inputs.experts[t].tensor(name).double() - result.state[f"shared.{name}"]).float()
            kept = delta_of(result, name, t)
            assert int((kept != 0).sum()) == count
            if method == "magnitude":
                assert count == round(0.25 * delta.numel())
                assert delta[kept != 0].abs().min() >= delta[kept == 0].abs().max()
            torch.testing.assert_close(kept[kept != 0], delta[kept != 0] * (4 if method == "bernoulli" else 1))
    planned = planned_bytes(inputs)
    if method == "magnitude":
        assert planned.deltas == result.delta_bytes and planned.note is None
    else:
        assert planned.deltas == pytest.approx(result.delta_bytes, rel=0.05) and "random" in str(planned.note)


def test_random_entries_follow_seed_expert_and_tensor(world):
    def places(seed):
        result, _ = split(
            world.experts("bert"), "seeds.yaml", seed=seed, exclusive={"method": "bernoulli", "ratio": 0.3}
        )
        return {key: value for key, value in result.state.items() if key.endswith(".indices")}, result.sparse

    first, counts = places(0)
    again, _ = places(0)
    other, _ = places(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    name = "bert.encoder.layer.0.output.dense.weight"
    blocks = first[f"deltas.{name.replace('.', '-')}.indices"].split(counts[name])
    assert not torch.equal(blocks[0], blocks[1])
