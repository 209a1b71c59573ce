"""Artifacts whose deltas are integers or sparse entries: they act as dense models do, and survive all that models go through."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests import files, tiny
from tests.conftest import load
from tests.modeling.shallow import shallow
from twin_merging_hf.artifact import check_artifact, inspect_artifact, read_config, storage
from twin_merging_hf.modeling.factors_twin_merging import FactoredDelta
from twin_merging_hf.probe import TOLERANCE, dense_model, probe


KINDS_OF_DELTA = {
    "int8": {"rank": 5, "dtype": "int8"},
    "int4": {"rank": 5, "dtype": "int4"},
    "int4 by budget": {"budget": 0.2, "dtype": "int4"},
    "energy": {"energy": 0.6, "dtype": "bf16"},
    "magnitude": {"method": "magnitude", "ratio": 0.2},
    "bernoulli": {"method": "bernoulli", "ratio": 0.2, "dtype": "bf16"},
}
INTEGERS = ["int8", "int4"]
MIXED = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0], [0.2, 0.3, 0.5]])


def artifact(world, stored: str, kind: str = "bert", **recipe):
    return world.artifact(kind, exclusive=KINDS_OF_DELTA[stored], router={"type": "projection"}, data=False, **recipe)


@pytest.mark.parametrize("stored", KINDS_OF_DELTA)
def test_mixed_batches_equal_dense_models(world, kind, stored):
    model = load(artifact(world, stored, kind))
    assert probe(model, seed=3) < TOLERANCE / 10


@pytest.mark.parametrize("stored", KINDS_OF_DELTA)
def test_the_dense_side_of_the_probe_adds_what_is_stored(world, stored):
    """One number of the delta recomputed from the file by hand, and the whole model nearer to the expert than shared."""
    folder = artifact(world, stored)
    tensors, config = load_file(folder / "model.safetensors"), read_config(folder)
    weights = torch.eye(3)[1]
    dense = dense_model(config, tensors, weights, 1).state_dict()
    shared = dense_model(config, tensors, torch.zeros(3), 1).state_dict()
    expert = load_file(world.experts("bert") / "b" / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    delta, wanted = dense[name] - shared[name], expert[name] - shared[name]
    share = float((delta * wanted).sum() / (delta.norm() * wanted.norm()))
    assert share > 0.3, "the stored delta points where the expert's does"
    if stored in INTEGERS:
        place, start = f"deltas.{name.replace('.', '-')}", config.ranks[name][0]
        total = 0.0
        for r in range(start, start + config.ranks[name][1]):
            up, down = tensors[f"{place}.up"], tensors[f"{place}.down"]
            if stored == "int4":  # entry [7, 4]: the high half of row 3, the low half of column 2
                a, b, unit = int(up[3, r]) // 16 - 8, int(down[r, 2]) % 16 - 8, 8
            else:
                a, b, unit = int(up[7, r]), int(down[r, 4]), 128
            total += a / unit * float(tensors[f"{place}.scale"][r]) * b / unit
        assert float(delta[7, 4]) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("stored", KINDS_OF_DELTA)
def test_loading_and_saving_changes_no_byte(world, tmp_path, stored, dtype):
    folder = artifact(world, stored, out_dtype=dtype)
    load(folder).save_pretrained(tmp_path / "again")
    assert files.listing(tmp_path / "again") == files.listing(folder)


@pytest.mark.parametrize("stored", KINDS_OF_DELTA)
def test_it_is_whole_and_its_bytes_are_accounted_for(world, stored):
    folder = artifact(world, stored)
    assert check_artifact(folder) == []
    tensors, report = load_file(folder / "model.safetensors"), files.read_json(folder / "report.json")
    deltas = sum(value.nbytes for key, value in tensors.items() if key.startswith("deltas."))
    assert storage(folder, read_config(folder)).deltas == deltas == report["exclusive"]["bytes"]
    assert sum(e["bytes"] for e in report["tensors"].values() if e.get("bytes") and e["treatment"] != "head") == deltas
    found = inspect_artifact(folder)
    expected = KINDS_OF_DELTA[stored].get("dtype", "fp32").replace("fp32", "float32").replace("bf16", "bfloat16")
    assert found.delta["dtype"] == report["exclusive"]["dtype"] == expected
    assert found.delta["kind"] == ("sparse" if "method" in KINDS_OF_DELTA[stored] else "factors")
    assert all(size > 0 for size in found.delta["sizes"].values())
    assert 0 < report["exclusive"]["energy_kept"] < 1 and report["exclusive"]["relative_error"] > 0


def damaged(tensors, key, how):
    tensors[key] = how(tensors[key])


DAMAGE = {
    "floats for integers": ("int8", ".up", lambda t: t.float(), "type torch.float32, expected torch.int8"),
    "another integer": ("int4", ".down", lambda t: t.to(torch.int8), "type torch.int8, expected torch.uint8"),
    "a scale of NaN": ("int8", ".scale", lambda t: t * float("nan"), "NaN"),
    "not packed": ("int4", ".up", lambda t: t.repeat(2, 1), "expected"),
    "a place outside": (
        "magnitude",
        ".indices",
        lambda t: torch.where(t == t.max(), 10**6, t).int(),
        "ascending places",
    ),
    "a negative place": ("magnitude", ".indices", lambda t: t - t.max(), "ascending places"),
    "a place twice": ("bernoulli", ".indices", lambda t: torch.cat([t[:1], t[:1], t[2:]]), "ascending places"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found(world, tmp_path, case):
    stored, ending, how, message = DAMAGE[case]
    folder = shutil.copytree(artifact(world, stored), tmp_path / "copy")
    key = f"deltas.bert-encoder-layer-1-output-dense-weight{ending}"
    files.edit_tensors(folder, lambda tensors: damaged(tensors, key, how))
    problems = check_artifact(folder)
    assert len(problems) == 1 and repr(key) in problems[0] and message in problems[0]


@torch.no_grad()
@pytest.mark.parametrize("stored", [*INTEGERS, "magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_models_keep_their_integers_and_answer_alike(world, stored, dtype):
    folder, inputs = artifact(world, stored), tiny.batch("bert", 4)
    expected = load(folder)(**inputs, expert_weights=MIXED).expert_logits
    for model in (load(folder).to(dtype), load(folder, dtype=dtype)):
        output = model(**inputs, expert_weights=MIXED).expert_logits.float()
        assert (output - expected).abs().max() < 0.03 * expected.abs().max()
        for module in model.deltas.values():
            if isinstance(module, FactoredDelta):
                assert module.up.dtype == {8: torch.int8, 4: torch.uint8}[module.bits] and module.scale.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("stored", KINDS_OF_DELTA)
def test_copies_answer_the_same(world, stored):
    model, inputs = load(artifact(world, stored)), tiny.batch("bert", 4)
    expected = model(**inputs, expert_weights=MIXED).expert_logits
    assert torch.equal(copy.deepcopy(model)(**inputs, expert_weights=MIXED).expert_logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("stored", ["int4", "magnitude"])
def test_compiled_models_answer_the_same(world, stored):
    model = shallow(world.model("bert", exclusive=KINDS_OF_DELTA[stored]))
    inputs = tiny.batch("bert", 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs, expert_weights=MIXED)
    torch.testing.assert_close(compiled.expert_logits, model(**inputs, expert_weights=MIXED).expert_logits)


@pytest.mark.parametrize("stored", INTEGERS)
def test_integers_load_through_meta_and_cannot_be_trained(world, stored):
    folder = artifact(world, stored)
    loaded, config = load(folder), read_config(folder)
    with torch.device("meta"):
        empty = type(loaded)(config)
    assert {value.device.type for key, value in empty.state_dict().items() if key.startswith("deltas.")} == {"meta"}
    empty.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    assert all(torch.equal(value, empty.state_dict()[key]) for key, value in loaded.state_dict().items())
    trainable = {name for name, _ in loaded.named_parameters() if name.startswith("deltas.")}
    assert trainable and all(name.endswith(".delta") for name in trainable)


@torch.no_grad()
def test_more_bits_are_nearer_to_the_floats(world):
    inputs, errors = tiny.batch("bert", 8), []
    exact = load(world.artifact("bert", exclusive={"rank": 5}, router={"type": "projection"}, data=False))
    for stored in INTEGERS:
        model = load(artifact(world, stored))
        errors.append(
            max(
                float((model(**inputs, experts=e).expert_logits - exact(**inputs, experts=e).expert_logits).norm())
                for e in tiny.LABELS
            )
        )
    assert 0 < errors[0] < 0.3 * errors[1]
