"""The rows of the big table: every method as a name, its answers for a seed, and its bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from artifacts import OURS, Artifact, ours, stored
from bench import Bench, fingerprint
from features import Features, features
from published import ROUTER_ROWS, Published, Setting, router_logits, shared_state, weights_of
from rivals import head_bytes
from running import backbone, expert_runner, load, outputs
from scores import Answers
from static_merges import SEEDED, StaticMerges, available


TITLES = {
    "base": "pretrained",
    "linear": "mean of the experts",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_linear": "DARE",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
}
# From the published run to ours, one change at a time.
LADDER = {
    "published-oracle": ("Twin-Merging as published, with the oracle", Setting(oracle=True)),
    "published": ("Twin-Merging as published, without it", Setting()),
    "repair-pooling": ("  + masked pooling", Setting(masked=True)),
    "repair-layer": ("  + middle layer", Setting(masked=True, middle=True)),
    "repair-temperature": ("  + fitted temperature", Setting(masked=True, middle=True, fitted=True)),
    "repair-router": ("  + linear router", Setting(masked=True, middle=True, fitted=True, linear=True)),
}


@dataclass(frozen=True)
class Method:
    """
    One row of the table.

    answers: for a seed. ratio: all bytes / the base's. seeded: whether seeds differ. oracle: the true task is known.
    """

    key: str
    title: str
    answers: Callable[[int], Answers]
    ratio: Callable[[], float]
    seeded: bool = False
    oracle: bool = False


class Methods:
    """All methods on one bench; what several of them need is made once."""

    def __init__(self, bench: Bench):
        self.bench, self.part = bench, bench.part("test")
        self.task = self.part.gold.task
        self.static = StaticMerges(bench)
        self.experts = expert_runner(bench, self.part)
        self._ours: dict[int, Artifact] = {}

    def ours(self, seed: int) -> Artifact:
        if seed not in self._ours:
            self._ours[seed] = ours(self.bench, seed)
        return self._ours[seed]

    def our_choice(self, seed: int) -> np.ndarray:
        """The expert that our router gives each test row [row]."""
        return self.ours(seed).weights().argmax(1)

    @cached_property
    def ceiling_choice(self) -> np.ndarray:
        """The expert that the base, fine-tuned whole to tell the tasks apart, gives each test row [row]."""
        return self.ceiling("test").argmax(1)

    def ceiling(self, split: str) -> np.ndarray:
        """Logits [row, expert] of that model."""
        assert self.bench.ceiling is not None
        return self._whole_model("ceiling", self.bench.ceiling, split)

    def _whole_model(self, name: str, path, split: str) -> np.ndarray:
        part = self.bench.part(split)
        compute = lambda: {"raw": outputs(self.bench, load(path, self.bench.kind), part.rows, name)}  # noqa: E731
        return self.bench.cached(name, [part.digest, fingerprint(path)], compute)["raw"]

    # ---- the list ---------------------------------------------------------------------------------------------

    def all(self) -> list[Method]:
        """In the order of the table."""
        known = partial(Method, oracle=True)
        listed = [known("experts", "each task's own expert", self._experts_given, lambda: float(len(self.task_names)))]
        for name in ("base", "linear", *available()):
            listed += self._static(name)
        listed += self._ladder()
        listed += [
            self._stored("shape", "  + our router, mean as shared (a tenth of full rank, fp32)", {"ratio": 0.1}),
            Method("ours", "OURS", lambda s: self.ours(s).routed(), self._our_ratio, seeded=True),
            Method("ours-top-1", "ours, top-1", self._ours_top_1, self._our_ratio, seeded=True),
            Method("ours-soft", "ours, soft", lambda s: self.ours(s).routed(top_k=None), self._our_ratio, seeded=True),
            known("ours-given", "ours, task given", lambda s: self.ours(s).given(), self._our_ratio, seeded=True),
            self._stored("base-dynamic", "pretrained as shared + dynamic", shared_model=str(self.bench.base)),
            self._stored("expert-dynamic", "an expert as shared + dynamic", shared_model=str(self.bench.experts[0])),
            Method(
                "swap",
                "checkpoint swap, our router",
                self._swap,
                lambda: self._our_ratio() + len(self.task_names),
                seeded=True,
            ),
        ]
        return listed + self._whole_models()

    @property
    def task_names(self) -> list[str]:
        return self.bench.names

    def _our_ratio(self) -> float:
        return self.ours(0).ratio

    def _experts_given(self, seed: int) -> Answers:
        return self.bench.answer(self.experts.get(self.task), self.task)

    def _ours_top_1(self, seed: int) -> Answers:
        return self.ours(seed).chosen(self.our_choice(seed))

    def _swap(self, seed: int) -> Answers:
        choice = self.our_choice(seed)
        return self.bench.answer(self.experts.get(choice), choice)

    def _static(self, name: str) -> list[Method]:
        title, seeded = TITLES[name], name in SEEDED
        tuned = name not in ("base", "linear")

        def raw(seed: int) -> np.ndarray:
            parameters = self.static.tuned(name) if tuned else {}
            return self.static.raw(name, parameters, seed, self.part)

        def routed(seed: int) -> Answers:
            return self.bench.answer(raw(seed), self.our_choice(seed))

        given = lambda seed: self.bench.answer(raw(seed), self.task)  # noqa: E731
        return [
            Method(name, f"{title}, true head", given, self._dense_ratio, seeded, oracle=True),
            Method(f"{name}-routed", f"{title}, our router's head", routed, self._dense_ratio, True),
        ]

    def _dense_ratio(self) -> float:
        base = sum(value.nbytes for value in backbone(self.bench, self.bench.base).values())
        return 1 + head_bytes(self.bench) / base

    def _stored(self, key: str, title: str, exclusive: dict | None = None, **parts) -> Method:
        """Other deltas or another shared model; each row is answered by the expert that our router gives it."""
        ours_parts = {**OURS, **self.bench.ours}
        artifact = stored(self.bench, key, exclusive or ours_parts["exclusive"], **parts)

        def answers(seed: int) -> Answers:
            found = artifact.chosen(self.our_choice(seed))
            artifact.close()
            return found

        return Method(key, title, answers, lambda: artifact.ratio)

    # ---- the published run ------------------------------------------------------------------------------------

    @cached_property
    def published(self) -> Published:
        return Published(self.bench)

    @cached_property
    def published_features(self) -> Features:
        return features(self.bench, "published", lambda: shared_state(self.bench), ROUTER_ROWS, unmasked=True)

    def _ladder(self) -> list[Method]:
        listed = []
        for key, (title, setting) in LADDER.items():
            answers = partial(self._published, key, setting)
            seeded = key.startswith("published")
            listed.append(Method(key, title, answers, lambda: self.published.ratio, seeded, setting.oracle))
        return listed

    def _published(self, key: str, setting: Setting, seed: int) -> Answers:
        def compute() -> dict[str, np.ndarray]:
            logits = router_logits(self.published_features, setting, seed)
            weights = weights_of(logits, self.bench.part("validation").gold.task, setting)
            owner = self.task if setting.oracle else weights.argmax(1)
            return {"raw": self.published.outputs(weights, owner), "owner": owner, "weights": weights}

        arrays = self.bench.cached(key, [self.published.artifact.key, self.part.digest, str(setting), seed], compute)
        return self.bench.answer(arrays["raw"], arrays["owner"])

    # ---- whole fine-tuned models ------------------------------------------------------------------------------

    def _whole_models(self) -> list[Method]:
        listed = []
        if self.bench.ceiling is not None:
            choice = lambda: self.ceiling_choice  # noqa: E731
            listed += [
                Method("ceiling", "ceiling router, our experts", lambda s: self.ours(s).chosen(choice()),
                       lambda: self._our_ratio() + 1, seeded=True),
                Method("ceiling-experts", "ceiling router, the experts themselves",
                       lambda s: self.bench.answer(self.experts.get(choice()), choice()), lambda: 1.0 + len(self.task_names)),
            ]  # fmt: skip
        if self.bench.multi_task is not None:
            listed += [
                Method("multi-task", "one multi-task fine-tune", lambda s: self._multi_task(False), self._dense_ratio),
                Method("multi-task-given", "one multi-task fine-tune, task given", lambda s: self._multi_task(True),
                       self._dense_ratio, oracle=True),
            ]  # fmt: skip
        return listed

    def _multi_task(self, given: bool) -> Answers:
        """Its outputs: the union's columns, a slot for each regression; then the regressions' numbers."""
        raw = self._whole_model("multi-task", self.bench.multi_task, "test").copy()
        width = self.bench.width
        owner = np.repeat(np.arange(len(self.task_names)), [span.stop - span.start for span in self.bench.spans])
        chosen = self.task if given else owner[raw[:, :width].argmax(1)]
        numbers = [task for task, regression in enumerate(self.part.gold.regression) if regression]
        for place, task in enumerate(numbers):
            raw[:, self.bench.spans[task].start] = raw[:, width + place]
        return self.bench.answer(raw[:, :width], chosen)
