"""LoRA experts: the artifact is what PEFT computes, deltas stay products, and adapters that are none are refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests import adapters, files, tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError, editing
from twin_merging_hf.adapted import AdaptedCheckpoint
from twin_merging_hf.builder import build_artifact, plan_build
from twin_merging_hf.cli import app
from twin_merging_hf.editing import Newcomer
from twin_merging_hf.low_rank import LowRank
from twin_merging_hf.preflight import preflight
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.separation import planned_bytes, separate
from twin_merging_hf.starter import look_at, starter_recipe


QUIET = Progress(quiet=True)
KINDS = ("bert", "gpt2", "vit", "llama")
SCALE = {name: 8 / rank for name, rank in adapters.RANKS.items()}  # lora_alpha / r


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of base and adapters of a kind, made once; tests must not change it."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = adapters.make_adapters(kind, tmp_path_factory.mktemp("lora") / kind)
        return made[kind]

    return of


@pytest.fixture
def own(folders, tmp_path) -> Path:
    """A copy for a test to change, in which the adapters name the copied base."""
    folder = tmp_path / "own"
    shutil.copytree(folders("bert"), folder)
    for name in tiny.LABELS:
        adapters.edit(folder / name, base_model_name_or_path=str(folder / "base"))
    return folder


def split(folder: Path, **overrides):
    inputs = preflight(load_recipe(adapters.recipe(folder, **overrides)))
    return separate(inputs), inputs


def own_logits(model, batch, name: str) -> torch.Tensor:
    position = model.expert_names.index(name)
    with torch.no_grad():
        return model(**batch, experts=name).expert_logits[:, slice(*model.label_space.spans[position])]


def delta_of(result, name: str, t: int) -> torch.Tensor:
    """One expert's stored delta as a matrix, float64."""
    key, ranks = name.replace(".", "-"), result.ranks.get(name)
    if ranks is None:
        return torch.zeros(())
    start, stop = sum(ranks[:t]), sum(ranks[: t + 1])
    up, down = result.state[f"deltas.{key}.up"].double(), result.state[f"deltas.{key}.down"].double()
    return up[:, start:stop] @ down[start:stop]


# ---- what the artifact computes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_on_the_base_is_each_adapted_model_at_the_adapters_own_ranks(folders, kind, tmp_path):
    folder = folders(kind)
    result = build_artifact(adapters.recipe(folder, shared_model="base"), tmp_path / "artifact", QUIET)
    model, batch = load(result.folder), tiny.batch(kind, 3)
    for name, labels in tiny.LABELS.items():
        with torch.no_grad():
            expected = adapters.dense_model(kind, folder, name, labels, SCALE[name])(**batch).logits
        torch.testing.assert_close(own_logits(model, batch, name), expected, rtol=0, atol=1e-5)
    assert model.config.ranks and all(ranks == list(adapters.RANKS.values()) for ranks in model.config.ranks.values())
    source = model.config.provenance["sources"]["a"]
    assert source["adapter_of"] == "base" and len(source["sha256"]) == 64


def test_the_artifact_equals_peft_with_patterns_and_rank_stabilised_scale(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.new_model("bert")
    base.save_pretrained(tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base")
    settings = {
        "a": {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
        "b": {"r": 4, "rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"value": 3},
              "target_modules": r".*\.(query|value)", "layers_to_transform": None},
        "c": {"r": 2, "target_modules": ["query", "word_embeddings"], "layers_to_transform": None},
    }  # fmt: skip
    expected, batch = {}, tiny.batch("bert", 3)
    for name, fields in settings.items():
        model = tiny.new_model("bert", tiny.LABELS[name])
        backbone = {k: v for k, v in base.state_dict().items() if k.startswith("bert.")}
        model.load_state_dict(backbone, strict=False)
        model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", lora_alpha=5, **fields))
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.eval().save_pretrained(tmp_path / name)
        with torch.no_grad():
            expected[name] = adapted(**batch).logits
    folder = build_artifact(adapters.recipe(tmp_path, shared_model="base"), tmp_path / "artifact", QUIET).folder
    model = load(folder)
    for name, logits in expected.items():
        torch.testing.assert_close(own_logits(model, batch, name), logits, rtol=0, atol=1e-5)
    assert model.config.ranks["bert.encoder.layer.1.attention.self.query.weight"] == [3, 2, 2]


def test_the_basis_of_the_factors_does_not_matter(own):
    before, _ = split(own, merge_method="linear")
    noise = torch.Generator().manual_seed(5)

    def turned(tensors):
        for key in [key for key in tensors if ".lora_A." in key]:
            other = key.replace("lora_A", "lora_B")
            change = torch.randn(len(tensors[key]), len(tensors[key]), generator=noise, dtype=torch.float64)
            tensors[key] = (torch.linalg.inv(change) @ tensors[key].double()).float()
            tensors[other] = (tensors[other].double() @ change).float()
        return tensors

    for name in tiny.LABELS:
        adapters.rewrite(own / name, turned)
    after, _ = split(own, merge_method="linear")
    for name in before.ranks:
        torch.testing.assert_close(after.state[f"shared.{name}"], before.state[f"shared.{name}"], rtol=0, atol=1e-4)
        for t in range(3):
            torch.testing.assert_close(delta_of(after, name, t), delta_of(before, name, t), rtol=0, atol=1e-4)


METHODS = {
    "linear": {},
    "linear, weighted": {"experts": {n: {"parameters": {"weight": w}} for n, w in zip("abc", (1, 2, 5), strict=True)}},
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties"},
    "dare_linear": {"merge_method": "dare_linear"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_adapters_is_the_merge_of_the_full_checkpoints_they_mean(folders, method, tmp_path):
    folder = folders("bert")
    for name, labels in tiny.LABELS.items():
        full = adapters.dense_model("bert", folder, name, labels, SCALE[name])
        full.save_pretrained(tmp_path / name)
    shutil.copytree(folder / "base", tmp_path / "base")
    experts = METHODS[method].get("experts", {})
    labels = {n: {"labels": list(names), **experts.get(n, {})} for n, names in tiny.LABELS.items()}
    overrides = {**METHODS[method], "experts": labels, "exclude": ["bert.pooler.*"]}
    products, _ = split(folder, file="methods.yaml", **overrides)
    dense, _ = split(tmp_path, **overrides)
    for name in products.ranks:
        torch.testing.assert_close(products.state[f"shared.{name}"], dense.state[f"shared.{name}"], rtol=0, atol=1e-5)
        for t in range(3):
            torch.testing.assert_close(delta_of(products, name, t), delta_of(dense, name, t), rtol=0, atol=1e-4)
    assert set(products.ranks) == set(dense.ranks)
    if method in ("linear", "task_arithmetic"):
        assert max(map(max, products.ranks.values())) == sum(adapters.RANKS.values())


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.8}, {"budget": 0.05}, {"rank": 4, "dtype": "int4"}])
def test_no_adapted_weight_is_ever_read_dense_where_the_shared_model_is_the_base(folders, size, monkeypatch):
    def forbidden(*args):
        raise AssertionError("a product was multiplied out")

    inputs = preflight(load_recipe(adapters.recipe(folders("bert"), shared_model="base", exclusive=size)))
    monkeypatch.setattr(LowRank, "dense", forbidden)
    result = separate(inputs)
    assert result.ranks
    with pytest.raises(AssertionError, match="multiplied out"):  # the guard can fail
        inputs.experts[0].tensor(next(iter(result.ranks)))


def test_a_full_checkpoint_and_an_adapter_in_one_build(own):
    full = tiny.perturbed(tiny.new_model("bert"), "bert", tiny.LABELS["b"], seed=9)
    shutil.rmtree(own / "b")
    full.save_pretrained(own / "b")
    result, inputs = split(own, shared_model="base")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert result.ranks[query] == [3, tiny.HIDDEN, 4]
    assert isinstance(inputs.experts[0], AdaptedCheckpoint) and not isinstance(inputs.experts[1], AdaptedCheckpoint)
    for t, expert in enumerate(inputs.experts):
        expected = expert.tensor(query).double() - inputs.base.tensor(query).double()
        torch.testing.assert_close(delta_of(result, query, t), expected, rtol=0, atol=1e-5)
    mixed, _ = split(own)  # a mean with a full checkpoint is dense
    expected = sum(expert.tensor(query).double() for expert in inputs.experts) / 3
    torch.testing.assert_close(mixed.state[f"shared.{query}"].double(), expected, rtol=0, atol=1e-5)


def test_the_plan_counts_the_adapters_ranks_and_leaves_out_what_they_do_not_touch(folders, tmp_path):
    recipe = adapters.recipe(folders("bert"), shared_model="base", file="plan.yaml")
    result, inputs = split(folders("bert"), shared_model="base", file="plan.yaml")
    matrices = sum(t.nbytes for key, t in result.state.items() if key.endswith((".up", ".down")))
    vectors = 3 * sum(s.numel() for s in inputs.experts[0].backbone.values() if len(s) == 1) * 4
    assert planned_bytes(inputs).deltas == matrices + vectors
    assert plan_build(recipe, tmp_path / "out").delta_bytes == matrices + vectors


# ---- heads and labels ------------------------------------------------------------------------------------------------


def test_label_names_come_from_a_config_beside_the_adapter_else_they_are_automatic(own):
    tiny.new_config("bert", ["good", "bad"]).save_pretrained(own / "a")
    inputs = preflight(load_recipe(tiny.write_recipe(own, data=False)))
    assert [entry["labels"] for entry in inputs.entries] == [
        ["good", "bad"],
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["LABEL_0", "LABEL_1"],
    ]
    assert any("automatic" in note for note in inputs.notes)


def test_an_adapter_without_a_head_uses_that_of_a_base_of_its_task_and_else_is_refused(own):
    def headless(tensors):
        return {key: value for key, value in tensors.items() if "classifier" not in key}

    adapters.rewrite(own / "a", headless)
    inputs = preflight(load_recipe(tiny.write_recipe(own, ("a",), data=False)))
    base = files.tensors_of(own / "base")
    assert torch.equal(inputs.experts[0].tensor("classifier.weight"), base["classifier.weight"])
    files.edit_json(own / "base" / "config.json", architectures=["BertForMaskedLM"])
    assert "modules_to_save" in refusal(own)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder: Path, **overrides) -> str:
    with pytest.raises(TwinMergingError) as caught:
        preflight(load_recipe(adapters.recipe(folder, **overrides)))
    return str(caught.value)


FIELDS = {
    "DoRA": ({"use_dora": True}, "merge_and_unload"),
    "biases": ({"bias": "lora_only"}, "merge_and_unload"),
    "lora_bias": ({"lora_bias": True}, "merge_and_unload"),
    "LOKR": ({"peft_type": "LOKR"}, "merge_and_unload"),
    "VERA": ({"peft_type": "VERA"}, "merge_and_unload"),
    "IA3": ({"peft_type": "IA3"}, "merge_and_unload"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "PREFIX_TUNING": ({"peft_type": "PREFIX_TUNING"}, "nothing to merge"),
    "XLORA": ({"peft_type": "XLORA"}, "each as an expert"),
    "replicated": ({"layer_replication": [[0, 2]]}, "train it again without"),
    "trainable_token_indices": ({"trainable_token_indices": [3]}, "merge_and_unload"),
    "`r`": ({"r": "many"}, "number"),
    "rank": ({"r": 7}, "do not belong together"),
    "`lora_alpha`": ({"lora_alpha": float("nan")}, "number"),
    "`rank_pattern`": ({"rank_pattern": {"(": 2}}, "regular expression"),
    "`alpha_pattern`": ({"alpha_pattern": {"query": None}}, "number"),
    "`base_model_name_or_path`": ({"base_model_name_or_path": ["base"]}, "text"),
    "`task_type`": ({"task_type": {}}, "text"),
    "`auto_mapping`": ({"auto_mapping": ["BertModel"]}, "mapping"),
    "QUESTION_ANS": ({"task_type": "QUESTION_ANS"}, "SEQ_CLS"),
}


@pytest.mark.parametrize("what", FIELDS)
def test_adapters_that_are_no_plain_lora_are_refused_with_a_remedy(own, what):
    fields, remedy = FIELDS[what]
    adapters.edit(own / "b", **fields)
    message = refusal(own)
    assert "expert 'b'" in message and what in message and remedy in message


def test_adapters_are_not_aligned(own, tmp_path):
    with pytest.raises(TwinMergingError, match="expert 'a' is a LoRA adapter.*merge_and_unload"):
        build_artifact(adapters.recipe(own, alignment={"method": "mudsc"}), tmp_path / "out", QUIET)


def test_all_reasons_are_told_at_once(own):
    adapters.edit(own / "a", use_dora=True, bias="all")
    adapters.edit(own / "c", peft_type="LOHA")
    message = refusal(own)
    assert all(part in message for part in ("DoRA", "bias: all", "LOHA", "expert 'a'", "expert 'c'"))


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
TABLE = "base_model.model.bert.embeddings.word_embeddings"
TENSORS = {
    "a magnitude": ({f"{QUERY}.lora_magnitude_vector": torch.ones(4)}, "lora_magnitude_vector"),
    "half a pair": ({f"{QUERY}.lora_A.weight": None}, "only one of"),
    "a trained norm": (
        {"base_model.model.bert.embeddings.LayerNorm.weight": torch.zeros(tiny.HIDDEN)},
        "modules_to_save",
    ),
    "added tokens": ({f"{TABLE}.weight": torch.ones(tiny.VOCABULARY + 1, tiny.HIDDEN)}, "resize_token_embeddings"),
    "an unknown module": (
        {"base_model.model.x.lora_A.weight": torch.ones(3, 4), "base_model.model.x.lora_B.weight": torch.ones(4, 3)},
        "another architecture",
    ),
    "another width": (
        {f"{QUERY}.lora_A.weight": torch.ones(3, 4), f"{QUERY}.lora_B.weight": torch.ones(4, 3)},
        "another base",
    ),
    "NaN": ({f"{QUERY}.lora_A.weight": torch.full((3, tiny.HIDDEN), float("nan"))}, "NaN"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_belong_to_no_lora_are_refused(own, what):
    changes, expected = TENSORS[what]

    def changed(tensors):
        return {key: value for key, value in {**tensors, **changes}.items() if value is not None}

    adapters.rewrite(own / "a", changed)
    assert "expert 'a'" in refusal(own) and expected in refusal(own)


def test_many_trained_tensors_are_one_problem(own):
    norms = {
        f"base_model.model.bert.encoder.layer.{i}.output.LayerNorm.{n}" for i in (0, 1) for n in ("weight", "bias")
    }
    adapters.rewrite(own / "a", lambda tensors: {**tensors, **{norm: torch.zeros(tiny.HIDDEN) for norm in norms}})
    message = refusal(own)
    assert message.count("modules_to_save") == 1 and "layer.0.output.LayerNorm.weight" in message


def test_a_folder_of_named_adapters_names_them(own):
    (own / "a").rename(own / "moved")
    (own / "a").mkdir()
    (own / "moved").rename(own / "a" / "mine")
    assert "name one of these" in refusal(own) and "mine" in refusal(own)


def test_an_embedding_that_is_saved_unchanged_is_none_that_was_trained(own):
    table = files.tensors_of(own / "base")["bert.embeddings.word_embeddings.weight"]
    adapters.rewrite(own / "a", lambda tensors: {**tensors, f"{TABLE}.base_layer.weight": table})
    split(own, shared_model="base")


def test_a_pickle_is_refused_with_the_way_to_safetensors(own):
    (own / "a" / "adapter_model.safetensors").rename(own / "a" / "adapter_model.bin")
    assert "pickle" in refusal(own) and "save_pretrained" in refusal(own)


# ---- which base ------------------------------------------------------------------------------------------------------


def test_without_base_model_the_adapters_bring_theirs(own, tmp_path):
    _, inputs = split(own, base_model=None, shared_model="base")
    assert inputs.base.path == own / "base" and inputs.shared is inputs.base
    for name in tiny.LABELS:
        adapters.edit(own / name, base_model_name_or_path=None)
    assert "names no base" in refusal(own, base_model=None)


def test_a_base_of_other_weights_is_refused_and_the_same_weights_elsewhere_are_not(own):
    shutil.copytree(own / "base", own / "copy")
    split(own, base_model="copy")
    files.edit_tensors(own / "copy", lambda tensors: tensors["bert.pooler.dense.weight"].add_(1e-3))
    message = refusal(own, base_model="copy")
    assert "bert.pooler.dense.weight" in message and "expert 'a'" in message


def test_a_base_that_cannot_be_found_must_be_stated(own):
    adapters.edit(own / "a", base_model_name_or_path="nobody/knows-this", revision="abc")
    message = refusal(own)
    assert "nobody/knows-this@abc" in message and "`base_model: base`" in message
    entries = {name: {"labels": list(names)} for name, names in tiny.LABELS.items()}
    entries["a"]["base_model"] = "base"
    split(own, experts=entries)


def test_a_statement_about_a_full_checkpoint_is_refused(world, tmp_path):
    recipe = tiny.write_recipe(
        world.experts("bert"), file="stated.yaml", data=False, experts={"a": {"base_model": "base"}}
    )
    with pytest.raises(TwinMergingError, match="full checkpoint"):
        preflight(load_recipe(recipe))


# ---- commands --------------------------------------------------------------------------------------------------------


def test_init_finds_the_base_of_adapters_and_its_recipe_builds(own, tmp_path):
    output = tmp_path / "recipe.yaml"
    result = CliRunner().invoke(app, ["init", *(str(own / name) for name in "abc"), "-o", str(output)])
    assert result.exit_code == 0 and "LoRA on" in result.output
    content = yaml.safe_load(output.read_text())
    assert content["base_model"] == str(own / "base") and content["shared_model"] == "base"
    assert content["exclusive"]["rank"] == max(adapters.RANKS.values())
    plan_build(output, tmp_path / "out")


def test_init_names_a_base_of_this_folder_relative_to_it(own, monkeypatch):
    monkeypatch.chdir(own)
    looks = look_at(["a", "b"], None, Path("."))
    assert yaml.safe_load(starter_recipe(looks, Path(".")))["base_model"] == "base"


def test_init_takes_the_users_word_for_a_base_that_is_not_to_be_had(own, tmp_path):
    adapters.edit(own / "a", base_model_name_or_path="nobody/knows-this")
    output = tmp_path / "recipe.yaml"
    models = [str(own / name) for name in "abc"]
    result = CliRunner().invoke(app, ["init", *models, "--base", str(own / "base"), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(output.read_text())["experts"][0]["base_model"] == str(own / "base")
    plan_build(output, tmp_path / "out")


def test_an_adapter_joins_an_artifact_and_one_of_another_base_does_not(own, tmp_path):
    recipe = adapters.recipe(own, {name: tiny.LABELS[name] for name in "ab"}, shared_model="base")
    artifact = build_artifact(recipe, own / "artifact", QUIET).folder
    newcomer = Newcomer("c", str(own / "c"), None, tuple(tiny.LABELS["c"]))
    folder = editing.add_expert(artifact, tmp_path / "more", newcomer, None, QUIET).folder
    model, batch = load(folder), tiny.batch("bert", 3)
    with torch.no_grad():
        expected = adapters.dense_model("bert", own, "c", tiny.LABELS["c"], SCALE["c"])(**batch).logits
    torch.testing.assert_close(own_logits(model, batch, "c"), expected, rtol=0, atol=1e-4)
    built = build_artifact(adapters.recipe(own, shared_model="base", file="all.yaml"), own / "all", QUIET).folder
    assert model.config.ranks == load(built).config.ranks  # no rank beyond the adapter's own
    files.edit_tensors(own / "base", lambda tensors: tensors["bert.pooler.dense.weight"].add_(1e-3))
    with pytest.raises(TwinMergingError, match="fingerprint"):
        editing.add_expert(artifact, tmp_path / "again", newcomer, None, QUIET)
