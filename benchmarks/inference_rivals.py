"""Other ways to answer a mixed batch: PEFT, a loop over experts, dense models row by row, merged copies group by group."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inference_work import Work
from inference_world import World, twin
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call


Run = Callable[[], torch.Tensor]


# ---- PEFT --------------------------------------------------------------------------------------------------------


def peft_model(world: World) -> Any:
    """Every expert as a LoRA adapter `e0`, `e1`, ... of the stock model, scaling 1."""
    targets = [world.body_name(name).removesuffix(".weight") for name in world.factors]
    model: Any = twin(world.body(world.stock))
    for t, rank in enumerate(world.ranks):
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        if t == 0:
            model = get_peft_model(model, config, adapter_name="e0")
        else:
            model.add_adapter(f"e{t}", config)
    _fill_adapters(world, model)
    return model.eval()


def _fill_adapters(world: World, model: Any, name: Callable[[int], str] = "e{}".format, inner: str = "") -> None:
    tuned = model.base_model.model  # below X-LoRA's own tuner: of the LoRA model in it
    for parameter, factors in world.factors.items():
        layer = tuned.get_submodule(inner + world.body_name(parameter).removesuffix(".weight"))
        blocks = zip(factors.up.split(world.ranks, 1), factors.down.split(world.ranks, 0), strict=True)
        for t, (up, down) in enumerate(blocks):
            layer.lora_A[name(t)].weight = nn.Parameter(down, requires_grad=False)
            layer.lora_B[name(t)].weight = nn.Parameter(up.contiguous(), requires_grad=False)


def peft_mixed(work: Work, model: Any, weights: torch.Tensor) -> Run:
    """PEFT's mixed batch: one adapter's name a row (weights are one-hot)."""
    names = [f"e{t}" for t in weights.argmax(1).tolist()]
    return lambda: work.call(model, adapter_names=names)


def router_and_peft(work: Work, model: Any, router: Any) -> Run:
    """A routing pass of the shared model, the likeliest expert by the same router as ours, then PEFT's mixed batch."""
    linear, shared = router.router.classifier, twin(work.base)

    def run() -> torch.Tensor:
        hidden = shared(**work.prompt).last_hidden_state  # type: ignore[attr-defined]
        chosen = linear(hidden.float().mean(dim=1)).argmax(1)
        return work.call(model, adapter_names=[f"e{t}" for t in chosen.tolist()])

    return run


class GivenScalings(nn.Module):
    """Stands after X-LoRA's own classifier, which still runs: its mixture is replaced by the weights at hand."""

    def __init__(self, classifier: Any, weights: torch.Tensor):
        super().__init__()
        self.classifier, self.weights = classifier, weights

    def make_dummy_scalings(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.classifier.make_dummy_scalings(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        scalings = self.classifier(*args, **kwargs)
        return self.weights[:, None, None, :].to(scalings).expand_as(scalings)


class InnerModel(nn.Module):
    """X-LoRA finds its adapters' tensors only in models whose layers lie in an attribute called `model`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = type(model.config).from_dict({**model.config.to_dict(), "use_cache": False})

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def xlora(work: Work, weights: torch.Tensor) -> Run:
    """PEFT's X-LoRA: a whole scaling pass, then a loop over all adapters in each layer, per-token weights."""
    world = work.world
    targets = [f"model.{world.body_name(name).removesuffix('.weight')}" for name in world.factors]
    with tempfile.TemporaryDirectory() as folder:
        # X-LoRA takes its adapters from disk only.
        folders = {str(t): str(Path(folder) / str(t)) for t in range(world.count)}
        for t, path in folders.items():
            # Their values are filled in below.
            config = LoraConfig(r=world.ranks[int(t)], target_modules=targets)
            get_peft_model(InnerModel(twin(work.base)), config).save_pretrained(path)
        size = world.stock.config.hidden_size
        mixture = XLoraConfig(hidden_size=size, adapters=folders, xlora_depth=1, layerwise_scalings=False)
        wrapped: Any = PeftModel(InnerModel(twin(work.base)), mixture).eval()
    _fill_adapters(world, wrapped, str, inner="model.")
    for module in wrapped.modules():
        if hasattr(module, "scaling") and hasattr(module, "lora_A"):
            module.scaling.update(dict.fromkeys(module.scaling, 1.0))
    tuner = wrapped.base_model
    tuner.internal_xlora_classifier = GivenScalings(tuner.internal_xlora_classifier, weights)
    return lambda: work.call(wrapped)


# ---- by hand -----------------------------------------------------------------------------------------------------


class LoopHook:
    """Adds every expert's part in turn, as X-LoRA's layers do, without its scaling pass."""

    def __init__(self, ups: list[torch.Tensor], downs: list[torch.Tensor], weights: torch.Tensor):
        self.ups, self.downs, self.weights = ups, downs, weights

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        for t, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            w = self.weights[:, t].reshape(-1, *([1] * (x.dim() - 1)))
            output = output + F.linear(F.linear(x * w, down), up)
        return output


def loop_over_experts(work: Work, weights: torch.Tensor) -> Run:
    """The factors of one expert after the other, for all rows."""
    world = work.world
    model = twin(world.stock)
    weights = weights.to(device=world.device, dtype=world.dtype)
    for name, factors in world.factors.items():
        ups = [up.contiguous() for up in factors.up.split(world.ranks, 1)]
        downs = list(factors.down.split(world.ranks, 0))
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(LoopHook(ups, downs, weights))
    body = world.body(model)
    return lambda: work.call(body)


def dense_bytes(world: World) -> int:
    """Memory of the dense deltas of all experts."""
    each = sum(f.up.shape[0] * f.down.shape[1] for f in world.factors.values()) * world.stock.dtype.itemsize
    return world.count * each


def dense_per_row(work: Work, weights: torch.Tensor, rows: int) -> Run:
    """
    The published code: T dense deltas in memory; for each row all weights anew, tensor by tensor, then a batch of one
    through `functional_call`. Answers the first `rows` rows.
    """
    world, body = work.world, twin(work.base)
    start = {world.body_name(name): dict(world.stock.named_parameters())[name] for name in world.factors}
    deltas = [
        {world.body_name(name): up.contiguous() @ down for name, (up, down) in _blocks(world, t).items()}
        for t in range(world.count)
    ]
    scalars = weights.tolist()

    def run() -> torch.Tensor:
        answers = []
        for row in range(rows):
            merged = {
                name: parameter + sum(w * delta[name] for w, delta in zip(scalars[row], deltas, strict=True))
                for name, parameter in start.items()
            }
            answers.append(work.call(Called(body, merged), [row]))
        return torch.cat(answers)

    return run


def _blocks(world: World, t: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, factors in world.factors.items():
        found[name] = factors.up.split(world.ranks, 1)[t], factors.down.split(world.ranks, 0)[t]
    return found


class Called(nn.Module):
    """A model called with other tensors in the place of some parameters."""

    def __init__(self, body: Any, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.body, self.tensors = body, tensors

    def forward(self, **inputs: Any) -> Any:
        return functional_call(self.body, self.tensors, (), inputs)


def merged_copies(work: Work, weights: torch.Tensor, rows: int | None = None) -> Run:
    """
    An honest rival where few mixtures are known beforehand: one merged copy of the model for each, rows sorted by copy.

    Args:
        rows: answer only the first ones.
    """
    world, count = work.world, rows or work.batch
    groups: dict[tuple, list[int]] = {}
    for row in range(count):
        groups.setdefault(tuple(weights[row].tolist()), []).append(row)
    copies = [world.body(world.merged(torch.tensor(key))) for key in groups]
    order = [row for members in groups.values() for row in members]
    back = torch.tensor(order).argsort().to(world.device)

    def run() -> torch.Tensor:
        parts = [work.call(copy, members) for copy, members in zip(copies, groups.values(), strict=True)]
        return torch.cat(parts)[back]

    return run


def copies_bytes(world: World, weights: torch.Tensor) -> int:
    """Memory of one merged copy for each different row of weights."""
    return dense_bytes(world) // world.count * len({tuple(row.tolist()) for row in weights})
