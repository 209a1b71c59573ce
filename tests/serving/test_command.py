"""`twin-merging serve`: a process with an engine of its own, which ends well and starts a lost engine again."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from tests.modeling.language import NAMES, LanguageWorld
from tests.serving.servers import is_ready, until
from twin_merging_hf.cli import app
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.export import export_adapters, export_vllm
from twin_merging_hf.serving.engine import engine_command, free_port
from twin_merging_hf.serving.front import EXPERT_HEADER
from twin_merging_hf.serving.served import read_served


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return LanguageWorld(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def exported(language):
    export_vllm(language.artifact("llama-lm"), language.root / "export")
    return language.root / "export"


@pytest.fixture
def vllm(tmp_path):
    """A program that is started as vLLM is; it writes its process id to a file of its port's name beside it."""
    program = tmp_path / "vllm"
    program.write_text(
        f'#!/bin/sh\ncd {ROOT}\necho $$ >> {tmp_path}/pids\nexec {sys.executable} -m tests.serving.fake_engine "$@"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return program


def pids(vllm: Path) -> list[int]:
    file = vllm.with_name("pids")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


@contextlib.contextmanager
def served(*arguments: str):
    """A `serve` process: it, its URL and the lines that it says."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "twin_merging_hf.cli",
        "serve",
        *arguments[:1],
        "--port",
        str(port),
        *arguments[1:],
    ]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        yield process, f"http://127.0.0.1:{port}", lines
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def complete(url: str, **body) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "w30 w31 w32", **body}, timeout=30)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_an_artifact_is_exported_its_engine_started_and_ended_by_sigterm_after_the_work(language, vllm):
    with served(str(language.artifact("llama-lm")), "--engine", str(vllm)) as (process, url, lines):
        until(lambda: is_ready(url), 120)
        (engine,) = pids(vllm)
        assert any("exporting" in line for line in lines) and is_alive(engine)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(complete, url, delay=2.0) for _ in range(4)]
            until(lambda: httpx.get(f"{url}/health").json()["upstreams"][0]["in_flight"] == 4)
            process.send_signal(signal.SIGTERM)
            until(lambda: not is_ready(url), 2)
            assert [answer.result().status_code for answer in answers] == [200] * 4, "work is finished first"
        assert process.wait(30) == 0
        assert not is_alive(engine)
        log = re.search(r"messages: (\S+?);", "".join(lines)).group(1)
        assert not Path(log).parent.exists(), "nothing is left behind"


def test_a_lost_engine_is_started_again_under_load(exported, vllm):
    with served(str(exported), "--engine", str(vllm)) as (_, url, lines):
        until(lambda: is_ready(url), 120)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(complete, url, delay=0.3) for _ in range(60)]
            until(lambda: answers[0].done())
            os.kill(pids(vllm)[-1], signal.SIGKILL)
            found = [answer.result() for answer in answers]
        assert {answer.status_code for answer in found} <= {200, 502, 503} and found[0].status_code == 200
        assert all(EXPERT_HEADER in answer.headers for answer in found if answer.status_code == 200)
        assert any(answer.status_code != 200 for answer in found)
        assert all("error" in answer.json() for answer in found if answer.status_code != 200)
        until(lambda: is_ready(url))
        assert complete(url).status_code == 200 and len(pids(vllm)) == 2
        assert any("ended with code -9" in line for line in lines)


def test_a_stream_whose_engine_dies_ends_with_an_error_event(exported, vllm):
    with served(str(exported), "--engine", str(vllm)) as (_, url, _lines):
        until(lambda: is_ready(url), 120)
        body = {"prompt": "w30", "stream": True, "die": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert answer.status_code == 200 and "choices" in events[0]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == 502
        until(lambda: is_ready(url))
        refused = complete(url, die=True)
        assert refused.status_code == 502 and "try again" in refused.json()["error"]["message"]


def test_the_engines_command_line_has_every_adapter_and_the_options_given(exported, vllm):
    command = engine_command(read_served(exported), str(vllm), 9, ["--dtype", "bfloat16"])
    assert command[:3] == [str(vllm), "serve", str(exported / "base")] and command[-2:] == ["--dtype", "bfloat16"]
    start = command.index("--lora-modules") + 1
    found = [json.loads(each) for each in command[start : start + len(NAMES)]]
    assert found == [{"name": name, "path": str(exported / name)} for name in NAMES]
    rank = json.loads((exported / "export.json").read_text(encoding="utf-8"))["max_lora_rank"]
    assert command[command.index("--max-lora-rank") + 1] == str(rank)


def test_no_engine_is_told_at_once(exported):
    run = CliRunner().invoke(app, ["serve", str(exported), "--engine", "no-such-program"])
    assert run.exit_code == 2 and "--upstream" in run.output


def test_what_cannot_be_served_is_refused(world, exported, language, tmp_path):
    run = CliRunner().invoke(app, ["serve", str(world.artifact("bert")), "--upstream", "http://127.0.0.1:9"])
    assert run.exit_code == 2 and "causal language models" in run.output
    export_adapters(language.artifact("llama-lm"), tmp_path / "peft")
    with pytest.raises(TwinMergingError, match="only `vllm`"):
        read_served(tmp_path / "peft")
    for content in (
        "{",
        "[]",
        '{"format": "vllm"}',
        '{"format": "vllm", "experts": [{"name": "z"}], "max_lora_rank": 8}',
    ):
        folder = tmp_path / f"damaged{len(content)}"
        folder.mkdir()
        (folder / "export.json").write_text(content)
        with pytest.raises(TwinMergingError, match="export again"):
            read_served(folder)
