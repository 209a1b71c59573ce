"""`--format merged`: fixed expert weights as one stock Transformers checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from twin_merging_hf.artifact import write_json

from .record import EXPORT_FILE, Export
from .source import open_source, output


def export_merged(
    artifact: str | Path, out: str | Path, weights: str | Mapping[str, float], head: str | None = None
) -> Export:
    """
    Write the merge for fixed weights as a plain checkpoint with the artifact's tokenizer or processor.

    Its logits are the artifact's `expert_logits` in the columns of `head` when all rows have these weights.

    Args:
        weights: an expert's name, `"__shared__"`, or weights by name.
        head: whose head it gets; needed where not just one expert has weight, and there are heads.

    Raises:
        TwinMergingError: no artifact, unknown names, no head chosen, `out` exists.
    """
    source = open_source(Path(artifact))
    with output(Path(out)) as folder:
        chosen = weights if isinstance(weights, str) else dict(weights)
        model = source.model.merge_and_unload(chosen, head)
        model.save_pretrained(folder)
        source.copy_processing(folder)
        content = {"format": "merged", "weights": chosen, "head": head, "class": type(model).__name__}
        write_json(folder / EXPORT_FILE, content)
    return Export(Path(out), "merged", content, f"{source.auto_class}.from_pretrained({str(out)!r})")
