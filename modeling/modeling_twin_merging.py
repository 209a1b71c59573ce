"""
Twin-Merging models for Transformers: one shared model that becomes the right mixture of experts for every row.

For a row x with expert weights w(x) the model computes `shared + sum_t w_t(x) * delta_t`, heads included
(arXiv 2406.15479, section 4). The weights come from the router, or are given by the caller.
"""

import inspect
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.utils import ModelOutput, TransformersKwargs, cached_file, logging

from .architectures_twin_merging import RMS_NORMS  # noqa: F401 - older loaders copy what is named here
from .call_twin_merging import CallWeights  # noqa: F401 - likewise
from .channels_twin_merging import refuse_batch_statistics
from .classification_twin_merging import ClassificationMixin, TwinMergingClassifierOutput
from .configuration_twin_merging import LANGUAGE, TwinMergingConfig
from .costs_twin_merging import Costs  # noqa: F401 - likewise
from .deltas_twin_merging import attach_deltas, follow_replacements, stand_ins
from .edit_twin_merging import EditMixin
from .export_twin_merging import ExportMixin
from .factors_twin_merging import INTEGER_BITS, ExactDelta, FactoredDelta
from .generation_twin_merging import (
    CausalLMMixin,
    MaskedLMMixin,
    Seq2SeqLMMixin,
    TwinMergingCausalLMOutput,
    TwinMergingMaskedLMOutput,
    TwinMergingSeq2SeqLMOutput,
)
from .heads_twin_merging import LabelSpace
from .late_twin_merging import LateMixin
from .limits_twin_merging import STORED, check_fits, stored_bytes
from .matrices_twin_merging import MatrixForward  # noqa: F401 - likewise
from .mix_twin_merging import ALL, CheckpointWithWeights, ExpertMix
from .norms_twin_merging import NormForward  # noqa: F401 - likewise
from .padding_twin_merging import TOKEN_INPUTS, align_left, restore_order
from .plans_twin_merging import PlansMixin
from .push_twin_merging import PushMixin
from .reference_twin_merging import (
    HUB_OPTIONS,
    base_state,
    generation_settings,
    is_referenced,
    own_state,
    refuse_changed,
)
from .report_twin_merging import PlanReport  # noqa: F401 - likewise
from .routing_twin_merging import (
    LexicalRouter,
    NeighbourRouter,
    Novelty,
    ProjectionRouter,
    StateReader,
    StateTap,
    new_router,
    weights_from_logits,
)
from .saving_twin_merging import staged_save
from .selection_twin_merging import Decision  # noqa: F401 - likewise
from .shared_twin_merging import LANGUAGE_MODELS, build_shared, find_shared_class
from .sparse_twin_merging import SparseDelta
from .tags_twin_merging import TOKEN_CLASSES
from .terms_twin_merging import looked_up  # noqa: F401 - likewise
from .token_classification_twin_merging import TokenClassificationMixin, TwinMergingTokenClassifierOutput


logger = logging.get_logger(__name__)

SHARED = "__shared__"
MODEL_FILE = "modeling_twin_merging"
AUTO_MAP = {
    "AutoConfig": "configuration_twin_merging.TwinMergingConfig",
    "AutoModel": f"{MODEL_FILE}.TwinMergingModel",
    "AutoModelForSequenceClassification": f"{MODEL_FILE}.TwinMergingForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODEL_FILE}.TwinMergingForTokenClassification",
    "AutoModelForImageClassification": f"{MODEL_FILE}.TwinMergingForImageClassification",
    "AutoModelForCausalLM": f"{MODEL_FILE}.TwinMergingForCausalLM",
    "AutoModelForSeq2SeqLM": f"{MODEL_FILE}.TwinMergingForSeq2SeqLM",
    "AutoModelForMaskedLM": f"{MODEL_FILE}.TwinMergingForMaskedLM",
}
_INPUT_NAMES = (*TOKEN_INPUTS, "pixel_values")


@dataclass
class TwinMergingModelOutput(ModelOutput):
    """
    Output of `TwinMergingModel`; every tensor has the batch first ([batch, expert, ...] for `experts="all"`).

    last_hidden_state: [batch, token, hidden], or a feature map [batch, channel, height, width] where the shared model is
        convolutional. pooler_output: [batch, hidden] ([batch, channel, 1, 1]) or None.
    expert_weights: the weights that acted, [batch, expert].
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    expert_weights: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class TwinMergingPreTrainedModel(EditMixin, ExportMixin, LateMixin, PlansMixin, PushMixin):
    """What all Twin-Merging models share: the shared task model, the deltas, the router, and how weights are chosen."""

    config_class = TwinMergingConfig
    base_model_prefix = "shared"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules = ["router"]
    _keep_in_fp32_modules_strict = ["router"]
    _serves: tuple = ()

    def __init__(self, config: TwinMergingConfig):
        super().__init__(config)
        if not config.experts:
            raise ValueError("TwinMergingConfig has no experts; build an artifact with `twin-merging build`")
        _, auto_class = find_shared_class(config.shared_class)
        if self._serves and auto_class not in self._serves:
            raise ValueError(
                f"{type(self).__name__} cannot serve a shared {config.shared_class}; load this artifact with "
                f"`{auto_class}` (or `AutoModel` for hidden states)"
            )
        types = {expert["problem_type"] for expert in config.experts}
        for problem_type, fits in (
            (TOKEN_CLASSES, auto_class == "AutoModelForTokenClassification"),
            (LANGUAGE, auto_class in LANGUAGE_MODELS),
        ):
            if (types == {problem_type}) != fits:
                raise ValueError(f"`problem_type` of the experts does not fit a shared {config.shared_class}")
        self.shared = build_shared(config)
        for module in self.shared.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(refuse_batch_statistics)
        self.mix = ExpertMix()
        self._start_plans()
        self.label_space = LabelSpace.of(config.experts)
        self.deltas = attach_deltas(
            self.shared,
            self.mix,
            config.ranks,
            config.exact_deltas,
            len(config.experts),
            storage=config.factor_dtype,
            sparse=config.sparse_deltas,
        )
        self._stand_ins = stand_ins(self.shared)
        self.router = new_router(config)
        check_fits(sum(parameter.numel() for parameter in self.parameters()))
        self._reader = self._hook_routing_states()
        self.main_input_name = self.shared.main_input_name
        self._accepted = _accepted_arguments(self.shared) | ({"labels"} if self._hands_labels_down else set())
        self._body_accepts = _accepted_arguments(self._routing_body()) - _NOT_ROUTED_ON
        self.post_init()

    def _hook_routing_states(self) -> StateReader:
        """Put taps where the router reads."""
        config = self.config
        if config.router_site:
            sites = [self.shared.get_submodule(config.router_site)]
        else:
            layers: Any = self.shared.get_submodule(config.layers_path) if config.state_layers else []
            for layer in config.state_layers:
                if not 0 <= layer < len(layers):
                    raise ValueError(
                        f"`router_layer` is {layer}, but {config.layers_path} has layers 0 to {len(layers) - 1}"
                    )
            sites = [layers[layer] for layer in config.state_layers]
        stops = config.router_pass in ("prefix", "late") or bool(config.router_site)
        reader = StateReader(stops)
        for site in sites:
            site.register_forward_pre_hook(StateTap(reader, ends=stops and site is sites[-1]), with_kwargs=True)
        return reader

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, FactoredDelta):
            if module.bits is None:
                init.normal_(module.down, std=0.02)
                init.zeros_(module.up)
            else:
                init.zeros_(module.scale)
        elif isinstance(module, ExactDelta):
            init.zeros_(module.delta)
        elif isinstance(module, LexicalRouter):
            init.zeros_(module.table)
            init.ones_(module.scale)
            init.zeros_(module.weight)
        elif isinstance(module, (ProjectionRouter, NeighbourRouter, Novelty)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)
        elif isinstance(module, SparseDelta):
            init.zeros_(module.values)
            init.zeros_(module.indices)
        else:
            super()._init_weights(module)

    # ---- experts, by name -------------------------------------------------------------------------------------

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts, in the order of the columns of `expert_weights`."""
        return self.config.expert_names

    @contextmanager
    def use_experts(self, experts=None, *, expert_weights: torch.Tensor | None = None):
        """
        Within the block, let these experts answer every row, in this thread only (for pipelines, whose calls cannot
        carry an argument).

        Args:
            experts: an expert's name, `"__shared__"`, or a dict of weights by name such as `{"sst2": 0.7, "qqp": 0.3}`.
            expert_weights: instead, a tensor [1, expert] (or [batch, expert], if every batch has that size).

        Raises:
            ValueError: an unknown name, or both arguments given.
        """
        if experts == ALL:
            raise ValueError("`use_experts('all')` has no meaning for pipelines; call the model with `experts='all'`")
        if (experts is None) == (expert_weights is None):
            raise ValueError("`use_experts` needs either names (or a dict of weights) or `expert_weights`, not both")
        weights: Any = expert_weights if experts is None else self._weights_by_name(experts)
        with self.mix.force(self._checked_weights(weights)):
            yield self

    def _weights_by_name(self, experts) -> torch.Tensor:
        """Turn a name, a dict of weights or one name for each row into weights [1 or batch, expert]."""
        names = self.expert_names
        if isinstance(experts, dict):
            weights = torch.zeros(1, len(names))
            for name, weight in experts.items():
                weights[0, self._expert_index(name)] = float(weight)
            return weights
        if not isinstance(experts, (str, list, tuple)):
            raise ValueError(
                f"`experts` must be a name, a list of names, a dict of weights by name or {ALL!r}, got {experts!r}; this "
                f"model has {', '.join(names)}"
            )
        rows = [experts] if isinstance(experts, str) else list(experts)
        weights = torch.zeros(len(rows), len(names))
        for row, name in enumerate(rows):
            if name != SHARED:
                weights[row, self._expert_index(name)] = 1.0
        return weights

    def _expert_index(self, name: str) -> int:
        if name not in self.expert_names:
            raise ValueError(f"unknown expert {name!r}; this model has {', '.join(self.expert_names)} (and {SHARED!r})")
        return self.expert_names.index(name)

    def _checked_weights(self, weights: torch.Tensor) -> torch.Tensor:
        if not isinstance(weights, torch.Tensor):
            raise ValueError(f"`expert_weights` must be a tensor [batch, expert], got {type(weights).__name__}")
        if weights.dim() != 2 or weights.shape[1] != len(self.expert_names):
            raise ValueError(
                f"`expert_weights` must be [batch, expert] or [1, expert] with {len(self.expert_names)} experts, "
                f"got {list(weights.shape)}"
            )
        if not torch.compiler.is_compiling():
            if not torch.isfinite(weights).all():
                raise ValueError("`expert_weights` holds NaN or infinity")
            if self._mixes_heads and (weights < 0).any():
                raise ValueError(
                    "`expert_weights` must not be negative where heads are mixed: a head's share has no logarithm"
                )
        return weights.float()

    _mixes_heads = False
    _hands_labels_down = False
    _per_token: tuple = ()
    """Fields of the output, beside hidden states and attentions, that stand [batch, token, ...]."""

    # ---- routing ----------------------------------------------------------------------------------------------

    def routing_logits(self, **inputs) -> torch.Tensor:
        """Router's logits [batch, expert] for a batch of model inputs, by a pass through the shared model."""
        router: Any = self.router
        return router.score(self.routing_features(**inputs))

    def routing_features(self, **inputs) -> torch.Tensor:
        """What the router scores: [batch, feature], float32 (masked mean of the routing states; shares for `projection`; sums
        over tokens behind the mean for `lexical`)."""
        inputs, _ = align_left(inputs)
        return self._features_of(self._routing_hidden(inputs), inputs)

    def _features_of(self, states: torch.Tensor, inputs: dict) -> torch.Tensor:
        router: Any = self.router
        mask = inputs.get("attention_mask")
        if isinstance(router, LexicalRouter):
            return router.features(states, mask, inputs.get("input_ids"))
        if isinstance(router, ProjectionRouter):  # through its forward, which brings an offloaded basis back
            return router(states, mask)
        return router.features(states, mask)

    def _routing_hidden(self, inputs: dict) -> torch.Tensor:
        self._check_mask(inputs)
        body_inputs = self._in_own_type({name: inputs[name] for name in inputs if name in self._body_accepts})
        # Never with gradients: activation checkpointing would replay this pass with the answer's weights.
        with torch.no_grad(), self.mix.applied(None):
            return self._reader.read(lambda: self._routing_body()(**body_inputs))

    def _check_mask(self, inputs: dict) -> None:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"routing needs an attention_mask [batch, token], got {list(mask.shape)}; or give `experts`"
            )

    def _routing_body(self) -> nn.Module:
        """What a routing pass runs: the shared backbone, of an encoder-decoder its encoder."""
        shared: Any = self.shared
        return shared.get_encoder() if shared.config.is_encoder_decoder else shared.base_model

    def _align(self, inputs: dict) -> tuple[dict, torch.Tensor | None]:
        return align_left(inputs)

    def route(self, **inputs) -> torch.Tensor:
        """
        Expert weights [batch, expert], float32, that the router gives a batch of model inputs.

        Each row sums to 1, or to 0 where the `none` route takes it: the shared model answers.
        """
        inputs, _ = align_left(inputs)
        return self._weights_of(self._routing_hidden(inputs), inputs)

    def _weights_of(self, states: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Expert weights [batch, expert] of rows with these routing states [batch, token, width]."""
        config, router = self.config, self.router
        features = self._features_of(states, inputs)
        logits = router.score(features)  # type: ignore[operator]
        weights = weights_from_logits(logits, config.router_temperature, config.router_top_k)
        if config.router_none_distance is not None:
            size = config.router_input_size if config.router_type != "projection" else features.shape[-1]
            known = router.novelty(features[:, :size]) <= config.router_none_distance  # type: ignore[operator]
            weights = weights * known[:, None]
        return weights

    # ---- one call ---------------------------------------------------------------------------------------------

    def _call_inputs(self, named: dict, kwargs: dict) -> dict:
        """Check the arguments of a call and return those for the shared model."""
        unknown = [name for name in kwargs if name not in self._accepted and name not in _CALL_KWARGS]
        if unknown:
            labels = {"labels"} if self._mixes_heads or self._hands_labels_down else set()
            valid = sorted({*self._accepted, *labels, "expert_weights", "experts"})
            raise ValueError(
                f"{type(self).__name__} got an unknown argument {unknown[0]!r}; it takes {', '.join(valid)}"
            )
        inputs = {name: value for name, value in named.items() if value is not None}
        for name in [name for name in inputs if name not in self._accepted]:
            # Tokenizers of other models make all-zero token types; stock models without them ignore those too.
            if name != "token_type_ids" or (not torch.compiler.is_compiling() and bool(inputs[name].any())):
                raise ValueError(f"the shared {self.config.shared_class} takes no {name!r}")
            del inputs[name]
        return {**inputs, **kwargs}

    def _resolve_weights(self, inputs: dict, experts, expert_weights) -> torch.Tensor:
        """Expert weights [batch, expert] of a call: given, chosen by `use_experts`, or routed."""
        weights = self._weights_given(inputs, experts, expert_weights)
        return self.route(**inputs) if weights is None else weights

    def _weights_given(self, inputs: dict, experts, expert_weights) -> torch.Tensor | None:
        """Expert weights [batch, expert] of a call: given, or chosen by `use_experts`; None: to be routed."""
        if experts is not None and expert_weights is not None:
            raise ValueError("give either `experts` or `expert_weights`, not both")
        main = self._main_input(inputs)
        batch, device = main.shape[0], main.device
        if experts is not None:
            expert_weights = self._weights_by_name(experts)
            if isinstance(experts, (list, tuple)) and len(experts) != batch:
                raise ValueError(f"`experts` names {len(experts)} rows, but the batch has {batch}")
        given = expert_weights is not None
        weights = self._checked_weights(expert_weights) if given else self.mix.current_forced()
        if weights is None:
            return None
        if weights.shape[0] not in (1, batch):
            raise ValueError(f"got expert weights for {weights.shape[0]} rows, but the batch has {batch}")
        return weights.to(device).expand(batch, -1)

    def _main_input(self, inputs: dict) -> torch.Tensor:
        for name in ("inputs_embeds", "input_ids", "pixel_values", "decoder_inputs_embeds", "decoder_input_ids"):
            if name in inputs:
                return inputs[name]
        raise ValueError(f"{type(self).__name__} needs `{self.main_input_name}`")

    def _repeat_for_all(self, inputs: dict, batch: int) -> tuple[dict, torch.Tensor]:
        """Repeat each row once for every expert: inputs [batch * expert, ...] and their one-hot weights."""
        count = len(self.expert_names)
        repeated = {
            name: value.repeat_interleave(count, dim=0)
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch
            else value
            for name, value in inputs.items()
        }
        return repeated, torch.eye(count).repeat(batch, 1)

    def _run(self, module: nn.Module, inputs: dict, weights: torch.Tensor | None) -> tuple[Any, torch.Tensor]:
        """The module's output and the weights [batch, expert] that acted; None: the router decides on the way."""
        if weights is None:
            return self._run_late(module, inputs)
        with self.mix.applied(self._planned(inputs, weights)):
            return module(**self._in_own_type(inputs), return_dict=True), weights

    def _in_own_type(self, inputs: dict) -> dict:
        """Inputs with pixels in the model's type, which transformers see to themselves and convolutional models do not."""
        pixels = inputs.get("pixel_values")
        return inputs if pixels is None else {**inputs, "pixel_values": pixels.to(self.dtype)}

    def _answer(self, named: dict, kwargs: dict, experts, expert_weights, answer, finish=lambda output: output):
        """
        Resolve the weights of a call, run `answer(inputs, weights)` and shape its output for `experts="all"`.

        `finish(output)` sees an output whose tokens stand in the caller's order again.
        """
        return_dict = kwargs.pop("return_dict", None)
        inputs, moved = self._align(self._call_inputs(named, kwargs))
        if isinstance(experts, str) and experts == ALL:
            if expert_weights is not None:
                raise ValueError("give either `experts` or `expert_weights`, not both")
            main = self._main_input(inputs)
            repeated, weights = self._repeat_for_all(inputs, main.shape[0])
            if moved is not None:
                moved = moved.repeat_interleave(len(self.expert_names))
            output = finish(restore_order(answer(repeated, weights.to(main.device)), moved, self._per_token))
            output = type(output)(**{k: _split_rows(v, len(self.expert_names)) for k, v in output.items()})
        else:
            given = self._weights_given(inputs, experts, expert_weights)
            if given is None and self._routes_in_the_answer_s_pass(inputs):
                self._check_mask(inputs)
            elif given is None:
                given = self.route(**inputs)
            output = answer(inputs, given)
            output = finish(restore_order(output, moved, self._per_token))
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def train(self, mode: bool = True):
        """As in PyTorch, but the router stays as it was built: its BatchNorm and dropout are for its own training."""
        super().train(mode)
        self.router.eval()
        return self

    # ---- Transformers' contract -------------------------------------------------------------------------------

    def get_input_embeddings(self):
        return self.shared.get_input_embeddings()

    def set_input_embeddings(self, value):
        raise ValueError("the input embeddings carry expert deltas and cannot be replaced; build a new artifact")

    def get_output_embeddings(self):
        return self.shared.get_output_embeddings()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):  # type: ignore[override]
        settings = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and settings.get("use_reentrant"):
            raise ValueError(
                "reentrant activation checkpointing would run backward through the router once for each layer; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        function = CheckpointWithWeights(self.mix, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Load an artifact. As in Transformers, but a missing or unexpected tensor raises.

        Raises:
            ValueError: a tensor of the artifact is missing, unexpected or of another shape (named), tensor
                parallelism is asked for, or a base that the shared model is a reference to is not to be had or changed
                (`shared_model=` says where it is, if not where it was).
        """
        if kwargs.get("tp_plan") is not None or kwargs.get("tp_size") is not None:
            raise ValueError("tensor parallelism is not supported by Twin-Merging models; use `device_map`")
        want_info = kwargs.pop("output_loading_info", False)
        names = (*HUB_OPTIONS, "revision", "subfolder")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        shared_model = kwargs.pop("shared_model", None)
        # Tensors of another shape come back in the info, to be refused below by name.
        kwargs["ignore_mismatched_sizes"] = True
        kwargs["use_safetensors"] = True  # a pickle could run code
        source = cls._with_reference(pretrained_model_name_or_path, kwargs, options, shared_model)
        if source is None and kwargs.get("state_dict"):
            stored = sum(tensor.nbytes for tensor in kwargs["state_dict"].values())
        else:
            stored = stored_bytes(str(source), options) if source is not None else None
        before = STORED.set(stored)
        try:
            loaded: Any = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        finally:
            STORED.reset(before)
        model, info = loaded
        follow_replacements(model.shared, model._stand_ins)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            keys = sorted(str(key) for key in info.get(kind) or ())
            if keys:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: {kind.replace('_', ' ')} in this artifact: {', '.join(keys[:5])}"
                    f"{' ...' if len(keys) > 5 else ''}; it is damaged or was made by another version, build it again"
                )
        if tuple(model.config.label_names) != model.label_space.labels:
            raise ValueError(
                f"`num_labels`, `id2label` and `label2id` of an artifact follow from its experts and cannot be changed; "
                f"it has {len(model.label_space.labels)} labels: {', '.join(model.label_space.labels[:5])}, ..."
            )
        model._artifact_source = (str(pretrained_model_name_or_path), options)
        model._shared_source = shared_model
        return (model, info) if want_info else model

    @classmethod
    def _with_reference(cls, folder, kwargs: dict, options: dict, shared_model: str | None):
        """
        Where Transformers shall read the weights: `folder`, or None if the shared model is a reference to the base. Then all
        tensors are put into `kwargs`.
        """
        config = kwargs.get("config")
        if config is None and folder is not None:
            config = cls.config_class.from_pretrained(folder, **options)
        if not getattr(config, "shared_reference", None):
            if shared_model is not None:
                raise ValueError(f"{folder} holds its shared model itself; leave `shared_model` out")
            return folder
        hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
        state = {**own_state(str(folder), options), **base_state(config, shared_model, hub)}
        kwargs.update(config=config, state_dict=state)
        if "generation_config" not in kwargs and cls.can_generate():
            kwargs["generation_config"] = generation_settings(str(folder), options)
        return None

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):  # type: ignore[override]
        """
        Save the artifact: weights, config, code, and the companion files it was loaded with (card, recipe, report,
        tokenizer or processor, pictures). Files that exist in `save_directory` already are not overwritten by
        companions. A save that is killed leaves no mixture of old and new (but with `push_to_hub`, which writes in place).
        """
        if state_dict is None and self.config.shared_reference:
            state_dict = self._state_without_base()
        if state_dict is None and not getattr(self, "hf_device_map", None):
            state_dict = self._storage_state_dict()
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict}
        if not is_main_process or kwargs.get("push_to_hub") or os.path.isfile(save_directory):
            super().save_pretrained(save_directory, **kwargs)
            if is_main_process and os.path.isdir(save_directory):
                self._restore_config(save_directory)
        else:
            with staged_save(os.fspath(save_directory)) as folder:
                super().save_pretrained(folder, **kwargs)
                self._restore_config(folder)
        if is_main_process and os.path.isdir(save_directory):
            self._copy_companions(save_directory)

    def _state_without_base(self) -> dict:
        """What an artifact stores whose shared model is the base by reference."""
        source = getattr(self, "_shared_source", None)
        options: dict = (getattr(self, "_artifact_source", None) or (None, {}))[1]
        hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
        state = self._storage_state_dict()
        refuse_changed(state, base_state(self.config, source, hub))
        return {name: value for name, value in state.items() if not is_referenced(name, self.config)}

    def _storage_state_dict(self) -> dict:
        """State dict with the factors in their storage type (loading widens floats to the model's type)."""
        state = self.state_dict()
        integers = self.config.factor_dtype in INTEGER_BITS
        storage = None if integers else getattr(torch, self.config.factor_dtype)
        for key, value in state.items():
            is_factor = key.startswith("deltas.") and key.endswith((".up", ".down", ".values"))
            if is_factor and storage is not None and value.element_size() > storage.itemsize:
                state[key] = value.to(storage)
            elif key.endswith("num_batches_tracked"):
                state[key] = value.long()  # loading casts this count to the model's type
        return state

    def _restore_config(self, save_directory) -> None:
        # One layout serves every head: the artifact keeps the head it was built for and names all of them.
        built_for = find_shared_class(self.config.shared_class)[1]
        self.config.architectures = [AUTO_MAP[built_for].split(".")[-1]]
        self.config.auto_map = dict(AUTO_MAP)
        self.config.save_pretrained(save_directory)

    def _has_companions(self) -> bool:
        return bool(getattr(self, "_artifact_source", None) or getattr(self, "_kept_companions", None))

    def _copy_companions(self, save_directory) -> None:
        for name, content in (getattr(self, "_kept_companions", None) or {}).items():
            target = os.path.join(save_directory, name)
            if not os.path.exists(target):
                with open(target, "wb") as stream:
                    stream.write(content)
        source = getattr(self, "_artifact_source", None)
        if source is None:
            return
        folder, options = source
        for name in self.config.provenance.get("companions", []):
            target = os.path.join(save_directory, name)
            if os.path.basename(name) != name or os.path.exists(target):
                continue
            found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **options)
            if found is None:
                logger.warning(f"{name} is listed in the artifact's config but not found in {folder}; not copied")
            else:
                shutil.copyfile(found, target)


_CALL_KWARGS = {*TransformersKwargs.__annotations__, "return_dict"}
# A routing pass leaves the caller's cache alone.
_NOT_ROUTED_ON = {"cache", "past_key_values", "use_cache"}


def _accepted_arguments(module: nn.Module) -> set:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self", "labels"}


def _split_rows(value, count: int):
    if isinstance(value, tuple):
        return tuple(_split_rows(item, count) for item in value)
    return value.reshape(-1, count, *value.shape[1:]) if isinstance(value, torch.Tensor) else value


class TwinMergingModel(TwinMergingPreTrainedModel):
    """The backbone of an artifact, without heads: hidden states of the right mixture for every row."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ) -> TwinMergingModelOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pixel_values:
                As in the shared model.
            expert_weights: [batch, expert] or [1, expert]; none given: the router decides.
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, a dict of weights
                by name, or `"all"` (each row by every expert, outputs [batch, expert, ...]).

        Raises:
            ValueError: unknown expert or argument, wrong shape of weights.
        """
        named = dict(zip(_INPUT_NAMES, (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                                        pixel_values), strict=True))  # fmt: skip

        if self.config.is_encoder_decoder:
            raise ValueError(
                f"a {self.config.shared_class} has no one backbone whose states could be given; load this artifact with "
                f"`{find_shared_class(self.config.shared_class)[1]}` and ask it for `output_hidden_states`"
            )

        def answer(inputs, weights):
            inputs = {name: value for name, value in inputs.items() if name in self._body_accepts | _CALL_KWARGS}
            output, weights = self._run(self.shared.base_model, inputs, weights)
            return TwinMergingModelOutput(
                last_hidden_state=output.last_hidden_state,
                pooler_output=output.get("pooler_output"),
                expert_weights=weights,
                hidden_states=output.get("hidden_states"),
                attentions=output.get("attentions"),
            )

        return self._answer(named, kwargs, experts, expert_weights, answer)


class TwinMergingForSequenceClassification(ClassificationMixin, TwinMergingPreTrainedModel):
    """Text classification and regression by the right expert for every row."""

    _serves = ("AutoModelForSequenceClassification",)


class TwinMergingForTokenClassification(TokenClassificationMixin, TwinMergingPreTrainedModel):
    """Token classification by the right expert for every row (one choice for all of its tokens)."""

    _serves = ("AutoModelForTokenClassification",)


class TwinMergingForImageClassification(ClassificationMixin, TwinMergingPreTrainedModel):
    """Image classification and regression by the right expert for every row."""

    _serves = ("AutoModelForImageClassification",)
    main_input_name = "pixel_values"


class TwinMergingForCausalLM(CausalLMMixin, TwinMergingPreTrainedModel, GenerationMixin):
    """Generation by the right expert for every row, chosen on its prompt."""

    _serves = ("AutoModelForCausalLM",)


class TwinMergingForSeq2SeqLM(Seq2SeqLMMixin, TwinMergingPreTrainedModel, GenerationMixin):
    """Encoder-decoder generation by the right expert for every row, chosen on what the encoder reads."""

    _serves = ("AutoModelForSeq2SeqLM",)


class TwinMergingForMaskedLM(MaskedLMMixin, TwinMergingPreTrainedModel):
    """Masked tokens filled by the right expert for every row."""

    _serves = ("AutoModelForMaskedLM",)


__all__ = [
    "TwinMergingCausalLMOutput",
    "TwinMergingClassifierOutput",
    "TwinMergingForCausalLM",
    "TwinMergingForImageClassification",
    "TwinMergingForMaskedLM",
    "TwinMergingForSeq2SeqLM",
    "TwinMergingForSequenceClassification",
    "TwinMergingForTokenClassification",
    "TwinMergingMaskedLMOutput",
    "TwinMergingModel",
    "TwinMergingModelOutput",
    "TwinMergingPreTrainedModel",
    "TwinMergingSeq2SeqLMOutput",
    "TwinMergingTokenClassifierOutput",
]
