"""The model card of an artifact, filled from its config and report."""

import re
from pathlib import Path

import yaml

from twin_merging_hf.modeling import TwinMergingConfig


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
_KINDS = {"regression": "regression", "token_classification": "tags", "language_modeling": "language model"}
_PIPELINE = """\
from transformers import pipeline

pipe = pipeline("{task}", model="{location}"{options})
pipe({example})"""
# Transformers has no pipeline for encoder-decoders any more.
_GENERATE = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{location}")
model = AutoModelForSeq2SeqLM.from_pretrained("{location}")
inputs = tokenizer({example}, padding=True, return_tensors="pt")
tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)"""
_BY_HAND = """\
`expert_weights` says who answered. To choose by hand: `model(**inputs, experts="{expert}")`, or
`with {model}.use_experts("{expert}"): ...`."""
_LABELS_MEAN = "`logits` are log-probabilities over all experts' labels. "
_TOKENS_MEAN = "`logits` are those over the vocabulary of the mixture that a row gets. "
_GENERATES = """
`generate(..., experts="{expert}")` takes the same choice; without one, a row is routed once, on its prompt."""
_COMPETING = """\
Labels of different experts
compete in one distribution; give `experts=` where the task is known."""
_KEPT = "What was chosen for a prompt stays\nwhile tokens are written; give `experts=` where the task is known."


def render_card(config: TwinMergingConfig, report: dict, recipe_text: str, kind: str) -> str:
    """
    Fill the card template.

    Args:
        report: content of report.json.
        kind: `text`, `image`, `tokens`, `prompt` or `masked`.
    """
    names = [expert["name"] for expert in config.experts]
    language = kind in ("prompt", "masked")
    together = _is_encoder_decoder(config, kind)
    by_hand = _BY_HAND.format(expert=names[0], model="model" if together else "pipe.model")
    generates = _GENERATES.format(expert=names[0]) if kind == "prompt" else ""
    versions = config.provenance.get("versions", {})
    return _TEMPLATE.read_text(encoding="utf-8").format(
        metadata=yaml.safe_dump(_metadata(config, kind), sort_keys=False, allow_unicode=True).strip(),
        title=f"Twin-Merging of {', '.join(names)}",
        count=len(names),
        usage=(_GENERATE if together else _PIPELINE).format(
            task=_TASKS[kind], location="PATH_OR_REPO_ID", example=_EXAMPLES[kind], options=_OPTIONS.get(kind, "")
        ),
        outputs=(_TOKENS_MEAN if language else _LABELS_MEAN) + by_hand + generates,
        limits=_KEPT if language else _COMPETING,
        experts=_experts(config, report),
        routing=_routing(config, report),
        verdict=_verdict(report),
        size=_size(report),
        fence=_fence(recipe_text),
        recipe=recipe_text.strip() or "# built from Python, without a recipe file",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _is_encoder_decoder(config: TwinMergingConfig, kind: str) -> bool:
    return kind == "prompt" and bool(config.is_encoder_decoder)


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def write_card(path: Path, config: TwinMergingConfig, report: dict, recipe_text: str, kind: str) -> None:
    """Write the card to `path`."""
    path.write_text(render_card(config, report, recipe_text, kind), encoding="utf-8")


def _metadata(config: TwinMergingConfig, kind: str) -> dict:
    sources = config.provenance.get("sources", {})
    # Local folders would be dead links on the Hub.
    models = [source["model"] for source in sources.values() if source["from_hub"]]
    metadata: dict = {"library_name": "transformers"}
    if not _is_encoder_decoder(config, kind):
        metadata["pipeline_tag"] = _TASKS[kind]
    if models:
        metadata |= {"base_model": list(dict.fromkeys(m.split("@")[0] for m in models)), "base_model_relation": "merge"}
    return metadata | {"tags": ["merge", "model-merging", "twin-merging", "twin-merging-hf", "custom_code"]}


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _experts(config: TwinMergingConfig, report: dict) -> str:
    lines = ["| expert | source | kind | labels |", "|---|---|---|---|"]
    for expert in config.experts:
        labels = ", ".join(expert["labels"][:12]) + (" ..." if len(expert["labels"]) > 12 else "")
        kind = _KINDS.get(expert["problem_type"], "classes")
        lines.append(f"| {_cell(expert['name'])} | {_cell(expert.get('source', ''))} | {kind} | {_cell(labels)} |")
    return "\n".join(lines)


def _routing(config: TwinMergingConfig, report: dict) -> str:
    layers = ", ".join(str(layer) for layer in config.state_layers)
    where = f"the states before layers {layers}" if len(config.state_layers) > 1 else f"the state before layer {layers}"
    where = "the shared model's last state" if config.router_pass == "full" else f"{where} of the shared model"
    tokens = " and the row's tokens" if config.router_type == "lexical" else ""
    text = f"A `{config.router_type}` router reads {where}{tokens}, once for each row."
    if config.router_pass == "late":
        text += (
            f" It does so in the answer's own pass: experts act from layer {config.router_layer} on, and what they learned "
            "below it is left out (`report.json` says how much)."
        )
    if config.router_none_distance is not None:
        text += " Rows unlike every expert's go to the shared model."
    router = report["router"]
    if router.get("held_out_rows"):
        text += (
            f" On {router['held_out_rows']} held-out rows it chose the right expert in {router['accuracy']:.1%} "
            f"(temperature {router['temperature']:.3g})."
        )
        names = [expert["name"] for expert in config.experts]
        text += "\n\n| belongs to \\ chosen | " + " | ".join(_cell(name) for name in names) + " |\n"
        text += "|---" * (len(names) + 1) + "|\n"
        for name, row in zip(names, router["confusion"], strict=True):
            text += f"| {_cell(name)} | " + " | ".join(str(count) for count in row) + " |\n"
    elif "stale" in router:
        text += f" Its accuracy was {router['stale']}."
    else:
        text += " It was built from the experts' weights alone; its accuracy was not measured."
    return text.strip()


def _verdict(report: dict) -> str:
    verdict = report["verdict"]
    if verdict["agreement"] is None:
        stale = verdict.get("stale")
        return f"{stale.capitalize()}." if stale else "Not measured: the recipe gave no data."
    lines = [
        "Agreement with each expert's own answers on held-out rows (share of equal labels, of equal tags where "
        "tokens are tagged; Pearson correlation for a regression; of a language model the share of the completions' tokens "
        "at which both would write the same next): left to itself, and with the expert given.",
        "",
        "| expert | rows | routed | given |",
        "|---|---|---|---|",
    ]
    for name, share in verdict["agreement"].items():
        lines.append(f"| {_cell(name)} | {verdict['rows'][name]} | {share:.1%} | {verdict['given'][name]:.1%} |")
    return "\n".join(lines)


def _size(report: dict) -> str:
    size = report["storage"]
    parts = ", ".join(f"{name} {size[name] / 1e6:.2f} MB" for name in ("shared", "deltas", "heads", "router"))
    return f"{size['total'] / 1e6:.2f} MB: {parts}; {size['ratio']:.2f} times the shared backbone alone."
