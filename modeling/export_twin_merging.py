"""An artifact as plain models: one merged stock model, or one expert as a LoRA on the shared model."""

import copy
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .deltas_twin_merging import delta_key, delta_rule, parameter_owners
from .factors_twin_merging import ExactDelta, FactoredDelta
from .shared_twin_merging import find_shared_class
from .tags_twin_merging import TOKEN_CLASSES


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}


def dense_delta(delta: Any, weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What expert weights [expert] add to a parameter of this shape, float32."""
    if isinstance(delta, ExactDelta):
        return torch.tensordot(weights.to(delta.delta.device), delta.delta.float(), dims=1).reshape(shape)
    if isinstance(delta, FactoredDelta):
        up, down = float_factors(delta)
        owners = torch.repeat_interleave(torch.arange(len(delta.ranks)), torch.tensor(delta.ranks))
        return ((up * weights[owners].to(up.device)) @ down).reshape(shape)
    return sum(float(w) * delta.dense(t).float() for t, w in enumerate(weights)).reshape(shape)


def float_factors(delta: FactoredDelta) -> tuple:
    """All experts' factors, float32, any scale inside `up`: up [m, sum of ranks], down [sum of ranks, n]."""
    up, down = delta.up_matrix(torch.float32), delta.down_matrix(torch.float32)
    return (up if delta.bits is None else up * delta.scale.float()), down


def refuse_unreadable(model: Any) -> None:
    """Raise ValueError where weights cannot be read and written as they are: quantised or offloaded ones."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            "the shared model is quantised, and weights cannot be merged into quantised ones; load it in full precision"
        )
    away = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if away:
        raise ValueError(f"{away[0]!r} is offloaded and cannot be read here; load the artifact without offloading")


@torch.no_grad()
def merged_model(model: Any, weights: torch.Tensor, head: int | None) -> PreTrainedModel:
    """
    A stock task model whose weights are shared + sum_t weights[t] delta_t, with one expert's head, on the CPU.

    Args:
        model: a Twin-Merging model, neither quantised nor offloaded.
        weights: [expert].
        head: whose head, labels and kind of problem the model has; None for models that have no heads.

    Raises:
        ValueError: quantised or offloaded weights.
    """
    refuse_unreadable(model)
    config = model.config
    task_config = copy.deepcopy(config.shared_config)
    if head is not None:
        _set_labels(task_config, config.experts[head])
    task_config.architectures = [config.shared_class]
    stock = find_shared_class(config.shared_class)[0](task_config)
    owned = dict(model.shared.state_dict())
    changed = {*config.ranks, *config.exact_deltas, *config.sparse_deltas}
    state = {}
    for name in stock.state_dict():
        value = owned[_source_key(name, config.head_modules, head)].cpu()
        if name in changed:
            delta = dense_delta(model.deltas[delta_key(name)], weights.float(), value.shape)
            value = (value.float() + delta.cpu()).to(value.dtype)
        state[name] = value
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    stock = stock.to(dtype)
    stock.load_state_dict(state)
    parameters = dict(stock.named_parameters(remove_duplicate=False))
    for name in changed:  # tied names are one tensor, which has to be that of the name with the delta
        parameters[name].copy_(state[name])
    if getattr(model, "generation_config", None) is not None and stock.can_generate():
        stock.generation_config = copy.deepcopy(model.generation_config)
    task_config.dtype = dtype
    return stock.eval()


def _source_key(name: str, head_modules: list, head: int | None) -> str:
    module = next((module for module in head_modules if name.startswith(f"{module}.")), None)
    return name if module is None else f"{module}.heads.{head}.{name.removeprefix(f'{module}.')}"


def _set_labels(config: Any, expert: dict) -> None:
    config.id2label = dict(enumerate(expert["labels"]))
    config.label2id = {label: i for i, label in config.id2label.items()}
    kind = expert["problem_type"]
    config.problem_type = None if kind == TOKEN_CLASSES else kind


@dataclass
class ExpertLora:
    """
    One expert's deltas as a LoRA.

    tensors, config: what goes into the adapter's two files.
    left_out: what a LoRA cannot carry, one `{"name", "numbers", "bytes", "energy"}` each.
    energy: squared Frobenius norm of all of the expert's deltas, left out ones included.
    """

    tensors: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    left_out: list = field(default_factory=list)
    energy: float = 0.0


@torch.no_grad()
def expert_lora(model: Any, t: int, base: str) -> ExpertLora:
    """
    The deltas of expert `t` as tensors and config of a PEFT LoRA on the shared model (scale inside the factors, alpha = r).

    Args:
        base: what the adapter says it belongs to.

    Raises:
        ValueError: quantised or offloaded weights, or deltas stored as single entries, which have no factors.
    """
    config = model.config
    refuse_unreadable(model)
    if config.sparse_deltas:
        raise ValueError(
            "the deltas of this artifact are single entries (`exclusive.method` magnitude or bernoulli), not factors; only "
            "`svd` makes LoRAs"
        )
    found = ExpertLora()
    owners, paths = parameter_owners(model.shared), {id(m): path for path, m in model.shared.named_modules()}
    ranks: dict = {}
    for name, all_ranks in config.ranks.items():
        holders, parameter = owners[name]
        start, rank = sum(all_ranks[:t]), all_ranks[t]
        if not rank:
            continue
        up, down = float_factors(model.deltas[delta_key(name)])
        up, down = up[:, start : start + rank].cpu(), down[start : start + rank].cpu()
        energy = float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum())
        found.energy += energy
        rules: list[Any] = [(owner, delta_rule(owner, attribute, parameter)) for owner, attribute in holders]
        if all(rule in _PAIRS for _, rule in rules):
            for owner, rule in rules:
                ranks[paths[id(owner)]] = rank
                _add_pair(found.tensors, paths[id(owner)], rule, up, down, parameter.shape)
        else:
            _leave_out(found, name, up.shape[0] * down.shape[1], (up.numel() + down.numel()) * 4, energy)
    for name in config.exact_deltas:
        delta: Any = model.deltas[delta_key(name)]
        energy = float(delta.delta[t].double().pow(2).sum())
        found.energy += energy
        if energy:
            _leave_out(found, name, delta.delta[t].numel(), delta.delta[t].nbytes, energy)
    _add_heads(found.tensors, model, t)
    found.config = _adapter_config(model, ranks, base)
    return found


def _leave_out(found: ExpertLora, name: str, numbers: int, size: int, energy: float) -> None:
    found.left_out.append({"name": name, "numbers": numbers, "bytes": size, "energy": energy})


def _linear_pair(up, down, shape):
    return down, up


def _transposed_pair(up, down, shape):
    return up.T, down.T


def _convolution_pair(up, down, shape):
    return down.reshape(-1, *shape[1:]), up[..., None, None]


# PEFT's lora_A [rank, in] and lora_B [out, rank], by the rule under which our factors act.
_PAIRS = {
    "linear": ("lora_{}.weight", _linear_pair),
    "conv1d": ("lora_{}.weight", _transposed_pair),
    "conv2d": ("lora_{}.weight", _convolution_pair),
    "embedding": ("lora_embedding_{}", _transposed_pair),
}


def _add_pair(tensors: dict, path: str, rule: str, up: torch.Tensor, down: torch.Tensor, shape: torch.Size) -> None:
    key, pair = _PAIRS[rule]
    for half, value in zip("AB", pair(up, down, shape), strict=True):
        tensors[f"{_ROOT}{path}.{key.format(half)}"] = value.contiguous().clone()


def _add_heads(tensors: dict, model: Any, t: int) -> None:
    for module in model.config.head_modules:
        prefix = f"{module}.heads.{t}."
        for key, value in model.shared.state_dict().items():
            if key.startswith(prefix):
                tensors[f"{_ROOT}{module}.{key.removeprefix(prefix)}"] = value.cpu().contiguous().clone()


def _adapter_config(model: Any, ranks: dict, base: str) -> dict:
    """adapter_config.json as PEFT writes it; modules of other ranks than the commonest stand in the patterns."""
    config = model.config
    rank = max(set(ranks.values()), key=list(ranks.values()).count) if ranks else 1
    other = {path.replace(".", r"\."): value for path, value in ranks.items() if value != rank}
    heads = list(config.head_modules)
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(find_shared_class(config.shared_class)[1]),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(type(model.shared.get_submodule(path)) is Conv1D for path in ranks),
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "modules_to_save": heads or None,
    }


class ExportMixin:
    """Ways out of a Twin-Merging model: a merged stock model, an expert as a LoRA."""

    # Of the model that this is mixed into.
    config: Any
    _expert_index: Any
    _weights_by_name: Any
    _checked_weights: Any

    def merge_and_unload(self, weights, head: str | None = None) -> PreTrainedModel:
        """
        A plain Transformers model with fixed expert weights; this model stays as it is.

        Args:
            weights: an expert's name, `"__shared__"`, or a dict of weights by name such as `{"sst2": 0.7, "qqp": 0.3}`.
            head: whose head it gets, where several experts have weight (models with heads only). Its outputs are the columns
                of that expert in `expert_logits` under these weights.

        Returns:
            The shared task class of Transformers, on the CPU, ready for `save_pretrained`.

        Raises:
            ValueError: an unknown name, no `head` where one has to be chosen, quantised or offloaded weights.
        """
        row = self._checked_weights(self._weights_by_name(weights))
        if len(row) != 1:
            raise ValueError(f"a merged model has one set of weights, got {len(row)}")
        return merged_model(self, row[0], self._head_of(row[0], head))

    def _head_of(self, weights: torch.Tensor, head: str | None) -> int | None:
        if not self.config.head_modules:
            if head is not None:
                raise ValueError(f"{type(self).__name__} has no heads to choose from; leave `head` out")
            return None
        if head is not None:
            return self._expert_index(head)
        chosen = weights.nonzero().flatten().tolist()
        if len(chosen) != 1:
            raise ValueError(
                f"{len(chosen)} experts have weight, and a plain model has one head: name it by `head` (one of "
                f"{', '.join(self.config.expert_names)})"
            )
        return chosen[0]

    def export_expert_as_lora(self, name: str, folder, base: str = "") -> ExpertLora:
        """
        Write one expert as a PEFT LoRA folder. It belongs on the shared model: save that by
        `merge_and_unload("__shared__", ...)` and load the adapter on it.

        Args:
            base: the folder or Hub id of the shared model, for `base_model_name_or_path`.

        Returns:
            What was written, and what a LoRA cannot carry (`left_out`).

        Raises:
            ValueError: an unknown name, an adapter that is there already, quantised or offloaded weights, sparse deltas.
        """
        lora = expert_lora(self, self._expert_index(name), base)
        write_lora(lora, folder)
        return lora


def write_lora(lora: ExpertLora, folder) -> None:
    """Write an adapter's two files. Raises ValueError if the folder holds an adapter already."""
    os.makedirs(folder, exist_ok=True)
    config = os.path.join(folder, ADAPTER_CONFIG)
    if os.path.exists(config):
        raise ValueError(f"{config} exists already; choose another folder")
    save_file(lora.tensors, os.path.join(folder, ADAPTER_WEIGHTS), {"format": "pt"})
    with open(config, "w", encoding="utf-8") as stream:
        json.dump(lora.config, stream, indent=2)
