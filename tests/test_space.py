"""`twin-merging space`: a folder that holds all that a Space needs, and a page that says what the artifact says."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests import tiny
from tests.conftest import load
from tests.modeling.language import NAMES, LanguageWorld
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.cli import app
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.space import make_space


COMMIT = "0123456789" * 4
BIN = Path(os.environ.get("SPACE_BIN", "no environment"))


def answering(folder: Path):
    """The page's answers, made by the file that lies in the Space."""
    spec = importlib.util.spec_from_file_location("space_answering", folder / "answering.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    return module.Answering(str(folder / settings["source"]), settings["auto_class"], settings["revision"])


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return LanguageWorld(tmp_path_factory.mktemp("space"))


@pytest.mark.parametrize("kind", ["bert", "vit"])
@torch.no_grad()
def test_the_page_says_what_the_artifact_says(world, kind, tmp_path):
    artifact = world.artifact(kind)
    folder = make_space(artifact, tmp_path / "space")
    given = tiny.picture(1, 5) if kind == "vit" else "w25 w26 w27 w30"
    answer, model = answering(folder), load(artifact)
    shown, inputs = answer(given), answer._inputs(given)
    output = model(**inputs)
    assert shown.answer == model.config.id2label[int(output.logits.argmax())]
    assert list(shown.weights) == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(list(shown.weights.values())), model.route(**inputs)[0])
    assert [row[0] for row in shown.table] == ["a", "b", "c", "the shared model"]
    for name, row in zip("abc", shown.table, strict=False):
        own = model(**inputs, experts=name).logits[0].exp()
        assert row[2] == model.config.id2label[int(own.argmax())] and row[2].startswith(f"{name}/")
        assert float(row[3]) == pytest.approx(float(own.max()), abs=1e-3)


@pytest.mark.parametrize("kind", ["llama-lm", "t5-lm", "bert-lm"])
@torch.no_grad()
def test_language_models_write_or_fill(language, kind, tmp_path):
    artifact = language.artifact(kind)
    answer, model = answering(make_space(artifact, tmp_path / "space")), load(artifact)
    text = "w25 w26 [MASK] w30" if kind == "bert-lm" else "w25 w26 w27"
    shown, inputs = answer(text), answer._inputs(text)
    assert [row[0] for row in shown.table] == [*NAMES, "the shared model"]
    if kind == "bert-lm":
        best = int(model(**inputs, experts="b").logits[0, 3].argmax())
        assert shown.table[1][2].split(", ")[0] == answer.processor.decode([best]).strip()
        with pytest.raises(ValueError, match=r"\[MASK\]"):
            answer("w25")
    else:
        written = model.generate(**inputs, experts="b", max_new_tokens=60, do_sample=False, pad_token_id=0)[0]
        start = 0 if kind == "t5-lm" else inputs["input_ids"].shape[1]
        assert shown.table[1][2] == answer.processor.decode(written[start:], skip_special_tokens=True).strip()


@torch.no_grad()
def test_taggers_and_regressions_are_shown(world, tmp_path):
    tagged = answering(make_space(world.artifact("bert-tokens", tiny.TAGS), tmp_path / "tags"))("w25 w26")
    assert all("[" in row[2] for row in tagged.table)
    artifact = world.artifact("bert", {"a": ["x", "y"], "r": ["value"]})
    answer, model = answering(make_space(artifact, tmp_path / "numbers")), load(artifact)
    own = model(**answer._inputs("w25 w26"), experts="r")
    number = float(own.expert_logits[0, slice(*model.label_space.spans[1])])
    assert answer("w25 w26").table[1][2] == f"r: {number:.3f}"


@torch.no_grad()
def test_experts_that_are_all_regressions_share_one_number(world, tmp_path):
    artifact = world.artifact("bert", {"r": ["value"], "s": ["value"]})
    answer, model = answering(make_space(artifact, tmp_path / "numbers")), load(artifact)
    inputs = answer._inputs("w25 w26")
    shown = answer("w25 w26")
    assert shown.answer == f"value: {float(model(**inputs).logits[0, 0]):.3f}"
    assert shown.table[1][2] == f"value: {float(model(**inputs, experts='s').logits[0, 0]):.3f}"


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_text_longer_than_the_model_takes_is_cut(world, kind, tmp_path):
    answer = answering(make_space(world.artifact(kind), tmp_path / "space"))
    answer.processor.model_max_length = 10**30
    assert answer("w25 " * 3000).answer


def test_what_is_no_part_of_the_artifact_stays_at_home(world, tmp_path):
    artifact = Path(shutil.copytree(world.artifact("bert"), tmp_path / "copy"))
    (artifact / ".env").write_text("HF_TOKEN=hf_secret")
    folder = make_space(artifact, tmp_path / "space")
    assert not (folder / "artifact" / ".env").exists() and check_artifact(folder / "artifact") == []
    (artifact / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (artifact / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(TwinMergingError, match="is a link to"):
        make_space(artifact, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_input_that_is_none_is_refused(world, tmp_path):
    answer = answering(make_space(world.artifact("bert"), tmp_path / "space"))
    for nothing in (None, "", "  "):
        with pytest.raises(ValueError, match="input"):
            answer(nothing)


def test_the_folder_is_a_space(world, tmp_path):
    run = CliRunner().invoke(
        app, ["space", str(world.artifact("vit")), str(tmp_path / "space"), "--title", 'My "Space": 1']
    )
    assert run.exit_code == 0, run.output
    folder = tmp_path / "space"
    _, card, text = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
    meta = yaml.safe_load(card)
    assert (
        meta["sdk"] == "gradio"
        and meta["app_file"] == "app.py"
        and meta["title"] == 'My "Space": 1'
        and "models" not in meta
    )
    assert (folder / "artifact" / "model.safetensors").exists() and "`a`, `b`, `c`" in text
    requirements = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("pillow") for line in requirements) and not any("twin" in line for line in requirements)
    compile((folder / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


def test_a_space_may_load_a_pinned_commit_from_the_hub(world, tmp_path):
    folder = make_space(world.artifact("bert"), tmp_path / "space", f"me/twin@{COMMIT}")
    assert json.loads((folder / "settings.json").read_text(encoding="utf-8"))["revision"] == COMMIT
    assert not (folder / "artifact").exists() and "me/twin" in (folder / "README.md").read_text(encoding="utf-8")
    for repo_id in ("me/twin", "me/twin@main", f"twin@{COMMIT}"):
        with pytest.raises(TwinMergingError, match="COMMIT"):
            make_space(world.artifact("bert"), tmp_path / "other", repo_id)


def test_what_is_no_artifact_makes_no_space(tmp_path):
    (tmp_path / "empty").mkdir()
    run = CliRunner().invoke(app, ["space", str(tmp_path / "empty"), str(tmp_path / "out")])
    assert run.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.browser
@pytest.mark.skipif(not (BIN / "python").exists(), reason="SPACE_BIN names no environment with gradio and playwright")
def test_a_real_browser_types_reads_the_bars_and_takes_a_picture(world, tmp_path):
    artifact = world.artifact("bert")
    folder = make_space(artifact, tmp_path / "space", title="Tiny")
    picture = Path(os.environ.get("SPACE_PICTURE", tmp_path / "space.png"))
    script = Path(__file__).with_name("space_browser.py")
    text = "w25 w26 w27 w30"
    done = subprocess.run(
        [str(BIN / "python"), str(script), str(folder), text, str(picture)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    expected = answering(folder)(text)
    print(f"\nthe page showed: {seen}")
    assert seen["answer"] == expected.answer
    best = max(expected.weights, key=expected.weights.get)
    assert seen["bars"][best] == f"{100 * expected.weights[best]:.0f}%"
    for row in expected.table:
        assert row[0] in seen["table"] and row[2] in seen["table"]
    assert Image.open(picture).size[0] > 600 and picture.stat().st_size > 10_000
