"""
The front: an ASGI application that speaks OpenAI's API, gives each prompt to its expert and passes the engine's answer through.

It keeps nothing between requests; any number of fronts may stand before the same engines.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route as Path

from .limits import Limits
from .metrics import Metrics
from .prompts import AUTO, BadRequestError, Prompt, chat_prompt, check_object, completion_prompts
from .router import PromptRouter, Route
from .served import Served
from .upstreams import LostUpstreamError, NoUpstreamError, Upstreams


EXPERT_HEADER, WEIGHT_HEADER = "x-twin-merging-expert", "x-twin-merging-weight"
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_MOST_PROMPTS = 256
_PASSED_ON = ("authorization", "x-request-id")
_GRACE = 5.0  # seconds that a client has to take the end of an answer that came at the last moment
_log = logging.getLogger(__name__)


def make_app(
    served: Served,
    router: PromptRouter,
    upstreams: Upstreams,
    metrics: Metrics,
    limits: Limits,
    engine: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> Starlette:
    """
    The application. It watches the engines while it lives, and closes router and upstreams at its end.

    Args:
        engine: also runs while the application lives, and is cancelled at its end.
    """
    front = _Front(served, router, upstreams, metrics, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(upstreams.watch())]
        if engine is not None:
            tasks.append(asyncio.create_task(engine()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await upstreams.close()
            router.close()

    routes = [
        Path(_COMPLETIONS, front.completions, methods=["POST"]),
        Path(_CHAT, front.chat, methods=["POST"]),
        Path("/v1/models", front.models, methods=["GET"]),
        Path("/health", front.health, methods=["GET"]),
        Path("/metrics", front.metrics, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})


class _Front:
    def __init__(
        self, served: Served, router: PromptRouter, upstreams: Upstreams, metrics: Metrics, limits: Limits
    ) -> None:
        self._served, self._router, self._upstreams = served, router, upstreams
        self._metrics, self._limits = metrics, limits
        self._at_work = 0

    # ---- about the front -----------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        entries = [
            {"id": name, "object": "model", "created": 0, "owned_by": "twin-merging"}
            for name in (AUTO, *self._served.models)
        ]
        return _json({"object": "list", "data": entries})

    async def health(self, request: Request) -> Response:
        engines = [
            {"name": each.name, "healthy": each.healthy, "state": each.state, "in_flight": each.in_flight}
            for each in self._upstreams.all
        ]
        ready = bool(self._upstreams.healthy)
        content = {"status": "ok" if ready else "no engine is ready", "upstreams": engines}
        return _json(content, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(self._upstreams), media_type=self._metrics.content_type)

    # ---- requests ------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, _COMPLETIONS, completion_prompts)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, _CHAT, lambda body: [chat_prompt(body)])

    async def _answer(self, request: Request, path: str, prompts_of: Callable[[dict], list[Prompt]]) -> Response:
        """Do the work of one request; whatever happens, the answer is one of OpenAI's form, and counted."""
        work = contextlib.ExitStack()
        if self._at_work >= self._limits.requests:
            response: Response = _error(429, "too many requests at once", retry=True)
        else:
            self._at_work += 1
            work.callback(self._finish, path, time.monotonic())
            response = await self._try(request, path, prompts_of, work)
        self._metrics.requests.labels(path, str(response.status_code)).inc()
        if not isinstance(response, _Passing):  # which is at work until its last part
            work.close()
        return response

    def _finish(self, path: str, started: float) -> None:
        self._at_work -= 1
        self._metrics.seconds.labels(path).observe(time.monotonic() - started)

    async def _try(
        self, request: Request, path: str, prompts_of: Callable[[dict], list[Prompt]], work: contextlib.ExitStack
    ) -> Response:
        deadline = time.monotonic() + self._limits.seconds
        try:
            body = check_object(await self._read(request))
            prompts = prompts_of(body)
            if len(prompts) > _MOST_PROMPTS:
                raise BadRequestError(
                    f"at most {_MOST_PROMPTS} prompts in one request, got {len(prompts)}", param="prompt"
                )
            routes = await self._routes(body, prompts)
            headers = _route_headers(routes)
            passed_on = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
            groups = _by_model(routes)
            if len(groups) > 1:
                answering = self._merged(path, body, groups, passed_on)
                content = await _while_connected(request, asyncio.wait_for(answering, self._limits.seconds))
                return _json(content, headers=headers)
            (model,) = groups
            return await self._passed(request, path, {**body, "model": model}, passed_on, headers, work, deadline)
        except BadRequestError as error:
            return _error(error.status, str(error), error.param)
        except _RefusedError as error:
            return Response(error.content, error.status, media_type="application/json")
        except NoUpstreamError:
            return _error(503, "no engine is ready; try again", retry=True)
        except LostUpstreamError:
            return _error(502, "the engine ended before it answered; try again", retry=True)
        except (asyncio.TimeoutError, httpx.TimeoutException):
            return _error(504, "the engine took too long")
        except (ClientDisconnect, _GoneError):
            return _error(499, "the client has gone")
        except Exception:
            _log.exception("a request failed")
            return _error(500, "this is a defect of the front; its log has more")

    async def _read(self, request: Request) -> Any:
        """A request's JSON. Raises `BadRequestError`: too large, too slow, no JSON."""
        content = bytearray()

        async def read() -> None:
            async for part in request.stream():
                content.extend(part)
                if len(content) > self._limits.body_bytes:
                    raise BadRequestError(f"the body has more than {self._limits.body_bytes} bytes", 413)

        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._limits.body_bytes:
            raise BadRequestError(f"the body has more than {self._limits.body_bytes} bytes", 413)
        try:
            await asyncio.wait_for(read(), self._limits.read_seconds)
            return json.loads(content, parse_constant=_no_number)
        except asyncio.TimeoutError:
            raise BadRequestError("the body came too slowly", 408) from None
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"the body is no JSON: {error}") from error

    async def _routes(self, body: dict, prompts: list[Prompt]) -> list[Route]:
        """Where each prompt goes: to the model that the request names, or as the router says."""
        name = body.get("model") or AUTO
        if name == AUTO:
            routes = await self._router.route(prompts)
        elif name in self._served.models:
            routes = [Route(name, 1.0)] * len(prompts)
        else:
            raise BadRequestError(
                f"there is no model {name!r}; there are {', '.join((AUTO, *self._served.models))}", 404, "model"
            )
        if body.get("stream") and len({route.model for route in routes}) > 1:
            raise BadRequestError(
                "the prompts of one streamed request go to different experts; send them one by one", param="prompt"
            )
        for route in routes:
            self._metrics.routes.labels(route.model, "router" if name == AUTO else "request").inc()
        return routes

    async def _passed(self, request, path, body, passed_on, headers, work, deadline) -> Response:
        """The engine's answer as it comes, streamed or not."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(work.close)
            sending = stack.enter_async_context(self._upstreams.send(path, body, passed_on))
            answer = await _while_connected(request, asyncio.wait_for(sending, deadline - time.monotonic()))
            if body.get("stream"):
                return _Passing(answer, self._upstreams.parts(answer), stack.pop_all(), headers, deadline)
            reading = asyncio.wait_for(self._upstreams.read(answer), deadline - time.monotonic())
            content = await _while_connected(request, reading)
            return Response(content, answer.status_code, headers, answer.headers.get("content-type"))

    async def _merged(self, path: str, body: dict, groups: dict[str, list[int]], passed_on: dict) -> dict:
        """One answer to prompts that go to several experts: a request for each expert, their choices in the prompts' order."""
        prompts = body["prompt"]

        async def ask(model: str, rows: list[int]) -> dict:
            part = {**body, "model": model, "prompt": [prompts[i] for i in rows]}
            async with self._upstreams.send(path, part, passed_on) as answer:
                content = await self._upstreams.read(answer)
                if answer.status_code != 200:
                    raise _RefusedError(answer.status_code, content)
                return json.loads(content)

        tasks = [asyncio.create_task(ask(model, rows)) for model, rows in groups.items()]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices: list[dict] = []
        for answer, rows in zip(answers, groups.values(), strict=True):
            each = len(answer["choices"]) // len(rows)  # `n` choices for a prompt
            for choice in answer["choices"]:
                prompt, number = divmod(choice["index"], each)
                choices.append({**choice, "index": rows[prompt] * each + number})
        usage: dict[str, Any] = {}
        for answer in answers:
            for key, value in (answer.get("usage") or {}).items():
                usage[key] = usage.get(key, 0) + value if isinstance(value, int) else value
        return {
            **answers[0],
            "model": AUTO,
            "choices": sorted(choices, key=lambda choice: choice["index"]),
            "usage": usage,
        }


class _RefusedError(Exception):
    """An engine answered a part of a request with an error."""

    def __init__(self, status: int, content: bytes):
        super().__init__()
        self.status, self.content = status, content


class _GoneError(Exception):
    """The client closed the connection."""


class _Passing(StreamingResponse):
    """An engine's stream as it comes. A stream that breaks ends with an error event, as OpenAI's do."""

    def __init__(
        self,
        answer: httpx.Response,
        parts: AsyncIterator[bytes],
        stack: contextlib.AsyncExitStack,
        headers: dict[str, str],
        deadline: float,
    ) -> None:
        super().__init__(self._until(deadline, parts), answer.status_code, headers, answer.headers.get("content-type"))
        self._stack, self._deadline = stack, deadline

    @staticmethod
    async def _until(deadline: float, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        while True:
            try:
                yield await asyncio.wait_for(anext(parts), max(0.0, deadline - time.monotonic()))
            except StopAsyncIteration:
                return
            except (LostUpstreamError, asyncio.TimeoutError, httpx.HTTPError):
                yield f"data: {json.dumps(_content(502, 'the engine ended in the middle'))}\n\n".encode()
                return

    async def __call__(self, scope, receive, send) -> None:
        try:
            passing = super().__call__(scope, receive, send)
            await asyncio.wait_for(passing, max(0.0, self._deadline - time.monotonic()) + _GRACE)
        except asyncio.TimeoutError:
            return  # a client that does not read; the server closes the connection
        finally:
            await self._stack.aclose()


async def _while_connected(request: Request, working: Coroutine[Any, Any, Any]) -> Any:
    """The result of some work, which is cancelled once nobody waits for it. Raises `_GoneError`."""
    work, gone = asyncio.ensure_future(working), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _GoneError
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _by_model(routes: list[Route]) -> dict[str, list[int]]:
    """Indices of the prompts that go to each model."""
    groups: dict[str, list[int]] = {}
    for i, route in enumerate(routes):
        groups.setdefault(route.model, []).append(i)
    return groups


def _route_headers(routes: list[Route]) -> dict[str, str]:
    return {
        EXPERT_HEADER: ",".join(route.model for route in routes),
        WEIGHT_HEADER: ",".join(f"{route.weight:.4f}" for route in routes),
    }


def _content(status: int, message: str, param: str | None = None) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(status: int, message: str, param: str | None = None, retry: bool = False) -> Response:
    return _json(_content(status, message, param), status, {"retry-after": "1"} if retry else None)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Escaped, since text from requests may hold what UTF-8 has no bytes for."""
    return Response(json.dumps(content), status, headers, "application/json")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there, in the same form."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _error(status, "there is no such path or method here")
