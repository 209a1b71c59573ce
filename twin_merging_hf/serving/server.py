"""The HTTP server: uvicorn, with a limit for clients that never finish the head of a request."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def make_server(app: Any, host: str, port: int, head_seconds: float, drain_seconds: float) -> uvicorn.Server:
    """
    A server of an application; signalled, it takes no more connections and finishes the requests at work.

    Args:
        head_seconds: longest time for the head of a request. drain_seconds: for requests at work after a signal.
    """
    protocol = type("Protocol", (_Impatient,), {"head_seconds": head_seconds})
    config = uvicorn.Config(
        app, host, port, http=protocol, ws="none", lifespan="on", log_level="warning", access_log=False,
        timeout_graceful_shutdown=round(drain_seconds), server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)


def run(server: uvicorn.Server) -> None:
    """Serve until SIGINT or SIGTERM."""
    with _signals_are_uvicorns():
        server.run()


class _Impatient(H11Protocol):
    """Closes a connection on which the head of a request has not come to its end in time."""

    head_seconds = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self.conn.trailing_data[0]:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


@contextlib.contextmanager
def _signals_are_uvicorns() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, for handlers of others; a drained server has ended well."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
