"""Uploads by the real client to a Hub on loopback, and loading from there with and without plugin and network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from transformers import pipeline
from typer.testing import CliRunner

from tests import files, tiny
from tests.conftest import load
from tests.stub_hub import TOKEN, StubHub, connect
from twin_merging_hf import TwinMergingError
from twin_merging_hf.artifact import LAYOUT, check_artifact, read_config
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.cli import app
from twin_merging_hf.hub_upload import push_artifact, upload
from twin_merging_hf.hub_upload.model_card import LOCATION
from twin_merging_hf.space import make_space


SCRIPT = Path(__file__).with_name("hub_script.py")
REPO = "me/twin"


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A Hub without large files; artifacts are checked in this process only, which is quicker."""
    server = StubHub()
    connect(monkeypatch, server, tmp_path / "cache")
    monkeypatch.setattr(upload, "check_whole", check_artifact)
    yield server
    server.close()


@pytest.fixture
def large(monkeypatch, tmp_path):
    """The same with weights by git LFS."""
    server = StubHub(large=True)
    connect(monkeypatch, server, tmp_path / "cache")
    monkeypatch.setattr(upload, "check_whole", check_artifact)
    yield server
    server.close()


@pytest.fixture
def copy(world, tmp_path) -> Path:
    return Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))


def expected_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LAYOUT.card}


def run(stub: StubHub, home: Path, *args: str, **environment: str) -> dict:
    """Run the loading script in a process with a cache of its own."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *args, str(home / "answers.json")],
        cwd=home,
        env=files.environment(
            HF_ENDPOINT=stub.url, HF_HOME=str(home / "hf"), HF_TOKEN=TOKEN, NO_PROXY="127.0.0.1", **environment
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return files.read_json(home / "answers.json")


@pytest.mark.timeout(1800)
def test_from_command_to_pipeline_with_and_without_plugin_and_network(world, tmp_path, monkeypatch):
    folder, row = world.artifact("bert"), " ".join(tiny.WORDS[:5])
    stub = StubHub()
    home = tmp_path / "home"
    home.mkdir()
    with monkeypatch.context() as patch:
        connect(patch, stub, tmp_path / "cache")
        result = CliRunner().invoke(app, ["upload", str(folder), "twin", "--private"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    commit = stub.repos[REPO].refs["main"]
    assert stub.repos[REPO].private and f'revision="{commit}", trust_remote_code=True' in result.output
    assert TOKEN not in result.output
    stub.cuts["model.safetensors"] = 1  # the client has to notice that half is missing
    answers = run(stub, home, REPO, commit, "text-classification", row, HF_HUB_OFFLINE="0")
    assert stub.cuts["model.safetensors"] == 0
    stub.close()
    again = run(stub, home, REPO, commit, "text-classification", row, HF_HUB_OFFLINE="1")
    right = pipeline("text-classification", model=str(folder))(row, top_k=None)
    for found in (answers["without plugin"], answers["with plugin"], again["without plugin"], again["with plugin"]):
        assert [entry["label"] for entry in found] == [entry["label"] for entry in right]
        assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in right], abs=1e-5)
    assert "trust_remote_code" in answers["without trust"]


# ---- what arrives -----------------------------------------------------------------------------------------------


def test_every_file_arrives_and_the_card_names_the_repository(copy, stub):
    pushed = push_artifact(copy, "twin")
    found = dict(stub.files(REPO))
    card = ModelCard(found.pop(LAYOUT.card).decode())
    assert found.pop(".gitattributes") and found == expected_files(copy)
    assert f'model="{REPO}"' in card.text
    assert "PATH_OR_REPO_ID" not in card.text and card.data.pipeline_tag == "text-classification"
    assert (pushed.repo_id, pushed.commit, pushed.pr_url) == (REPO, stub.repos[REPO].refs["main"], None)


def test_doing_it_again_changes_nothing(copy, stub):
    first, count = push_artifact(copy, REPO), len(stub.repos[REPO].commits)
    again = push_artifact(copy, REPO)
    assert again.commit == first.commit and len(stub.repos[REPO].commits) == count


def test_a_pull_request_leaves_main_alone_and_can_be_added_to(copy, stub):
    with pytest.raises(TwinMergingError, match="no such repository; without a pull request it would be made"):
        push_artifact(copy, REPO, create_pr=True)
    assert REPO not in stub.repos
    push_artifact(copy, REPO)
    before = stub.repos[REPO].refs["main"]
    files.edit_tensors(copy, lambda tensors: tensors["router.classifier.bias"].add_(1))
    pushed = push_artifact(copy, REPO, create_pr=True)
    assert pushed.pr_url == f"{stub.url}/{REPO}/discussions/1" and stub.repos[REPO].refs["main"] == before
    files.edit_tensors(copy, lambda tensors: tensors["router.classifier.bias"].add_(1))
    push_artifact(copy, REPO, revision="refs/pr/1")
    assert stub.files(REPO, "refs/pr/1")[LAYOUT.weights] == (copy / LAYOUT.weights).read_bytes()
    with pytest.raises(TwinMergingError, match="not both"):
        push_artifact(copy, REPO, create_pr=True, revision="dev")
    with pytest.raises(TwinMergingError, match="no such revision"):
        push_artifact(copy, REPO, revision="refs/pr/9")


def test_a_branch_is_made(copy, stub):
    push_artifact(copy, REPO, revision="dev")
    assert LAYOUT.weights in stub.files(REPO, "dev") and LAYOUT.weights not in stub.files(REPO)


def test_weights_of_an_earlier_artifact_do_not_stay(copy, stub, tmp_path):
    """Transformers would read them instead of the new ones."""
    push_artifact(copy, REPO)
    load(copy).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    push_artifact(tmp_path / "shards", REPO)
    assert LAYOUT.weights not in stub.files(REPO) and LAYOUT.index in stub.files(REPO)
    push_artifact(copy, REPO)
    assert {n for n in stub.files(REPO) if "model" in n and n.endswith((".safetensors", ".index.json"))} == {
        LAYOUT.weights
    }


def test_only_the_artifact_is_uploaded(copy, stub):
    (copy / ".env").write_text("SECRET=1")
    (copy / "notes.txt").write_text("mine")
    pushed = push_artifact(copy, REPO)
    assert pushed.left == [".env", "notes.txt"] and not {".env", "notes.txt"} & set(stub.files(REPO))


def test_a_link_to_outside_is_refused(copy, stub, tmp_path):
    (tmp_path / "secret").write_text((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(TwinMergingError, match="is a link to .*secret, outside of the artifact"):
        push_artifact(copy, REPO)
    assert stub.requests == []


def test_a_token_in_a_recipe_is_not_published(world, stub, tmp_path):
    secret = "hf_" + "Ab3" * 12
    inputs = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    recipe = tiny.write_recipe(inputs, ("a", "b"), data=False)
    recipe.write_text(f"# HF_TOKEN={secret}\n" + recipe.read_text())
    artifact = build_artifact(recipe, tmp_path / "out", Progress(quiet=True)).folder
    with pytest.raises(TwinMergingError, match="holds a Hub token") as caught:
        push_artifact(artifact, REPO)
    assert secret not in str(caught.value) and REPO not in stub.repos
    with pytest.raises(TwinMergingError, match="holds a Hub token"):
        make_space(artifact, tmp_path / "space")


def test_what_is_not_whole_is_not_uploaded(copy, stub):
    (copy / "mix_twin_merging.py").write_text("import os\n")
    (copy / LAYOUT.recipe).unlink()
    with pytest.raises(TwinMergingError, match="is not whole, so it is not uploaded") as caught:
        push_artifact(copy, REPO)
    assert "mix_twin_merging.py" in str(caught.value) and LAYOUT.recipe in str(caught.value)
    assert stub.requests == []


# ---- the card ---------------------------------------------------------------------------------------------------


def test_a_card_that_nobody_edited_is_rendered_again_as_it_was(artifact):
    """Also from a config on disk, whose keys stand in another order than those of the build."""
    card = upload.card_for(artifact, read_config(artifact))
    assert card == (artifact / LAYOUT.card).read_text() and LOCATION in card


EVALUATION = {
    "data": {"b": {"file": "b.jsonl", "rows": 50, "metric": "accuracy"}},
    "experts": {"scores": {"b": 0.8}, "source": ""},
    "routed": {"raw": {"b": 0.6}},
    "given": {"raw": {"b": 0.6}},
    "merges": {},
}


def test_an_edited_card_keeps_its_words(copy, stub):
    text = (copy / LAYOUT.card).read_text().replace("## Limits", "My own words.\n\n## Limits")
    (copy / LAYOUT.card).write_text(text)
    said: list[str] = []
    push_artifact(copy, REPO, say=said.append)
    assert stub.files(REPO)[LAYOUT.card].decode() == text.replace("PATH_OR_REPO_ID", REPO)
    assert not any("was edited" in line for line in said)
    (copy / LAYOUT.evaluation).write_text(json.dumps(EVALUATION))
    push_artifact(copy, REPO, say=said.append)
    assert any("was edited" in line and LAYOUT.evaluation in line for line in said)


def test_an_evaluation_in_the_folder_goes_into_the_card(copy, stub):
    (copy / LAYOUT.evaluation).write_text(json.dumps(EVALUATION))
    push_artifact(copy, REPO)
    card = ModelCard(stub.files(REPO)[LAYOUT.card].decode())
    assert [r.metric_value for r in card.data.eval_results] == [0.6, 75.0] and LAYOUT.evaluation in stub.files(REPO)
    for broken in ("{", "[]", json.dumps({**EVALUATION, "data": {"zebra": {}}})):
        (copy / LAYOUT.evaluation).write_text(broken)
        with pytest.raises(TwinMergingError, match=r"evaluation\.json cannot be read"):
            push_artifact(copy, REPO)


# ---- what goes wrong --------------------------------------------------------------------------------------------


def test_a_bad_token_is_explained_and_not_shown(copy, stub, monkeypatch):
    secret = "hf_another_secret_token"
    with pytest.raises(TwinMergingError, match="log in with `hf auth login`") as caught:
        push_artifact(copy, REPO, token=secret)
    assert secret not in str(caught.value) and REPO not in stub.repos


REFUSALS = {
    "no permission": ("commit/", 403, "Forbidden", "may not write there"),
    "a full account": ("commit/", 403, "Private repository storage limit reached", "storage is full"),
    "payment": ("commit/", 402, "Payment required", "storage is full"),
    "a request too large": ("preupload", 413, "Payload too large", "storage is full"),
    "a name that is taken otherwise": ("repos/create", 400, "Bad name", "refuses the request"),
    "a broken server": ("commit/", 500, "oops", "run it again"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_refuses_is_explained(copy, stub, case):
    part, status, message, expected = REFUSALS[case]
    stub.refuses[part] = (status, message)
    with pytest.raises(TwinMergingError, match=expected) as caught:
        push_artifact(copy, REPO)
    assert REPO in str(caught.value) and TOKEN not in str(caught.value)
    stub.refuses.clear()
    assert push_artifact(copy, REPO).commit == stub.repos[REPO].refs["main"]


@pytest.mark.parametrize("name", ["a b", "a/b/c", "-x", "x" * 200])
def test_a_name_that_cannot_be(copy, stub, name):
    said: list[str] = []
    with pytest.raises(TwinMergingError, match="can be no repository, give NAME or NAMESPACE/NAME"):
        push_artifact(copy, name, say=said.append)
    assert said == [], "before the artifact is looked at"


def test_no_network_and_no_wish_for_one_are_said_first(copy, stub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TwinMergingError, match=f"^{REPO}: http://127.0.0.1:9 cannot be reached; is there a network"):
        push_artifact(copy, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        TwinMergingError, match=f"^{REPO}: nothing can be uploaded in offline mode; unset HF_HUB_OFFLINE"
    ):
        push_artifact(copy, REPO)


def test_a_card_that_the_hub_could_not_read_is_refused_and_an_empty_one_is_written_anew(copy, stub):
    before = (copy / LAYOUT.card).read_text()
    (copy / LAYOUT.card).write_text("---\ntags: [1\n---\nMine.\n")
    with pytest.raises(TwinMergingError, match=r"README\.md: the metadata .* cannot be read"):
        push_artifact(copy, REPO)
    (copy / LAYOUT.card).write_text("\n")
    push_artifact(copy, REPO)
    assert stub.files(REPO)[LAYOUT.card].decode() == before.replace("PATH_OR_REPO_ID", REPO)


def test_quiet_is_quiet(copy, stub):
    result = CliRunner().invoke(app, ["upload", "--quiet", str(copy), REPO])
    assert result.exit_code == 0 and result.stderr == "", result.output


def test_large_files_that_broke_off_are_resumed(copy, large, tmp_path):
    load(copy).save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    large.breaks["PUT /objects"] = 10_000
    with pytest.raises(TwinMergingError, match="run it again"):
        push_artifact(tmp_path / "shards", REPO)
    assert set(large.files(REPO)) == {".gitattributes"}, "nothing that loads, and nothing half"
    large.breaks = {"commit/main": 10_000}
    with pytest.raises(TwinMergingError, match="run it again"):
        push_artifact(tmp_path / "shards", REPO)
    assert set(large.files(REPO)) == {".gitattributes"} and len(large.objects) == len(shards)
    large.breaks, large.requests = {}, []
    push_artifact(tmp_path / "shards", REPO)
    assert not [line for line in large.requests if line.startswith("PUT")], "nothing is sent twice"
    assert all(large.files(REPO)[name] == (tmp_path / "shards" / name).read_bytes() for name in shards)


# ---- push_to_hub of a loaded model ------------------------------------------------------------------------------


def test_push_to_hub_carries_the_whole_artifact_and_its_card(copy, stub):
    load(copy).push_to_hub("twin", tags=["mine"])
    found = dict(stub.files(REPO))
    card = ModelCard(found.pop(LAYOUT.card).decode())
    assert found.pop(".gitattributes") and found == expected_files(copy)
    assert card.text.strip() == ModelCard((copy / LAYOUT.card).read_text()).text.strip()
    assert {"mine", "twin-merging"} <= set(card.data.tags)
    load(copy).push_to_hub("twin")
    assert "## Experts" in stub.files(REPO)[LAYOUT.card].decode()


def test_save_with_push_does_the_same(copy, stub, tmp_path):
    model = load(copy)
    model.save_pretrained(tmp_path / "twin")  # its companions are old files by the next call
    model.save_pretrained(tmp_path / "twin", push_to_hub=True)
    found = dict(stub.files(REPO))
    assert found.pop(LAYOUT.card) == (copy / LAYOUT.card).read_bytes()
    assert found.pop(".gitattributes") and found == expected_files(copy)
    assert files.listing(tmp_path / "twin") == files.listing(copy)


def test_save_with_push_keeps_a_card_of_the_users(copy, stub, tmp_path):
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / LAYOUT.card).write_text("---\ntags:\n- mine\n---\nMy words.\n")
    load(copy).save_pretrained(tmp_path / "twin", push_to_hub=True)
    assert stub.files(REPO)[LAYOUT.card] == b"---\ntags:\n- mine\n---\nMy words.\n"
    assert (tmp_path / "twin" / LAYOUT.card).read_text() == "---\ntags:\n- mine\n---\nMy words.\n"
