"""LoRA experts of language models: tokens are those of each adapted model, and exports, vLLM's included, are the same models."""

import pytest
import torch
import transformers

from tests import adapters, files, tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.export import export_adapters, export_merged, export_vllm
from twin_merging_hf.modeling import TwinMergingModel
from twin_merging_hf.progress import Progress


QUIET = Progress(quiet=True)
KINDS = ("llama-lm", "gpt2-lm")
EXPERTS: dict[str, list[str]] = {"a": [], "b": []}
SCALE = {name: 8 / rank for name, rank in adapters.RANKS.items()}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Folder of base, two adapters and an artifact by reference, of a kind; tests must not change it."""
    made = {}

    def of(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp("lm") / kind
            adapters.make_adapters(kind, folder, EXPERTS, task_type="CAUSAL_LM")
            recipe = adapters.recipe(folder, EXPERTS, shared_model="base", shared_by_reference=True)
            build_artifact(recipe, folder / "artifact", QUIET)
            made[kind] = folder
        return made[kind]

    return of


def prompts() -> dict[str, torch.Tensor]:
    """Two prompts [2, 5] without padding."""
    ids = torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def dense(kind: str, folder, name: str):
    return adapters.dense_model(kind, folder, name, [], SCALE[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_written_as_by_each_adapted_model(worlds, kind):
    folder, batch = worlds(kind), prompts()
    model = load(folder / "artifact")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(**batch, experts=["a", "b"], **settings)
    for row, name in enumerate(EXPERTS):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        with torch.no_grad():
            expected = dense(kind, folder, name)
            torch.testing.assert_close(model(**alone, experts=name).logits, expected(**alone).logits, rtol=0, atol=1e-5)
        assert torch.equal(written[row : row + 1], expected.generate(**alone, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_compute_what_the_artifact_does(worlds, kind, tmp_path):
    peft = pytest.importorskip("peft")
    folder, batch = worlds(kind), prompts()
    with torch.no_grad():
        expected = dense(kind, folder, "b")(**batch).logits
        export_merged(folder / "artifact", tmp_path / "merged", "b")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)
        export_adapters(folder / "artifact", tmp_path / "peft")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft" / "b").eval()
        torch.testing.assert_close(adapted(**batch).logits, expected, rtol=0, atol=1e-5)


def test_the_export_for_vllm_keeps_its_rules_the_logits_and_the_route(worlds, tmp_path):
    peft = pytest.importorskip("peft")
    folder, batch, out = worlds("llama-lm"), prompts(), tmp_path / "out"
    found = export_vllm(folder / "artifact", out)
    assert found.content["max_lora_rank"] == 8 and "--max-lora-rank 8" in found.next
    for name, entry in zip(EXPERTS, found.content["experts"], strict=True):
        config, tensors = adapters.read(out / name)
        assert entry["left_out"] == [] and config["modules_to_save"] is None and config["rank_pattern"] == {}
        assert config["r"] == 8 and config["target_modules"] == ["down_proj", "q_proj"]
        assert {t.shape[0 if ".lora_A." in key else 1] for key, t in tensors.items()} == {8}
        base = transformers.AutoModelForCausalLM.from_pretrained(out / "base")
        adapted = peft.PeftModel.from_pretrained(base, out / name).eval()
        with torch.no_grad():
            expected = dense("llama-lm", folder, name)(**batch).logits
            torch.testing.assert_close(adapted(**batch).logits, expected, rtol=0, atol=1e-5)
    router, whole = TwinMergingModel.from_pretrained(out / "router").eval(), load(folder / "artifact")
    torch.testing.assert_close(router.route(**batch), whole.route(**batch), rtol=0, atol=1e-5)
    assert router.config.shared_config.num_hidden_layers == whole.config.router_layer + 1 < tiny.LAYERS
    sizes = [sum(t.nbytes for t in files.tensors_of(out / part).values()) for part in ("router", "base")]
    assert sizes[0] < sizes[1]


def test_gpt2_has_no_lora_in_vllm(worlds, tmp_path):
    with pytest.raises(TwinMergingError, match="without LoRA"):
        export_vllm(worlds("gpt2-lm") / "artifact", tmp_path / "out")


def test_an_adapter_on_a_tied_embedding_is_refused(tmp_path):
    folder = tmp_path / "own"
    adapters.make_adapters("gpt2-lm", folder, {"a": []}, task_type="CAUSAL_LM")
    base = tiny.new_model("gpt2-lm")
    adapters.write_adapter(folder / "b", folder / "base", base, None, ("wte",), task_type="CAUSAL_LM")
    with pytest.raises(TwinMergingError, match="tied"):
        build_artifact(adapters.recipe(folder, EXPERTS), tmp_path / "out", QUIET)
