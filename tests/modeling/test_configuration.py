"""The config describes one possible artifact, says so by the field's name if not, and survives a round trip."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig, ViTConfig

from tests import files, tiny
from tests.conftest import load
from twin_merging_hf.modeling import TwinMergingConfig, TwinMergingModel
from twin_merging_hf.modeling.configuration_twin_merging import FORMAT_VERSION, check_expert_names


def fields(**changes: Any) -> dict:
    """Fields of a valid config, with changes."""
    experts = [
        {"name": "a", "labels": ["x", "y"], "problem_type": "single_label_classification"},
        {"name": "b", "labels": ["score"], "problem_type": "regression"},
    ]
    valid = {
        "shared_config": tiny.new_config("bert"),
        "shared_class": "BertForSequenceClassification",
        "head_modules": ["classifier"],
        "layers_path": "bert.encoder.layer",
        "experts": experts,
        "ranks": {"bert.encoder.layer.0.output.dense.weight": [2, 0]},
        "exact_deltas": ["bert.encoder.layer.0.output.dense.bias"],
        "router_layer": 2,
        "router_input_size": tiny.HIDDEN,
    }
    return copy.deepcopy({**valid, **changes})


def expert(**changes: Any) -> list[dict]:
    return [{**fields()["experts"][0], **changes}, fields()["experts"][1]]


WEIGHT = "bert.encoder.layer.0.output.dense.weight"
BAD: dict[str, tuple[dict, str]] = {
    "router type": (
        {"router_type": "magic"},
        "`router_type` must be one of linear, mlp, centroid, lexical, knn, projection.*'magic'",
    ),
    "router pass": ({"router_pass": "early"}, "`router_pass` must be one of prefix, full, late.*'early'"),
    "late without a layer": ({"router_pass": "late", "router_layer": None}, "'late'.*needs `router_layer`"),
    "no layer": ({"router_layer": None}, "`router_layer`"),
    "no site": ({"router_type": "projection", "router_rank": 2}, "`router_site`"),
    "no subspace": ({"router_type": "projection", "router_site": "x"}, "`router_rank`"),
    "temperature": ({"router_temperature": 0.0}, "`router_temperature` must be positive"),
    "NaN temperature": ({"router_temperature": float("nan")}, "`router_temperature` must be positive"),
    "top_k of 0": ({"router_top_k": 0}, "`router_top_k` must be between 1 and 2"),
    "top_k of 3": ({"router_top_k": 3}, "`router_top_k` must be between 1 and 2"),
    "a hash that is none": (
        {"shared_reference": {"model": "me/base", "sha256": "A" * 64}},
        "`shared_reference` must give `model` and the `sha256`",
    ),
    "a distance without end": (
        {"router_none_distance": float("inf")},
        "`router_none_distance` must be a finite number",
    ),
    "a distance that is a switch": ({"router_none_distance": True}, "`router_none_distance` must be a finite number"),
    "a dimension of 0": ({"router_none_dimension": 0}, "`router_none_dimension` must be a positive integer.*got 0"),
    "half a dimension": ({"router_none_dimension": 1.5}, "`router_none_dimension` must be a positive.*got 1.5"),
    "no neighbours": (
        {"router_type": "knn", "router_rank": 2, "router_exemplars": 3, "router_neighbours": 0},
        "`router_type='knn'` needs",
    ),
    "one expert's centres": ({"router_type": "centroid", "router_centres": [2]}, "`router_centres`"),
    "an expert without centres": ({"router_type": "centroid", "router_centres": [2, 0]}, "`router_centres`"),
    "input size": ({"router_input_size": 0}, "`router_input_size`"),
    "factor dtype": ({"factor_dtype": "int3"}, "`factor_dtype` must be one of.*'int3'"),
    "too few ranks": ({"ranks": {WEIGHT: [2]}}, f"`ranks\\['{WEIGHT}'\\]`.*2 experts"),
    "negative rank": ({"ranks": {WEIGHT: [2, -1]}}, "`ranks.*got \\[2, -1\\]"),
    "no rank": ({"ranks": {WEIGHT: [0, 0]}}, "`ranks.*got \\[0, 0\\]"),
    "rank as a word": ({"ranks": {WEIGHT: ["2", 0]}}, "`ranks"),
    "a delta twice": ({"exact_deltas": [WEIGHT]}, f"'{WEIGHT}' stands in both `ranks` and `exact_deltas`"),
    "no entries": ({"ranks": {}, "sparse_deltas": {WEIGHT: [0, 0]}}, "`sparse_deltas.*one count.*got \\[0, 0\\]"),
    "sparse and factored": ({"sparse_deltas": {WEIGHT: [3, 1]}}, "stands in both `ranks` and `sparse_deltas`"),
    "sparse integers": (
        {"ranks": {}, "sparse_deltas": {WEIGHT: [3, 1]}, "factor_dtype": "int8"},
        "`factor_dtype` 'int8' is for factors",
    ),
    "no labels": ({"experts": expert(labels=[])}, "expert 'a': `labels`"),
    "a label twice": ({"experts": expert(labels=["x", "x"])}, "expert 'a': `labels`"),
    "problem type": ({"experts": expert(problem_type="multi_label_classification")}, "expert 'a': `problem_type`"),
    "no problem type": ({"experts": expert(problem_type=None)}, "expert 'a': `problem_type`"),
    "a name twice": ({"experts": expert(name="B")}, "'B' and 'b' are the same ignoring case"),
    "a reserved name": ({"experts": expert(name="all")}, "'all' is reserved"),
    "a name with a slash": ({"experts": expert(name="a/b")}, "'a/b' is not legal"),
    "a newer format": ({"format_version": FORMAT_VERSION + 1}, f"format_version {FORMAT_VERSION + 1}.*upgrade"),
    "no format": ({"format_version": 0}, "`format_version` must be a positive integer"),
    "a worded format": ({"format_version": "1"}, "`format_version`"),
    "a shared config without a type": ({"shared_config": {"hidden_size": 32}}, "`shared_config` has no `model_type`"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_an_impossible_config_raises_and_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        TwinMergingConfig(**fields(**changes))


SET = {"router_temperature": -1, "router_top_k": 9, "router_type": "magic", "experts": [fields()["experts"][0]] * 2}


@pytest.mark.parametrize("name", SET)
def test_what_was_set_to_the_impossible_is_not_saved(world, tmp_path, name):
    """Neither by the config nor by its model, which leaves an older artifact in that folder as it was."""
    model = load(world.artifact("bert"))
    model.save_pretrained(tmp_path / "older")
    before = files.listing(tmp_path / "older")
    setattr(model.config, name, SET[name])
    with pytest.raises(ValueError, match=name if name != "experts" else "expert names"):
        model.config.save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "older")
    assert not (tmp_path / "config").exists() and files.listing(tmp_path / "older") == before


@pytest.mark.parametrize("changes", [{}, {"router_top_k": 2}, {"router_pass": "full", "router_layer": None}])
def test_a_possible_config_does_not_raise(changes):
    TwinMergingConfig(**fields(**changes))


@pytest.mark.parametrize(
    "missing", [{"problem_type": "regression"}, {"name": "a", "problem_type": "regression"}, {"labels": ["x"]}]
)
def test_an_expert_without_one_of_its_keys_raises_a_value_error(missing):
    with pytest.raises(ValueError):
        TwinMergingConfig(**fields(experts=[missing]))


def test_legal_names_are_legal():
    check_expert_names(["sst2", "SQuAD-v1.1", "my_task", "0", "al", "..."])


# ---- round trips ----------------------------------------------------------------------------------------------------


def test_a_config_survives_a_round_trip_through_json(tmp_path, artifact):
    config = TwinMergingConfig.from_pretrained(artifact)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is TwinMergingConfig
    assert (tmp_path / "config.json").read_text() == (artifact / "config.json").read_text()
    ignored = {"_name_or_path": ""}
    assert {**again.to_dict(), **ignored} == {**config.to_dict(), **ignored}


def test_the_shared_config_is_a_real_config_of_its_own_class(world):
    for kind, expected in (("bert", BertConfig), ("vit", ViTConfig)):
        config = AutoConfig.from_pretrained(world.artifact(kind))
        assert type(config.shared_config) is expected
        assert type(copy.deepcopy(config).shared_config) is expected
        assert config.get_text_config() is config.shared_config or kind == "vit"
        assert (config.hidden_size, config.num_hidden_layers) == (tiny.HIDDEN, tiny.LAYERS)


def test_a_default_config_can_be_made_without_arguments():
    # Transformers does so, to tell what differs from the defaults.
    config = TwinMergingConfig()
    assert config.experts == []
    assert config.get_text_config() is config
    assert config.to_diff_dict()["model_type"] == "twin_merging"


def test_two_configs_do_not_share_lists():
    one, two = TwinMergingConfig(), TwinMergingConfig()
    one.experts.append({"name": "a"})
    one.provenance["seed"] = 1
    assert two.experts == [] and two.provenance == {}
    entries = fields()["experts"]
    config = TwinMergingConfig(**fields(experts=entries))
    config.experts[0]["name"] = "other"
    assert entries[0]["name"] == "a"


def test_labels_beyond_ten_keep_their_order(tmp_path):
    labels = {i: f"l{i}" for i in range(12)}
    config = TwinMergingConfig(**fields(id2label=labels, label2id={v: k for k, v in labels.items()}))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).label_names == list(labels.values())


def test_an_artifact_of_a_newer_format_is_refused(tmp_path, world):
    content = json.loads((world.artifact("bert") / "config.json").read_text())
    content["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="format_version.*pip install -U"):
        AutoConfig.from_pretrained(tmp_path)


MODEL_BAD: dict[str, tuple[dict, str]] = {
    "a class of others": ({"shared_class": "os.system"}, "`shared_class` 'os.system'"),
    "a class without a wrapper": (
        {"shared_class": "BertForQuestionAnswering"},
        "`shared_class` 'BertForQuestionAnswering'",
    ),
    "a layer too far": ({"router_layer": 4}, "`router_layer` is 4.*layers 0 to 3"),
    "a delta of nothing": ({"exact_deltas": ["bert.nothing"]}, "'bert.nothing'.*no such parameter"),
    "a delta in the head": ({"ranks": {"classifier.weight": [1, 1]}}, "'classifier.weight'"),
    "no experts": ({"experts": []}, "no experts"),
}


@pytest.mark.parametrize(("changes", "message"), MODEL_BAD.values(), ids=MODEL_BAD)
def test_a_config_that_no_model_fits_raises_and_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        TwinMergingModel(TwinMergingConfig(**fields(**changes)))


def test_a_model_of_a_config_alone_starts_as_the_shared_model_for_every_expert():
    model = TwinMergingModel(TwinMergingConfig(**fields())).eval()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with torch.no_grad():
        output = model(**tiny.text_batch(2), experts="all").last_hidden_state
    assert torch.equal(output[:, 0], output[:, 1])


def test_the_config_of_a_loaded_model_is_the_file_s(artifact):
    assert load(artifact).config.to_dict().keys() >= {"experts", "ranks", "shared_config", "provenance"}
