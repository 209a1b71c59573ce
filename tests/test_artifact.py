"""The artifact on disk: it survives saving and loading byte by byte, and damage is found."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from tests import files, tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError, modeling
from twin_merging_hf.artifact import (
    LAYOUT,
    check_artifact,
    code_files,
    inspect_artifact,
    read_config,
    staged,
    storage,
    tensor_sizes,
)
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP


VARIANTS = {
    "linear": {},
    "narrow mlp": {"router": {"type": "mlp", "pass": "full", "epochs": 1}, "exclusive": {"rank": 3, "dtype": "bf16"}},
    "projection": {"router": {"type": "projection", "rank": 4}, "data": False},
    "bfloat16": {"out_dtype": "bfloat16", "router": {"type": "linear"}},
}


@pytest.fixture
def copy(world, tmp_path) -> Path:
    """An artifact to be damaged."""
    return Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))


# ---- saving and loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_and_saving_changes_no_byte(world, tmp_path, variant):
    folder = world.artifact("bert", **VARIANTS[variant])
    load(folder).save_pretrained(tmp_path / "again")
    assert files.listing(tmp_path / "again") == files.listing(folder)
    load(tmp_path / "again").save_pretrained(tmp_path / "third")
    assert files.listing(tmp_path / "third") == files.listing(folder)


def test_loading_and_saving_changes_no_byte_for_any_architecture(artifact, tmp_path):
    load(artifact).save_pretrained(tmp_path / "again")
    assert files.listing(tmp_path / "again") == files.listing(artifact)


def test_the_backbone_alone_saves_the_whole_artifact_but_its_heads_load_too(artifact, tmp_path):
    """One layout serves every head, so that nothing is lost by saving what `AutoModel` gave."""
    modeling.TwinMergingModel.from_pretrained(artifact).save_pretrained(tmp_path / "again")
    assert files.listing(tmp_path / "again") == files.listing(artifact)


def test_an_artifact_in_shards_is_the_same(world, kind, artifact, tmp_path):
    load(artifact).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / LAYOUT.index).is_file() and not (tmp_path / "shards" / LAYOUT.weights).exists()
    one, other = files.tensors_of(artifact), files.tensors_of(tmp_path / "shards")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert check_artifact(tmp_path / "shards") == []
    assert storage(tmp_path / "shards", read_config(artifact)) == storage(artifact, read_config(artifact))
    inputs = tiny.batch(kind, 3)
    with torch.no_grad():
        expected, got = load(artifact)(**inputs), load(tmp_path / "shards")(**inputs)
    assert torch.equal(expected.logits, got.logits)


def test_saving_does_not_overwrite_the_cards_in_the_folder(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / LAYOUT.card).write_text("my words")
    load(world.artifact("bert")).save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / LAYOUT.card).read_text() == "my words"


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_safetensors_only(world, variant):
    folder = world.artifact("bert", **VARIANTS[variant])
    for path in folder.iterdir():
        assert path.suffix in {".json", ".py", ".yaml", ".md", ".png", ".safetensors"}, path.name
        assert not path.read_bytes().startswith((b"\x80", b"PK")), path.name


def test_the_code_in_an_artifact_is_the_packages(artifact):
    assert {path.name for path in artifact.glob("*.py")} == {path.name for path in code_files()}
    for path in code_files():
        assert (artifact / path.name).read_bytes() == path.read_bytes()
    assert len(code_files()) == len(list(Path(modeling.__file__).parent.glob("*.py"))) - 1  # all but __init__


# ---- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_storage_is_the_bytes_of_the_file(world, variant):
    folder = world.artifact("bert", **VARIANTS[variant])
    content = (folder / LAYOUT.weights).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    sizes = storage(folder, read_config(folder))
    assert sizes.total == len(content) - header == sum(tensor_sizes(folder).values())
    tensors = files.tensors_of(folder)
    assert tensor_sizes(folder) == {name: value.nbytes for name, value in tensors.items()}
    assert sizes.deltas == sum(v.nbytes for k, v in tensors.items() if k.startswith("deltas."))
    assert sizes.router == sum(v.nbytes for k, v in tensors.items() if k.startswith("router."))
    assert sizes.heads == sum(v.nbytes for k, v in tensors.items() if k.startswith("shared.classifier."))
    assert sizes.ratio == pytest.approx(sizes.total / sizes.shared)
    reported = files.read_json(folder / LAYOUT.report)["storage"]
    assert reported["total"] == sizes.total and reported["shared"] == sizes.shared


def test_shared_bytes_are_those_of_an_experts_backbone(world, kind, artifact):
    expert = files.tensors_of(world.experts(kind) / "a")
    prefix = type(tiny.new_model(kind)).base_model_prefix
    backbone = sum(value.nbytes for name, value in expert.items() if name.startswith(f"{prefix}."))
    assert storage(artifact, read_config(artifact)).shared == backbone


def test_inspection_reads_what_was_built(world):
    folder = world.artifact("bert", **VARIANTS["narrow mlp"])
    found = inspect_artifact(folder)
    assert (found.folder, found.shared_class) == (str(folder), "BertForSequenceClassification")
    assert [expert["name"] for expert in found.experts] == list(tiny.LABELS)
    assert found.rank == {"a": 3, "b": 3, "c": 3}
    assert found.router["type"] == "mlp" and found.router["pass"] == "full" and found.router["layer"] is None
    assert found.labels == ["a/x", "a/y", "b/p", "b/q", "b/r", "c/m", "c/n"]
    assert found.storage["total"] == sum(tensor_sizes(folder).values())
    json.dumps(found.__dict__)


# ---- what is wrong with an artifact -----------------------------------------------------------------------------


def check(folder: Path) -> str:
    problems = check_artifact(folder)
    assert problems, "nothing was found"
    return "\n".join(problems)


def test_a_missing_tensor(copy):
    files.edit_tensors(copy, lambda tensors: tensors.pop("shared.classifier.heads.1.bias"))
    assert check(copy) == "tensor 'shared.classifier.heads.1.bias' is missing"


def test_an_extra_tensor(copy):
    files.edit_tensors(copy, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert check(copy) == "tensor 'extra' does not belong to this artifact"


def test_a_tensor_of_another_shape(copy):
    files.edit_tensors(copy, lambda tensors: tensors.update({"router.classifier.bias": torch.zeros(7)}))
    assert check(copy) == "tensor 'router.classifier.bias' is [7], expected [3]"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite(copy, value):
    files.edit_tensors(copy, lambda tensors: tensors["router.classifier.bias"][1].fill_(value))
    assert check(copy) == "tensor 'router.classifier.bias' holds NaN or infinity"


def test_a_changed_code_file(copy):
    path = copy / "mix_twin_merging.py"
    path.write_text(path.read_text() + "\nimport os\n")
    assert check(copy).startswith("model code mix_twin_merging.py is not that of the installed package; ")


def test_an_artifact_of_another_version_is_told_what_to_do_and_that_helps(copy, tmp_path):
    for path in copy.glob("*_twin_merging.py"):
        path.write_text("# of another version\n" + path.read_text())
    (problem,) = check_artifact(copy)
    assert "mix_twin_merging.py, " in problem and "`save_pretrained` to a new folder" in problem
    load(copy).save_pretrained(tmp_path / "new")
    assert check_artifact(tmp_path / "new") == []
    weights = {path.name for path in copy.glob("*.safetensors")}
    assert all((copy / name).read_bytes() == (tmp_path / "new" / name).read_bytes() for name in weights)


def test_a_missing_code_file(copy):
    (copy / "mix_twin_merging.py").unlink()
    assert "model code mix_twin_merging.py is missing" in check(copy)


@pytest.mark.parametrize("name", ["README.md", "recipe.yaml", "report.json", "tokenizer.json", "confusion.png"])
def test_a_missing_companion(copy, name):
    (copy / name).unlink()
    assert check(copy) == f"{name} is missing"


def test_several_problems_at_once(copy):
    (copy / "README.md").unlink()
    (copy / "mix_twin_merging.py").unlink()
    files.edit_tensors(copy, lambda tensors: tensors.update(extra=torch.zeros(1)))
    assert len(check_artifact(copy)) == 3


def test_weights_that_are_missing_or_damaged(copy):
    path = copy / LAYOUT.weights
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert "damaged" in check(copy)
    path.write_bytes(b"")
    assert "damaged" in check(copy)
    path.unlink()
    assert "model.safetensors is missing" in check(copy)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "x"}}', '{"weight_map": {}}'],
)
def test_a_damaged_index(copy, index):
    (copy / LAYOUT.index).write_text(index)
    check(copy)


def test_one_whole_file_counts_and_an_index_beside_it_is_a_problem(copy):
    """As in Transformers, which would not read the shards that the index names."""
    shutil.copyfile(copy / LAYOUT.weights, copy / "model-00001-of-00001.safetensors")
    names = tensor_sizes(copy)
    (copy / LAYOUT.index).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    assert check(copy) == f"{LAYOUT.index} is of other weights: beside {LAYOUT.weights} nobody reads it; remove it"
    files.edit_tensors(copy, lambda tensors: tensors["router.classifier.bias"][1].fill_(float("nan")))
    assert any("router.classifier.bias" in problem for problem in check_artifact(copy))
    (copy / LAYOUT.weights).unlink()
    assert check_artifact(copy) == []


def test_a_shard_outside_of_the_folder_is_not_opened(copy):
    (copy / LAYOUT.weights).rename(copy.parent / LAYOUT.weights)
    (copy / LAYOUT.index).write_text(json.dumps({"weight_map": {"a": f"../{LAYOUT.weights}"}}))
    assert LAYOUT.index in check(copy) or "missing" in check(copy)


CONFIGS = {
    "newer format": ({"format_version": 99}, "upgrade"),
    "another model": ({"model_type": "bert"}, "not an artifact"),
    "no experts": ({"experts": []}, "`experts` is empty"),
    "experts a number": ({"experts": 5}, "config.json"),
    "expert without name": ({"experts": [{}]}, "config.json"),
    "router type": ({"router_type": "magic"}, "`router_type` must be one of"),
    "ranks of two": ({"ranks": {"bert.x": [1, 1]}}, "ranks"),
    "ranks of an unknown tensor": ({"ranks": {"bert.x": [1, 1, 1]}}, "bert.x"),
    "ranks a list": ({"ranks": [5]}, "config.json"),
    "unknown class": ({"shared_class": "os.system"}, "shared_class"),
    "class of another kind": ({"shared_class": "BertModel"}, "shared_class"),
    "layer too high": ({"router_layer": 99}, "router_layer"),
    "no shared config": ({"shared_config": None}, "config.json"),
    "shared config of no type": ({"shared_config": {}}, "shared_config"),
    "shared config of an unknown type": ({"shared_config": {"model_type": "zzz"}}, "zzz"),
    "no auto_map": ({"auto_map": None}, "auto_map"),
    "auto_map to other code": ({"auto_map": {"AutoConfig": "evil.C"}}, "auto_map"),
    "auto_map to another repository": (
        {"auto_map": {name: f"evil/repo--{where}" for name, where in AUTO_MAP.items()}},
        "auto_map",
    ),
    "pipelines of other code": ({"custom_pipelines": {"x": {"impl": "evil/repo--evil.P"}}}, "custom_pipelines"),
    "provenance a list": ({"provenance": [1]}, "config.json"),
    "companions a number": ({"provenance": {"companions": 5}}, "companions"),
    "companions outside": ({"provenance": {"companions": ["../copy/config.json"]}}, "companions"),
    "head modules of another model": ({"head_modules": ["head"]}, "head"),
    "layers path": ({"layers_path": "bert.nothing"}, "nothing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_describe_the_artifact(copy, case):
    changes, expected = CONFIGS[case]
    files.edit_json(copy / LAYOUT.config, **changes)
    assert expected in check(copy)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"5", b"null"])
def test_a_config_that_is_none(copy, content):
    (copy / LAYOUT.config).write_bytes(content)
    check(copy)
    with pytest.raises(TwinMergingError):
        inspect_artifact(copy)


def test_folders_that_are_no_artifacts(world, tmp_path):
    assert "is not an artifact: it has no config.json" in check(tmp_path)
    assert "is not an artifact" in check(tmp_path / "nowhere")
    assert "model_type is not 'twin_merging'" in check(world.experts("bert") / "a")
    with pytest.raises(TwinMergingError, match="is not an artifact"):
        inspect_artifact(tmp_path)


# ---- all or nothing ---------------------------------------------------------------------------------------------

NAMES = ["out", "out[1]", "out*", ".hidden", "ö ü"]


def finish(folder: Path) -> None:
    """What a build does before its block ends."""
    (folder / LAYOUT.unfinished_config).write_text("{}")


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_appears_when_all_is_done(tmp_path, name):
    out = tmp_path / "x" / name
    with staged(out) as folder:
        finish(folder)
        assert not out.exists() and folder.parent == out.parent and not (folder / LAYOUT.config).exists()
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert [path.name for path in out.iterdir()] == [LAYOUT.config]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path, name):
    out = tmp_path / name
    with pytest.raises(RuntimeError), staged(out) as folder:
        pattern = folder.name.replace(str(os.getpid()), "{pid}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    leftover, running = (tmp_path / pattern.format(pid=pid) for pid in (_dead_process(), os.getppid()))
    for path in (leftover, running):
        path.mkdir()
        (path / "file").write_text("x")
    with staged(out) as folder:
        finish(folder)
        assert not leftover.exists() and running.exists()


@pytest.mark.parametrize("name", NAMES)
def test_builds_of_other_outputs_are_left_alone(tmp_path, name):
    running = os.getppid()
    others = [f".other.building-{running}", f".{name}.building-x.building-{running}", f"{name}-mine", ".building-1"]
    for other in others:
        (tmp_path / other).mkdir()
    with staged(tmp_path / name) as folder:
        finish(folder)
        assert all((tmp_path / other).exists() for other in others)


def _dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TwinMergingError, match="exists already"), staged(out) as folder:
        finish(folder)
        out.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not any(out.iterdir())


def test_an_unfinished_artifact_does_not_load(tmp_path):
    """A killed build leaves no folder that anything would take for an artifact."""
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as folder:
        finish(folder)
        assert "not an artifact" in check(folder)
        raise RuntimeError
