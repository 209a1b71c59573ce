"""
What plans cost: time of one forward by each, from the sizes of a model, the weights of a batch, and what a device achieves.

Symbols: N tokens computed, n tokens of one group of rows with equal weights, r_t rank of expert t in a matrix [d_in, d_out].
Beside the base's 2 N d_in d_out operations, factors take 2 N r (d_in + d_out) and merging a matrix 2 r d_in d_out: merging
pays for a group with more than d_in d_out / (d_in + d_out) tokens, whatever the ranks. Few tokens are bound by the bytes of
the weights instead; each part costs the larger of the two times.
"""

import time
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Constants:
    """
    What a device achieves in one type of numbers.

    flops: operations per second in large products. thin, batched: the shares of it in products with a side of some ten
    to hundred, and in batches of such. bandwidth: bytes per second. launch: seconds that one operation takes at least.
    """

    flops: float
    thin: float
    batched: float
    bandwidth: float
    launch: float


# One thread of a server's processor as measured (EPYC Zen 4); an H200's data sheet at the shares that large products reach.
DEFAULTS = {
    ("cpu", torch.float32): Constants(95e9, 0.9, 0.55, 22e9, 4e-6),
    ("cpu", torch.bfloat16): Constants(210e9, 0.85, 0.5, 22e9, 4e-6),
    ("cuda", torch.float32): Constants(300e12, 0.4, 0.3, 3.5e12, 6e-6),
    ("cuda", torch.bfloat16): Constants(600e12, 0.4, 0.3, 3.5e12, 6e-6),
}
_measured: dict = {}


def constants_for(device: torch.device, dtype: torch.dtype) -> Constants:
    """Measured constants of a device and type where `measure_constants` has run in this process, else the defaults."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    narrow = torch.float32 if dtype == torch.float32 else torch.bfloat16
    return _measured.get((str(device), dtype)) or DEFAULTS[kind, narrow]


def measure_constants(device: torch.device, dtype: torch.dtype) -> Constants:
    """Measure a device once in this process (some 0.1 s); `constants_for` gives what was found from then on."""
    key = (str(device), dtype)
    if key not in _measured:
        x, square = (torch.randn(512, 768, device=device, dtype=dtype) for _ in range(2))
        thin, large = square[:128], torch.zeros(1 << 22, device=device)
        rows, stacks = x.view(16, 32, 768), square[:256].view(16, 16, 768)
        tiny = torch.zeros(1, device=device)

        def rate(operations, run):
            return operations / _seconds(run, device)

        flops = rate(2 * 512 * 512 * 768, lambda: x @ square.T)
        _measured[key] = Constants(
            flops=flops,
            thin=min(1.0, rate(2 * 512 * 128 * 768, lambda: x @ thin.T) / flops),
            batched=min(1.0, rate(2 * 512 * 16 * 768, lambda: torch.bmm(rows, stacks.transpose(1, 2))) / flops),
            bandwidth=rate(2 * large.nbytes, large.clone),
            launch=_seconds(lambda: tiny.add_(1), device),
        )
    return _measured[key]


def _seconds(run, device: torch.device, repeats: int = 7) -> float:
    """Median time of `run`, after one run to warm up."""
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            times.append(time.perf_counter() - start)
    return max(sorted(times[1:])[repeats // 2], 1e-9)


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator to finish what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Sizes:
    """
    Sizes of a model's matrices, summed.

    matrices: how many have deltas. base: entries of all matrices; owned: of those with deltas. thin: for each expert, sum of
    rank * (d_in + d_out); full: of rank * d_in * d_out. largest: entries of the largest with deltas. entry: bytes of one.
    sides: sum of d_in + d_out of those with deltas.
    """

    matrices: int
    base: int
    owned: int
    thin: tuple
    full: tuple
    largest: int
    entry: int
    sides: int
    sparse: bool = False

    @property
    def crossover(self) -> float:
        """Tokens of a group at which merging its matrices takes as many operations as applying its factors."""
        thin, full = sum(self.thin), sum(self.full)
        return full / thin if thin else float("inf")


@dataclass
class Costs:
    """Seconds of one forward of `rows` rows with `width` tokens each, on a device with `constants`."""

    sizes: Sizes
    constants: Constants
    rows: int
    width: int
    _unit: float = field(init=False)

    def __post_init__(self):
        self._unit = self.sizes.entry / self.constants.bandwidth

    def product(self, tokens: int, entries: float, share: float = 1.0) -> float:
        """`tokens` tokens times matrices of so many entries, at a share of the device's best."""
        return max(2 * tokens * entries / (self.constants.flops * share), entries * self._unit)

    @property
    def base(self) -> float:
        """The shared model's matrices alone."""
        return self.product(self.rows * self.width, self.sizes.base) + self.sizes.matrices * self.constants.launch

    def factored(self, experts: tuple, rows: int, copied: bool) -> float:
        """Extra time of the factors of these experts on all of `rows` rows; `copied`: they are brought together first."""
        sizes = self.sizes
        if sizes.sparse:
            return len(experts) * (self.product(rows * self.width, sizes.owned) + 3 * sizes.owned * self._unit)
        entries = sum(sizes.thin[t] for t in experts)
        time = (
            self.product(rows * self.width, entries, self.constants.thin) + 3 * sizes.matrices * self.constants.launch
        )
        return time + (2 * entries * self._unit + 2 * sizes.matrices * self.constants.launch if copied else 0.0)

    def gathered(self, row_experts: list) -> float:
        """Extra time of each row's own experts, whose factors are copied for each row (rows take as long as the widest)."""
        widest = max(sum(self.sizes.thin[t] for t in experts) for experts in row_experts)
        entries = len(row_experts) * widest
        compute = 2 * self.width * entries / (self.constants.flops * self.constants.batched)
        return compute + 3 * entries * self._unit + 7 * self.sizes.matrices * self.constants.launch

    def merging(self, experts: tuple) -> float:
        """Time to write one merged copy of all matrices."""
        sizes = self.sizes
        if sizes.sparse:
            return 8 * sizes.owned * self._unit
        full = sum(sizes.full[t] for t in experts)
        return 2 * full / (self.constants.flops * self.constants.thin) + 3 * sizes.owned * self._unit

    def split(self, groups: list) -> float:
        """Extra time of running groups (numbers of rows) one after the other rather than all rows at once."""
        if len(groups) == 1 and groups[0] == self.rows:
            return 0.0
        owned, tokens = self.sizes.owned, self.rows * self.width
        apart = sum(self.product(rows * self.width, owned) for rows in groups)
        together = self.product(sum(groups) * self.width, owned)
        copies = 2 * tokens * self.sizes.sides * self._unit
        return apart - together + copies + 3 * len(groups) * self.sizes.matrices * self.constants.launch
