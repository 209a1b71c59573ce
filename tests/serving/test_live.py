"""
A real vLLM behind the export and behind `serve`: `make vllm`, or `VLLM_BIN=ENVIRONMENT/bin pytest -m vllm -s`.

Real weights (SmolLM2-135M-Instruct) with four LoRAs that change what it writes; a CPU is enough.
"""

import concurrent.futures
import copy
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests import smollm2
from tests.serving.servers import is_ready, until
from tests.serving.test_command import served
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.export import export_vllm
from twin_merging_hf.progress import Progress
from twin_merging_hf.serving.front import EXPERT_HEADER


BIN = Path(os.environ.get("VLLM_BIN", "no vLLM"))
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not (BIN / "vllm").exists(), reason="VLLM_BIN names no folder with a program `vllm`"),
]
RANK, NEW_TOKENS, REQUESTS, AT_ONCE = 8, 16, 200, 16
SENTENCES = {
    "french": "Translate to French: the {} {} is near the {}",
    "numbers": "Compute {0} {1} plus {2}: 12 + 7 - 3 =",
    "python": "def {}_{}(x): # return the {} of x",
    "letters": "Dear {} and {}, I am writing to you about the {}.",
}
WORDS = "red house garden small table river bright winter stone paper green bottle window orange silver".split()  # noqa: SIM905
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "2",
}  # fmt: skip


def sentence(name: str, draw: random.Random) -> str:
    return SENTENCES[name].format(*(draw.choice(WORDS) for _ in range(3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base, four LoRAs of attention and feed-forward layers, an artifact and its export."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("live")
    base, tokenizer = smollm2.load()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    entries = []
    for seed, name in enumerate(SENTENCES):
        settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(base), settings)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if ".lora_B." in key:
                    value.copy_(0.02 * torch.randn(value.shape, generator=draw))
        model.peft_config["default"].base_model_name_or_path = str(folder / "base")
        model.save_pretrained(folder / name)
        draw_text = random.Random(seed)
        rows = [{"prompt": sentence(name, draw_text), "completion": " yes"} for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        entries.append({"name": name, "model": name, "data": f"{name}.jsonl"})
    recipe = {"base_model": "base", "shared_model": "base", "experts": entries, "exclusive": {"rank": RANK}}
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "router": "auto"}), encoding="utf-8")
    build_artifact(folder / "recipe.yaml", folder / "artifact", Progress(quiet=True))
    export_vllm(folder / "artifact", folder / "export")
    return folder


@torch.no_grad()
def test_vllm_writes_what_the_artifact_does(folder):
    out, draw = folder / "export", random.Random(7)
    names = [name for name in SENTENCES for _ in range(10)]
    prompts = [sentence(name, draw) for name in names]
    request = {
        "base": str(out / "base"), "rank": RANK, "tokens": NEW_TOKENS, "prompts": prompts, "names": names,
        "adapters": {name: str(out / name) for name in SENTENCES},
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name("vllm_generate.py")
    command = [str(BIN / "python"), str(script), str(folder / "request.json"), str(folder / "written.json")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = json.loads((folder / "written.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder / "artifact").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact")
    worst, same = 0.0, 0
    for name, prompt, tokens in zip(names, prompts, written, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
        logits = model(input_ids=ids, experts=name).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((logits.max(dim=1).values - chosen).max()))
        own = model.generate(**inputs, experts=name, max_new_tokens=NEW_TOKENS, do_sample=False)
        same += own[0, inputs["input_ids"].shape[1] :].tolist() == tokens
    print(
        f"\nvLLM against the artifact: {same} of {len(names)} texts identical, worst gap of a token {worst:.4f} logits"
    )
    assert worst <= 0.25 and same >= 0.9 * len(names)
    assert len({tuple(tokens) for tokens in written}) > len(names) / 2, "adapters that write alike prove nothing"


def test_serve_with_vllm_loses_nothing_recovers_and_drains(folder, monkeypatch):
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    draw = random.Random(11)
    prompts = [sentence(draw.choice(list(SENTENCES)), draw) for _ in range(REQUESTS)]
    router = AutoModel.from_pretrained(folder / "export" / "router").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export" / "router")
    assert max(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) <= 64
    options = ["--", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    with served(str(folder / "export"), "--engine", str(BIN / "vllm"), *options) as (process, url, lines):
        until(lambda: is_ready(url), 400)

        def ask(prompt: str, tokens: int = NEW_TOKENS) -> httpx.Response:
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=600)

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            started = time.monotonic()
            answers = list(pool.map(ask, prompts))
            seconds = time.monotonic() - started
        assert [answer.status_code for answer in answers] == [200] * REQUESTS
        offline = []
        for prompt in prompts:
            with torch.no_grad():
                weights = router.route(**tokenizer([prompt], return_tensors="pt"))[0]
            offline.append(router.expert_names[int(weights.argmax())] if float(weights.max()) > 0 else "base")
        right = sum(answer.headers[EXPERT_HEADER] == name for answer, name in zip(answers, offline, strict=True))
        print(f"\nserve: {REQUESTS} requests, {AT_ONCE} at once, {seconds:.0f} s; {right} as the offline router")
        assert right == REQUESTS
        assert [answer.json()["model"] for answer in answers] == offline
        assert len(set(offline)) == len(SENTENCES)

        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            pending = [pool.submit(ask, prompt) for prompt in prompts[:100]]
            until(lambda: sum(each.done() for each in pending) >= 20, 120)
            os.killpg(engine_of(process.pid), signal.SIGKILL)
            found = [each.result() for each in pending]
        codes = {code: sum(each.status_code == code for each in found) for code in {e.status_code for e in found}}
        assert set(codes) <= {200, 502, 503} and len(codes) > 1, codes
        assert all("error" in each.json() for each in found if each.status_code != 200)
        until(lambda: is_ready(url), 400)
        assert ask(prompts[0]).status_code == 200 and process.poll() is None
        print(f"engine killed under load: {codes}; the front stayed and the engine is back")

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            pending = [pool.submit(ask, prompt, 150) for prompt in prompts[:4]]
            until(lambda: httpx.get(f"{url}/health").json()["upstreams"][0]["in_flight"] == 4)
            process.send_signal(signal.SIGTERM)
            assert [each.result().status_code for each in pending] == [200] * 4
        assert process.wait(60) == 0, "".join(lines)
        print("SIGTERM: 4 of 4 requests finished, exit code 0")


def engine_of(front: int) -> int:
    """The process that a front started as its engine; it leads a group."""
    children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    return next(int(pid) for pid in children if os.getpgid(int(pid)) == int(pid))
