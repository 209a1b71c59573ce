"""The model card of an artifact, filled from its config, report and scores."""

import re
from pathlib import Path

import yaml

from twin_merging_hf.artifact import LAYOUT
from twin_merging_hf.modeling import TwinMergingConfig
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace

from .card_scores import CardScores, card_scores, model_index
from .card_tables import (
    agreement_text,
    experts_table,
    fence,
    licences_text,
    routing_text,
    scores_text,
    size_text,
)
from .licences import Licences, licences_of


_TEMPLATE = Path(__file__).with_name("card_template.md")
_TASKS = {
    "text": "text-classification",
    "image": "image-classification",
    "tokens": "token-classification",
    "prompt": "text-generation",
    "masked": "fill-mask",
}
_EXAMPLES = {
    "text": '["a text", "another text"]',
    "image": '["image.png"]',
    "tokens": '["a text", "another text"]',
    "prompt": '["a prompt", "another prompt"]',
    "masked": '["a text with a [MASK]"]',
}
_OPTIONS = {"tokens": ', aggregation_strategy="simple"'}
_PIPELINE = """\
from transformers import pipeline

pipe = pipeline("{task}", model="{location}"{trust}{options})
pipe({example})"""
# Transformers has no pipeline for encoder-decoders any more.
_GENERATE = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{location}")
model = AutoModelForSeq2SeqLM.from_pretrained("{location}"{trust})
inputs = tokenizer({example}, padding=True, return_tensors="pt")
tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)"""
_BY_HAND = """\
`expert_weights` says who answered. To choose by hand: `model(**inputs, experts="{expert}")`, or
`with {model}.use_experts("{expert}"): ...`."""
# By kind of the label space.
_LOGITS_MEAN = {
    "union": "`logits` are log-probabilities over all experts' labels. ",
    "tags": "`logits` are log-probabilities over all experts' tags. ",
    "same": "`logits` are log-probabilities over the labels that all experts have. ",
    "value": "`logits` hold one number a row: the experts' own, by their weights. ",
    "language": "`logits` are those over the vocabulary of the mixture that a row gets. ",
}
_NUMBERS = "The number of an expert that is a regression stands in `expert_logits`. "
_GENERATES = """
`generate(..., experts="{expert}")` takes the same choice; without one, a row is routed once, on its prompt."""
_COMPETING = """\
Labels of different experts
compete in one distribution; give `experts=` where the task is known."""
_COMMON = (
    "Experts answer in the same\nterms, so only `expert_weights` says who did; give `experts=` where the task is known."
)
_KEPT = "What was chosen for a prompt stays\nwhile tokens are written; give `experts=` where the task is known."
_KNOWN = "Give `experts=` where\nthe task is known."
_STRANGERS = "An input that belongs to none of the experts is still given to one of them, or to a mixture."
_KEPT_OFF = "An input that belongs to none of the experts goes to the shared model where the router knows it for one."
_LIMITS = {"union": _COMPETING, "tags": _COMPETING, "same": _COMMON, "value": _COMMON, "language": _KEPT}
_REFERENCE = """

The shared model is not among these files: it is fetched from {base}, and refused if its weights are others."""
_TRUST = ', revision="COMMIT_HASH", trust_remote_code=True'
_DATASET = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
LOCATION = "PATH_OR_REPO_ID"
"""Stands in a card for the repository until there is one."""


def render_card(
    config: TwinMergingConfig,
    report: dict,
    recipe_text: str,
    kind: str,
    *,
    evaluation: dict | None = None,
) -> str:
    """
    Fill the card template.

    Args:
        report: content of report.json.
        kind: `text`, `image`, `tokens`, `prompt` or `masked`.
        evaluation: what `twin-merging evaluate` wrote about this artifact.
    """
    names = [expert["name"] for expert in config.experts]
    space = LabelSpace.of(config.experts)
    together = _is_encoder_decoder(config, kind)
    by_hand = _BY_HAND.format(expert=names[0], model="model" if together else "pipe.model")
    generates = _GENERATES.format(expert=names[0]) if kind == "prompt" else ""
    versions = config.provenance.get("versions", {})
    licences = licences_of(config.provenance.get("sources", {}))
    scores = card_scores(report, evaluation)
    picture = LAYOUT.confusion if LAYOUT.confusion in config.provenance.get("companions", []) else None
    metadata = _metadata(config, kind, licences, scores)
    return _TEMPLATE.read_text(encoding="utf-8").format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        title=f"Twin-Merging of {', '.join(names)}",
        count=len(names),
        usage=_usage(kind, together, pinned=False),
        pinned=_usage(kind, together, pinned=True),
        outputs=_meaning(space) + by_hand + generates + _reference(config),
        strangers=_STRANGERS if config.router_none_distance is None else _KEPT_OFF,
        limits=_KNOWN if kind == "masked" else _LIMITS[space.kind],
        experts=experts_table(config, report),
        routing=routing_text(config, report, picture),
        verdict=agreement_text(report),
        scores=scores_text(scores, kind),
        size=size_text(report),
        licences=licences_text(licences),
        fence=fence(recipe_text),
        recipe=recipe_text.strip() or "# built from Python, without a recipe file",
        versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items())) or "unknown versions",
    )


def _usage(kind: str, together: bool, pinned: bool) -> str:
    """Code that loads and uses the artifact; `pinned`: without the plugin, at one commit."""
    return (_GENERATE if together else _PIPELINE).format(
        task=_TASKS[kind],
        location=LOCATION,
        example=_EXAMPLES[kind],
        options=_OPTIONS.get(kind, ""),
        trust=_TRUST if pinned else "",
    )


def _meaning(space: LabelSpace) -> str:
    numbers = space.kind == "union" and any(space.regression)
    return _LOGITS_MEAN[space.kind] + (_NUMBERS if numbers else "")


def _reference(config: TwinMergingConfig) -> str:
    """Where the shared model is, if the artifact does not hold it."""
    reference = config.shared_reference
    if not reference:
        return ""
    model, revision = reference["model"], reference.get("revision")
    base = f"[{model}](https://huggingface.co/{model}) at commit `{revision}`" if revision else f"the folder `{model}`"
    return _REFERENCE.format(base=base)


def _is_encoder_decoder(config: TwinMergingConfig, kind: str) -> bool:
    return kind == "prompt" and bool(config.is_encoder_decoder)


def write_card(path: Path, config: TwinMergingConfig, report: dict, recipe_text: str, kind: str) -> None:
    """Write the card to `path`."""
    path.write_text(render_card(config, report, recipe_text, kind), encoding="utf-8")


def _metadata(config: TwinMergingConfig, kind: str, licences: Licences, scores: CardScores | None) -> dict:
    sources = config.provenance.get("sources", {})
    # Local folders would be dead links on the Hub.
    models = [source["model"].split("@")[0] for _, source in sorted(sources.items()) if source["from_hub"]]
    metadata: dict = {"library_name": "transformers"}
    if not _is_encoder_decoder(config, kind):
        metadata["pipeline_tag"] = _TASKS[kind]
    metadata |= licences.metadata
    if models:
        base = sources.get("base", {}).get("model", "").split("@")[0]
        ordered = sorted(dict.fromkeys(models), key=lambda model: model != base)
        metadata |= {"base_model": ordered, "base_model_relation": "merge"}
    metadata["tags"] = ["merge", "model-merging", "twin-merging", "twin-merging-hf", "custom_code"]
    datasets = sorted({name for source in sources.values() for name in source.get("datasets", [])})
    datasets = [name for name in datasets if _DATASET.fullmatch(name)]
    if datasets:
        metadata["datasets"] = datasets
    if scores is not None:
        name = f"twin-merging-{'-'.join(config.expert_names)}"
        metadata["model-index"] = model_index(name, _TASKS[kind], scores)
    return metadata
