"""
What the front needs of vLLM, without a model: `python -m tests.serving.fake_engine serve BASE --lora-modules ... --port N`.

Each choice repeats its model and prompt. Fields of a request that vLLM does not have make trouble: `delay` (seconds before the
answer, and between the parts of a stream), `die` (the engine ends: before the answer, or after the first part of a stream).
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class FakeEngine:
    """An engine with models; `seen` has the bodies and headers of all requests."""

    def __init__(self, models: Sequence[str]):
        self.names, self.seen = list(models), []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.answer, methods=["POST"]),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": name} for name in self.names]})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append((body, dict(request.headers)))
        if body.get("max_tokens", 1) < 1:
            return JSONResponse({"error": {"message": "max_tokens must be positive"}}, 400)
        if body["model"] not in self.names:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if body.get("stream"):
            return StreamingResponse(self._parts(body), media_type="text/event-stream")
        await asyncio.sleep(body.get("delay", 0))
        if body.get("die"):
            os._exit(1)
        prompts = body.get("prompt", [""])
        prompts = prompts if isinstance(prompts, list) else [prompts]
        n = body.get("n", 1)
        choices = [
            {"index": i * n + j, "text": f"{body['model']}|{prompt}|{j}"}
            for i, prompt in enumerate(prompts)
            for j in range(n)
        ]
        usage = {"prompt_tokens": len(prompts), "completion_tokens": n * len(prompts), "details": None}
        return JSONResponse({"id": "x", "model": body["model"], "choices": choices, "usage": usage})

    async def _parts(self, body: dict):
        for i in range(4):
            part = {"choices": [{"text": f"{body['model']}{i} "}]}
            yield f"data: {json.dumps(part)}\n\n".encode()
            if body.get("die"):
                os._exit(1)
            await asyncio.sleep(body.get("delay", 0))
        yield b"data: [DONE]\n\n"


def main(arguments: list[str]) -> None:
    def after(option: str) -> list[str]:
        start = arguments.index(option) + 1
        found = []
        for value in arguments[start:]:
            if value.startswith("--"):
                break
            found.append(value)
        return found

    adapters = [json.loads(each)["name"] for each in after("--lora-modules")]
    engine = FakeEngine([*after("--served-model-name"), *adapters])
    uvicorn.run(engine.app, port=int(after("--port")[0]), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1:])
