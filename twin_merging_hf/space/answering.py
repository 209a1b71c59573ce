"""What the page shows for one input. Needs Transformers and the artifact, whose code travels with it; no Gradio."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

# From where it is defined: the package's own name for it asks for torchvision in older releases, the class does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


SHARED = "__shared__"
NEW_TOKENS, SHOWN = 60, 5


@dataclass
class Shown:
    """answer: the routed one. weights: of the router, by expert. table: [who, weight, answer, how sure] of each expert and the
    shared model."""

    answer: str
    weights: dict[str, float]
    table: list[list[str]]


class Answering:
    """An artifact with its tokenizer or image processor. auto_class: name of the Auto class that loads it."""

    def __init__(self, source: str, auto_class: str, revision: str | None = None):
        options: dict[str, Any] = {"trust_remote_code": True, "revision": revision}
        self.model = getattr(transformers, auto_class).from_pretrained(source, **options).eval()
        self.is_image = auto_class == "AutoModelForImageClassification"
        processor = AutoImageProcessor if self.is_image else transformers.AutoTokenizer
        self.processor = processor.from_pretrained(source, **options)
        self._say = {
            "AutoModelForCausalLM": self._written,
            "AutoModelForSeq2SeqLM": self._written,
            "AutoModelForMaskedLM": self._filled,
            "AutoModelForTokenClassification": self._tagged,
        }.get(auto_class, self._labelled)

    @torch.no_grad()
    def __call__(self, given: Any) -> Shown:
        """
        Answer one text or picture: routed, by each expert, and by the shared model.

        Raises:
            ValueError: there is nothing to answer.
        """
        if given is None or (isinstance(given, str) and not given.strip()):
            raise ValueError("give an input first")
        inputs = self._inputs(given)
        weights = self.model.route(**inputs)[0].tolist()
        names = self.model.expert_names
        answer, _ = self._say(inputs, None)
        table = []
        for name, weight in [*zip(names, weights, strict=True), (SHARED, None)]:
            said, sure = self._say(inputs, name)
            shown = "the shared model" if name == SHARED else name
            table.append([shown, "" if weight is None else f"{weight:.3f}", said, sure])
        return Shown(answer, dict(zip(names, weights, strict=True)), table)

    def _inputs(self, given: Any) -> dict[str, torch.Tensor]:
        if self.is_image:
            return dict(self.processor(given.convert("RGB"), return_tensors="pt"))
        if self.processor.chat_template and self._say == self._written:
            chat = [{"role": "user", "content": given}]
            given = self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return dict(self.processor(given, return_tensors="pt", add_special_tokens=False))
        return dict(self.processor(given, return_tensors="pt", truncation=True, max_length=self._most_tokens()))

    def _most_tokens(self) -> int:
        """Longer texts are cut: many tokenizers do not say what the model has positions for."""
        text = self.model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or 1 << 30
        # RoBERTa and its kin spend some on padding.
        if any(hasattr(module, "create_position_ids_from_input_ids") for module in self.model.modules()):
            positions -= (text.pad_token_id or 0) + 1
        return min(self.processor.model_max_length, positions)

    # ---- one answer and how sure it is, of an expert (None: routed) -------------------------------------------------

    def _labelled(self, inputs: dict, expert: str | None) -> tuple[str, str]:
        output = self.model(**inputs, experts=expert)
        specs, names = self.model.config.experts, self.model.expert_names
        best = names[int(output.expert_weights[0].argmax())] if expert in (None, SHARED) else expert
        if all(spec["problem_type"] == "regression" for spec in specs):
            return f"{self.model.config.id2label[0]}: {output.logits[0, 0]:.3f}", ""
        if specs[names.index(best)]["problem_type"] == "regression":
            span = slice(*self.model.label_space.spans[names.index(best)])
            return f"{best}: {output.expert_logits[0, span].flatten()[0]:.3f}", ""
        probabilities = output.logits[0].exp()
        label = int(probabilities.argmax())
        return self.model.config.id2label[label], f"{probabilities[label]:.3f}"

    def _tagged(self, inputs: dict, expert: str | None) -> tuple[str, str]:
        probabilities = self.model(**inputs, experts=expert).logits[0].softmax(-1)
        tokens = self.processor.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        special = set(self.processor.all_special_tokens)
        labels = [self.model.config.id2label[i] for i in probabilities.argmax(-1).tolist()]
        found = [f"{token} [{label}]" for token, label in zip(tokens, labels, strict=True) if token not in special]
        return " ".join(found), f"{probabilities.max(-1).values.mean():.3f}"

    def _filled(self, inputs: dict, expert: str | None) -> tuple[str, str]:
        places = (inputs["input_ids"][0] == self.processor.mask_token_id).nonzero().flatten()
        if not len(places):
            raise ValueError(f"put {self.processor.mask_token} where a word is missing")
        probabilities = self.model(**inputs, experts=expert).logits[0, places[0]].softmax(-1)
        best = probabilities.topk(SHOWN)
        words = [str(self.processor.decode([i])).strip() for i in best.indices.tolist()]
        return ", ".join(words), f"{best.values[0]:.3f}"

    def _written(self, inputs: dict, expert: str | None) -> tuple[str, str]:
        call = {} if expert is None else {"experts": expert}
        padding = (
            self.processor.pad_token_id if self.processor.pad_token_id is not None else self.processor.eos_token_id
        )
        written = self.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=padding or 0, **call
        )[0]
        start = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return str(self.processor.decode(written[start:], skip_special_tokens=True)).strip(), ""
