"""The snippets of README and docs: recipes are parsed, code and commands run, and what cannot run is listed with its reason."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from tests.conftest import World
from tests.files import ROOT
from tests.stub_hub import StubHub, connect
from twin_merging_hf import reload
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.cli import app
from twin_merging_hf.hub_upload import upload
from twin_merging_hf.recipe import parse_recipe


TUTORIALS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("tutorial_*.md"))]
"""Pages whose snippets run one after the other in an empty folder, as a reader would."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(python|bash|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets() -> dict[str, str]:
    """All snippets by page, language and number among those: `docs/hub.md python 1`."""
    found: dict[str, str] = {}
    for page in PAGES:
        counts: dict[str, int] = {}
        for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
            counts[language] = counts.get(language, 0) + 1
            found[f"{page.relative_to(ROOT).as_posix()} {language} {counts[language]}"] = code
    return found


SNIPPETS = snippets()
ARTIFACTS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "README.md python 1": ("artifact", {"sst2": ["negative", "positive"], "topic": ["politics", "sport"]}),
    "README.md python 2": ("work/artifact", {"newsgroups": ["autos", "space", "med"], "election": ["a", "b", "c"]}),
    "docs/export.md python 3": ("artifact", {"sst2": ["negative", "positive"], "qqp": ["no", "yes"]}),
    "docs/inference.md python 1": ("artifact", {"sst2": ["negative", "positive"], "qqp": ["no", "yes"]}),
}
"""Python that runs beside an artifact of tiny experts: its folder there, and the experts' labels."""
COMMANDS = {
    "docs/export.md bash 1": "vllm has no LoRA for classifiers: tests/test_export.py exports a language model",
}
"""Bash that runs in part: why its last line does not."""
NOT_RUN = {
    **{f"{page} bash 1": "installs" for page in TUTORIALS},
    "README.md bash 1": "makes environments; CI runs `make test`",
    "README.md bash 2": "installs; the commands after it run in tests/test_cli.py",
    "README.md bash 3": "trains experts for minutes",
    "docs/alignment.md python 1": "its models and batches are the reader's; tests/alignment/ has them",
    "docs/alignment.md python 2": "its model class is the reader's; tests/alignment/ registers one",
    "docs/alignment.md bash 1": "its recipe is the reader's; tests/test_align_experts.py runs both modes",
    "docs/editing.md python 1": "its experts are the reader's; tests/modeling/test_live_editing.py loads and deletes one",
    "docs/evaluate.md bash 1": "starts processes; tests/test_distributed.py does so",
    "docs/export.md python 1": "needs the folders of the commands before it; tests/test_export.py loads them",
    "docs/export.md python 2": "needs the folders of the commands before it; tests/test_export.py routes with them",
    "docs/generation.md python 1": "needs a chat template and many tokens; tests/modeling/ generates in each way",
    "docs/hub.md bash 1": "uploads; tests/hub_upload/ does so to a Hub on loopback",
    "docs/hub.md python 1": "downloads; tests/hub_upload/ does so from a Hub on loopback",
    "docs/hub.md bash 3": "uploads; tests/test_space.py writes the page and uses it in a browser",
    "docs/hub.md bash 2": "its rows are the reader's; tests/test_evaluate.py runs the command",
    "docs/large_builds.md bash 1": "its recipe is the reader's; tests/test_large_builds.py builds with these options",
    "docs/lora.md python 1": "its base is a Hub model that has moved; tests/test_lora.py moves one",
    "docs/lora.md yaml 2": "part of a recipe; its base is the reader's",
    "docs/serving.md bash 1": "needs vLLM; tests/serving/ runs the command with a stand-in",
    "docs/serving.md bash 2": "needs a running front; tests/serving/ asks one",
    "docs/serving.md bash 3": "needs running engines; tests/serving/test_front.py has two",
    "docs/security.md bash 1": "10,000 inputs take minutes; tests/test_hostile.py runs fewer",
}


def _page(name: str) -> str:
    return name.split(" ")[0]


RECIPES = [n for n in SNIPPETS if " yaml " in n and n not in NOT_RUN and _page(n) not in TUTORIALS]


def test_every_snippet_is_run_or_listed() -> None:
    tutorials = [name for name in SNIPPETS if _page(name) in TUTORIALS and name not in NOT_RUN]
    handled = [*ARTIFACTS, *COMMANDS, *NOT_RUN, *RECIPES, *tutorials]
    assert len(handled) == len(set(handled))
    assert set(handled) == set(SNIPPETS), "a snippet is neither run nor listed, or a listed one is gone"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_one(name: str) -> None:
    parse_recipe(yaml.safe_load(SNIPPETS[name]))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_python_runs(name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = _beside_artifact(name, world, tmp_path, monkeypatch)
    exec(compile(SNIPPETS[name], name, "exec"), scope)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_run(name: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _beside_artifact("docs/export.md python 3", world, tmp_path, monkeypatch)
    *lines, _ = SNIPPETS[name].splitlines()
    for number, line in enumerate(lines):
        words = shlex.split(line.replace(" out ", f" out{number} "), comments=True)
        assert words[0] == "twin-merging"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_tutorial_runs_from_an_empty_folder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python in one session, commands line by line, recipes as the files that their first line names."""
    server = StubHub()
    connect(monkeypatch, server, tmp_path / "cache")
    for module in (reload, upload):  # the clean process has tests of its own
        monkeypatch.setattr(module, "check_whole", check_artifact)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    scope: dict[str, Any] = {}
    for name, code in SNIPPETS.items():
        if _page(name) == page and name not in NOT_RUN:
            _follow(name, code, scope)
    [files] = [repo.at("main") for repo in server.repos.values()]
    assert files and "config.json" in files[1], "the last step shares the artifact"
    server.close()


def _follow(name: str, code: str, scope: dict[str, Any]) -> None:
    """One step of a tutorial."""
    language = name.split(" ")[1]
    if language == "python":
        exec(compile(code, name, "exec"), scope)
    elif language == "yaml":
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
    else:
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "twin-merging"
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{name}: {line}: {result.output}"


def _beside_artifact(name: str, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Go to a folder with an artifact; the names that a snippet takes for given."""
    place, labels = ARTIFACTS[name]
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(world.artifact("bert", labels), target_is_directory=True)
    monkeypatch.chdir(folder)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    batch = AutoTokenizer.from_pretrained(place)(["w1 w2", "w40"], padding=True, return_tensors="pt")
    return {"torch": torch, "model": model, "batch": batch}
