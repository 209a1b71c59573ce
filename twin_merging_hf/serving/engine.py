"""The engine: vLLM in a process of its own, started again when it ends."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from twin_merging_hf.errors import TwinMergingError

from .served import NONE, Served


_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before each new start of an engine that keeps ending
_STEADY = 120.0  # an engine that lived so long starts again at once


def engine_command(served: Served, engine: str, port: int, more: Sequence[str] = ()) -> list[str]:
    """
    The command line of `vllm serve` for an export: all adapters under their names, the shared model as `base`.

    Raises:
        TwinMergingError: there is no such program.
    """
    program = shutil.which(engine)
    if program is None:
        raise TwinMergingError(
            f"there is no program {engine!r}; install vLLM in an environment of its own and give "
            "`--engine ENVIRONMENT/bin/vllm`, or start it elsewhere and give `--upstream http://HOST:PORT`"
        )
    adapters = [json.dumps({"name": name, "path": str(served.folder / name)}) for name in served.experts]
    options = {
        "--served-model-name": NONE,
        "--max-lora-rank": served.max_lora_rank,
        "--max-loras": len(adapters),
        "--host": "127.0.0.1",
        "--port": port,
    }
    listed = [str(part) for pair in options.items() for part in pair]
    return [program, "serve", str(served.base), "--enable-lora", *listed, "--lora-modules", *adapters, *more]


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def keep_running(command: Sequence[str], log: Path, say: Callable[[str], None]) -> None:
    """Run a command, its output in `log`, and start it again whenever it ends; cancelled, it is ended with its children."""
    failures = 0
    loop = asyncio.get_running_loop()
    while True:
        started = loop.time()
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            code = await process.wait()
        finally:
            await _end(process)
        failures = 0 if loop.time() - started > _STEADY else failures + 1
        pause = _PAUSES[min(failures, len(_PAUSES)) - 1] if failures else 0.0
        say(f"the engine ended with code {code} (its messages: {log}); it starts again in {pause:.0f} s")
        await asyncio.sleep(pause)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and all that it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
            if number == signal.SIGKILL:
                return
        # The process has ended; what it started is killed in the next turn.
