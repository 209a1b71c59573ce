"""
Mutated inputs by the thousand, in one process, under guards: how long, how much memory, and what they touched.

usage: python -m tests.hostile COUNT [SEED]   (prints one line of JSON with the figures)
"""

import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import logging as transformers_logging

from tests import adapters, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.adapted import open_expert
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.checkpoints import open_checkpoint
from twin_merging_hf.data import read_rows
from twin_merging_hf.recipe import load_recipe
from twin_merging_hf.row_hashes import read_hashes
from twin_merging_hf.source_card import card_facts


sys.dont_write_bytecode = True  # imports that come late are no writes of an input's
SECONDS, MEGABYTES = 2.0, 512
# Small enough that one check takes a few milliseconds.
_FIELDS = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
_RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "shutil.rmtree")


# ---- values that nobody expects -------------------------------------------------------------------------------------


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


NASTY: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: 1, lambda: 3, lambda: 10**6, lambda: 10**9, lambda: 2**63,
    lambda: 10**40, lambda: -(10**12), lambda: 1e308, lambda: float("nan"), lambda: float("inf"), lambda: 0.5,
    lambda: "", lambda: "x", lambda: "x" * 50_000, lambda: "../../etc/passwd", lambda: "/etc/passwd", lambda: "~nobody/x",
    lambda: "a\0b", lambda: "\ud800", lambda: "A", lambda: "a", lambda: "🤗" * 50, lambda: "__import__('os').system('exit 1')",
    lambda: [], lambda: {}, lambda: [[]], lambda: {"": None}, lambda: list(range(2000)), lambda: {str(i): i for i in range(500)},
    lambda: _deep(60), lambda: _deep(300), lambda: [None, "a", 1.5, {}], lambda: "bert", lambda: "os.system", lambda: "(a+)+$",
]  # fmt: skip

YAML_SNIPPETS = [
    "!!python/object/apply:os.system ['touch {marker}']", "!!python/name:os.system", "!!binary 'aGk='", "!!set {a, b}",
    "!<tag:yaml.org,2002:python/object/new:os.system> [x]", "&a [*a]", "*nothing", "<<: {a: 1}", "[[[[[[[[[[", "{" * 200,
    "2001-99-99", "1:2:3:4", "0x" + "f" * 400, "1e400", "\t", "\x00", "\x85", "? [a]\n: b", "--- \n...\n---\n", "%YAML 9.9\n---",
    "'", '"\\ud800"', "|\n  x", "- - - - -", "a: 1\na: 2", ".nan", "~", "=", "[" * 3000, "a: " * 300,
]  # fmt: skip


# ---- mutations ------------------------------------------------------------------------------------------------------


def mutate_json(content: Any, rng: random.Random) -> Any:
    """Change one to three places of a JSON value: another value, no value, one more key, one item twice."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        places = list(_places(content))
        holder, key = rng.choice(places)
        what = rng.random()
        if what < 0.65:
            holder[key] = rng.choice(NASTY)()
        elif what < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["__class__", "A", "../x", "", str(key).upper(), "auto_map"])] = rng.choice(NASTY)()
        else:
            holder.insert(key, holder[key])
        if not content:
            break
    return content


def _places(value: Any):
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items[:60]:
        yield value, key
        yield from _places(item)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, or make it no UTF-8."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at:]
        elif what == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
        elif what == 3:
            data[at:at] = data[max(0, at - 40) : at] * rng.randint(1, 50)
        elif what == 4:
            data[at:at] = rng.choice([b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\xc3"])
        else:
            del data[at : at + rng.randint(1, 30)]
    return bytes(data)


def mutate_text(content: bytes, rng: random.Random, snippets: list[str]) -> bytes:
    """As `mutate_bytes`, or with a hostile snippet in the place of a value."""
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    lines = content.decode().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    head, colon, _ = lines[at].partition(":")
    lines[at] = f"{head}{colon} {rng.choice(snippets)}\n"
    return "".join(lines).encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header (names, types, shapes, offsets, its length), or bytes anywhere."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    header = mutate_json(header, rng)
    if rng.random() < 0.3 and isinstance(header, dict) and header:
        entry = header[rng.choice(list(header))]
        if isinstance(entry, dict):
            entry["dtype"] = rng.choice(["F64", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "U64", "C64", "I8", "zebra"])
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.8 else rng.choice([0, 1, len(text) - 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + text + body


# ---- the guard ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What the process does while an input is read: an audit hook cannot be removed, so there is one for all."""

    active: bool = False
    allowed: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)

    def hook(self, event: str, args: tuple) -> None:
        if not self.active:
            return
        if event in _RUNS_CODE:
            self.seen.append(f"{event} {args[:1]}")
        elif event in _CHANGES:
            self._check(event, args[0])
        elif event == "open" and isinstance(args[0], (str, bytes)) and set("wax+") & set(args[1] or ""):
            self._check("open for writing", args[0])

    def _check(self, event: str, path: Any) -> None:
        text = path.decode() if isinstance(path, bytes) else str(path)
        if not text.startswith(self.allowed):
            self.seen.append(f"{event} {text}")

    @contextmanager
    def on(self, allowed: Path):
        self.active, self.allowed, self.seen = True, (str(allowed), "/dev/null"), []
        try:
            yield
        finally:
            self.active = False


WATCH = Watch()
sys.addaudithook(WATCH.hook)


class TooLong(BaseException):
    """An input took longer than `SECONDS` of this process's own time."""


@contextmanager
def limited_time():
    """End what takes too long; processor time, so that a busy machine does not count."""

    def ring(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# ---- targets --------------------------------------------------------------------------------------------------------


@dataclass
class Target:
    """
    One kind of input. change: content of the file -> mutated content; read: what reads it, from the folder in which it lies;
    any_error: whether any exception is a clean end (for code that is not ours), and not only our own.
    """

    file: str
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], Any]
    share: float
    any_error: bool = False


def _json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(content, rng)
    return json.dumps(mutate_json(json.loads(content), rng)).encode("utf-8", "surrogatepass")


def _rows(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _json(lines[at], rng)
    return b"\n".join(lines)


def _load(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def _read_rows(name: str, kind: str) -> Callable[[Path], Any]:
    return lambda folder: read_rows(folder / name, kind, ["x", "y"], False)


def _check(name: str) -> Callable[[Path], Any]:
    return lambda folder: check_artifact(folder / name)


def _open(folder: Path) -> Any:
    return open_checkpoint("a", folder, "expert 'a'")


def _open_lora(folder: Path) -> Any:
    expert = open_expert("lora", folder, "expert 'lora'", "base")
    return [expert.tensor(name) for name in expert.backbone]


def _yaml(content: bytes, rng: random.Random) -> bytes:
    return mutate_text(content, rng, YAML_SNIPPETS)


_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TARGETS = {
    "recipe": Target("recipe.yaml", _yaml, lambda folder: load_recipe(folder / "recipe.yaml"), 0.33),
    "rows": Target("a.jsonl", _rows, _read_rows("a.jsonl", "text"), 0.25),
    "tokens": Target("t.jsonl", _rows, _read_rows("t.jsonl", "tokens"), 0.05),
    "images": Target("i.jsonl", _rows, _read_rows("i.jsonl", "image"), 0.03),
    "source card": Target("README.md", _yaml, card_facts, 0.08),
    "row hashes": Target("rows.json", _json, lambda folder: read_hashes(folder / "rows.json"), 0.05),
    "config": Target(f"artifact/{_CONFIG}", _json, _check("artifact"), 0.06),
    "index": Target(f"shards/{_INDEX}", _json, _check("shards"), 0.03),
    "tensors": Target(f"artifact/{_WEIGHTS}", mutate_safetensors, _check("artifact"), 0.04),
    "report": Target("artifact/report.json", _json, _check("artifact"), 0.01),
    "expert config": Target(f"a/{_CONFIG}", _json, _open, 0.02),
    "expert tensors": Target(f"a/{_WEIGHTS}", mutate_safetensors, _open, 0.02),
    "LoRA config": Target("lora/adapter_config.json", _json, _open_lora, 0.03),
    "LoRA tensors": Target("lora/adapter_model.safetensors", mutate_safetensors, _open_lora, 0.03),
    "load, config": Target(f"artifact/{_CONFIG}", _json, lambda f: _load(f / "artifact"), 0.015, any_error=True),
    "load, tensors": Target(
        f"artifact/{_WEIGHTS}", mutate_safetensors, lambda f: _load(f / "artifact"), 0.015, any_error=True
    ),
}


def make_inputs(folder: Path) -> Path:
    """Sound inputs of every target, in one folder."""
    tiny.make_experts("bert", folder, {"a": ["x", "y"], "b": ["p", "q"]}, **_FIELDS)
    base, head = (tiny.new_model("bert", ["x", "y"], seed, **_FIELDS) for seed in (0, 1))
    adapters.write_adapter(folder / "lora", folder / "base", base, head, adapters.TARGETS["bert"], 2)
    recipe = tiny.write_recipe(folder, ("a", "b"), exclusive={"rank": 2}, include=[".*"], seed=1, parameters={})
    built = build_artifact(recipe, folder / "artifact", Progress(quiet=True)).folder
    _load(built).save_pretrained(folder / "shards", max_shard_size="8KB")
    shutil.copyfile(built / "rows.json", folder / "rows.json")
    (folder / "README.md").write_text("---\nlicense: mit\ndatasets:\n- glue\ntags: [a, b]\n---\n# Title\n")
    (folder / "t.jsonl").write_text('{"tokens": ["w1", "w2"], "tags": ["x", 1]}\n' * 3)
    tiny.picture(0, 0).save(folder / "one.png")
    (folder / "i.jsonl").write_text('{"image": "one.png", "label": "x"}\n' * 3)
    for target in TARGETS.values():
        target.read(folder)  # what is imported or cached once does not count later
    return folder


@dataclass
class Figures:
    """What came of all inputs."""

    inputs: int = 0
    ends: Counter = field(default_factory=Counter)
    by_target: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    growth: float = 0.0
    failures: list[str] = field(default_factory=list)


def attack(folder: Path, count: int, seed: int) -> Figures:
    """Read `count` mutated inputs; failures say target, seed of the input and what happened."""
    figures = Figures()
    names, shares = list(TARGETS), [target.share for target in TARGETS.values()]
    chosen = random.Random(seed).choices(names, shares, k=max(0, count - len(names)))
    for number, name in enumerate([*names, *chosen]):
        _attack_one(folder, name, f"{seed}:{number}", figures)
    return figures


def _attack_one(folder: Path, name: str, seed: str, figures: Figures) -> None:
    target, path = TARGETS[name], folder / TARGETS[name].file
    sound, rng = path.read_bytes(), random.Random(seed)
    mutated = target.change(sound, rng).replace(b"{marker}", str(folder / "marker").encode())
    path.write_bytes(mutated)
    before, memory = time.process_time(), _peak()
    end = "read"
    try:
        with WATCH.on(folder), limited_time():
            found = target.read(folder)
        end = "problems found" if isinstance(found, list) and found and isinstance(found[0], str) else "read"
    except TwinMergingError:
        end = "our error"
    except TooLong:
        figures.failures.append(f"{name}, {seed}: longer than {SECONDS} s")
    except Exception as error:
        end = "clean exception"
        if not target.any_error:
            figures.failures.append(f"{name}, {seed}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        path.write_bytes(sound)
    figures.inputs += 1
    figures.ends[end] += 1
    figures.by_target[name] += 1
    figures.slowest = max(figures.slowest, time.process_time() - before)
    grown = _peak() - memory
    figures.growth = max(figures.growth, grown)
    if grown > MEGABYTES:
        figures.failures.append(f"{name}, {seed}: memory grew by {grown:.0f} MiB")
    if WATCH.seen or (folder / "marker").exists():
        figures.failures.append(f"{name}, {seed}: touched {WATCH.seen[:3]}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(count: int, seed: int) -> int:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sys.stdin = io.StringIO()  # Transformers asks whether code may run; nobody is there to answer
    with tempfile.TemporaryDirectory() as scratch:
        figures = attack(make_inputs(Path(scratch).resolve() / "in"), count, seed)
    figures.failures, shown = figures.failures[:50], len(figures.failures)
    print(json.dumps({**figures.__dict__, "failed": shown}, ensure_ascii=False))
    return int(bool(shown))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
