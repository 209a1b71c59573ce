"""Everything that can be wrong with a build's inputs, found at once and before any work."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from twin_merging_hf.modeling.configuration_twin_merging import LANGUAGE
from twin_merging_hf.modeling.deltas_twin_merging import delta_rule, parameter_owners
from twin_merging_hf.modeling.heads_twin_merging import LabelSpace
from twin_merging_hf.modeling.tags_twin_merging import TOKEN_CLASSES

from .adapted import adapter_base, open_expert
from .batch_statistics import STATISTICS, common_statistics
from .checkpoints import Checkpoint, open_checkpoint
from .data import READ_AS_TEXT, ExpertRows, read_rows, split_rows
from .errors import TwinMergingError, require_extra
from .late import before_routing
from .processing import Processing, differing_parts, load_processing, position_limit
from .recipe import BASE, ExpertSpec, Recipe, check_base


_NOT_FUNCTION = {
    "architectures", "auto_map", "id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "dtype",
    "torch_dtype", "transformers_version", "finetuning_task", "use_cache", "gradient_checkpointing", "output_attentions",
    "output_hidden_states", "return_dict", "_attn_implementation_autoset", "initializer_range", "initializer_factor",
    "bos_token_id", "eos_token_id", "sep_token_id", "tie_word_embeddings", "pooler_act", "pooler_output_size",
    "encoder_stride",
}  # fmt: skip
# Fields of older versions of Transformers that change the function, with the value that newer versions imply.
_OLD_DEFAULTS: dict[str, Any] = {"position_embedding_type": "absolute", "pruned_heads": {}}
_KIND_OF_INPUT = {"input_ids": "text", "pixel_values": "image"}
_KIND_OF_CLASS = {
    "AutoModelForTokenClassification": "tokens",
    "AutoModelForCausalLM": "prompt",
    "AutoModelForSeq2SeqLM": "prompt",
    "AutoModelForMaskedLM": "masked",
}


@dataclass
class Inputs:
    """All that a build works on, checked: checkpoints that fit together, label space, data, processing."""

    recipe: Recipe
    experts: list[Checkpoint]
    base: Checkpoint | None
    shared: Checkpoint | None
    """A ready shared model, if the recipe names one."""
    entries: list[dict]
    """Config entries of the experts: name, labels, problem_type, source."""
    processing: Processing | None
    rows: list[ExpertRows] | None
    """Rows of each expert, if all have data."""
    notes: list[str]
    before_routing: frozenset[str] = frozenset()
    """Parameters that get no delta because they act before a `late` router has read."""
    alignment: dict | None = None
    """What alignment found, for report.json; None where nothing was aligned."""
    thresholds: dict[tuple[float, torch.dtype], tuple[float, ...]] = field(default_factory=dict, repr=False)
    """What TIES keeps of each expert, by density and type of computing; filled where it is needed first."""
    fitted: dict[tuple, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    """Backbone tensors of shared models that were fitted as a whole, by method and the experts' weights; filled likewise."""
    low_memory: bool = False
    """Whether no model may be in memory as a whole."""
    on_fit: Callable[[str], Any] = field(default=lambda name: None, repr=False)
    """Called with the name of each module that is fitted, which takes seconds."""

    @property
    def kind(self) -> str:
        """`text`, `image`, `tokens`, `prompt` or `masked`."""
        return input_kind(self.experts[0])

    @property
    def label_space(self) -> LabelSpace:
        return LabelSpace.of(self.entries)

    def gets_delta(self, tensor: str) -> bool:
        """False where the recipe leaves a tensor to the shared model alone, by name or by where its experts begin to act."""
        return self.recipe.gets_delta(tensor) and tensor not in self.before_routing

    def close(self) -> None:
        """Close all checkpoint files."""
        for checkpoint in [*self.experts, self.base, self.shared]:
            if checkpoint is not None:
                checkpoint.close()


def input_kind(checkpoint: Checkpoint) -> str:
    """
    `text` or `image`, by what the model's main input is; `tokens` where texts are tagged word by word, `prompt` where they
    are gone on from or answered, `masked` where they are filled.
    """
    kind = _KIND_OF_CLASS.get(checkpoint.auto_class)
    if kind is not None and checkpoint.skeleton.main_input_name == "input_ids":
        return kind
    return _KIND_OF_INPUT.get(checkpoint.skeleton.main_input_name, checkpoint.skeleton.main_input_name)


def _tags_tokens(checkpoint: Checkpoint) -> bool:
    return checkpoint.auto_class == "AutoModelForTokenClassification"


def preflight(recipe: Recipe, report: Callable[[str], None] = lambda message: None) -> Inputs:
    """
    Open and compare everything that a recipe names.

    Raises:
        TwinMergingError: lists every problem found.
    """
    problems: list[str] = []
    notes: list[str] = []
    recipe = _with_base(recipe)
    check_base(recipe)
    experts, base, shared = _open_all(recipe, problems)
    first = experts[0]
    backbones = [*experts, *(checkpoint for checkpoint in (base, shared) if checkpoint is not None)]
    for checkpoint in backbones:
        problems += compare_backbones(checkpoint, first)
        if checkpoint not in experts:
            _check_absent(checkpoint, recipe, problems, notes)
            notes += [f"{checkpoint.role}: ignored head tensor {name}" for name in checkpoint.ignored]
    if not problems:
        ready = base if recipe.shared_model == BASE else shared
        notes += share_statistics(backbones, [ready] if ready is not None else experts, recipe)
    _attempt(problems, _check_router_layer, recipe, first)
    entries = [_attempt(problems, _entry, *pair) for pair in zip(experts, recipe.experts, strict=True)]
    processing = _attempt(problems, _common_processing, backbones, recipe, problems, notes)
    rows = None
    if None not in entries:
        rows = _attempt(problems, _rows, recipe, entries, input_kind(first))
        _attempt(problems, _check_label_space, entries)
        notes += [*_label_notes(entries), *_data_notes(recipe)]
    _attempt(problems, _check_patterns, recipe, list(first.backbone))
    _raise(problems)
    for checkpoint in backbones:
        report(f"checking that {checkpoint.role} holds no NaN or infinity")
        bad = checkpoint.find_not_finite()
        if bad is not None:
            problems.append(f"{checkpoint.role}: tensor {bad!r} holds NaN or infinity; train or save it again")
        untied = checkpoint.find_untied()
        if untied is not None:
            problems.append(
                f"{checkpoint.role}: its config ties {untied!r} to another tensor, but its files hold two different ones; "
                "set `tie_word_embeddings` to false in its config.json"
            )
    _raise(problems)
    merged = [c for c in (shared, base if _uses_base(recipe) else None) if c is not None]
    below = before_routing(recipe, first)
    _check_covered(recipe, [*experts, *merged], first, below)
    ready = base if recipe.shared_model == BASE else shared
    return Inputs(recipe, experts, base, ready, entries, processing, rows, notes, below)


def _open_all(recipe: Recipe, problems: list[str]) -> tuple[list[Checkpoint], Checkpoint | None, Checkpoint | None]:
    """Open the experts, the base model and the ready shared model; raise if that fails or their classes differ."""
    opened = [_attempt(problems, _open_expert, expert, recipe) for expert in recipe.experts]
    _raise(problems)
    experts: list[Checkpoint] = opened
    first = experts[0]
    others: list[Checkpoint | None] = []
    for role, source in (("base model", recipe.base_model), ("shared model", recipe.shared_model)):
        wanted = source is not None and not (role == "shared model" and source == BASE)
        others.append(_attempt(problems, open_checkpoint, source, recipe.folder, role, first) if wanted else None)
    for checkpoint in experts[1:]:
        if checkpoint.task_class is not first.task_class:
            problems.append(
                f"{checkpoint.role} is a {checkpoint.task_class.__name__}, but {first.role} is a "
                f"{first.task_class.__name__}; all experts must be of one class"
            )
    _raise(problems)
    return experts, others[0], others[1]


def _open_expert(expert: ExpertSpec, recipe: Recipe) -> Checkpoint:
    role = f"expert {expert.name!r}"
    return open_expert(expert.model, recipe.folder, role, recipe.base_model, expert.base_model)


def _with_base(recipe: Recipe) -> Recipe:
    """LoRA experts bring their base: without `base_model`, that of the first one is the base of all."""
    if recipe.base_model is not None:
        return recipe
    for expert in recipe.experts:
        try:
            base = expert.base_model or adapter_base(expert.model, recipe.folder, f"expert {expert.name!r}")
        except TwinMergingError:
            continue  # said again, with all other problems, when the expert is opened
        if base is not None:
            return replace(recipe, base_model=base)
    return recipe


def share_statistics(checkpoints: Sequence[Any], leading: Sequence[Any], recipe: Recipe) -> list[str]:
    """Let all checkpoints' batch norms be read in the statistics of the `leading` ones; returns a note if any differ."""
    dtype = getattr(torch, recipe.out_dtype) if recipe.out_dtype else None
    others = [c for c in checkpoints if not any(c is leader for leader in leading) and not c.absent]
    common = common_statistics(leading[0].skeleton, [c.stored for c in leading], [c.stored for c in others], dtype)
    for checkpoint in checkpoints:
        checkpoint.statistics = common
    count = len(common) // len(STATISTICS)
    return [f"the statistics of {count} batch norms differ; all are restated in common ones"] if count else []


def _attempt(problems: list[str], action: Callable, *args: Any) -> Any:
    """Call `action`; what a user can fix becomes a problem in the list instead of an end."""
    try:
        return action(*args)
    except TwinMergingError as error:
        problems.append(str(error))
        return None


def _raise(problems: list[str]) -> None:
    problems = list(dict.fromkeys(problems))  # a missing package is missed more than once
    if len(problems) == 1:
        raise TwinMergingError(problems[0])
    if problems:
        raise TwinMergingError(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _check_absent(checkpoint: Checkpoint, recipe: Recipe, problems: list[str], notes: list[str]) -> None:
    """A base without, say, a pooler serves only where its tensors are not merged."""
    if not checkpoint.absent:
        return
    text = f"{checkpoint.role}: its class has no {_some(checkpoint.absent)}"
    if not _uses_base(recipe) and checkpoint.role == "base model":
        notes.append(f"{text}; not needed by `linear`")
    else:
        problems.append(f"{text}, which the shared model would be made of; use `merge_method: linear`")


def _check_router_layer(recipe: Recipe, first: Checkpoint) -> None:
    layers = recipe.router.layers or ()
    if recipe.router.type == "lexical" and input_kind(first) not in READ_AS_TEXT:
        raise TwinMergingError(
            f"`router: lexical` looks at the tokens of texts, but these experts read {input_kind(first)}; use `centroid`"
        )
    untrained = recipe.router.type == "auto" and any(expert.data is None for expert in recipe.experts)
    if recipe.router.router_pass == "full" and untrained:
        raise TwinMergingError(
            "`router: auto` without `data` for every expert means `projection`, which reads a layer's input and cannot use "
            "`pass: full`; give data, or leave `pass` out"
        )
    if recipe.router.router_pass == "full" and not layers:
        return
    if recipe.router.router_pass == "full":
        raise TwinMergingError("`router.layer` has no meaning with `pass: full`, which reads the last state")
    if recipe.router.router_pass == "late" and layers == (0,) and (untrained or recipe.router.type == "projection"):
        raise TwinMergingError(
            "`router.pass: late` with `projection` reads inside the layer below the one from which experts act; give "
            "`router.layer` of at least 1"
        )
    count = first.layer_count  # raises where the model has no list of layers
    for layer in layers:
        if layer >= count:
            raise TwinMergingError(f"`router.layer` is {layer}, but the model has layers 0 to {count - 1}")


def compare_backbones(checkpoint: Checkpoint, first: Checkpoint) -> list[str]:
    """Reasons why a checkpoint's backbone cannot be merged with the first's; empty if it can."""
    problems = []
    is_expert = checkpoint.role.startswith("expert")
    extra = [*checkpoint.extra, *(checkpoint.ignored if is_expert else [])]
    if checkpoint.missing:
        problems.append(
            f"{checkpoint.role}: {_some(checkpoint.missing)} missing in the files; save the whole model again"
        )
    if extra:
        problems.append(
            f"{checkpoint.role}: the files hold {_some(extra)}, which a {checkpoint.task_class.__name__} does not have"
        )
    contradictions = checkpoint.contradictions()
    problems += [
        f"{checkpoint.role}: {contradiction}; its files do not belong together" for contradiction in contradictions
    ]
    for name, shape in checkpoint.backbone.items():
        other = first.backbone.get(name)
        if other is not None and other != shape and not contradictions:
            is_vocabulary = shape[:1] == (getattr(checkpoint.config, "vocab_size", None),)
            remedy = "; the vocabularies differ" if is_vocabulary else ""
            problems.append(
                f"{checkpoint.role}: tensor {name!r} is {list(shape)}, but {list(other)} in {first.role}{remedy}; "
                "all must be fine-tuned from one base model"
            )
    if not problems and checkpoint is not first:
        problems += _compare_configs(checkpoint, first)
    return problems


def _compare_configs(checkpoint: Checkpoint, first: Checkpoint) -> list[str]:
    mine, others = _functional_fields(checkpoint.config), _functional_fields(first.config)
    if first.is_language_model:
        mine, others = (
            {**found, "tie_word_embeddings": getattr(config, "tie_word_embeddings", None)}
            for found, config in ((mine, checkpoint.config), (others, first.config))
        )
    differing = [key for key in sorted({*mine, *others}) if mine.get(key) != others.get(key)]
    return [
        f"{checkpoint.role}: config field {key!r} is {mine.get(key)!r}, but {others.get(key)!r} in {first.role}; "
        "the models would compute different functions"
        for key in differing
    ]


def _functional_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Config fields that change what a model computes: those that its class declares; files carry many others."""
    values = config.to_dict()
    declared = {f.name for f in fields(config)} - _NOT_FUNCTION
    functional = {key: values.get(key) for key in declared if "dropout" not in key}
    return functional | {key: values.get(key, default) for key, default in _OLD_DEFAULTS.items()}


def _some(names: list[str], most: int = 3) -> str:
    listed = ", ".join(repr(name) for name in sorted(names)[:most])
    return f"{'tensor' if len(names) == 1 else f'{len(names)} tensors:'} {listed}{', ...' if len(names) > most else ''}"


def _entry(checkpoint: Checkpoint, expert: ExpertSpec) -> dict:
    config = checkpoint.config
    if checkpoint.is_language_model:
        if expert.labels is not None:
            raise TwinMergingError(f"{checkpoint.role} is a language model, which has no labels; remove `labels`")
        return {"name": expert.name, "labels": [], "problem_type": LANGUAGE, "source": expert.model}
    labels = [str(label) for _, label in sorted((config.id2label or {}).items())]  # type: ignore[type-var]
    if expert.labels is not None:
        if len(expert.labels) != len(labels):
            raise TwinMergingError(
                f"{checkpoint.role}: the recipe gives {len(expert.labels)} `labels`, but its head has {len(labels)}"
            )
        labels = list(expert.labels)
    if _tags_tokens(checkpoint) and config.problem_type not in (None, "single_label_classification"):
        raise TwinMergingError(
            f"{checkpoint.role}: its config.json says {config.problem_type!r}; a token classifier must give every token one "
            "of its tags (`problem_type` single_label_classification, or none)"
        )
    problem_type: str = config.problem_type or ("regression" if len(labels) == 1 else "single_label_classification")
    problem_type = TOKEN_CLASSES if _tags_tokens(checkpoint) else problem_type
    if problem_type == "multi_label_classification":
        raise TwinMergingError(
            f"{checkpoint.role} is a multi-label classifier; its sigmoids are no distribution over labels, so it cannot "
            "share one label space with other experts. Not supported"
        )
    if problem_type == "regression" and len(labels) != 1:
        raise TwinMergingError(f"{checkpoint.role} is a regression with {len(labels)} outputs; only one is supported")
    twice = next((label for label, count in Counter(labels).items() if count > 1), None)
    if twice is not None:
        raise TwinMergingError(
            f"{checkpoint.role}: two labels have one name ({twice!r}); give others by `labels` in the recipe"
        )
    return {"name": expert.name, "labels": labels, "problem_type": problem_type, "source": expert.model}


def _check_label_space(entries: list[dict]) -> None:
    try:
        LabelSpace.of(entries)
    except ValueError as error:
        raise TwinMergingError(str(error)) from error


def _data_notes(recipe: Recipe) -> list[str]:
    without = [expert.name for expert in recipe.experts if expert.data is None]
    if not without or len(without) == len(recipe.experts):
        return []
    return [f"no router is trained and no row is used, because these experts have no `data`: {', '.join(without)}"]


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    for key in ("include", "exclude"):
        for pattern in getattr(recipe, key):
            if not any(re.fullmatch(pattern, name) for name in names):
                raise TwinMergingError(
                    f"`{key}`: {pattern!r} matches no backbone tensor in full (one is called {names[0]!r})"
                )


def _uses_base(recipe: Recipe) -> bool:
    """True where the shared model is made of the base."""
    return recipe.shared_model == BASE or (
        recipe.shared_model is None and recipe.merge_method not in ("linear", "least_squares")
    )


def _check_covered(
    recipe: Recipe, backbones: list[Checkpoint], first: Checkpoint, below: frozenset[str] = frozenset()
) -> None:
    """Refuse tensors that differ between checkpoints although no rule can apply a delta of them per row."""
    names = [name for name in uncovered(first, list(first.backbone)) if recipe.gets_delta(name) and name not in below]
    holders = [(name, [c.tensor(name) for c in backbones if name in c.places]) for name in names]
    bad = [name for name, tensors in holders if any(not torch.equal(t.float(), tensors[0].float()) for t in tensors)]
    if bad:
        raise TwinMergingError(
            f"{_some(bad, most=len(bad))} differs between checkpoints, but no rule can apply a delta of it per row; to drop "
            f"what the experts have there on purpose, add to the recipe: exclude: {bad!r}"
        )


def _label_notes(entries: list[dict]) -> list[str]:
    return [
        f"expert {entry['name']!r} has only automatic label names ({entry['labels'][0]}, ...); `labels` in the recipe "
        "gives it readable ones"
        for entry in entries
        if entry["problem_type"] != "regression" and entry["labels"][:1] == ["LABEL_0"]
    ]


def _common_processing(
    backbones: list[Checkpoint], recipe: Recipe, problems: list[str], notes: list[str]
) -> Processing | None:
    kind = input_kind(backbones[0])
    if kind not in ("text", "image", "tokens", "prompt", "masked"):
        raise TwinMergingError(f"models whose main input is {kind!r} are not supported (only text and images)")
    loaded = []
    for checkpoint in backbones:
        processing = checkpoint_processing(checkpoint, kind, recipe.trust_remote_code)
        if processing is not None:
            loaded.append((checkpoint, processing))
    what = "image processor" if kind == "image" else "tokenizer"
    if not loaded:
        _refuse_data(recipe, f"no checkpoint has a {what}")
        notes.append(f"no checkpoint has a {what}, so the artifact has none; pipelines need one")
        return None
    first, common = loaded[0]
    for checkpoint, processing in loaded[1:]:
        is_expert = checkpoint.role.startswith("expert")
        # A base may carry an older file of the same tokenizer; its vocabulary still has to be the experts'.
        parts = differing_parts(
            processing, common, None if is_expert else ("vocabulary", "size", "image_mean", "image_std")
        )
        if parts:
            problems.append(
                f"{checkpoint.role}: its {what} differs from that of {first.role} in {', '.join(parts)}; the artifact has one "
                f"for all, so train with one, or save the right one into each folder if the difference is by oversight"
            )
    return replace(common, max_tokens=min(common.max_tokens, position_limit(backbones[0].skeleton)))


def _refuse_data(recipe: Recipe, why: str) -> None:
    """Raise `TwinMergingError` if any expert has data, which nothing can read."""
    if any(expert.data is not None for expert in recipe.experts):
        raise TwinMergingError(f"`data` is given, but {why} to read it with")


def checkpoint_processing(checkpoint: Checkpoint, kind: str, trust_remote_code: bool = False) -> Processing | None:
    """Tokenizer or image processor of a checkpoint (of a LoRA adapter without one: its base's), or None."""
    for path in checkpoint.processing_paths:
        found = load_processing(path, kind, checkpoint.role, trust_remote_code)
        if found is not None:
            return found
    return None


def _rows(recipe: Recipe, entries: list[dict], kind: str) -> list[ExpertRows] | None:
    with_data = [expert for expert in recipe.experts if expert.data is not None]
    if not with_data:
        return None
    if kind == "image":
        require_extra("PIL", "vision")  # said once, not for each expert
    problems: list[str] = []
    rows = []
    for expert, entry in zip(recipe.experts, entries, strict=True):
        if expert.data is not None:
            rows.append(_attempt(problems, _expert_rows, expert, entry, kind, recipe))
    if problems:
        raise TwinMergingError("\n".join(problems))
    return rows if len(with_data) == len(recipe.experts) else None


def _expert_rows(expert: ExpertSpec, entry: dict, kind: str, recipe: Recipe) -> ExpertRows:
    assert expert.data is not None
    regression = entry["problem_type"] == "regression"
    try:
        train = read_rows(expert.data.train, kind, entry["labels"], regression)
        validation = (
            read_rows(expert.data.validation, kind, entry["labels"], regression) if expert.data.validation else None
        )
    except TwinMergingError as error:
        raise TwinMergingError(f"expert {expert.name!r}: {error}") from error
    return split_rows(train, validation, recipe.router.rows, recipe.seed, expert.name)


def uncovered(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Names of backbone tensors whose deltas no rule can apply per row."""
    owners = parameter_owners(checkpoint.skeleton)
    found = []
    for name in names:
        holders, parameter = owners.get(name, ([], torch.empty(0)))
        if not holders or any(delta_rule(owner, attribute, parameter) is None for owner, attribute in holders):
            found.append(name)
    return found


def check_newcomer(recipe: Recipe, newcomer: ExpertSpec, built: Checkpoint) -> Inputs:
    """
    Open one expert that joins a finished artifact, and compare it with the artifact's shared model.

    Args:
        recipe: the artifact's settings.
        built: the artifact's shared model.

    Returns:
        Inputs of the new expert alone, from the ready shared model `built`; without rows.

    Raises:
        TwinMergingError: lists every problem found.
    """
    problems: list[str] = []
    notes: list[str] = []
    # A LoRA adapter is put on the base that it names; that this is the artifact's is for the caller to check.
    new = open_expert(newcomer.model, recipe.folder, f"expert {newcomer.name!r}", None, newcomer.base_model)
    if new.task_class is not built.task_class:
        raise TwinMergingError(
            f"{new.role} is a {new.task_class.__name__}, but {built.role} is made of {built.task_class.__name__}s; all "
            "experts must be of one class"
        )
    problems += compare_backbones(new, built)
    entry = _attempt(problems, _entry, new, newcomer)
    processing = _attempt(problems, _common_processing, [built, new], recipe, problems, notes)
    _raise(problems)
    notes += share_statistics([new], [built], recipe)
    bad = new.find_not_finite()
    if bad is not None:
        raise TwinMergingError(f"{new.role}: tensor {bad!r} holds NaN or infinity; train or save it again")
    alone = replace(recipe, experts=(newcomer,))
    below = before_routing(recipe, new)
    _check_covered(alone, [new, built], built, below)
    return Inputs(alone, [new], None, built, [entry], processing, None, [*notes, *_label_notes([entry])], below)


def read_all_rows(
    recipe: Recipe, entries: list[dict], kind: str, processing: Processing | None
) -> list[ExpertRows] | None:
    """Rows of every expert, split as a build splits them; None unless all have data. Raises `TwinMergingError`."""
    if processing is None:
        _refuse_data(recipe, "there is no tokenizer or image processor")
    return _rows(recipe, entries, kind)
