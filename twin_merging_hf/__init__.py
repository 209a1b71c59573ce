"""Twin-Merging for Transformers: importing this package registers its models with the Auto classes."""

from pathlib import Path as _Path


# In a source checkout `modeling` and `hub_upload` stand beside this folder, not inside it.
if not (_Path(__file__).parent / "modeling").is_dir():
    __path__.append(str(_Path(__file__).resolve().parents[1]))

from twin_merging_hf.modeling import (
    TwinMergingConfig,
    TwinMergingForCausalLM,
    TwinMergingForImageClassification,
    TwinMergingForMaskedLM,
    TwinMergingForSeq2SeqLM,
    TwinMergingForSequenceClassification,
    TwinMergingForTokenClassification,
    TwinMergingModel,
)

from ._version import __version__
from .errors import TwinMergingError


__all__ = [
    "TwinMergingConfig",
    "TwinMergingError",
    "TwinMergingForCausalLM",
    "TwinMergingForImageClassification",
    "TwinMergingForMaskedLM",
    "TwinMergingForSeq2SeqLM",
    "TwinMergingForSequenceClassification",
    "TwinMergingForTokenClassification",
    "TwinMergingModel",
    "__version__",
]
