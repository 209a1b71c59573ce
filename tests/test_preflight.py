"""Inputs that do not fit together: every one is refused with a reason, before anything is written."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import Progress, build_artifact, plan_build
from twin_merging_hf.checkpoints import open_checkpoint


WORD = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def inputs(world, tmp_path) -> Path:
    """Base and experts a, b of BERT with data, to be damaged."""
    return files.copy_inputs(world.experts("bert"), tmp_path / "in")


@pytest.fixture
def pictures(world, tmp_path) -> Path:
    """The same of ViT."""
    return files.copy_inputs(world.experts("vit"), tmp_path / "in")


def refusal(folder: Path, **recipe) -> str:
    """Build; the message of the refusal. Nothing may have been written."""
    path = tiny.write_recipe(folder, ("a", "b"), **recipe)
    before = files.listing(folder.parent)
    with pytest.raises(TwinMergingError) as caught:
        build_artifact(path, folder.parent / "out", Progress(quiet=True))
    assert files.listing(folder.parent) == before
    with pytest.raises(TwinMergingError):
        plan_build(path, folder.parent / "out")
    assert files.listing(folder.parent) == before
    return str(caught.value)


def replace(folder: Path, name: str, kind: str = "bert", seed: int = 9, labels=("x", "y"), **fields) -> None:
    """Put another model in a checkpoint's place, tokenizer and data as they are."""
    tiny.new_model(kind, labels, seed=seed, **fields).save_pretrained(folder / name)


# ---- architectures, shapes, configs -----------------------------------------------------------------------------


def test_experts_of_two_architectures(inputs):
    replace(inputs, "b", "roberta", labels=("p", "q", "r"))
    message = refusal(inputs)
    for part in ("expert 'b'", "RobertaForSequenceClassification", "expert 'a'", "BertForSequenceClassification"):
        assert part in message


def test_base_of_another_architecture(inputs):
    replace(inputs, "base", "distilbert")
    message = refusal(inputs)
    assert "base model is a distilbert" in message and "expert 'a' is a bert" in message


def test_backbones_of_two_shapes(inputs):
    replace(inputs, "b", labels=("p", "q", "r"), intermediate_size=48)
    message = refusal(inputs)
    for part in ("expert 'b'", "bert.encoder.layer.0.intermediate.dense.weight", "[48, 32]", "[64, 32]", "expert 'a'"):
        assert part in message


@pytest.mark.parametrize("layers", [tiny.LAYERS - 1, tiny.LAYERS + 1])
def test_backbones_of_two_depths(inputs, layers):
    replace(inputs, "b", labels=("p", "q", "r"), num_hidden_layers=layers)
    message = refusal(inputs)
    assert "expert 'b'" in message and "num_hidden_layers" in message


def test_base_of_another_shape(inputs):
    replace(inputs, "base", intermediate_size=48)
    assert "base model: tensor" in refusal(inputs)


def test_vocabularies_of_two_sizes(inputs):
    replace(inputs, "b", labels=("p", "q", "r"), vocab_size=tiny.VOCABULARY + 1)
    message = refusal(inputs)
    assert "expert 'b'" in message and "word_embeddings" in message and "vocabularies differ" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 2), ("layer_norm_eps", 1e-5), ("hidden_act", "relu"), ("pad_token_id", 1)],
)
def test_config_fields_that_change_the_function(inputs, field, value):
    files.edit_json(inputs / "b" / "config.json", **{field: value})
    message = refusal(inputs)
    assert "expert 'b'" in message and repr(field) in message and repr(value) in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_dropout_prob", 0.25), ("initializer_range", 0.25), ("classifier_dropout", 0.25), ("use_cache", False)],
)
def test_config_fields_that_do_not_are_no_obstacle(inputs, field, value):
    files.edit_json(inputs / "b" / "config.json", **{field: value})
    plan_build(tiny.write_recipe(inputs, ("a", "b")), inputs.parent / "out")


def test_fields_that_older_versions_of_transformers_wrote_are_no_obstacle(inputs):
    # What 4.x saved in every fine-tuned BERT, and the base on the Hub may not have.
    old = {"position_embedding_type": "absolute", "gradient_checkpointing": False, "torch_dtype": "float32"}
    files.edit_json(inputs / "a" / "config.json", **old, transformers_version="4.30.0")
    plan_build(tiny.write_recipe(inputs, ("a", "b")), inputs.parent / "out")


def test_an_old_field_that_changes_the_function_is_an_obstacle(inputs):
    files.edit_json(inputs / "b" / "config.json", position_embedding_type="relative_key")
    assert "position_embedding_type" in refusal(inputs)


# ---- tensors ----------------------------------------------------------------------------------------------------


def test_a_missing_backbone_tensor(inputs):
    files.edit_tensors(inputs / "b", lambda tensors: tensors.pop(f"bert.{WORD}"))
    message = refusal(inputs)
    assert "expert 'b'" in message and f"bert.{WORD}" in message and "missing" in message


def test_a_missing_tensor_of_the_first_expert_is_its_own_fault_alone(inputs):
    files.edit_tensors(inputs / "a", lambda tensors: tensors.pop(f"bert.{WORD}"))
    message = refusal(inputs)
    assert "expert 'a'" in message and "expert 'b'" not in message


def test_a_missing_backbone_tensor_of_the_base(inputs):
    files.edit_tensors(inputs / "base", lambda tensors: tensors.pop(f"bert.{WORD}"))
    message = refusal(inputs)
    assert "base model" in message and f"bert.{WORD}" in message and "missing" in message


def test_a_missing_head_tensor(inputs):
    files.edit_tensors(inputs / "b", lambda tensors: tensors.pop("classifier.bias"))
    message = refusal(inputs)
    assert "expert 'b'" in message and "classifier.bias" in message


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.adapter.weight", "classifier.extra.weight"])
def test_an_extra_tensor_of_an_expert(inputs, name):
    files.edit_tensors(inputs / "b", lambda tensors: tensors.update({name: torch.zeros(2)}))
    message = refusal(inputs)
    assert "expert 'b'" in message and name in message and "BertForSequenceClassification" in message


def test_an_extra_backbone_tensor_of_the_base(inputs):
    name = "bert.encoder.layer.0.adapter.weight"
    files.edit_tensors(inputs / "base", lambda tensors: tensors.update({name: torch.zeros(2)}))
    message = refusal(inputs)
    assert "base model" in message and name in message


def test_a_head_that_is_not_as_wide_as_its_labels(inputs):
    wide = torch.zeros(5, tiny.HIDDEN)
    files.edit_tensors(inputs / "b", lambda tensors: tensors.update({"classifier.weight": wide}))
    message = refusal(inputs)
    assert "expert 'b'" in message and "classifier.weight" in message and "[5, 32]" in message


def test_tensors_that_all_contradict_the_config(inputs):
    for name in ("base", "a", "b"):
        files.edit_json(inputs / name / "config.json", max_position_embeddings=40)
    message = refusal(inputs)
    assert "position_embeddings" in message and "[66, 32]" in message and "[40, 32]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "tensor"), [("a", f"bert.{WORD}"), ("b", "classifier.bias"), ("base", f"bert.{WORD}")]
)
def test_a_checkpoint_that_is_not_finite(inputs, name, tensor, value):
    files.edit_tensors(inputs / name, lambda tensors: tensors[tensor].view(-1)[1].fill_(value))
    message = refusal(inputs)
    assert ("base model" if name == "base" else f"expert '{name}'") in message
    assert repr(tensor) in message and "NaN or infinity" in message


# ---- tokenizers and image processors ----------------------------------------------------------------------------


def edit_tokenizer(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "tokenizer.json"
    content = files.read_json(path)
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def swap_two_words(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]


TOKENIZERS: dict[str, tuple[Callable[[dict], None], str]] = {
    "lowercase": (lambda content: content.update(normalizer={"type": "Lowercase"}), "normalizer"),
    "split": (lambda content: content.update(pre_tokenizer={"type": "WhitespaceSplit"}), "pre_tokenizer"),
    "no special tokens": (lambda content: content.update(post_processor=None), "post_processor"),
    "other ids": (swap_two_words, "vocabulary"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_differ(inputs, case):
    edit, part = TOKENIZERS[case]
    edit_tokenizer(inputs / "b", edit)
    message = refusal(inputs)
    assert "expert 'b'" in message and "tokenizer differs" in message and part in message


def save_pieces(folder: Path, merges: list[tuple[str, str]]) -> None:
    """A byte-pair tokenizer over one vocabulary, with merges in the given order."""
    pieces = ["[PAD]", "[UNK]", "a", "b", "c", "ab", "bc", "abc"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def test_tokenizers_with_one_vocabulary_that_split_words_in_other_ways(inputs):
    merges = [("a", "b"), ("b", "c"), ("ab", "c")]
    for name in ("base", "a"):
        save_pieces(inputs / name, merges)
    save_pieces(inputs / "b", [("b", "c"), ("a", "b"), ("a", "bc")])
    message = refusal(inputs)
    assert "expert 'b'" in message and "tokenizer differs" in message


def test_a_base_may_carry_an_older_file_of_the_same_tokenizer(inputs):
    edit_tokenizer(inputs / "base", lambda content: content.update(normalizer={"type": "NFC"}))
    plan_build(tiny.write_recipe(inputs, ("a", "b")), inputs.parent / "out")


def test_a_base_with_another_vocabulary(inputs):
    edit_tokenizer(inputs / "base", swap_two_words)
    message = refusal(inputs)
    assert "base model" in message and "vocabulary" in message


def test_a_tokenizer_that_cannot_be_loaded(inputs):
    (inputs / "b" / "tokenizer.json").write_text("{", encoding="utf-8")
    message = refusal(inputs)
    assert "expert 'b'" in message and "tokenizer" in message and "cannot be loaded" in message


def test_image_processors_that_differ(pictures):
    for file in (pictures / "b").glob("*processor*.json"):
        files.edit_json(file, image_mean=[0.1, 0.2, 0.3])
    message = refusal(pictures)
    assert "expert 'b'" in message and "image processor differs" in message and "image_mean" in message


def test_data_without_anything_to_read_it(inputs):
    for name in ("base", "a", "b"):
        for file in (inputs / name).glob("tokenizer*"):
            file.unlink()
    assert "`data` is given, but no checkpoint has a tokenizer" in refusal(inputs)


def test_a_broken_tokenizer_is_one_problem(inputs):
    (inputs / "a" / "tokenizer.json").write_text("{")
    message = refusal(inputs)
    assert "expert 'a': the tokenizer in" in message and "no checkpoint has" not in message


def test_a_missing_pillow_is_said_once(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refusal(pictures) == (
        "this needs pillow, which is not installed; run `pip install 'twin-merging-hf[vision]'`"
    )


def test_quantised_checkpoints_are_refused(inputs):
    files.edit_json(inputs / "b" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    message = refusal(inputs)
    assert "expert 'b' is quantised" in message and "full-precision" in message


# ---- kinds of heads ---------------------------------------------------------------------------------------------


def test_multi_label_experts(inputs):
    files.edit_json(inputs / "b" / "config.json", problem_type="multi_label_classification")
    message = refusal(inputs)
    assert "expert 'b'" in message and "multi-label" in message and "Not supported" in message


def test_regressions_of_several_numbers(inputs):
    files.edit_json(inputs / "b" / "config.json", problem_type="regression")
    message = refusal(inputs)
    assert "expert 'b'" in message and "regression with 3 outputs" in message


def test_labels_of_the_recipe_that_do_not_fit_the_head(inputs):
    message = refusal(inputs, experts={"b": {"labels": ["only", "two"]}})
    assert "expert 'b'" in message and "2 `labels`" in message and "has 3" in message


def test_two_labels_of_one_name(inputs):
    files.edit_json(inputs / "b" / "config.json", id2label={"0": "p", "1": "p", "2": "r"}, label2id={"p": 0, "r": 2})
    message = refusal(inputs)
    assert "expert 'b'" in message and "two labels have one name ('p')" in message and "`labels`" in message


@pytest.mark.parametrize("names", [[], ["BertForMaskedLM"], ["BertModel"], ["NoSuchClass"], None])
def test_classes_that_are_no_classifiers(inputs, names):
    files.edit_json(inputs / "b" / "config.json", architectures=names)
    message = refusal(inputs)
    assert "expert 'b'" in message and (names[0] if names else "one architecture") in message


# ---- data -------------------------------------------------------------------------------------------------------

GOOD = {"text": "w1 w2", "label": "x"}
ROWS: dict[str, tuple[list[str], list[str]]] = {
    "empty": ([], ["no rows"]),
    "only blank lines": (["", "  "], ["no rows"]),
    "malformed JSON": ([json.dumps(GOOD), '{"text": "w1", "label"'], ["line 2", "not valid JSON"]),
    "brackets without end": (["[" * 100_000], ["line 1", "not valid JSON"]),
    "a number too long to read": (['{"text": "w", "label": ' + "1" * 5000 + "}"], ["line 1"]),
    "no object": (["[1]"], ["line 1", "object"]),
    "no text": (['{"label": "x"}'], ["line 1", "`text`", "non-empty string"]),
    "blank text": (['{"text": " ", "label": "x"}'], ["line 1", "`text`"]),
    "text a number": (['{"text": 5, "label": "x"}'], ["line 1", "`text`", "5"]),
    "half of a character": (
        [json.dumps({**GOOD, "text": word}) for word in tiny.WORDS[:9]] + ['{"text": "\\ud800", "label": "x"}'],
        ["line 10", "`text`"],
    ),
    "pair a number": (['{"text": "w", "text_pair": 5, "label": "x"}'], ["line 1", "`text_pair`", "5"]),
    "unknown key": (['{"text": "w", "label": "x", "lable": 1}'], ["line 1", "'lable'", "known"]),
    "no label": (['{"text": "w"}'], ["line 1", "`label` is missing"]),
    "unknown label": ([json.dumps(GOOD), "", '{"text": "w", "label": "z"}'], ["line 3", "'z'", "x, y"]),
    "label id too large": (['{"text": "w", "label": 2}'], ["line 1", "2", "0 to 1"]),
    "label id negative": (['{"text": "w", "label": -1}'], ["line 1", "-1"]),
    "label true": (['{"text": "w", "label": true}'], ["line 1", "True"]),
    "label a list": (['{"text": "w", "label": ["x"]}'], ["line 1", "['x']"]),
    "too few rows": ([json.dumps(GOOD)] * 5, ["1 different", "at least 2"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_are_named_by_file_and_line(inputs, case):
    lines, expected = ROWS[case]
    (inputs / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    message = refusal(inputs)
    assert "expert 'a'" in message
    for part in expected:
        assert part in message
    if "line" in expected[0]:
        assert "a.jsonl" in message


@pytest.mark.parametrize("label", ['"x"', "NaN", "Infinity", "true", "null", "1" + "0" * 400])
def test_labels_of_a_regression_are_finite_numbers(inputs, label):
    replace(inputs, "a", labels=("score",))
    (inputs / "a.jsonl").write_text(f'{{"text": "w1", "label": {label}}}\n', encoding="utf-8")
    message = refusal(inputs)
    assert "line 1" in message and "finite number" in message


def test_data_that_is_not_text(inputs):
    (inputs / "a.jsonl").write_bytes(b'{"text": "\xff", "label": "x"}')
    assert "not UTF-8" in refusal(inputs)


def test_data_that_is_not_there(inputs):
    (inputs / "b.jsonl").unlink()
    message = refusal(inputs)
    assert "expert 'b'" in message and "b.jsonl does not exist" in message


def test_an_image_that_is_not_there(pictures):
    rows = [{"image": "images/a0.png", "label": "x"}, {"image": "images/none.png", "label": "x"}]
    files.write_rows(pictures / "a.jsonl", rows)
    message = refusal(pictures)
    assert "a.jsonl, line 2" in message and "none.png does not exist" in message


def test_an_image_that_is_none(world, pictures):
    (pictures / "images" / "b3.png").write_text("not a picture")
    recipe = tiny.write_recipe(pictures, ("a", "b"))
    before = files.listing(pictures.parent)
    with pytest.raises(TwinMergingError, match="b3.png"):
        build_artifact(recipe, pictures.parent / "out", Progress(quiet=True))
    assert files.listing(pictures.parent) == before


# ---- files of checkpoints ---------------------------------------------------------------------------------------


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "run")


@pytest.mark.parametrize("name", ["a", "base"])
def test_pickles_are_refused_and_never_opened(inputs, name, tmp_path):
    planted = tmp_path / "planted"
    payload = Payload(planted)
    (inputs / name / files.WEIGHTS).unlink()
    (inputs / name / "pytorch_model.bin").write_bytes(pickle.dumps(payload))
    message = refusal(inputs)
    assert "pytorch_model.bin" in message and "pickle" in message and "save_pretrained" in message
    assert not planted.exists()
    pickle.loads(pickle.dumps(payload))
    assert planted.exists(), "the payload does nothing, so this test proves nothing"


def test_a_pickle_beside_safetensors_is_not_opened(inputs, tmp_path):
    planted = tmp_path / "planted"
    for file in ("pytorch_model.bin", "training_args.bin"):
        (inputs / "a" / file).write_bytes(pickle.dumps(Payload(planted)))
    build_artifact(tiny.write_recipe(inputs, ("a", "b")), tmp_path / "out", Progress(quiet=True))
    assert not planted.exists()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights(inputs, damage):
    file = inputs / "b" / files.WEIGHTS
    content = {"truncated": file.read_bytes()[:-100], "garbage": b"\xff" * 500, "empty": b""}[damage]
    file.write_bytes(content)
    message = refusal(inputs)
    assert "expert 'b'" in message and "damaged" in message


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"weight_map": []}', "damaged"),
        ('{"weight_map": {"x": 5}}', "damaged"),
        ('{"weight_map": {"x": "none.safetensors"}}', "none.safetensors"),
        ('{"weight_map": {"x": "../a/model.safetensors"}}', "not a file beside it"),
    ],
)
def test_damaged_indexes(inputs, index, expected):
    (inputs / "b" / files.WEIGHTS).unlink()
    (inputs / "b" / f"{files.WEIGHTS}.index.json").write_text(index)
    message = refusal(inputs)
    assert "expert 'b'" in message and expected in message


def test_of_one_whole_file_and_shards_the_whole_file_is_read(inputs):
    """As Transformers does: an index that an earlier save left is no part of the checkpoint."""
    before = open_checkpoint("b", inputs, "expert 'b'").fingerprint()
    tensors = files.tensors_of(inputs / "b")
    save_file({key: value + 1 for key, value in tensors.items()}, inputs / "b" / "model-00001-of-00001.safetensors")
    content = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (inputs / "b" / f"{files.WEIGHTS}.index.json").write_text(json.dumps(content))
    assert open_checkpoint("b", inputs, "expert 'b'").fingerprint() == before


def test_a_folder_that_is_not_there(inputs):
    message = refusal(inputs, experts={"b": {"model": "./none"}})
    assert "expert 'b'" in message and "none is not a folder" in message


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(inputs):
    message = refusal(inputs, experts={"b": {"model": "no-such-org/no-such-model"}})
    assert "expert 'b'" in message and "neither a folder" in message and "Hub" in message


def test_a_folder_without_config(inputs):
    (inputs / "b" / "config.json").unlink()
    message = refusal(inputs)
    assert "expert 'b'" in message and "no config.json" in message


def test_a_folder_without_weights(inputs):
    (inputs / "b" / files.WEIGHTS).unlink()
    message = refusal(inputs)
    assert "expert 'b'" in message and "no weights" in message


def test_an_adapter(inputs):
    shutil.rmtree(inputs / "b")
    (inputs / "b").mkdir()
    (inputs / "b" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refusal(inputs)
    assert "expert 'b'" in message and "PEFT" in message


@pytest.mark.parametrize(
    "config",
    ["{", "[]", "{}", '{"model_type": "no_such_type"}', '{"model_type": 5}'],
)
def test_a_config_that_cannot_be_read(inputs, config):
    (inputs / "b" / "config.json").write_text(config)
    message = refusal(inputs)
    assert "expert 'b'" in message and "config.json" in message


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 5), ("hidden_act", "no_such_act")])
def test_a_config_that_describes_no_model(inputs, field, value):
    for name in ("base", "a", "b"):
        files.edit_json(inputs / name / "config.json", **{field: value})
    assert "expert 'a'" in refusal(inputs)


def test_code_of_a_checkpoint_does_not_run(inputs, tmp_path):
    planted = tmp_path / "planted"
    (inputs / "b" / "custom.py").write_text(f"import pathlib\npathlib.Path({str(planted)!r}).write_text('run')\n")
    files.edit_json(
        inputs / "b" / "config.json",
        model_type="custom_type",
        auto_map={"AutoConfig": "custom.C", "AutoModelForSequenceClassification": "custom.M"},
    )
    assert "expert 'b'" in refusal(inputs)
    assert not planted.exists()


# ---- the output folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["folder", "file", "link to a folder", "broken link"])
def test_an_output_that_exists_is_not_touched(inputs, shape):
    out = inputs.parent / "out"
    if shape == "folder":
        out.mkdir()
    elif shape == "file":
        out.write_text("mine")
    else:
        out.symlink_to(inputs if shape == "link to a folder" else inputs / "nowhere")
    message = refusal(inputs)
    assert "exists already" in message and "out" in message
    assert out.is_symlink() == ("link" in shape)


def test_an_output_below_a_file(inputs):
    (inputs.parent / "file").write_text("mine")
    recipe = tiny.write_recipe(inputs, ("a", "b"))
    before = files.listing(inputs.parent)
    with pytest.raises(TwinMergingError, match="file"):
        build_artifact(recipe, inputs.parent / "file" / "out", Progress(quiet=True))
    assert files.listing(inputs.parent) == before


# ---- all at once ------------------------------------------------------------------------------------------------


def test_all_problems_are_listed_at_once(inputs):
    files.edit_json(inputs / "b" / "config.json", hidden_act="relu")
    edit_tokenizer(inputs / "b", swap_two_words)
    (inputs / "a.jsonl").write_text("", encoding="utf-8")
    message = refusal(inputs, router={"layer": 99})
    for part in ("4 problems", "hidden_act", "vocabulary", "no rows", "`router.layer` is 99"):
        assert part in message


def test_two_folders_that_are_not_there_are_both_named(inputs):
    message = refusal(inputs, experts={"a": {"model": "./none1"}, "b": {"model": "./none2"}})
    assert "none1" in message and "none2" in message


def test_checkpoints_that_are_not_finite_are_all_named(inputs):
    for name in ("a", "b"):
        files.edit_tensors(inputs / name, lambda tensors: tensors[f"bert.{WORD}"].fill_(float("nan")))
    message = refusal(inputs)
    assert "expert 'a'" in message and "expert 'b'" in message


# ---- what a base may be -----------------------------------------------------------------------------------------


def save_base(kind: str, folder: Path, class_name: str) -> None:
    """Save the base's backbone as another class, whose own head is random."""
    source = getattr(transformers, tiny.new_model(kind).__class__.__name__).from_pretrained(folder)
    other = getattr(transformers, class_name)(source.config)
    prefix = f"{source.base_model_prefix}."
    backbone = {k: v for k, v in source.state_dict().items() if k.startswith(prefix)}
    if not class_name.endswith("Model"):
        other.load_state_dict(backbone, strict=False)
    else:
        other.load_state_dict({k.removeprefix(prefix): v for k, v in backbone.items()}, strict=False)
    (folder / files.WEIGHTS).unlink()
    other.save_pretrained(folder)


BASES = [
    ("bert", "BertForPreTraining", "cls.predictions.bias"),
    ("bert", "BertForNextSentencePrediction", "cls.seq_relationship.bias"),
    ("bert", "BertModel", None),
    ("roberta", "RobertaForMaskedLM", "lm_head.bias"),
    ("roberta", "RobertaModel", "pooler.dense.bias"),
    ("distilbert", "DistilBertForMaskedLM", "vocab_projector.bias"),
    ("distilbert", "DistilBertModel", None),
    ("vit", "ViTModel", "pooler.dense.bias"),
]


@pytest.mark.parametrize(("kind", "class_name", "head"), BASES)
def test_a_base_of_another_class_gives_the_same_plan_and_its_head_is_reported(world, tmp_path, kind, class_name, head):
    inputs = files.copy_inputs(world.experts(kind), tmp_path / "in")
    recipe = tiny.write_recipe(inputs, ("a", "b"), merge_method="task_arithmetic")
    expected = plan_build(recipe, tmp_path / "out")
    save_base(kind, inputs / "base", class_name)
    plan = plan_build(recipe, tmp_path / "out")
    assert (plan.shared_bytes, plan.delta_bytes) == (expected.shared_bytes, expected.delta_bytes)
    ignored = [note for note in plan.notes if note.startswith("base model: ignored head tensor")]
    assert not head or any(note.endswith(head) for note in ignored)


def test_a_base_without_the_pooler_that_experts_have(inputs):
    """A masked language model of BERT has no pooler, so there is nothing to measure the experts' poolers from."""
    save_base("bert", inputs / "base", "BertForMaskedLM")
    message = refusal(inputs, merge_method="task_arithmetic")
    assert "base model" in message and "bert.pooler.dense.weight" in message


def test_tables_that_models_now_compute_are_tolerated(inputs):
    table = torch.arange(66)[None]
    files.edit_tensors(inputs / "a", lambda tensors: tensors.update({"bert.embeddings.position_ids": table}))
    save_base("bert", inputs / "base", "BertModel")
    files.edit_tensors(inputs / "base", lambda tensors: tensors.update({"embeddings.position_ids": table}))
    plan_build(tiny.write_recipe(inputs, ("a", "b")), inputs.parent / "out")


def test_checkpoints_in_shards_are_read(inputs):
    expected = plan_build(tiny.write_recipe(inputs, ("a", "b")), inputs.parent / "out")
    model = transformers.BertForSequenceClassification.from_pretrained(inputs / "b")
    (inputs / "b" / files.WEIGHTS).unlink()
    model.save_pretrained(inputs / "b", max_shard_size="40KB")
    assert len(list((inputs / "b").glob("*.safetensors"))) > 1
    assert plan_build(tiny.write_recipe(inputs, ("a", "b")), inputs.parent / "out") == expected
