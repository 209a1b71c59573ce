"""Tokenizers and image processors of checkpoints: loaded, compared, and run on rows of data."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.image_utils import load_image

# From where it is defined: the package's own name for it asks for torchvision in older releases, the class does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging as transformers_logging

from .errors import TwinMergingError, require_extra
from .prompts import prompt_inputs


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_NOT_BEHAVIOUR = {
    "image_processor_type",
    "processor_class",
    "_processor_class",
    "feature_extractor_type",
    "_name_or_path",
}
_MAX_TOKENS = 512


@dataclass(frozen=True)
class Processing:
    """What turns rows into model inputs: a tokenizer or an image processor, as loaded by its Auto class."""

    kind: str
    """`text`, `image`, `tokens` (texts in words, each with a tag), `prompt` (without its completion) or `masked`."""
    processor: Any
    max_tokens: int = _MAX_TOKENS
    """Longer texts are cut: what the model has positions for, or what the tokenizer says."""

    def signature(self) -> dict[str, Any]:
        """Everything about the processor that changes its output, part by part, for comparison."""
        if self.kind == "image":
            return {key: value for key, value in self.processor.to_dict().items() if key not in _NOT_BEHAVIOUR}
        parts: dict[str, Any] = {
            "vocabulary": self.processor.get_vocab(),
            "truncation side": self.processor.truncation_side,
            "special tokens": {key: str(value) for key, value in self.processor.special_tokens_map.items()},
        }
        if self.kind == "prompt":
            parts["chat template"] = getattr(self.processor, "chat_template", None)
        backend = getattr(self.processor, "backend_tokenizer", None)
        if backend is not None:
            content = json.loads(backend.to_str())
            parts.update({key: content.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")})
            parts["model"] = {key: value for key, value in content.get("model", {}).items() if key != "vocab"}
        return parts

    def inputs(self, rows: list[dict], max_tokens: int | None = None) -> dict[str, torch.Tensor]:
        """
        Turn data rows into one padded batch of model inputs.

        Args:
            rows: each with `text` (and `text_pair`), with `image` (a path or a PIL image), with `tokens`, or with `prompt`.

        Raises:
            TwinMergingError: rows of tokens, and a tokenizer that cannot tell which word a piece comes from.
        """
        return self._batch(rows, max_tokens)[0]

    def inputs_and_tags(self, rows: list[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """
        As `inputs`, for rows of tokens, and their tags [batch, token]: a word's tag stands at its first piece, -100 at
        its other pieces, at special tokens and padding. Words beyond the length limit, and those that the tokenizer makes
        nothing of (such as lone control characters), are no input and have no tag.

        Raises:
            TwinMergingError: the tokenizer makes nothing of a whole row.
        """
        batch, encoding = self._batch(rows, None)
        tags = torch.full(batch["input_ids"].shape, -100)
        for index, row in enumerate(rows):
            before = None
            for position, word in enumerate(encoding.word_ids(index)):
                if word is not None and word != before:
                    tags[index, position] = row["tags"][word]
                before = word
            if (tags[index] == -100).all():
                raise TwinMergingError(f"the tokenizer makes nothing of a whole row: tokens {row['tokens'][:5]}")
        return batch, tags

    def _batch(self, rows: list[dict], max_tokens: int | None) -> tuple[dict[str, torch.Tensor], Any]:
        batch: Any
        if self.kind == "image":
            images = [_open_image(row["image"]) for row in rows]
            batch = self.processor(images=images, return_tensors="pt")
        else:
            limit = min(max_tokens or self.max_tokens, self.processor.model_max_length)
            if self.kind == "prompt":
                return prompt_inputs(rows, self.processor, limit), None
            batch = self._tokenize_words(rows, limit) if self.kind == "tokens" else self._tokenize(rows, limit)
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}, batch

    def _tokenize_words(self, rows: list[dict], limit: int) -> Any:
        if not self.processor.is_fast:
            raise TwinMergingError(
                f"{type(self.processor).__name__} cannot tell which word a piece comes from, which tags need; save the "
                "checkpoints with a fast tokenizer (one that has a tokenizer.json)"
            )
        words = [row["tokens"] for row in rows]
        options = {"is_split_into_words": True, "truncation": True, "max_length": limit}
        return self.processor(words, padding=True, return_tensors="pt", **options)

    def _tokenize(self, rows: list[dict], limit: int) -> Any:
        options = {"truncation": True, "max_length": limit}
        pairs = [row.get("text_pair") for row in rows]
        if all(pair is None for pair in pairs) or None not in pairs:
            second = None if pairs[0] is None else pairs
            return self.processor([row["text"] for row in rows], second, padding=True, return_tensors="pt", **options)
        # A row without a second text stays one text, also beside rows that have two.
        each = [self.processor(row["text"], pair, **options) for row, pair in zip(rows, pairs, strict=True)]
        return self.processor.pad(each, padding=True, return_tensors="pt")


def _open_image(image: Any) -> Any:
    if not isinstance(image, (str, Path)):
        return image
    require_extra("PIL", "vision")
    # As `pipeline` does, so that a row routes in use as it did in the build.
    return load_image(str(image))


def load_processing(path: Path, kind: str, role: str, trust_remote_code: bool = False) -> Processing | None:
    """
    Load the tokenizer or image processor that lies in a checkpoint's folder, or return None if there is none.

    It comes without code of its own: a fast tokenizer's class is exchanged for Transformers' (`trust_remote_code`).

    Raises:
        TwinMergingError: there is one, but it cannot be loaded, or it cannot do without its code.
    """
    names = _IMAGE_FILES if kind == "image" else _TOKENIZER_FILES
    if not any((path / name).is_file() for name in names):
        return None
    auto_class = AutoImageProcessor if kind == "image" else AutoTokenizer
    if kind == "image":
        require_extra("PIL", "vision")  # Transformers' own words for it are many, and name no extra
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the torchvision notice, once for each folder
    what = "image processor" if kind == "image" else "tokenizer"
    try:
        return Processing(kind, _without_code(auto_class.from_pretrained(path, trust_remote_code=trust_remote_code)))
    except Exception as error:
        raise TwinMergingError(f"{role}: the {what} in {path} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)


_TRIAL = ("One text, with 2 numbers.", "Another TEXT; ünïcode too!")


def _without_code(processor: Any) -> Any:
    """
    A processor that leads to no code but Transformers': an artifact carries the package's code only.

    Raises:
        ValueError: what its own code does cannot be had without it.
    """
    name = type(processor).__name__
    if type(processor).__module__.split(".")[0] == "transformers_modules":
        if not getattr(processor, "is_fast", False):
            raise ValueError(
                f"{name} is code of the checkpoint's own, which an artifact does not carry; save the checkpoint with a class "
                "of Transformers' (of tokenizers, a fast one)"
            )
        plain = _plain_tokenizer(processor)
        if any(plain(*texts).data != processor(*texts).data for texts in [*((text,) for text in _TRIAL), _TRIAL]):
            raise ValueError(
                f"without its own code, {name} would split texts otherwise; save it as a PreTrainedTokenizerFast"
            )
        processor = plain
    for holder in (vars(processor), getattr(processor, "init_kwargs", {})):
        holder.pop("auto_map", None)
    return processor


def _plain_tokenizer(tokenizer: Any) -> Any:
    """The same fast tokenizer as a class of Transformers'."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer_config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("auto_map", None)
        path.write_text(json.dumps({**content, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def differing_parts(one: Processing, other: Processing, only: tuple[str, ...] | None = None) -> list[str]:
    """Names of the parts in which two processors differ."""
    a, b = one.signature(), other.signature()
    return [key for key in sorted({*a, *b}) if (only is None or key in only) and a.get(key) != b.get(key)]


def position_limit(model: Any) -> int:
    """How many tokens a stock model has positions for; RoBERTa and its kin spend some on padding."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return 1 << 30
    counts_padding = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    return positions - ((model.config.pad_token_id or 0) + 1 if counts_padding else 0)
