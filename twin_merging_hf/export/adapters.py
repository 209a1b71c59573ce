"""`--format peft`: the shared model as an ordinary checkpoint, and each expert as a PEFT LoRA on it."""

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from twin_merging_hf.artifact import write_json
from twin_merging_hf.modeling.export_twin_merging import ExpertLora, expert_lora, write_lora
from twin_merging_hf.modeling.modeling_twin_merging import SHARED

from .record import EXPORT_FILE, Export, left_out_summary
from .source import Source, open_source, output


BASE_FOLDER = "base"


def export_adapters(artifact: str | Path, out: str | Path, base_id: str | None = None) -> Export:
    """
    Write `out/base` (the shared model) and `out/<expert>` (a LoRA, with the expert's head in `modules_to_save`).

    Args:
        base_id: what the adapters name as their base, such as the Hub id under which you publish it; default: the folder.

    Raises:
        TwinMergingError: no artifact, sparse deltas, an expert called like the base's folder, `out` exists.
    """
    source, out = open_source(Path(artifact)), Path(out)
    with output(out) as folder:
        refuse_name(source, BASE_FOLDER)
        save_shared(source, folder / BASE_FOLDER)
        base = base_id or str((out / BASE_FOLDER).resolve())
        experts = []
        for t, name in enumerate(source.model.expert_names):
            lora = expert_lora(source.model, t, base)
            experts.append(write_expert(source, lora, t, folder / name))
        content = {"format": "peft", "base": base, "experts": experts, "notes": []}
        write_json(folder / EXPORT_FILE, content)
    first = source.model.expert_names[0]
    labels = len(source.config.experts[0]["labels"])
    count = f", num_labels={labels}" if source.config.head_modules else ""
    how = (
        f"model = {source.auto_class}.from_pretrained({str(out / BASE_FOLDER)!r}{count}); "
        f"PeftModel.from_pretrained(model, {str(out / first)!r})"
    )
    return Export(out, "peft", content, how)


def refuse_name(source: Source, *taken: str) -> None:
    """Raise ValueError where an expert is called like a folder that is something else."""
    for name in source.model.expert_names:
        if name.lower() in taken:
            raise ValueError(
                f"expert {name!r} is called like the folder {name.lower()!r} of the export; rename the expert"
            )


def save_shared(source: Source, folder: Path) -> PreTrainedModel:
    """Save the shared model as an ordinary checkpoint: the backbone alone where experts have heads of their own."""
    has_heads = bool(source.config.head_modules)
    model: Any = source.model.merge_and_unload(SHARED, source.model.expert_names[0] if has_heads else None)
    if has_heads:
        model = model.base_model
        model.config.architectures = [type(model).__name__]
        model.config.num_labels = 2
        model.config.problem_type = None
    model.save_pretrained(folder)
    source.copy_processing(folder)
    return model


def write_expert(source: Source, lora: ExpertLora, t: int, folder: Path) -> dict:
    """Write one adapter folder with its labels and tokenizer; return its entry of export.json."""
    write_lora(lora, folder)
    entry = source.config.experts[t]
    if entry["labels"]:
        # PEFT keeps no label names; beside the adapter they do no harm, and a build reads them from here.
        config = copy.deepcopy(source.config.shared_config)
        config.id2label = dict(enumerate(entry["labels"]))
        config.label2id = {label: i for i, label in config.id2label.items()}
        config.architectures = [source.config.shared_class]
        config.save_pretrained(folder)
    source.copy_processing(folder)
    size = sum(tensor.nbytes for tensor in lora.tensors.values())
    ranks = [lora.config["r"], *lora.config["rank_pattern"].values()] if lora.config["target_modules"] else [0]
    return left_out_summary(entry["name"], max(ranks), size, lora.energy, lora.left_out)
