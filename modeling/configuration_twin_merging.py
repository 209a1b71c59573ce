"""Configuration of a Twin-Merging artifact: what the shared model is, who the experts are, how rows are routed."""

import itertools
import math
import re
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .limits_twin_merging import MOST_EXPERTS, check_sizes
from .tags_twin_merging import TOKEN_CLASSES


FORMAT_VERSION = 1
ROUTER_TYPES = ("linear", "mlp", "centroid", "lexical", "knn", "projection")
ROUTER_PASSES = ("prefix", "full", "late")
EXPERT_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# `base` and `shared` stand beside the experts in `provenance.sources`.
RESERVED_EXPERT_NAMES = ("all", "none", "base", "shared", "__shared__", "__base__")
FACTOR_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
LANGUAGE = "language_modeling"
"""`problem_type` of an expert that writes tokens; it has no labels."""
PROBLEM_TYPES = ("single_label_classification", "regression", TOKEN_CLASSES, LANGUAGE)


def check_expert_names(names: list[str]) -> None:
    """Raise `ValueError` unless every name is legal and unique ignoring case."""
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not EXPERT_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"expert name {name!r} is not legal: use letters, digits, '_', '.', '-' only")
        if name.lower() in RESERVED_EXPERT_NAMES:
            raise ValueError(f"expert name {name!r} is reserved ({', '.join(RESERVED_EXPERT_NAMES)}); choose another")
        if name.lower() in seen:
            raise ValueError(f"expert names {seen[name.lower()]!r} and {name!r} are the same ignoring case; rename one")
        seen[name.lower()] = name


class TwinMergingConfig(PreTrainedConfig):
    r"""
    Describes one artifact: `shared + sum_t w_t(x) * delta_t`, heads included (Twin-Merging, arXiv 2406.15479, section 4).

    Args:
        shared_config (`PreTrainedConfig` or `dict`):
            Configuration of the shared task model; becomes a real config object of its own class.
        shared_class (`str`):
            Name of the task model's class in Transformers, for example `"BertForSequenceClassification"`.
        head_modules (`list[str]`):
            Direct children of the task model outside its base model, in call order. Every expert keeps its own.
        layers_path (`str`):
            Path, inside the task model, of the list of layers that the router counts.
        experts (`list[dict]`):
            One `{"name", "labels", "problem_type", ...}` for each expert, in order; with a `temperature`, the expert's
            outputs are divided by it before they become probabilities.
        ranks (`dict[str, list[int]]`):
            For each factored parameter of the task model, the rank of each expert's delta.
        exact_deltas (`list[str]`):
            Parameters whose deltas are stored exactly (vectors: biases, norms, class tokens).
        factor_dtype (`str`):
            Storage type of the factors on disk. Floats follow the model's dtype in memory; `int8` and `int4` (packed,
            one scale for each rank direction) stay as they are, are unpacked in each call, and cannot be trained.
        sparse_deltas (`dict[str, list[int]]`):
            Instead of factors, for ablations: for each parameter, the number of stored entries of each expert's delta.
        router_type, router_pass, router_layer, router_temperature, router_top_k:
            `linear`, `mlp`, `centroid`, `lexical`, `knn` or `projection`; `full` (whole shared pass), `prefix` (the
            state before layer `router_layer`) or `late` (the same state, in the answer's own pass: no delta acts below
            that layer); weights are `softmax(logits / router_temperature)`, the largest
            `router_top_k` kept.
        router_layers (`list[int]`):
            Layers whose inputs the router reads besides the one that its pass ends with, in ascending order.
        router_site (`str`, *optional*):
            For `projection`: the module whose input is projected on the experts' subspaces.
        router_input_size (`int`), router_rank (`int`):
            Width of all routing states together; dimension of each expert's subspace (`projection`) or of the space
            in which neighbours are sought (`knn`).
        router_centres (`list[int]`):
            For `centroid` and `lexical`: how many centres each expert has.
        router_exemplars (`int`), router_neighbours (`int`):
            For `knn`: rows kept of each expert, and how many of all of them vote.
        router_none_distance (`float`, *optional*):
            Rows stranger than this get no expert (weights of 0: the shared model answers). None: every row gets one.
        router_none_dimension (`int`, *optional*):
            Dimension of the space in which strangeness is measured; None: one less than there are experts (at least 1).
        format_version (`int`):
            Version of this layout; a newer one than the code knows is refused.
        shared_reference (`dict`, *optional*):
            Where the shared model is, if the artifact does not hold it: `model` (folder or Hub id of the base), `revision`
            (commit, or null) and `sha256` of its weight files.
        provenance (`dict`):
            Where the artifact came from: recipe digest, sources and fingerprints, versions, seed, scores.
    """

    model_type = "twin_merging"
    # Declared so that dtype and attention settings reach the shared model. Built in __post_init__ by hand because
    # `SubConfigSpec` does not exist in every supported version of Transformers.
    sub_configs = {"shared_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "expert_logits", "expert_weights", "hidden_states", "attentions", "pooler_output", "cache", "past_key_values",
        "cross_attentions", "decoder_hidden_states", "decoder_attentions", "encoder_last_hidden_state",
        "encoder_hidden_states", "encoder_attentions",
    ]  # fmt: skip

    shared_config: Any = None
    shared_class: str = ""
    head_modules: list = field(default_factory=list)
    layers_path: str = ""
    experts: list = field(default_factory=list)
    ranks: dict = field(default_factory=dict)
    exact_deltas: list = field(default_factory=list)
    factor_dtype: str = "float32"
    sparse_deltas: dict = field(default_factory=dict)
    router_type: str = "linear"
    router_pass: str = "prefix"
    router_layer: int | None = None
    router_layers: list = field(default_factory=list)
    router_site: str | None = None
    router_input_size: int = 0
    router_rank: int = 0
    router_centres: list = field(default_factory=list)
    router_exemplars: int = 0
    router_neighbours: int = 0
    router_none_distance: float | None = None
    router_none_dimension: int | None = None
    router_temperature: float = 1.0
    router_top_k: int | None = None
    format_version: int = FORMAT_VERSION
    shared_reference: dict | None = None
    provenance: dict = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        if isinstance(self.shared_config, dict):
            fields = dict(self.shared_config)
            check_sizes(fields, "shared_config")
            model_type = fields.pop("model_type", None)
            if not model_type:
                raise ValueError("TwinMergingConfig: `shared_config` has no `model_type`, so its class is unknown")
            self.shared_config = AutoConfig.for_model(model_type, **fields)
        self.head_modules = list(self.head_modules or [])
        if len(self.experts or []) > MOST_EXPERTS:
            raise ValueError(f"`experts` has {len(self.experts)} items, more than {MOST_EXPERTS}")
        self.experts = [dict(expert) for expert in self.experts or []]
        self.ranks = dict(self.ranks or {})
        self.exact_deltas = list(self.exact_deltas or [])
        self.router_layers = list(self.router_layers or [])
        self.router_centres = list(self.router_centres or [])
        self.sparse_deltas = dict(self.sparse_deltas or {})
        self.provenance = dict(self.provenance or {})
        super().__post_init__(**kwargs)
        if self.experts:
            self.validate_twin_merging()

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in Transformers; raises `ValueError`, before anything is written, if a field was set to what is impossible."""
        if self.experts:
            self.validate_twin_merging()
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_text_config(self, decoder=None, encoder=None):
        """Delegate to the shared model's config, where caches and vocabulary checks look."""
        if not isinstance(self.shared_config, PreTrainedConfig):
            return self
        return self.shared_config.get_text_config(decoder=decoder, encoder=encoder)

    # Special tokens are the shared model's; trainers align them with a tokenizer's, in reading and in writing.

    @property
    def pad_token_id(self) -> int | None:
        return getattr(self.get_text_config(), "pad_token_id", None) if self.shared_config is not None else None

    @pad_token_id.setter
    def pad_token_id(self, value: int | None) -> None:
        self.shared_config.get_text_config().pad_token_id = value

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self.get_text_config(), "bos_token_id", None) if self.shared_config is not None else None

    @bos_token_id.setter
    def bos_token_id(self, value: int | None) -> None:
        self.shared_config.get_text_config().bos_token_id = value

    @property
    def eos_token_id(self) -> int | list | None:
        return getattr(self.get_text_config(), "eos_token_id", None) if self.shared_config is not None else None

    @eos_token_id.setter
    def eos_token_id(self, value: int | list | None) -> None:
        self.shared_config.get_text_config().eos_token_id = value

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts, in the order of `expert_weights`' columns."""
        return [expert["name"] for expert in self.experts]

    @property
    def state_layers(self) -> list[int]:
        """Layers whose inputs the router reads, in ascending order; a `prefix` pass ends with the last."""
        return [*self.router_layers, *([self.router_layer] if self.router_layer is not None else [])]

    @property
    def label_names(self) -> list[str]:
        """Names of the union label space, in the order of `logits`' columns; none for language models."""
        if all(expert["problem_type"] == LANGUAGE for expert in self.experts):
            return []
        return [str(label) for _, label in sorted((self.id2label or {}).items())]  # type: ignore[type-var]

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.shared_config, "hidden_size", None)

    @property
    def num_hidden_layers(self) -> int | None:
        return getattr(self.shared_config, "num_hidden_layers", None)

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.shared_config, "vocab_size", None)

    @property
    def max_position_embeddings(self) -> int | None:
        return getattr(self.shared_config, "max_position_embeddings", None)

    def validate_twin_merging(self) -> None:
        """Raise `ValueError`, naming the field, if the fields do not describe one possible artifact."""
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise ValueError(f"`format_version` must be a positive integer, got {self.format_version!r}")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this artifact has format_version {self.format_version}, this code knows up to {FORMAT_VERSION}; "
                "upgrade with `pip install -U twin-merging-hf`"
            )
        for position, expert in enumerate(self.experts):
            missing = [key for key in ("name", "labels", "problem_type") if key not in expert]
            if missing:
                raise ValueError(f"`experts[{position}]` has no {missing[0]!r}")
        check_expert_names(self.expert_names)
        for expert in self.experts:
            labels = expert.get("labels")
            language = expert.get("problem_type") == LANGUAGE
            if not isinstance(labels, list) or bool(labels) == language or len(set(labels)) != len(labels):
                raise ValueError(
                    f"expert {expert['name']!r}: `labels` must be a list of different names (empty for language models), "
                    f"got {labels!r}"
                )
            if expert.get("problem_type") not in PROBLEM_TYPES:
                raise ValueError(
                    f"expert {expert['name']!r}: `problem_type` must be one of {', '.join(PROBLEM_TYPES)}, "
                    f"got {expert.get('problem_type')!r}"
                )
            temperature = expert.get("temperature", 1.0)
            if (
                isinstance(temperature, bool)
                or not isinstance(temperature, (int, float))
                or not 0 < temperature < math.inf
            ):
                raise ValueError(f"expert {expert['name']!r}: `temperature` must be positive, got {temperature!r}")
        self._validate_reference()
        self._validate_deltas()
        self._validate_router()

    def _validate_reference(self) -> None:
        reference = self.shared_reference
        if reference is None:
            return
        legal = isinstance(reference, dict) and all(isinstance(reference.get(key), str) for key in ("model", "sha256"))
        if not legal or not re.fullmatch(r"[0-9a-f]{64}", reference["sha256"]):
            raise ValueError(f"`shared_reference` must give `model` and the `sha256` of its weights, got {reference!r}")

    def _validate_deltas(self) -> None:
        for field_name, unit, most in (("ranks", "rank", 1 << 20), ("sparse_deltas", "count", 1 << 31)):
            for name, numbers in getattr(self, field_name).items():
                legal = isinstance(numbers, list) and all(isinstance(r, int) and 0 <= r <= most for r in numbers)
                if not legal or len(numbers) != len(self.experts) or not any(numbers):
                    raise ValueError(
                        f"`{field_name}[{name!r}]` must give one {unit} >= 0 for each of the {len(self.experts)} experts "
                        f"(not all 0), got {numbers!r}"
                    )
        places = {"ranks": self.ranks, "exact_deltas": self.exact_deltas, "sparse_deltas": self.sparse_deltas}
        for one, other in itertools.combinations(places, 2):
            both = set(places[one]) & set(places[other])
            if both:
                raise ValueError(f"{sorted(both)[0]!r} stands in both `{one}` and `{other}`")
        if self.factor_dtype not in FACTOR_DTYPES:
            raise ValueError(f"`factor_dtype` must be one of {', '.join(FACTOR_DTYPES)}, got {self.factor_dtype!r}")
        if self.sparse_deltas and self.factor_dtype.startswith("int"):
            raise ValueError(
                f"`factor_dtype` {self.factor_dtype!r} is for factors; `sparse_deltas` are stored as floats"
            )

    def _validate_router(self) -> None:
        if self.router_type not in ROUTER_TYPES:
            raise ValueError(f"`router_type` must be one of {', '.join(ROUTER_TYPES)}, got {self.router_type!r}")
        if self.router_pass not in ROUTER_PASSES:
            raise ValueError(f"`router_pass` must be one of {', '.join(ROUTER_PASSES)}, got {self.router_pass!r}")
        needs_layer = self.router_pass == "late" or (self.router_pass == "prefix" and not self.router_site)
        if needs_layer and not isinstance(self.router_layer, int):
            raise ValueError(f"`router_pass={self.router_pass!r}` needs `router_layer` (the number of layers to run)")
        layers = self.state_layers
        if layers != sorted(set(layers)) or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"`router_layers` and `router_layer` must ascend, got {layers!r}")
        self._validate_router_type()
        distance = self.router_none_distance
        number = isinstance(distance, (int, float)) and not isinstance(distance, bool) and abs(distance) < math.inf
        if distance is not None and not number:
            raise ValueError(f"`router_none_distance` must be a finite number or null, got {distance!r}")
        dimension = self.router_none_dimension
        if dimension is not None and (isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1):
            raise ValueError(f"`router_none_dimension` must be a positive integer or null, got {dimension!r}")
        if self.router_input_size < 1:
            raise ValueError(f"`router_input_size` must be positive, got {self.router_input_size!r}")
        if not 0 < self.router_temperature < math.inf:
            raise ValueError(f"`router_temperature` must be positive, got {self.router_temperature!r}")
        top_k = self.router_top_k
        if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= len(self.experts)):
            raise ValueError(f"`router_top_k` must be between 1 and {len(self.experts)} or null, got {top_k!r}")

    def _validate_router_type(self) -> None:
        """What single types of router need."""
        if self.router_type == "projection" and (not self.router_site or self.router_rank < 1):
            raise ValueError("`router_type='projection'` needs `router_site` and `router_rank` >= 1")
        if self.router_type == "knn" and min(self.router_rank, self.router_exemplars, self.router_neighbours) < 1:
            raise ValueError("`router_type='knn'` needs `router_rank`, `router_exemplars` and `router_neighbours` >= 1")
        centres = self.router_centres
        legal = len(centres) == len(self.experts) and all(isinstance(n, int) and n > 0 for n in centres)
        if self.router_type in ("centroid", "lexical") and not legal:
            raise ValueError(
                f"`router_type={self.router_type!r}` needs `router_centres`, one count an expert, got {centres!r}"
            )
        if self.router_type == "lexical" and not isinstance(self.vocab_size, int):
            raise ValueError("`router_type='lexical'` needs a shared model with a `vocab_size`")
