"""Plans: in which order the exact mixture of a batch is computed. Each gives the same answers; they differ in cost."""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .call_twin_merging import Budget, CallWeights
from .costs_twin_merging import Costs, Sizes, constants_for, measure_constants
from .matrices_twin_merging import MatrixForward
from .mix_twin_merging import Scoped
from .report_twin_merging import measure as measured_ratio
from .report_twin_merging import new_report
from .selection_twin_merging import PLANS, Batch, Decision, Limits, decide
from .sparse_twin_merging import SparseDelta


@dataclass(frozen=True)
class PlanChoice:
    """What a user asked for: one of `PLANS`, and the bytes that plans may take (None: half of what is free)."""

    plan: str = "auto"
    memory_budget: int | None = None

    def __post_init__(self):
        if self.plan not in PLANS:
            raise ValueError(f"`plan` must be one of {', '.join(PLANS)}, got {self.plan!r}")
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ValueError(f"`memory_budget` must be a number of bytes or None, got {budget!r}")


class Generation:
    """What the forwards of one generation share. One for each block of `generating`, so that threads do not meet."""

    def __init__(self, expected: int | None, budget: Budget):
        self.expected, self.budget = expected, budget
        self.steps = 0
        self._calls: dict = {}

    def find(self, weights: torch.Tensor, kind: str) -> Any:
        """The call made before for a forward of this kind with equal weights, as a tuple of one; None if there is none."""
        known = self._calls.get(kind)
        return (known[1],) if known is not None and _equal(known[0], weights) else None

    def remember(self, weights: torch.Tensor, kinds: tuple, call: CallWeights | None) -> None:
        for kind in kinds:
            self._calls[kind] = (weights, call)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.device != other.device:
        return False
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one._version == other._version
    return same or torch.equal(one, other)


class PlansMixin:
    """What lets a Twin-Merging model choose how it computes."""

    # Of the model that this is mixed into.
    shared: Any
    deltas: Any
    config: Any
    _main_input: Any
    _align: Any
    _call_inputs: Any
    _resolve_weights: Any
    _run: Any

    def _start_plans(self) -> None:
        self._plan_choice = PlanChoice()
        self._plan_here, self._generation = Scoped(), Scoped()
        self._known_sizes: Sizes | None = None
        self._known_matrices: list | None = None

    def set_plan(self, plan: str = "auto", memory_budget: int | None = None, probe: bool = False) -> None:
        """
        Choose how the model computes from now on; answers stay the same.

        Args:
            plan: `factored`: every row through the factors of all experts that have weight in the batch. `gathered`: each
                row through its own experts' factors, for rows with few experts of many. `materialised`: rows with equal
                weights through one merged copy of each matrix, layer by layer, or kept within `generating`. `auto`
                (default): for each forward what it is expected to be cheapest.
            memory_budget: bytes that merged copies, and whatever else is made from the weights, may take beside shared and
                factors; None: half of the memory that is free.
            probe: measure the device once in this process (0.1 s) rather than rely on typical figures. What `auto` chooses
                may then differ from run to run.

        Raises:
            ValueError: an unknown plan or an impossible budget, or a plan that cannot be used with this model (why).
        """
        choice = PlanChoice(plan, memory_budget)
        self._check_usable(choice, self._unusable(choice))
        if probe:
            weight = self._weight()
            measure_constants(weight.device, weight.dtype)
        self._plan_choice = choice

    @contextmanager
    def use_plan(self, plan: str = "auto", memory_budget: int | None = None):
        """
        As `set_plan`, within the block and in this thread only.

        Raises:
            ValueError: as `set_plan`.
        """
        choice = PlanChoice(plan, memory_budget)
        self._check_usable(choice, self._unusable(choice))
        with self._plan_here.set(choice):
            yield self

    @contextmanager
    def generating(self, max_new_tokens: int | None = None):
        """
        Within the block, forwards of this thread belong to one generation: calls with equal expert weights share what was
        made for them once (merged copies, unpacked integers), within the memory budget. All of it is dropped at the end.

        Args:
            max_new_tokens: how many forwards are expected, by which `auto` judges whether merged copies pay; None: not
                known, and they are made once as many forwards have passed as it takes for them to pay.
        """
        if torch.compiler.is_compiling():
            yield self
            return
        with self._generation.set(Generation(max_new_tokens, Budget(self._budget(self._choice())))):
            yield self

    @torch.no_grad()
    def explain(self, *, experts=None, expert_weights: torch.Tensor | None = None, measure: bool = False, **inputs):
        """
        How a call with these arguments would be computed, and why.

        Args:
            experts, expert_weights, inputs: as in a call; none of the first two: the router decides.
            measure: also time the chosen plan against the base forward (a few runs of each).

        Returns:
            A `PlanReport`, to be printed or read.

        Raises:
            ValueError: as a call.
        """
        inputs, _ = self._align(self._call_inputs(inputs, {}))
        weights = self._resolve_weights(inputs, experts, expert_weights)
        choice, generation = self._choice(), self._generation.get()
        decision, _ = self._decide(inputs, weights, choice, generation)
        costs = self._costs(decision.batch.rows, decision.batch.width)
        limits = Limits(choice.plan, self._budget(choice, generation), self._unusable(choice))
        ratio = None
        if measure:
            run, base = (
                lambda: self._run(self.shared, dict(inputs), weights),
                lambda: self._run(self.shared, dict(inputs), torch.zeros_like(weights)),
            )
            ratio = measured_ratio(run, base, self._weight().device)
        sizes = {
            "shared": sum(parameter.nbytes for parameter in self.shared.parameters()),
            "factors": sum(t.nbytes for t in (*self.deltas.parameters(), *self.deltas.buffers())),
        }
        return new_report(decision, costs, limits, self.config.expert_names, sizes, ratio)

    # ---- one forward ------------------------------------------------------------------------------------------

    def _choice(self) -> PlanChoice:
        return self._plan_here.get() or self._plan_choice

    def _planned(self, inputs: dict, weights: torch.Tensor) -> CallWeights | None:
        """The weights of a call with the plan by which they act; None where no expert has weight."""
        choice = self._choice()
        if _has_fixed_shapes(weights):
            if choice.plan in ("gathered", "materialised"):
                raise ValueError(
                    f"plan {choice.plan!r} depends on the values of expert weights, which compiled or captured graphs and "
                    "the training of routers cannot; use 'auto' or 'factored'"
                )
            return CallWeights(weights)
        if choice.plan == "auto" and torch.is_grad_enabled():
            return CallWeights(weights)  # the least memory for backward, and one path to trust in training
        generation: Generation | None = self._generation.get()
        kind = "step" if self._computed_width(inputs) == 1 else "prompt"
        if generation is not None:
            generation.steps += kind == "step"
            known = generation.find(weights, kind)
            if known is not None and not self._may_merge_now(generation, choice):
                return known[0]
        decision, for_all = self._decide(inputs, weights, choice, generation)
        call = decision.call(weights, generation.budget if generation is not None else None)
        if generation is not None:
            generation.remember(weights, ("step", "prompt") if for_all else (kind,), call)
        return call

    def _may_merge_now(self, generation: Generation, choice: PlanChoice) -> bool:
        """Whether a generation of unknown length has just become long enough to think again: at powers of two."""
        steps = generation.steps
        return generation.expected is None and choice.plan == "auto" and steps >= 8 and steps & (steps - 1) == 0

    def _decide(self, inputs: dict, weights: torch.Tensor, choice: PlanChoice, generation) -> tuple[Decision, bool]:
        """The plan of a forward, and whether it is for all forwards of the generation."""
        rows: list = weights.tolist()  # on an accelerator, the one time that the host waits
        width, tokens = self._computed_width(inputs), self._tokens(inputs, len(rows))
        limits = Limits(choice.plan, self._budget(choice, generation), self._unusable(choice))
        self._check_usable(choice, limits.unusable)
        if generation is not None:
            # Merged copies are made for the many steps to come, and then serve the prompt too.
            expected = generation.steps if generation.expected is None else generation.expected
            steps = Batch.of(rows, [1] * len(rows), 1, max(1, expected))
            decision = decide(steps, self._costs(len(rows), 1), limits)
            if decision.kept or width == 1:
                return decision, decision.kept
        return decide(Batch.of(rows, tokens, width), self._costs(len(rows), width), limits), False

    def _costs(self, rows: int, width: int) -> Costs:
        weight = self._weight()
        return Costs(self._sizes(), constants_for(weight.device, weight.dtype), rows, width)

    def _computed_width(self, inputs: dict) -> int:
        """Computed tokens of each row, padding included."""
        main = self._main_input(inputs)
        if main.dim() != 4:
            return main.shape[1] if main.dim() > 1 else 1
        patch = getattr(self.config.shared_config, "patch_size", None)
        height, width = patch if isinstance(patch, (tuple, list)) else (patch or 16, patch or 16)
        return max(1, main.shape[2] * main.shape[3] // (height * width))

    def _tokens(self, inputs: dict, rows: int) -> list:
        """Tokens of each row without padding."""
        width, mask = self._computed_width(inputs), inputs.get("attention_mask")
        if mask is None or mask.dim() != 2 or mask.shape != (rows, width) or width == 1:
            return [width] * rows
        return (mask > 0).sum(dim=1).tolist()

    # ---- what can be used -------------------------------------------------------------------------------------

    def _budget(self, choice: PlanChoice, generation: Generation | None = None) -> int:
        if generation is not None:
            return generation.budget.limit
        return choice.memory_budget if choice.memory_budget is not None else free_bytes(self._weight().device) // 2

    def _check_usable(self, choice: PlanChoice, unusable: dict) -> None:
        if choice.plan in unusable:
            raise ValueError(f"plan {choice.plan!r} cannot be used with this model: {unusable[choice.plan]}")

    def _unusable(self, choice: PlanChoice) -> dict:
        """For each plan that cannot be used, why."""
        found, sizes = {}, self._sizes()
        if sizes.sparse:
            found["gathered"] = "its deltas are sparse entries, which have no factors to gather"
        reason = self._why_not_merged(sizes, choice)
        if reason:
            found["materialised"] = reason
        return found

    def _why_not_merged(self, sizes: Sizes, choice: PlanChoice) -> str | None:
        places = set(map(str, (getattr(self, "hf_device_map", None) or {}).values()))
        if places & {"cpu", "disk"} and len(places) > 1 or "disk" in places:
            return "some of its weights are offloaded"
        if getattr(self, "hf_quantizer", None) is not None:
            return "its shared weights are quantised"
        for stand_in in self._matrices():
            weight: Any = stand_in.module.weight
            if weight.device.type == "meta":
                return "its weights are on the meta device"
            if not weight.is_floating_point():
                return f"its shared weights are quantised ({weight.dtype})"
            if hasattr(weight, "device_mesh"):
                return "its weights are sharded over devices"
        copy = sizes.largest * sizes.entry
        if choice.memory_budget is not None and copy > choice.memory_budget:
            return f"one merged matrix takes {copy} bytes, the memory budget is {choice.memory_budget}"
        return None

    def _matrices(self) -> list:
        """The stand-ins of all linear layers whose weights have deltas, looked up once: every forward asks for them."""
        if self._known_matrices is None:
            stand_ins = (module.__dict__.get("forward") for module in self.shared.modules())
            self._known_matrices = [one for one in stand_ins if isinstance(one, MatrixForward)]
        return self._known_matrices

    def _weight(self) -> torch.Tensor:
        return next(self.shared.parameters())

    def _sizes(self) -> Sizes:
        """Sizes of the matrices, looked up once."""
        if self._known_sizes is None:
            self._known_sizes = _sizes_of(self.shared, self._matrices(), len(self.config.experts))
        return self._known_sizes


def _sizes_of(shared: nn.Module, matrices: list, experts: int) -> Sizes:
    thin, full, owned = [0] * experts, [0] * experts, [0]
    sides, sparse = 0, False
    for stand_in in matrices:
        m, n = _shape(stand_in.module)
        owned.append(m * n)
        sides += m + n
        sparse = sparse or isinstance(stand_in.weight, SparseDelta)
        for t, rank in enumerate(getattr(stand_in.weight, "ranks", (0,) * experts)):
            thin[t] += rank * (m + n)
            full[t] += rank * m * n
    modules = [m for m in shared.modules() if isinstance(m, (nn.Linear, nn.Conv1d, Conv1D))]
    base = sum(math.prod(_shape(module)) for module in modules)
    entry = next(shared.parameters()).element_size()
    return Sizes(len(matrices), base, sum(owned), tuple(thin), tuple(full), max(owned), entry, sides, sparse)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of a weight; a quantised one is packed in a way of its own."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight: Any = module.weight
    return tuple(weight.shape)


def _has_fixed_shapes(weights: torch.Tensor) -> bool:
    """Whether a plan must not depend on the values of weights: in graphs, and where weights themselves get gradients."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and weights.requires_grad):
        return True
    return weights.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else 0
    except (ValueError, OSError, AttributeError):
        return 0
