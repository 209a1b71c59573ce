"""The front: each prompt goes where the router says, what the engine answers comes through, and bad requests harm nobody."""

import asyncio
import concurrent.futures
import contextlib
import json
import shutil
import socket
import time

import httpx
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.modeling.language import NAMES, LanguageWorld
from tests.serving.fake_engine import FakeEngine
from tests.serving.servers import engine, is_ready, running, until
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.export import export_vllm
from twin_merging_hf.serving import Limits, read_served
from twin_merging_hf.serving.engine import free_port
from twin_merging_hf.serving.front import EXPERT_HEADER, WEIGHT_HEADER, make_app
from twin_merging_hf.serving.metrics import Metrics
from twin_merging_hf.serving.prompts import Prompt
from twin_merging_hf.serving.router import PromptRouter
from twin_merging_hf.serving.server import make_server
from twin_merging_hf.serving.upstreams import Upstreams


MODELS = ["base", *NAMES]
LIMITS = Limits(body_bytes=20_000, read_seconds=1.0, requests=8, seconds=6.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export for vLLM, and the rows that its experts were built with: (expert, prompt)."""
    world = LanguageWorld(tmp_path_factory.mktemp("serving"))
    out = world.root / "export"
    export_vllm(world.artifact("llama-lm", data=True), out)
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (out / "router" / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = []
    for name in NAMES:
        lines = (world.experts("llama-lm") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [(name, json.loads(line)["prompt"]) for line in lines[:5]]
    return out, rows


@pytest.fixture(scope="module")
def offline(exported):
    """The route of one prompt, as the export's README says to compute it."""
    folder = exported[0] / "router"
    router, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def of(text: str) -> str:
        with torch.no_grad():
            weights = router.route(**tokenizer([text], return_tensors="pt"))[0]
        return router.expert_names[int(weights.argmax())] if float(weights.max()) > 0 else "base"

    return of


@contextlib.contextmanager
def front(folder, urls, limits=LIMITS):
    """A front before some engines; its URL."""
    served, metrics = read_served(folder), Metrics()
    pool = Upstreams(urls, served.models, limits.seconds, every=0.1, observe=metrics.failed)
    app = make_app(served, PromptRouter(served.router, metrics.batch), pool, metrics, limits)
    with running(make_server(app, "127.0.0.1", free_port(), limits.read_seconds, 5)) as url:
        yield url


@pytest.fixture
def world(exported):
    """A front and one engine: URL of the front, engine, rows."""
    fake = FakeEngine(MODELS)
    with engine(fake.app) as upstream, front(exported[0], [upstream]) as url:
        until(lambda: is_ready(url))
        yield url, fake, exported[1]


def post(url: str, path: str = "/v1/completions", headers: dict | None = None, **body) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=20, headers=headers)


# ---- routing ---------------------------------------------------------------------------------------------------------


def test_each_of_many_requests_at_once_goes_where_the_offline_router_says(world, offline):
    url, _, rows = world
    rows = rows * 3
    limits = concurrent.futures.ThreadPoolExecutor(8)
    answers = list(limits.map(lambda row: post(url, prompt=row[1], max_tokens=4), rows))
    for (name, prompt), answer in zip(rows, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.headers[EXPERT_HEADER] == offline(prompt) == name
        assert answer.json()["choices"][0]["text"] == f"{name}|{prompt}|0"
        assert 0.25 < float(answer.headers[WEIGHT_HEADER]) <= 1


def test_what_the_router_does_not_know_goes_to_the_shared_model(exported, tmp_path):
    out = tmp_path / "export"
    shutil.copytree(exported[0], out)
    config = json.loads((out / "router" / "config.json").read_text(encoding="utf-8"))
    router = PromptRouter(out / "router")
    router.model._weights_of = lambda states, inputs: torch.zeros(len(states), len(config["experts"]))
    assert [(route.model, route.weight) for route in router.compute([Prompt("x y")])] == [("base", 0.0)]


def test_prompts_of_one_request_are_routed_one_by_one_and_come_back_in_order(world):
    url, fake, rows = world
    mixed = rows[::4]
    answer = post(url, prompt=[prompt for _, prompt in mixed], n=2)
    assert answer.status_code == 200, answer.text
    assert answer.headers[EXPERT_HEADER].split(",") == [name for name, _ in mixed]
    expected = [f"{name}|{prompt}|{j}" for name, prompt in mixed for j in range(2)]
    found = answer.json()
    assert [choice["text"] for choice in found["choices"]] == expected
    assert [choice["index"] for choice in found["choices"]] == list(range(len(expected)))
    assert found["usage"] == {"prompt_tokens": len(mixed), "completion_tokens": 2 * len(mixed), "details": None}
    assert len(fake.seen) == len({name for name, _ in mixed})
    assert post(url, prompt=[prompt for _, prompt in mixed], max_tokens=0).json()["error"]["message"].startswith("max_")


def test_token_ids_text_and_chats_are_routed_alike(world, exported):
    url, _, rows = world
    name, text = rows[-1]
    ids = AutoTokenizer.from_pretrained(exported[0] / "router")(text)["input_ids"]
    assert post(url, prompt=ids).headers[EXPERT_HEADER] == name
    parts = [{"type": "text", "text": text}]
    for content in (text, parts):
        answer = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
        assert answer.status_code == 200 and answer.headers[EXPERT_HEADER] == name


def test_an_explicit_model_is_honoured_and_auto_is_not_one(world):
    url, fake, rows = world
    name, text = rows[0]
    assert post(url, prompt=text, model="c").headers[EXPERT_HEADER] == "c"
    assert post(url, prompt=text, model="base").json()["model"] == "base"
    assert post(url, prompt=text, model="auto").headers[EXPERT_HEADER] == name
    refused = post(url, prompt=text, model="gpt-4")
    assert refused.status_code == 404 and "auto, base, a, b, c, d" in refused.json()["error"]["message"]
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["auto", *MODELS]


def test_fields_and_the_authorization_go_to_the_engine_as_they_came(world):
    url, fake, rows = world
    post(
        url,
        prompt=rows[0][1],
        temperature=0.3,
        custom={"a": [1]},
        headers={"authorization": "Bearer t", "x-other": "1"},
    )
    body, headers = fake.seen[-1]
    assert body == {"prompt": rows[0][1], "temperature": 0.3, "custom": {"a": [1]}, "model": rows[0][0]}
    assert headers["authorization"] == "Bearer t" and "x-other" not in headers


def test_streams_come_through_part_by_part(world):
    url, _, rows = world
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": rows[0][1], "stream": True, "delay": 0.3}, timeout=20
    ) as answer:
        times = [time.monotonic() for _ in answer.iter_lines()]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers[EXPERT_HEADER] == rows[0][0]
    assert times[-1] - times[0] > 0.8, "all parts came together"


def test_a_streamed_request_for_several_experts_is_refused(world):
    url, _, rows = world
    refused = post(url, prompt=[prompt for _, prompt in rows[::5]], stream=True)
    assert refused.status_code == 400 and "one by one" in refused.json()["error"]["message"]


def test_prompts_that_wait_for_the_router_are_one_batch(exported):
    batches = []
    router = PromptRouter(exported[0] / "router", lambda rows, seconds: batches.append(rows))

    async def work():
        await asyncio.gather(*(router.route([Prompt(text)]) for _, text in exported[1]))

    asyncio.run(work())
    assert sum(batches) == len(exported[1]) and len(batches) <= 2


# ---- engines ---------------------------------------------------------------------------------------------------------


def test_two_engines_share_the_work_and_one_alone_carries_on(exported):
    fakes = [FakeEngine(MODELS), FakeEngine(MODELS)]
    text = exported[1][0][1]
    with contextlib.ExitStack() as first:
        one = first.enter_context(engine(fakes[0].app))
        with engine(fakes[1].app) as two, front(exported[0], [one, two]) as url:
            until(lambda: all(each["healthy"] for each in httpx.get(f"{url}/health").json()["upstreams"]))
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                list(pool.map(lambda _: post(url, prompt=text, delay=0.2), range(6)))
            assert len(fakes[0].seen) == len(fakes[1].seen) == 3
            first.close()
            for _ in range(4):
                assert post(url, prompt=text).status_code == 200
            assert len(fakes[1].seen) == 7
            states = {each["name"]: each["healthy"] for each in httpx.get(f"{url}/health").json()["upstreams"]}
            assert states == {one.removeprefix("http://"): False, two.removeprefix("http://"): True}


def test_an_engine_that_goes_and_comes_back_needs_no_new_front(exported):
    port, text = free_port(), exported[1][0][1]
    with front(exported[0], [f"http://127.0.0.1:{port}"]) as url:
        for _ in range(2):
            refused = post(url, prompt=text)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert "no engine is ready" in refused.json()["error"]["message"]
            assert is_ready(url, 503)
            with engine(FakeEngine(MODELS).app, port):
                until(lambda: is_ready(url))
                assert post(url, prompt=text).status_code == 200
            until(lambda: is_ready(url, 503))


def test_an_engine_without_all_adapters_gets_nothing(exported):
    with engine(FakeEngine(MODELS[:-1]).app) as upstream, front(exported[0], [upstream]) as url:
        until(lambda: httpx.get(f"{url}/health").json()["upstreams"][0]["state"] == "it has no model d")
        assert post(url, prompt=exported[1][0][1]).status_code == 503


@pytest.mark.parametrize("urls", [[], ["ftp://x"], ["localhost:8000"], ["http://x/v1"], ["http://x?y=1"]])
def test_upstreams_that_are_none(urls):
    with pytest.raises(TwinMergingError, match="upstream"):
        Upstreams(urls, MODELS)


def test_credentials_of_an_upstream_are_told_to_nobody(exported):
    with front(exported[0], [f"http://me:secret@127.0.0.1:{free_port()}"]) as url:
        for path in ("/health", "/metrics"):
            assert "secret" not in httpx.get(url + path).text


# ---- bad requests ----------------------------------------------------------------------------------------------------

WRONG = {
    "no object": ([1], 400, "object"),
    "no prompt": ({}, 400, "`prompt`"),
    "empty prompt": ({"prompt": []}, 400, "`prompt`"),
    "empty text": ({"prompt": ""}, 200, ""),
    "number as prompt": ({"prompt": 3}, 400, "`prompt`"),
    "mixed prompts": ({"prompt": ["a", 3]}, 400, "`prompt`"),
    "true as a token": ({"prompt": [True]}, 400, "`prompt`"),
    "negative token": ({"prompt": [-1]}, 400, "token ids"),
    "huge token": ({"prompt": [10**30]}, 400, "token ids"),
    "too many tokens": ({"prompt": [5] * 5000}, 400, "at most"),
    "half a surrogate": ({"prompt": "\ud800"}, 400, "surrogate"),
    "model is no text": ({"prompt": "x", "model": 3}, 400, "`model`"),
    "model of half a surrogate": ({"prompt": "x", "model": "\ud800"}, 404, "no model"),
    "stream is no boolean": ({"prompt": "x", "stream": "yes"}, 400, "`stream`"),
    "special tokens": ({"prompt": "x", "add_special_tokens": 1}, 400, "`add_special_tokens`"),
    "too many prompts": ({"prompt": ["x"] * 300}, 400, "at most 256"),
    "too large": ({"prompt": "x" * 30_000}, 413, "bytes"),
    "engine's refusal": ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_bad_request_is_refused_by_name(world, what):
    url, fake, rows = world
    body, status, says = WRONG[what]
    answer = httpx.post(f"{url}/v1/completions", content=json.dumps(body), timeout=20)
    assert answer.status_code == status and (status == 200 or says in answer.json()["error"]["message"]), answer.text
    assert post(url, prompt=rows[0][1]).headers[EXPERT_HEADER] == rows[0][0]


CHATS = {
    "no messages": ({}, "`messages`"),
    "message is text": ({"messages": ["x"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0]"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text only"),
    "content is a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "tools": ({"messages": [{"role": "user", "content": "x"}], "tools": [3]}, "`tools`"),
    "settings": ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 3}, "`chat_template_kwargs`"),
    "prompt flag": ({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": 1}, "`add_generation"),
}


@pytest.mark.parametrize("what", CHATS)
def test_a_bad_chat_is_refused_by_name(world, what):
    url, _, _ = world
    body, says = CHATS[what]
    answer = post(url, "/v1/chat/completions", **body)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"NaN", b'{"prompt": NaN}', b"[" * 9000], ids=range(6))
def test_what_is_no_json_is_refused(world, content):
    answer = httpx.post(f"{world[0]}/v1/completions", content=content, timeout=20)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there(world):
    assert httpx.get(f"{world[0]}/v1/nothing").json()["error"]["code"] == 404
    assert httpx.get(f"{world[0]}/v1/completions").json()["error"]["code"] == 405


def test_a_model_without_a_chat_template_says_so(exported, tmp_path):
    out = tmp_path / "export"
    shutil.copytree(exported[0], out)
    (out / "router" / "chat_template.jinja").unlink()
    with engine(FakeEngine(MODELS).app) as upstream, front(out, [upstream]) as url:
        answer = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
        assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
     b"Content-Length: 50\r\n\r\n{"],
    ids=["nothing", "half a head", "half a body"],
)  # fmt: skip
def test_slow_requests_are_ended_while_others_are_served(world, sent):
    url, _, rows = world
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((host, int(port)), 10)) for _ in range(5)]
        started = time.monotonic()
        for each in slow:
            each.sendall(sent)
        assert post(url, prompt=rows[0][1]).status_code == 200
        answers = [each.recv(4096) for each in slow]
        assert 0.5 < time.monotonic() - started < 6
        assert all((b" 408 " in answer) == (b"Content-Length" in sent) for answer in answers)


def test_more_at_once_than_allowed_is_told_to_wait_and_leaves_no_trace(world):
    url, _, rows = world
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: post(url, prompt=rows[0][1], delay=1.0).status_code, range(12)))
    assert sorted(set(found)) == [200, 429] and found.count(200) == LIMITS.requests
    assert post(url, prompt=rows[0][1]).status_code == 200


def test_an_engine_that_takes_too_long_is_given_up(world):
    url, _, rows = world
    started = time.monotonic()
    assert post(url, prompt=rows[0][1], delay=30).status_code == 504
    assert time.monotonic() - started < 15


def test_a_client_that_leaves_frees_its_place(world):
    url, fake, rows = world
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"prompt": rows[0][1], "delay": 5, "stream": stream}, timeout=0.5)
        until(lambda: httpx.get(f"{url}/health").json()["upstreams"][0]["in_flight"] == 0, 3)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_count_routes_statuses_and_batches(world):
    url, _, rows = world
    post(url, prompt=rows[0][1])
    post(url, prompt=rows[0][1], model="base")
    post(url, prompt=3)
    text = httpx.get(f"{url}/metrics").text
    for line in (
        'twin_merging_routes_total{by="router",model="a"} 1.0',
        'twin_merging_routes_total{by="request",model="base"} 1.0',
        'twin_merging_requests_total{path="/v1/completions",status="200"} 2.0',
        'twin_merging_requests_total{path="/v1/completions",status="400"} 1.0',
        "twin_merging_router_batch_rows_count 1.0",
        'twin_merging_request_seconds_count{path="/v1/completions"} 3.0',
    ):
        assert line in text
    assert 'twin_merging_upstream_healthy{upstream="127.0.0.1:' in text
