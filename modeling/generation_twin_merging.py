"""
Language models: the row is routed once, on its prompt, and the weights then stay with it while tokens are written.

Caches, masks, positions and decoding are Transformers' own: `generate` is its `generate`, with the expert weights as one
more tensor of the model's inputs, which it repeats for beams and return sequences like the others.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, MaskedLMOutput, Seq2SeqLMOutput

from .mix_twin_merging import ALL, ExpertMix
from .padding_twin_merging import align_left


CACHES = ("cache", "past_key_values")
"""Names of the cache among a model's arguments: since Transformers 5.24, and before."""


@dataclass
class TwinMergingCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """As in Transformers, and behind it the weights that acted: `expert_weights` [batch, expert]."""

    expert_weights: torch.FloatTensor | None = None


@dataclass
class TwinMergingMaskedLMOutput(MaskedLMOutput):
    """As in Transformers, and behind it the weights that acted: `expert_weights` [batch, expert]."""

    expert_weights: torch.FloatTensor | None = None


@dataclass
class TwinMergingSeq2SeqLMOutput(Seq2SeqLMOutput):
    """As in Transformers, and behind it the weights that acted: `expert_weights` [batch, expert]."""

    expert_weights: torch.FloatTensor | None = None


class LanguageModelMixin:
    """What makes a Twin-Merging model write tokens: its head is backbone, and it hands labels down."""

    _hands_labels_down = True
    _output_class: type
    # Of the model that this is mixed into.
    shared: Any
    config: Any
    mix: ExpertMix
    _accepted: set
    _answer: Any
    _run: Any

    @property
    def accepts_loss_kwargs(self) -> bool:
        """
        Whether the shared model's loss heeds `num_items_in_batch` (Trainer asks): those that leave it to Transformers' common
        losses do, those that compute a plain cross-entropy do not.
        """
        return "loss_function" in inspect.unwrap(type(self.shared).forward).__code__.co_names

    def _write(self, named: dict, kwargs: dict, experts, expert_weights) -> Any:
        """One forward of the shared model with the row's weights; `named` holds its inputs, None where not given."""
        named = self._with_cache(named)
        if isinstance(experts, str) and experts == ALL:
            self._check_all(named)
            named["use_cache"] = False if "use_cache" in self._accepted else None
        elif experts is None and expert_weights is None:
            self._check_routable(named)

        def answer(inputs, weights):
            output, weights = self._run(self.shared, inputs, weights)
            return self._output_class(**output, expert_weights=weights)

        return self._answer(named, kwargs, experts, expert_weights, answer)

    def _with_cache(self, named: dict) -> dict:
        """The cache under the name by which the shared model takes it."""
        given = [named[name] for name in CACHES if named.get(name) is not None]
        if len(given) > 1:
            raise ValueError("`cache` and `past_key_values` are one thing under two names; give one of them")
        inputs = {name: value for name, value in named.items() if name not in CACHES}
        if given:
            inputs[next((name for name in CACHES if name in self._accepted), CACHES[0])] = given[0]
        return inputs

    def _check_all(self, named: dict) -> None:
        for name in ("labels", "encoder_outputs", *CACHES):
            if named.get(name) is not None:
                raise ValueError(f"`{name}` cannot be given together with `experts='all'`: it has one entry for a row")

    def _check_routable(self, named: dict) -> None:
        """Refuse to route on what is no prompt."""
        if self.mix.current_forced() is not None:
            return
        _check_not_filled(named)
        if named.get("input_ids") is None and named.get("inputs_embeds") is None:
            raise ValueError(
                "routing needs the prompt (`input_ids` or `inputs_embeds`); give it, or `expert_weights` or `experts`"
            )


def _check_not_filled(inputs: dict) -> None:
    """Refuse to choose a mixture anew for a cache that holds another's states; one that was only made may be filled."""
    cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
    if cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0):
        raise ValueError(
            "this cache holds the states of the mixture that filled it, so no other can be chosen for it. Give the weights "
            "of that call (`expert_weights=output.expert_weights`, or the same `experts`), or start again without the cache"
        )


class MaskedLMMixin(LanguageModelMixin):
    """What makes a Twin-Merging model fill masked tokens."""

    _output_class: type = TwinMergingMaskedLMOutput
    _per_token = ("logits",)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ) -> TwinMergingMaskedLMOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds:
                As in the shared model.
            labels: [batch, token], -100 where none counts; the loss is the shared model's.
            expert_weights: [batch, expert] or [1, expert]; none given: the router decides.
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, a dict of weights
                by name, or `"all"` (each row by every expert, outputs [batch, expert, ...]).

        Raises:
            ValueError: unknown expert or argument, wrong shape of weights, or labels together with `experts="all"`.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
                 "position_ids": position_ids, "inputs_embeds": inputs_embeds, "labels": labels}  # fmt: skip
        return self._write(named, kwargs, experts, expert_weights)


class GenerationLMMixin(LanguageModelMixin):
    """What makes a Twin-Merging model generate: the weights of a row, chosen once, go with it through `generate`."""

    # Of Transformers' GenerationMixin, which comes later in the order of classes.
    generation_config: Any
    main_input_name: str
    generating: Any
    expert_names: list[str]
    _planned: Any

    def _routes_in_the_answer_s_pass(self, inputs: dict) -> bool:
        # Routing reads rows as if padded on the right, which this pass does not.
        return super()._routes_in_the_answer_s_pass(inputs) and align_left(inputs)[1] is None  # type: ignore[misc]

    def _align(self, inputs: dict) -> tuple[dict, None]:
        # Padding stays where it is: what a cache and its masks hold has an order, and stock models expect it so.
        return inputs, None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ):
        """
        Transformers' `generate`; every row is written by its own experts, which are chosen once, on the whole prompt.

        Args:
            inputs, args, kwargs: as in Transformers.
            expert_weights: [batch, expert] or [1, expert]; none given: the router decides (or `use_experts`).
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, or a dict of weights by
                name.

        Returns:
            As in Transformers; with `return_dict_in_generate=True` the output also has `expert_weights` [batch, expert],
            one row for each prompt, to be given to the next turn of a conversation.

        Raises:
            ValueError: unknown expert, wrong shape of weights, `experts="all"`, no prompt to route on, or a filled cache
                without the choice that filled it.
        """
        if isinstance(experts, str) and experts == ALL:
            raise ValueError(
                "`generate` writes one answer for a row; for every expert's answer repeat the prompts and name the experts "
                '(`experts=["a", "b", ...]`)'
            )
        kwargs = self._with_cache(kwargs)
        weights = self._weights_of_prompt(inputs, kwargs, experts, expert_weights)
        with self.generating(self._setting("max_new_tokens", kwargs)), self._guided(weights, kwargs):
            output = super().generate(inputs, *args, expert_weights=weights, **kwargs)  # type: ignore[misc]
        if isinstance(output, dict):
            output["expert_weights"] = weights
        return output

    def _setting(self, name: str, kwargs: dict) -> Any:
        """A setting of this call of `generate`: its own argument, else that of its or the model's `generation_config`."""
        return kwargs.get(name, getattr(kwargs.get("generation_config") or self.generation_config, name))

    def _guided(self, weights: torch.Tensor, kwargs: dict) -> AbstractContextManager:
        """Under classifier-free guidance, the weights for the second pass, which `generate` runs without any of ours."""
        if self._setting("guidance_scale", kwargs) in (None, 1):
            return nullcontext()
        copies = [self._setting(name, kwargs) or 1 for name in ("num_beams", "num_return_sequences")]
        return self.mix.force(weights.repeat_interleave(max(copies), dim=0))

    def _weights_of_prompt(self, inputs, kwargs: dict, experts, expert_weights) -> torch.Tensor:
        routed = experts is None and expert_weights is None and self.mix.current_forced() is None
        if routed:
            _check_not_filled(kwargs)
        prompt = {name: kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None}
        if inputs is not None:
            prompt[self.main_input_name] = inputs
        if not prompt and not routed and kwargs.get("encoder_outputs") is not None:
            prompt = {"inputs_embeds": kwargs["encoder_outputs"][0]}  # which tell how many rows there are
        if not prompt:
            raise ValueError(
                "`generate` needs a prompt (`input_ids` or `inputs_embeds`): it decides which expert writes"
            )
        if "inputs_embeds" in prompt:  # ids beside them are only for what `generate` gives back
            prompt = {"inputs_embeds": prompt["inputs_embeds"]}
        mask = kwargs.get("attention_mask")
        if mask is None and "inputs_embeds" not in prompt:
            mask = self._mask_of(prompt["input_ids"], kwargs)
        if mask is not None:
            prompt["attention_mask"] = mask
        return self._resolve_weights(prompt, experts, expert_weights)  # type: ignore[attr-defined]

    def _mask_of(self, ids: torch.Tensor, kwargs: dict) -> torch.Tensor | None:
        """The mask that `generate` takes for granted where none is given: all but padding, if padding can be told."""
        pad, end = self._setting("pad_token_id", kwargs), self._setting("eos_token_id", kwargs)
        ends = end if isinstance(end, (list, tuple)) else [end]
        if self.config.is_encoder_decoder or pad is None or pad in ends:
            return None
        return (ids != pad).long()

    def prepare_inputs_for_generation(self, *args, inputs_embeds=None, expert_weights=None, **kwargs) -> dict:
        """As the shared model prepares them, plus the weights of the rows."""
        if "position_ids" not in self._accepted:
            kwargs.pop("position_ids", None)
        kwargs.pop("tokenizer", None)  # that of `stop_strings`, which `generate` hands on to where it is of no use
        if inputs_embeds is not None:  # named in the signature because `generate` looks there whether it may be given
            kwargs["inputs_embeds"] = inputs_embeds
        return {**self.shared.prepare_inputs_for_generation(*args, **kwargs), "expert_weights": expert_weights}

    def _supports_logits_to_keep(self) -> bool:
        return "logits_to_keep" in self._accepted

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: Transformers packs all prompts into one row, and a row has one mixture (`generate_batch` comes here too)."""
        raise ValueError(
            "continuous batching is not supported by Twin-Merging models, because it packs prompts of several experts into one "
            "row; use `generate` with a padded batch, or `twin-merging serve`"
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """A model that drafts for this one is given the rows' weights only if it has the same experts."""
        drafting = kwargs.get("assistant_model")
        if drafting is not None and getattr(drafting, "expert_names", None) != self.expert_names:
            given = kwargs["model_kwargs"]
            kwargs["model_kwargs"] = {name: value for name, value in given.items() if name != "expert_weights"}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]


class CausalLMMixin(GenerationLMMixin):
    """What makes a Twin-Merging model a decoder that goes on from its prompt."""

    _output_class: type = TwinMergingCausalLMOutput

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ) -> TwinMergingCausalLMOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, use_cache, logits_to_keep:
                As in the shared model; padding may stand on the left or the right, as there.
            cache, past_key_values: a cache to go on from, under either name; one that holds tokens needs `expert_weights`
                or `experts`.
            labels: [batch, token], -100 where none counts; the loss is the shared model's. Routing then reads the labelled
                tokens too; to train on completions, give the weights of the prompts (`expert_weights=model.route(...)`).
            expert_weights: [batch, expert] or [1, expert]; none given: the router decides.
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, a dict of weights
                by name, or `"all"` (each row by every expert, outputs [batch, expert, ...]).

        Raises:
            ValueError: unknown expert or argument, wrong shape of weights, a filled cache without weights, or
                `experts="all"` together with labels or a cache.
        """
        keep = None if isinstance(logits_to_keep, int) and logits_to_keep == 0 else logits_to_keep
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
                 "position_ids": position_ids, "inputs_embeds": inputs_embeds, "cache": cache,
                 "past_key_values": past_key_values, "labels": labels, "use_cache": use_cache,
                 "logits_to_keep": keep}  # fmt: skip
        return self._write(named, kwargs, experts, expert_weights)


class Seq2SeqLMMixin(GenerationLMMixin):
    """What makes a Twin-Merging model an encoder and a decoder; it routes on what the encoder reads."""

    _output_class: type = TwinMergingSeq2SeqLMOutput

    def get_encoder(self, *args, **kwargs):
        return self.shared.get_encoder(*args, **kwargs)

    def get_decoder(self, *args, **kwargs):
        return self.shared.get_decoder(*args, **kwargs)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """As the shared model does (data collators ask for it)."""
        return self.shared.prepare_decoder_input_ids_from_labels(labels)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        expert_weights: torch.FloatTensor | None = None,
        experts: str | list | dict | None = None,
        **kwargs,
    ) -> TwinMergingSeq2SeqLMOutput:
        """
        Args:
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, inputs_embeds, use_cache:
                As in the shared model, as is `decoder_inputs_embeds`.
            cache, past_key_values: a cache to go on from, under either name; one that holds tokens needs `expert_weights`
                or `experts`, as do `encoder_outputs` without `input_ids`.
            labels: [batch, token], -100 where none counts; the loss is the shared model's.
            expert_weights: [batch, expert] or [1, expert]; none given: the router decides, on the encoder's input.
            experts: instead, an expert's name for all rows, one name for each row, `"__shared__"`, a dict of weights
                by name, or `"all"` (each row by every expert, outputs [batch, expert, ...]).

        Raises:
            ValueError: unknown expert or argument, wrong shape of weights, nothing to route on, or `experts="all"`
                together with labels, encoder outputs or a cache.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids,
                 "decoder_attention_mask": decoder_attention_mask, "encoder_outputs": encoder_outputs, "cache": cache,
                 "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "labels": labels,
                 "use_cache": use_cache}  # fmt: skip
        return self._write(named, kwargs, experts, expert_weights)

    def _prepare_text_encoder_decoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        prepare = super()._prepare_text_encoder_decoder_kwargs_for_generation  # type: ignore[misc]
        return self._encode(prepare, inputs_tensor, model_kwargs, *args, **kwargs)

    def _prepare_encoder_decoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        # What the method above was called before Transformers 5.23.
        prepare = super()._prepare_encoder_decoder_kwargs_for_generation  # type: ignore[misc]
        return self._encode(prepare, inputs_tensor, model_kwargs, *args, **kwargs)

    def _encode(self, prepare, inputs_tensor, model_kwargs: dict, *args, **kwargs) -> dict:
        """Let `generate` run the encoder with the rows' weights acting, and without them among its arguments."""
        weights = model_kwargs["expert_weights"]
        rest = {name: value for name, value in model_kwargs.items() if name != "expert_weights"}
        with self.mix.applied(self._planned({self.main_input_name: inputs_tensor, **rest}, weights)):
            prepared = prepare(inputs_tensor, rest, *args, **kwargs)
        return {**prepared, "expert_weights": weights}
