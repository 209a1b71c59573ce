"""The engines behind the front: which of them are there, and one request to one of them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import httpx

from twin_merging_hf.errors import TwinMergingError


@dataclass
class Upstream:
    """One engine. name: host and port, as told to others; url: may hold credentials. state: why it is not healthy."""

    name: str
    url: str
    healthy: bool = False
    state: str = "not asked yet"
    in_flight: int = 0


class NoUpstreamError(Exception):
    """No engine could be reached."""


class LostUpstreamError(Exception):
    """The last engine that could be tried ended before it answered."""


class Upstreams:
    """
    A pool of engines that serve the same models; requests go to the healthy one with the fewest in flight.

    Args:
        urls: such as http://127.0.0.1:8001, without /v1.
        models: names that an engine must list at /v1/models to be healthy.
        seconds: longest wait for a response, and between two parts of one.
        observe: called with an upstream's name and `unreachable` or `lost` when a request fails.

    Raises:
        TwinMergingError: no URLs, or one that is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        models: Sequence[str],
        seconds: float = 600.0,
        every: float = 1.0,
        observe: Callable[[str, str], None] = lambda name, what: None,
    ):
        self.all = [_parse(url) for url in dict.fromkeys(urls)]
        if not self.all:
            raise TwinMergingError("there must be at least one upstream")
        self._models, self._every, self._observe = set(models), every, observe
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(seconds, connect=5.0, pool=seconds),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    @property
    def healthy(self) -> list[Upstream]:
        return [upstream for upstream in self.all if upstream.healthy]

    async def watch(self) -> None:
        """Ask every engine for its models again and again; ends when cancelled."""
        while True:
            await asyncio.gather(*(self._ask(upstream) for upstream in self.all))
            await asyncio.sleep(self._every)

    async def _ask(self, upstream: Upstream) -> None:
        try:
            response = await self._client.get(f"{upstream.url}/v1/models", timeout=10.0)
            response.raise_for_status()
            missing = self._models - {entry["id"] for entry in response.json()["data"]}
        except httpx.ReadTimeout:
            upstream.state = "slow"  # busy, so as healthy as it was
        except httpx.HTTPError as error:
            upstream.healthy, upstream.state = False, f"no answer ({type(error).__name__})"
        except (ValueError, KeyError, TypeError):
            upstream.healthy, upstream.state = False, "its /v1/models is no list of models"
        else:
            upstream.healthy = not missing
            upstream.state = f"it has no model {', '.join(sorted(missing))}" if missing else "ok"

    @contextlib.asynccontextmanager
    async def send(self, path: str, body: dict, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """
        Post to one engine; the response's body is not read yet. An engine that fails before it answers is left for another.

        Raises:
            NoUpstreamError, LostUpstreamError: no engine answers. httpx.TimeoutException: the engine took too long.
        """
        content, headers = json.dumps(body).encode(), {**headers, "content-type": "application/json"}
        tried: set[str] = set()
        lost = False
        while True:
            left = [upstream for upstream in self.healthy if upstream.name not in tried]
            if not left:
                raise LostUpstreamError if lost else NoUpstreamError
            upstream = min(left, key=lambda each: each.in_flight)
            tried.add(upstream.name)
            upstream.in_flight += 1
            try:
                request = self._client.build_request("POST", upstream.url + path, content=content, headers=headers)
                try:
                    response = await self._client.send(request, stream=True)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    self._failed(upstream, "unreachable")
                    continue
                except (httpx.NetworkError, httpx.ProtocolError):
                    self._failed(upstream, "lost")
                    lost = True
                    continue
                response.extensions["upstream"] = upstream
                try:
                    yield response
                finally:
                    await response.aclose()
                return
            finally:
                upstream.in_flight -= 1

    async def parts(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body of a response of `send`, as it comes. Raises `LostUpstreamError`: the engine ended in the middle."""
        try:
            async for part in response.aiter_bytes():
                yield part
        except (httpx.NetworkError, httpx.ProtocolError) as error:
            self._failed(response.extensions["upstream"], "lost")
            raise LostUpstreamError from error

    async def read(self, response: httpx.Response) -> bytes:
        """The whole body of a response of `send`. Raises as `parts`."""
        return b"".join([part async for part in self.parts(response)])

    def _failed(self, upstream: Upstream, what: str) -> None:
        upstream.healthy, upstream.state = False, what
        self._observe(upstream.name, what)

    async def close(self) -> None:
        await self._client.aclose()


def _parse(url: str) -> Upstream:
    try:
        parsed = httpx.URL(url.rstrip("/"))
    except (httpx.InvalidURL, TypeError) as error:
        raise TwinMergingError(f"upstream {url!r} is no URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query:
        raise TwinMergingError(f"upstream {url!r} must be like http://HOST:PORT")
    if parsed.path.rstrip("/").endswith("/v1"):
        raise TwinMergingError(f"upstream {url!r} must be given without /v1")
    return Upstream(f"{parsed.host}:{parsed.port}" if parsed.port else parsed.host, str(parsed).rstrip("/"))
