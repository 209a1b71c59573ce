"""Exports: what plain Transformers and PEFT compute from them is what the artifact computes, and what is lost is told."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import adapters, files, tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.cli import app
from twin_merging_hf.export import export_adapters, export_merged, export_vllm, parse_weights
from twin_merging_hf.export.vllm import pad, vllm_problems
from twin_merging_hf.modeling.export_twin_merging import expert_lora
from twin_merging_hf.progress import Progress


QUIET = Progress(quiet=True)
AUTO = {"vit": transformers.AutoModelForImageClassification}


def plain(kind: str, folder, **kwargs):
    return AUTO.get(kind, transformers.AutoModelForSequenceClassification).from_pretrained(folder, **kwargs).eval()


@pytest.fixture(scope="module")
def lora_artifact(tmp_path_factory):
    """Artifact of LoRA experts on their base, by kind: everything in it is a LoRA, of many ranks."""
    made = {}

    def of(kind: str):
        if kind not in made:
            folder = adapters.make_adapters(kind, tmp_path_factory.mktemp("export") / kind)
            recipe = adapters.recipe(folder, shared_model="base", exclusive={"energy": 0.8})
            made[kind] = build_artifact(recipe, folder / "artifact", QUIET).folder
        return made[kind]

    return of


def columns(model, outputs: torch.Tensor, name: str) -> torch.Tensor:
    return outputs[:, slice(*model.label_space.spans[model.expert_names.index(name)])]


# ---- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_merged_checkpoint_is_the_artifact_under_fixed_weights(world, kind, tmp_path):
    artifact, batch = world.artifact(kind), tiny.batch(kind, 3)
    model = load(artifact)
    for weights, head, name in (("b", None, "b"), ({"a": 0.7, "c": 0.3}, "c", "c"), ("__shared__", "a", "a")):
        out = tmp_path / f"out-{head}"
        export_merged(artifact, out, weights, head)
        stock = plain(kind, out)
        with torch.no_grad():
            expected = columns(model, model(**batch, experts=weights).expert_logits, name)
            torch.testing.assert_close(stock(**batch).logits, expected, rtol=0, atol=1e-5)
        assert list(stock.config.id2label.values()) == tiny.LABELS[name]
        assert stock.config.architectures == [type(stock).__name__] and not hasattr(stock, "deltas")
    assert (out / "preprocessor_config.json").is_file() or (out / "tokenizer.json").is_file()


def test_a_mixture_needs_a_head_and_a_single_expert_none(world):
    model = world.model("bert")
    with pytest.raises(ValueError, match="name it by `head`"):
        model.merge_and_unload({"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="unknown expert 'zz'"):
        model.merge_and_unload("zz")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stock = model.merge_and_unload("a")
    with torch.no_grad():
        next(stock.parameters()).add_(1.0)  # nothing of it belongs to the artifact
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_sparse_and_integer_deltas_merge_too(world):
    batch = tiny.batch("bert", 2)
    for exclusive in ({"rank": 4, "dtype": "int4"}, {"method": "magnitude", "ratio": 0.2}):
        model = world.model("bert", exclusive=exclusive)
        with torch.no_grad():
            expected = columns(model, model(**batch, experts="b").expert_logits, "b")
            torch.testing.assert_close(model.merge_and_unload("b")(**batch).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="single"):
        model.export_expert_as_lora("a", "nowhere")


def test_a_merged_tagger_has_no_problem_type(world):
    artifact = world.artifact("bert-tokens", tiny.TAGS)
    stock = load(artifact).merge_and_unload("b")
    assert stock.config.problem_type is None and list(stock.config.id2label.values()) == tiny.TAGS["b"]
    stock = world.model("bert").merge_and_unload("b")
    assert stock.config.problem_type == "single_label_classification"


# ---- peft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_loras_in_peft_are_the_artifact_to_rounding_where_everything_is_carried(lora_artifact, kind, tmp_path):
    peft = pytest.importorskip("peft")
    artifact, batch = lora_artifact(kind), tiny.batch(kind, 3)
    out, model = tmp_path / "out", load(artifact)
    found = export_adapters(artifact, out)
    for name, entry in zip(tiny.LABELS, found.content["experts"], strict=True):
        assert entry["left_out"] == [] and entry["left_out_energy"] == 0 and entry["rank"] <= adapters.RANKS[name]
        if kind == "bert":  # an adapter whose modules differ in rank is among those compared
            assert adapters.read(out / name)[0]["rank_pattern"]
        base = plain(kind, out / "base", num_labels=len(tiny.LABELS[name]))
        adapted = peft.PeftModel.from_pretrained(base, out / name).eval()
        with torch.no_grad():
            expected = columns(model, model(**batch, experts=name).expert_logits, name)
            torch.testing.assert_close(adapted(**batch).logits, expected, rtol=0, atol=1e-5)


def test_what_a_lora_cannot_carry_is_reported_with_its_size_and_energy(world, tmp_path):
    artifact = world.artifact("bert")
    found = export_adapters(artifact, tmp_path / "out", base_id="me/shared")
    entry = found.content["experts"][0]
    norm = "bert.encoder.layer.0.output.LayerNorm.weight"
    item = next(item for item in entry["left_out"] if item["name"] == norm)
    delta = files.tensors_of(artifact)[f"deltas.{norm.replace('.', '-')}.delta"][0]
    assert item["energy"] == pytest.approx(float(delta.double().pow(2).sum()), rel=1e-4)
    assert item["bytes"] == delta.nbytes and item["numbers"] == delta.numel()
    vectors = {name for name in files.read_json(artifact / "config.json")["exact_deltas"]}
    assert {item["name"] for item in entry["left_out"]} == vectors and 0 < entry["left_out_energy"] < 1
    assert files.read_json(tmp_path / "out" / "export.json")["experts"] == found.content["experts"]
    assert files.read_json(tmp_path / "out" / "a" / "adapter_config.json")["base_model_name_or_path"] == "me/shared"


def test_an_export_builds_again_to_the_same_artifact(lora_artifact, tmp_path):
    artifact, out = lora_artifact("bert"), tmp_path / "out"
    export_adapters(artifact, out)
    recipe = tiny.write_recipe(out, data=False, shared_model="base", exclusive={"rank": tiny.FULL_RANK})
    again = load(build_artifact(recipe, tmp_path / "again", QUIET).folder)
    first, batch = load(artifact), tiny.batch("bert", 3)
    assert again.config.label_names == first.config.label_names
    with torch.no_grad():
        one, two = (model(**batch, experts="b").expert_logits for model in (first, again))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_an_adapter_is_not_written_over_another(lora_artifact, tmp_path):
    model = load(lora_artifact("bert"))
    model.export_expert_as_lora("a", tmp_path / "a", base="x")
    with pytest.raises(ValueError, match="exists already"):
        model.export_expert_as_lora("a", tmp_path / "a")


# ---- vllm ------------------------------------------------------------------------------------------------------------


def test_classifiers_and_models_that_vllm_has_no_lora_for_are_refused(lora_artifact, tmp_path):
    with pytest.raises(TwinMergingError, match="causal language models"):
        export_vllm(lora_artifact("bert"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_vllms_rules_are_checked_by_us(lora_artifact):
    lora = expert_lora(load(lora_artifact("bert")), 0, "base")
    text = "; ".join(vllm_problems(lora))
    assert "is none of 8" in text and "modules_to_save" in text and "classifier.weight" in text
    lora.tensors = {key: value for key, value in lora.tensors.items() if ".lora_" in key}
    pad(lora, 8)
    assert vllm_problems(lora) == []
    lora.config["rank_pattern"] = {"query": 4}
    assert "patterns" in vllm_problems(lora)[0]


# ---- command ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_and_says_what_was_lost(world, tmp_path):
    artifact = str(world.artifact("bert"))
    run = CliRunner().invoke(app, ["export", artifact, str(tmp_path / "peft"), "--format", "peft"])
    assert run.exit_code == 0 and "NOT carried" in run.output and "PeftModel.from_pretrained" in run.output
    mixed = ["--format", "merged", "--weights", "a=0.7,b=0.3", "--head", "a"]
    run = CliRunner().invoke(app, ["export", artifact, str(tmp_path / "merged"), *mixed])
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["weights"] == {"a": 0.7, "b": 0.3}
    assert load_file(tmp_path / "merged" / "model.safetensors")


WRONG = {
    "unknown format": (["--format", "gguf"], "merged, peft, vllm"),
    "no weights": (["--format", "merged"], "--expert NAME or"),
    "both": (["--format", "merged", "--expert", "a", "--weights", "a=1"], "either"),
    "option of another": (["--format", "peft", "--expert", "a"], "only with merged"),
    "no head": (["--format", "merged", "--weights", "a=0.5,b=0.5"], "head"),
    "unknown expert": (["--format", "merged", "--expert", "zz"], "unknown expert 'zz'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_command_refuses_what_means_nothing(world, tmp_path, what):
    options, expected = WRONG[what]
    run = CliRunner().invoke(app, ["export", str(world.artifact("bert")), str(tmp_path / "out"), *options])
    assert run.exit_code == 2 and expected in run.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a", "a=x", "=1", "a=1,a=2", "a=nan"])
def test_weights_that_are_none(text):
    with pytest.raises(TwinMergingError):
        parse_weights(text)
