"""
`--format vllm`: the shared model, LoRAs that vLLM's multi-LoRA engine takes, and the router in a small folder of its own.

vLLM finds out late, and in words of its own, what it does not take; so its rules are checked here, on what was written.
"""

from pathlib import Path

import torch
from torch import nn

from twin_merging_hf.artifact import write_json
from twin_merging_hf.modeling.export_twin_merging import ExpertLora, expert_lora

from .adapters import BASE_FOLDER, refuse_name, save_shared, write_expert
from .record import EXPORT_FILE, Export
from .router import export_router
from .source import Source, open_source, output


ROUTER_FOLDER = "router"
# What `--max-lora-rank` of vLLM takes (vllm/config/lora.py); 1 is left out: older versions do not know it.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Architectures that vLLM runs, but not with LoRA (its list of supported models).
_WITHOUT_LORA = ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "GPTJForCausalLM")
_ROOT = "base_model.model."


def export_vllm(
    artifact: str | Path, out: str | Path, base_id: str | None = None, allow_embeddings: bool = False
) -> Export:
    """
    Write `out/base`, `out/<expert>` and `out/router`; every adapter keeps vLLM's rules.

    Adapters have one rank that vLLM knows (shorter factors are padded with zeros), no heads, and linear modules of the layers
    only. What else an expert changed is left out and reported, with its share of the delta's energy.

    Args:
        base_id: what the adapters name as their base.
        allow_embeddings: also adapt the embedding and the output layer, which only some versions and models of vLLM can.

    Raises:
        TwinMergingError: no causal language model, one that vLLM has no LoRA for, a rank above all that vLLM knows, an expert
            called `base` or `router`, sparse deltas, `out` exists.
    """
    source, out = open_source(Path(artifact)), Path(out)
    with output(out) as folder:
        _refuse(source)
        base = base_id or str((out / BASE_FOLDER).resolve())
        loras = [expert_lora(source.model, t, base) for t in range(len(source.model.expert_names))]
        for lora in loras:
            _keep_layers(lora, source, allow_embeddings)
        rank = _common_rank(loras)
        for lora in loras:
            pad(lora, rank)
        save_shared(source, folder / BASE_FOLDER)
        experts = [
            write_expert(source, lora, t, folder / name)
            for t, (name, lora) in enumerate(zip(source.model.expert_names, loras, strict=True))
        ]
        for name, lora in zip(source.model.expert_names, loras, strict=True):
            problems = vllm_problems(lora)
            if problems:
                raise RuntimeError(f"expert {name!r}: the export breaks vLLM's rules: {'; '.join(problems)}")
        export_router(source, folder / ROUTER_FOLDER)
        content = {"format": "vllm", "base": base, "max_lora_rank": rank, "experts": experts, "notes": []}
        write_json(folder / EXPORT_FILE, content)
    modules = " ".join(f"{name}={out / name}" for name in source.model.expert_names)
    how = (
        f"vllm serve {out / BASE_FOLDER} --served-model-name {BASE_FOLDER} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {modules}\nor: twin-merging serve {out}"
    )
    return Export(out, "vllm", content, how)


def _refuse(source: Source) -> None:
    refuse_name(source, BASE_FOLDER, ROUTER_FOLDER)
    name = source.config.shared_class
    if source.auto_class != "AutoModelForCausalLM":
        raise ValueError(
            f"vLLM's LoRAs are for causal language models, this artifact is a {name}: its heads could not go along. Use "
            "`--format peft`"
        )
    if name in _WITHOUT_LORA:
        raise ValueError(f"vLLM runs {name} without LoRA only; use `--format merged` for one expert at a time")


def _keep_layers(lora: ExpertLora, source: Source, allow_embeddings: bool) -> None:
    """Leave out, and report, all modules but linear ones of the layers (and, if allowed, embedding and output layer)."""
    model = source.model.shared
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for path in list(lora.config["target_modules"]):
        module = model.get_submodule(path)
        if (type(module) is nn.Linear and id(module) not in ends) or (allow_embeddings and id(module) in ends):
            continue
        keys = [key for key in lora.tensors if key.startswith(f"{_ROOT}{path}.lora_")]
        a, b = (lora.tensors.pop(key).flatten(1).double() for key in sorted(keys))
        energy = float(((a @ a.T) * (b.T @ b)).sum())
        size = 4 * (a.numel() + b.numel())
        lora.left_out.append(
            {"name": f"{path}.weight", "numbers": a.shape[1] * b.shape[0], "bytes": size, "energy": energy}
        )
        lora.config["target_modules"].remove(path)


def _common_rank(loras: list[ExpertLora]) -> int:
    """The smallest rank that vLLM knows and all factors fit into. Raises ValueError if there is none."""
    largest = max((_rank(key, value) for lora in loras for key, value in lora.tensors.items()), default=1)
    for rank in VLLM_RANKS:
        if largest <= rank:
            return rank
    raise ValueError(
        f"an expert has rank {largest}, vLLM takes at most {VLLM_RANKS[-1]}; build the artifact with `exclusive: {{rank: "
        f"{VLLM_RANKS[-1]}}}` or less"
    )


def _rank(key: str, tensor: torch.Tensor) -> int:
    return tensor.shape[0] if _is_a(key) else tensor.shape[1]


def _is_a(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_embedding_A"))


def pad(lora: ExpertLora, rank: int) -> None:
    """Bring all factors of an adapter to one rank by zeros, in place; its config then has no patterns."""
    for key, value in lora.tensors.items():
        missing = rank - _rank(key, value)
        axis = 0 if _is_a(key) else 1
        shape = list(value.shape)
        shape[axis] = missing
        lora.tensors[key] = torch.cat([value, value.new_zeros(shape)], dim=axis).contiguous()
    leaves = sorted({path.rsplit(".", 1)[-1] for path in lora.config["target_modules"]})
    lora.config.update(
        r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, target_modules=leaves, modules_to_save=None
    )


def vllm_problems(lora: ExpertLora) -> list[str]:
    """What vLLM would not take about an adapter; an empty list means that its rules are kept."""
    config, problems = lora.config, []
    if config["r"] not in VLLM_RANKS:
        problems.append(f"rank {config['r']} is none of {', '.join(map(str, VLLM_RANKS))}")
    if config["modules_to_save"]:
        problems.append("`modules_to_save` is set")
    if config["bias"] != "none" or config["use_dora"]:
        problems.append("biases or DoRA")
    if config["rank_pattern"] or config["alpha_pattern"]:
        problems.append("patterns of rank or alpha, which vLLM does not read")
    leaves = set(config["target_modules"])
    for key, value in lora.tensors.items():
        module = key.removeprefix(_ROOT).split(".lora_")[0]
        if ".lora_" not in key or module.rsplit(".", 1)[-1] not in leaves:
            problems.append(f"tensor {key!r} belongs to no target module")
        elif _rank(key, value) != config["r"]:
            problems.append(f"tensor {key!r} has rank {_rank(key, value)}, not {config['r']}")
    return problems
