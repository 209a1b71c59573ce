"""The command: what it prints, what it writes, and how it ends."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import files, tiny
from twin_merging_hf import TwinMergingError, __version__, builder, starter, verdict
from twin_merging_hf.cli import app
from twin_merging_hf.recipe import load_recipe


COMMANDS = (
    "init", "build", "align", "tune", "check", "inspect", "verify", "upload", "evaluate", "add-expert", "remove-expert",
    "replace-expert", "export", "serve", "space", "demo",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _signals():
    """The command may take over signals; tests give them back. SIGINT acts as it does in a terminal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def inputs(world, tmp_path) -> Path:
    return files.copy_inputs(world.experts("bert"), tmp_path / "in")


def call(*args, code: int = 0):
    """Run the command in this process; errors of the program itself are not swallowed."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_help_lists_every_command():
    text = call("--help").output
    assert all(command in text for command in COMMANDS)
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    assert "Usage" in call(command, "--help").output


def test_a_full_disk_and_a_forbidden_file_are_said_in_one_line(inputs, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(inputs / "a"))

    monkeypatch.setattr(builder, "build_artifact", fail)
    result = call("build", inputs / "recipe.yaml", tmp_path / "out", code=2)
    assert result.stderr.splitlines()[-1] == f"error: Permission denied: {inputs / 'a'}"


def test_a_token_in_a_recipe_is_not_shown(inputs, tmp_path):
    token = "hf_abcdefghijklmnopqrst"
    tiny.write_recipe(inputs, ("a", "b"), experts={"a": {"model": f"/none/{token}"}})
    result = call("build", inputs / "recipe.yaml", tmp_path / "out", code=2)
    assert "/none/[token] is not a folder" in result.output and token not in result.output


def test_without_a_command_it_helps():
    assert "Usage" in CliRunner().invoke(app, []).output


def test_version():
    assert call("--version").output == f"twin-merging-hf {__version__}\n"


@pytest.mark.parametrize("args", [["nothing"], ["build"], ["build", "a", "b", "c"], ["check", "--what"]])
def test_wrong_usage_ends_with_2(args):
    call(*args, code=2)


# ---- init -------------------------------------------------------------------------------------------------------


def test_init_writes_a_recipe_of_what_fits(inputs, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = call("init", inputs / "a", inputs / "b", "--base", inputs / "base", "-o", recipe).output
    assert text.count("- fits") == 3 and f"twin-merging build {recipe}" in text
    assert load_recipe(recipe).names == ["a", "b"]
    call("build", recipe, tmp_path / "out", "--dry-run")


def test_init_ends_with_1_where_something_does_not_fit(inputs, tmp_path):
    files.edit_json(inputs / "b" / "config.json", hidden_act="relu")
    text = call("init", inputs / "a", inputs / "b", "-o", tmp_path / "recipe.yaml", code=1).output
    assert "b: BertForSequenceClassification" in text and "does not fit" in text and "hidden_act" in text
    assert load_recipe(tmp_path / "recipe.yaml").names == ["a"]


def test_init_does_not_overwrite(inputs, tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    result = call("init", inputs / "a", "-o", tmp_path / "recipe.yaml", code=2)
    assert "exists already" in result.stderr and (tmp_path / "recipe.yaml").read_text() == "mine"


def test_init_writes_into_a_folder_that_is_not_there_yet_or_says_so(inputs, tmp_path):
    recipe = tmp_path / "new" / "recipe.yaml"
    result = CliRunner().invoke(app, ["init", str(inputs / "a"), "-o", str(recipe)])
    assert result.exit_code in (0, 2), repr(result.exception)
    assert recipe.is_file() if result.exit_code == 0 else str(recipe.parent) in result.stderr


def test_init_of_nothing_writes_nothing(tmp_path):
    result = call("init", tmp_path / "missing", "-o", tmp_path / "recipe.yaml", code=2)
    assert "error: expert 'missing'" in result.stderr and list(tmp_path.iterdir()) == []


# ---- build, check, inspect --------------------------------------------------------------------------------------


def test_a_dry_run_tells_and_writes_nothing(inputs, tmp_path):
    recipe = tiny.write_recipe(inputs, ("a", "b"))
    before = files.listing(tmp_path)
    text = call("build", recipe, tmp_path / "out", "--dry-run").stdout
    for part in (
        "expert a: a, 2 labels",
        "expert b: b, 3 labels",
        "a/x, a/y, b/p",
        "router: linear",
        "nothing was written",
    ):
        assert part in text
    assert files.listing(tmp_path) == before


def test_a_dry_run_finds_what_a_build_would(inputs, tmp_path):
    (inputs / "a.jsonl").write_text("{")
    result = call("build", tiny.write_recipe(inputs, ("a", "b")), tmp_path / "out", "--dry-run", code=2)
    assert "a.jsonl, line 1" in result.stderr and not (tmp_path / "out").exists()


def test_build_check_and_inspect(inputs, tmp_path):
    out = tmp_path / "out"
    result = call("build", tiny.write_recipe(inputs, ("a", "b")), out)
    assert "Verdict" in result.stdout and f"twin-merging check {out}" in result.stdout
    assert "times the shared backbone" in result.stdout and "router accuracy" in result.stdout
    assert "checking recipe" in result.stderr
    text = call("check", out).stdout
    assert f"{out} is whole" in text and f'pipeline("text-classification", model="{out}")' in text
    text = call("inspect", out).stdout
    for part in ("BertForSequenceClassification, 2 experts, 5 labels", "a: x, y", "b: p, q, r", "type linear", "MB"):
        assert part in text
    found = json.loads(call("inspect", out, "--json").stdout)
    assert found["labels"] == ["a/x", "a/y", "b/p", "b/q", "b/r"]
    assert found["storage"]["total"] == files.read_json(out / "report.json")["storage"]["total"]
    assert {"folder", "shared_class", "experts", "router", "rank", "provenance"} < set(found)


def test_quiet_says_nothing_on_the_way(inputs, tmp_path):
    recipe = tiny.write_recipe(inputs, ("a", "b"), data=False)
    assert call("build", recipe, tmp_path / "out", "--quiet").stderr == ""


def test_verify_names_what_changed_and_ends_with_1(world, tmp_path):
    artifact, sources = world.artifact("bert"), world.experts("bert")
    lines = call("verify", artifact, "--from", sources).stdout.splitlines()
    assert len(lines) == 5 and all("as at the build" in line for line in lines)
    assert "a: cannot be compared" in call("verify", artifact, "--from", tmp_path, code=1).stdout
    found = json.loads(call("verify", artifact, "--from", tmp_path, "--json", code=1).stdout)
    assert {state["name"] for state in found if state["unknown"]} == {"base", "a", "b", "c"}


def test_check_lists_problems_and_ends_with_1(world, tmp_path):
    result = call("check", world.experts("bert") / "a", code=1)
    assert result.stderr.startswith("problem: ") and result.stdout == ""
    assert "not an artifact" in call("check", tmp_path / "nowhere", code=1).stderr


# ---- errors -----------------------------------------------------------------------------------------------------


def test_errors_are_one_message_and_end_with_2(inputs, tmp_path, world):
    recipe = tiny.write_recipe(inputs, ("a", "b"))
    (tmp_path / "exists").mkdir()
    (tmp_path / "bad.yaml").write_text("experts: [")
    for args in (
        ("build", tmp_path / "none.yaml", tmp_path / "out"),
        ("build", tmp_path / "bad.yaml", tmp_path / "out"),
        ("build", recipe, tmp_path / "exists"),
        ("inspect", tmp_path / "exists"),
        ("inspect", world.experts("bert") / "a"),
        ("demo", tmp_path / "exists"),
    ):
        result = call(*args, code=2)
        assert result.stderr.startswith("error: ") and result.stdout == "", args
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_build_are_listed(inputs, tmp_path):
    (inputs / "a.jsonl").unlink()
    files.edit_json(inputs / "b" / "config.json", hidden_act="relu")
    result = call("build", tiny.write_recipe(inputs, ("a", "b")), tmp_path / "out", code=2)
    assert "2 problems" in result.stderr and "a.jsonl" in result.stderr and "hidden_act" in result.stderr


def test_an_interruption_ends_with_130(inputs, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "separate", interrupt)
    result = call("build", tiny.write_recipe(inputs, ("a", "b")), tmp_path / "out", code=130)
    assert "interrupted" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_compiled_code_turns_into_another_error_is_still_a_signal(
    inputs, tmp_path, monkeypatch, number, code
):
    """A signal may arrive inside of PyTorch, which answers with an error of its own; that is no crash of ours."""

    def swallow(*args, **kwargs):
        try:
            signal.raise_signal(number)
        except (SystemExit, KeyboardInterrupt):
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    monkeypatch.setattr(builder, "separate", swallow)
    result = CliRunner().invoke(app, ["build", str(tiny.write_recipe(inputs, ("a", "b"))), str(tmp_path / "out")])
    assert result.exit_code == code, repr(result.exception)
    assert not (tmp_path / "out").exists()


def test_an_interruption_after_the_artifact_appeared_does_not_deny_it(inputs, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(verdict, "describe", interrupt)
    result = call("build", tiny.write_recipe(inputs, ("a", "b")), tmp_path / "out", code=130)
    assert (tmp_path / "out").is_dir() and "nothing was written" not in result.stderr


def test_mistakes_of_ours_are_not_hidden(inputs, tmp_path, monkeypatch):
    """Only what a user can fix becomes a message."""

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(starter, "look_at", broken)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(app, ["init", str(inputs / "a"), "-o", str(tmp_path / "r")], catch_exceptions=False)
    assert not issubclass(ZeroDivisionError, TwinMergingError)


def test_the_module_runs_as_a_program(inputs, tmp_path):
    """Once for real: exit code, no traceback, nothing on standard output."""
    result = subprocess.run(
        [sys.executable, "-m", "twin_merging_hf.cli", "build", str(inputs / "none.yaml"), "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=files.environment(),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: recipe ") and "Traceback" not in result.stderr
