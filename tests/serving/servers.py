"""Fronts and engines on loopback, in threads of the test's process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn

from twin_merging_hf.serving.engine import free_port


@contextlib.contextmanager
def running(server: uvicorn.Server) -> Iterator[str]:
    """Run a server in a thread; its URL."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def engine(app: Any, port: int | None = None) -> Iterator[str]:
    """An engine's application on a port."""
    config = uvicorn.Config(app, port=port or free_port(), log_level="warning", timeout_graceful_shutdown=1)
    with running(uvicorn.Server(config)) as url:
        yield url


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to become true; fail if it does not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_ready(url: str, status: int = 200) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health").status_code == status
    return False
