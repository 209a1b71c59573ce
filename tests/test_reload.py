"""`check`'s last step: a process without the package loads the artifact, or says why not."""

import json
import shutil
from pathlib import Path

import pytest

from tests import files
from twin_merging_hf import artifact as artifact_module
from twin_merging_hf import reload
from twin_merging_hf.reload import check_whole, reload_problems


@pytest.fixture
def copy(world, tmp_path) -> Path:
    return Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))


def test_a_whole_artifact_loads_in_a_clean_process(copy):
    before = files.listing(copy)
    assert check_whole(copy) == []
    assert files.listing(copy) == before


def test_code_that_is_not_the_packages_never_runs(copy):
    path = copy / "mix_twin_merging.py"
    path.write_text(path.read_text() + f"\nopen({str(copy / 'ran')!r}, 'w')\n")
    (problem,) = check_whole(copy)
    assert problem.startswith("model code mix_twin_merging.py is not that of the installed package")
    assert not (copy / "ran").exists()


def test_an_artifact_that_only_the_package_can_load_is_found(copy):
    """Here the code in the folder is broken, as if the package's were; the static checks are left out."""
    (copy / "heads_twin_merging.py").write_text("import nothing_of_that_name\n")
    (problem,) = reload_problems(copy)
    assert "a clean process without twin-merging-hf cannot load it" in problem and "nothing_of_that_name" in problem


@pytest.mark.parametrize("content", ["{", '{"model": {"vocab": 5}}'])
def test_a_damaged_tokenizer_is_found(copy, content):
    (copy / "tokenizer.json").write_text(content)
    (problem,) = check_whole(copy)
    assert "a clean process without twin-merging-hf cannot load it" in problem


def test_a_damaged_image_processor_is_found(world, tmp_path):
    folder = Path(shutil.copytree(world.artifact("vit"), tmp_path / "copy"))
    files.edit_json(folder / "preprocessor_config.json", image_processor_type="NoSuchProcessor")
    (problem,) = check_whole(folder)
    assert "a clean process" in problem and "image processor" in problem


LEADING = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil/repo--evil.T", None]}},
    "processor_config.json": {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.P"}}},
}


@pytest.mark.parametrize("name", LEADING)
def test_settings_that_lead_to_code_are_found(copy, name):
    path = copy / name
    path.write_text(json.dumps({**(files.read_json(path) if path.exists() else {}), **LEADING[name]}))
    (problem,) = artifact_module.check_artifact(copy)
    assert name in problem and "`auto_map` names code" in problem


def test_settings_that_are_no_json_are_found(copy):
    """Transformers would take its own defaults instead, without a word."""
    (copy / "generation_config.json").write_text("{")
    (problem,) = artifact_module.check_artifact(copy)
    assert problem.startswith("generation_config.json cannot be read")


def test_secrets_do_not_reach_the_process(copy, monkeypatch):
    seen = {}

    def run(command, *, env, **kwargs):
        seen.update(env)
        raise reload.subprocess.TimeoutExpired(command, 1)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(reload.subprocess, "run", run)
    assert "did not load it within" in reload_problems(copy)[0]
    assert "hf_secret" not in seen.values() and seen["HF_HUB_OFFLINE"] == "1"


STRAY = {
    "a pickle": ("pytorch_model.bin", "may be a pickle"),
    "a pickle in a folder": ("extra/weights.PT", "may be a pickle"),
    "more code": ("setup.py", "setup.py is not model code"),
    "a name in another case": ("readme.MD", "are one file where case does not count"),
}


@pytest.mark.parametrize("case", STRAY)
def test_files_that_must_not_be_there(copy, case):
    name, expected = STRAY[case]
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"\x80")
    (problem,) = artifact_module.check_artifact(copy)
    assert expected in problem and name in problem


def test_papers_of_another_artifact_are_found(copy):
    content = files.read_json(copy / "report.json")
    content["experts"][0]["name"] = "zebra"
    files.edit_json(copy / "report.json", experts=content["experts"])
    (copy / "recipe.yaml").write_text("seed: 5\n")
    one, other = artifact_module.check_artifact(copy)
    assert "report.json is about other experts (zebra, b, c)" in one and "recipe.yaml is not the recipe" in other
