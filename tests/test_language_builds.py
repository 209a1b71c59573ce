"""Builds of language models with data: router on prompts, verdict, card, check, inspect, plan, evaluate."""

import json
from pathlib import Path

import pytest
import transformers
import yaml
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from tests import tiny
from tests.modeling.language import GREEDY, NAMES, LanguageWorld, prompts
from twin_merging_hf import modeling
from twin_merging_hf.artifact import check_artifact, inspect_artifact
from twin_merging_hf.builder import build_artifact, plan_build
from twin_merging_hf.cli import app
from twin_merging_hf.editing import Newcomer, add_expert, remove_expert
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.evaluate_artifact import evaluate_artifact
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import parse_recipe
from twin_merging_hf.starter import describe_look, look_at, starter_recipe


KINDS = {"llama-lm": "text-generation", "t5-lm": None, "bert-lm": "fill-mask"}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> LanguageWorld:
    return LanguageWorld(tmp_path_factory.mktemp("language"))


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_build_with_data_is_whole_and_agrees_with_its_experts(language, kind):
    folder = language.artifact(kind, data=True)
    report = read(folder, "report.json")
    assert check_artifact(folder) == []
    assert report["router"]["accuracy"] == 1.0, "each expert's prompts have words of their own"
    assert report["verdict"]["given"] == dict.fromkeys(NAMES, 1.0), "full rank loses nothing"
    assert min(report["verdict"]["agreement"].values()) > 0.5
    assert report["verdict"]["rows"] == dict.fromkeys(NAMES, 4) and report["head_temperatures"] == {}
    assert report["storage"]["heads"] == 0
    found = inspect_artifact(folder)
    assert found.task == KINDS[kind] and found.labels == []
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (f"pipeline_tag: {KINDS[kind]}" in card) == (KINDS[kind] is not None)
    assert "log-probabilities over all experts' labels" not in card and "tokens" in card


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_of_a_build_sends_each_prompt_to_its_expert(language, kind):
    folder = language.artifact(kind, data=True)
    model, tokenizer = language.model(kind, data=True), AutoTokenizer.from_pretrained(folder)
    key = "text" if kind == "bert-lm" else "prompt"
    for index, name in enumerate(NAMES):
        lines = (language.experts(kind) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)[key] for line in lines]
        weights = model.route(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        assert weights.argmax(dim=1).tolist() == [index] * len(texts)


def test_a_dry_run_plans_without_writing(language):
    folder = language.experts("llama-lm")
    recipe = tiny.write_recipe(folder, NAMES, file="plan.yaml", exclusive={"rank": 2})
    plan = plan_build(recipe, folder / "planned")
    assert plan.labels == [] and plan.delta_bytes > 0 and not (folder / "planned").exists()


def test_the_artifact_generates_as_its_experts_are_told_to(language, tmp_path):
    folder = tiny.make_experts("llama-lm", tmp_path, {"a": (), "b": ()}, rows=0)
    for name in ("a", "b"):
        GenerationConfig(max_new_tokens=3, eos_token_id=[3, 7], pad_token_id=0).save_pretrained(folder / name)
    recipe = tiny.write_recipe(folder, ["a", "b"], data=False, exclusive={"rank": 2})
    built = build_artifact(recipe, folder / "artifact", Progress(quiet=True)).folder
    settings = GenerationConfig.from_pretrained(built)
    assert (settings.max_new_tokens, settings.eos_token_id, settings.pad_token_id) == (3, [3, 7], 0)


@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm"])
def test_evaluate_scores_what_is_written_routed_and_given(language, kind, tmp_path):
    folder, experts = language.artifact(kind, data=True), language.experts(kind)
    files = {}
    for index, name in enumerate(NAMES[:2]):
        words = tiny.WORDS[index * 22 : index * 22 + 5]
        rows = [{"prompt": " ".join([*words, word]), "completion": word} for word in words]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = evaluate_artifact(folder, files, experts / "artifact-data.yaml", metrics={"b": "rouge_l"}, resamples=20)
    assert {name: task["metric"] for name, task in found["data"].items()} == {"a": "exact_match", "b": "rouge_l"}
    assert found["given"]["raw"] == found["experts"]["scores"], "full rank writes what the experts write"
    assert found["calibration"] is None and found["time"]["routed_seconds"] > 0
    model, tokenizer = language.model(kind, data=True), AutoTokenizer.from_pretrained(folder)
    right = []
    for index, path in enumerate(files.values()):
        for line in path.read_text(encoding="utf-8").splitlines():
            inputs = tokenizer(json.loads(line)["prompt"], return_tensors="pt", return_token_type_ids=False)
            right.append(int(model.route(**inputs).argmax()) == index)
    assert found["router"]["accuracy"] == pytest.approx(sum(right) / len(right)), "as each prompt alone is routed"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "w1", "label": 0}, "unknown key 'label'"),
        ({"prompt": "w1"}, "`completion` must be a non-empty string"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "at least 2"),
        ({"messages": [{"role": "user", "content": "w1"}] * 2}, "must be the assistant's"),
        ({"messages": [{"role": "human", "content": "w1"}] * 2}, "message 0: `role`"),
    ],
)
def test_a_malformed_row_is_named(language, row, says, tmp_path):
    folder = language.experts("llama-lm")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = {"a": {"data": str(tmp_path / "rows.jsonl")}}
    recipe = tiny.write_recipe(folder, NAMES, file="bad.yaml", experts=data)
    with pytest.raises(TwinMergingError, match=says):
        plan_build(recipe, folder / "bad")


def test_messages_train_the_router_through_the_chat_template_which_the_artifact_keeps(tmp_path):
    folder = tiny.make_experts("llama-lm", tmp_path, {"a": (), "b": ()}, rows=0)
    for index, name in enumerate(("a", "b")):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        tokenizer.save_pretrained(folder / name)
        words = tiny.WORDS[index * 22 : index * 22 + 20]
        rows = [
            {"messages": [{"role": "user", "content": f"{word} {words[0]}"}, {"role": "assistant", "content": word}]}
            for word in words
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny.write_recipe(folder, ["a", "b"], exclusive={"rank": tiny.FULL_RANK}, router="lexical")
    result = build_artifact(recipe, folder / "artifact", Progress(quiet=True))
    assert result.verdict.given == {"a": 1.0, "b": 1.0} and check_artifact(folder / "artifact") == []
    kept = AutoTokenizer.from_pretrained(folder / "artifact").chat_template
    assert kept == AutoTokenizer.from_pretrained(folder / "a").chat_template


def test_several_chat_templates_are_kept(tmp_path):
    root = tiny.make_experts("llama-lm", tmp_path, {"a": (), "b": ()}, rows=20)
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for name in ("base", "a", "b"):
        tokenizer = AutoTokenizer.from_pretrained(root / name)
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(root / name)
    out = build_artifact(tiny.write_recipe(root, "ab"), tmp_path / "out", Progress(quiet=True)).folder
    assert check_artifact(out) == [] and AutoTokenizer.from_pretrained(out).chat_template == templates


def test_messages_without_a_chat_template_are_refused(tmp_path):
    folder = tiny.make_experts("llama-lm", tmp_path, {"a": (), "b": ()}, rows=0)
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
    for name in ("a", "b"):
        rows = [{"messages": [{"role": "user", "content": f"w{i}"}, row["messages"][1]]} for i in range(9)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny.write_recipe(folder, ["a", "b"], exclusive={"rank": 2})
    with pytest.raises(TwinMergingError, match="no chat template"):
        build_artifact(recipe, folder / "artifact", Progress(quiet=True))
    assert not (folder / "artifact").exists()


def test_experts_that_untie_their_embeddings_do_not_fit_those_that_tie_them(tmp_path):
    tied = tiny.make_experts("llama-lm", tmp_path, {"a": ()}, rows=0, tie_word_embeddings=True)
    untied = tiny.make_experts("llama-lm", tmp_path / "untied", {"b": ()}, rows=0, tie_word_embeddings=False)
    experts = {"b": {"model": str(untied / "b")}}
    recipe = tiny.write_recipe(tied, ["a", "b"], data=False, experts=experts)
    with pytest.raises(TwinMergingError, match="tie_word_embeddings"):
        plan_build(recipe, tied / "artifact")


def test_fused_experts_are_refused_by_name(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=tiny.VOCABULARY,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "a")
    recipe = tiny.write_recipe(tmp_path, ["a"], data=False, base_model=None)
    with pytest.raises(TwinMergingError, match=r"many experts of its own \(model.layers.0.mlp.experts"):
        plan_build(recipe, tmp_path / "artifact")


def test_experts_join_and_leave_a_finished_language_artifact(language, tmp_path):
    folder, experts = language.artifact("llama-lm"), language.experts("llama-lm")
    left = remove_expert(folder, "b", tmp_path / "left", progress=Progress(quiet=True)).folder
    assert check_artifact(left) == []
    newcomer = Newcomer("b", str(experts / "b"))
    recipe = experts / "artifact.yaml"
    joined = add_expert(left, tmp_path / "joined", newcomer, recipe, Progress(quiet=True)).folder
    assert check_artifact(joined) == []
    model = modeling.TwinMergingForCausalLM.from_pretrained(joined).eval()
    assert model.expert_names == ["a", "c", "d", "b"]
    inputs = prompts()
    written = model.generate(**inputs, experts=["a", "b", "c", "d"], **GREEDY)
    assert written.tolist() == language.model("llama-lm").generate(**inputs, experts=NAMES, **GREEDY).tolist()


@pytest.mark.parametrize("kind", ["gpt2-lm", "t5-lm", "bart-lm", "bert-lm"])
@pytest.mark.parametrize(
    "exclusive", [{"rank": 3, "dtype": "int4"}, {"method": "magnitude", "ratio": 0.2}], ids=["int4", "sparse"]
)
def test_integers_and_sparse_deltas_pass_the_proof_of_a_build_in_every_rule(language, kind, exclusive, tmp_path):
    folder = language.experts(kind)
    recipe = tiny.write_recipe(folder, NAMES, data=False, file=f"{tmp_path.name}.yaml", exclusive=exclusive)
    result = build_artifact(recipe, tmp_path / "artifact", Progress(quiet=True))
    assert result.report["probe"]["largest_relative_difference"] < 1e-4


def test_commands_know_language_models(language, tmp_path):
    folder = language.experts("llama-lm")
    looks = look_at([str(folder / "a"), str(folder / "b")], str(folder / "base"), tmp_path)
    assert [look.misfits for look in looks] == [[], [], []]
    assert "labels" not in "".join(describe_look(looks[0]))
    text = starter_recipe(looks, tmp_path)
    assert '{"prompt": ..., "completion": ...}' in text and "LABEL_0" not in text
    assert parse_recipe(yaml.safe_load(text), tmp_path).names == ["a", "b"]
    for kind, says in (("llama-lm", 'pipeline("text-generation"'), ("t5-lm", "AutoModelForSeq2SeqLM")):
        artifact = str(language.artifact(kind))
        checked = CliRunner().invoke(app, ["check", artifact])
        assert checked.exit_code == 0 and says in checked.output, checked.output
        shown = CliRunner().invoke(app, ["inspect", artifact])
        assert "a: language model" in shown.output and "0 labels" not in shown.output, shown.output
