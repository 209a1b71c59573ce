"""The model code that travels with every artifact, and its registration with Transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_twin_merging import TwinMergingConfig
from .modeling_twin_merging import (
    TwinMergingForCausalLM,
    TwinMergingForImageClassification,
    TwinMergingForMaskedLM,
    TwinMergingForSeq2SeqLM,
    TwinMergingForSequenceClassification,
    TwinMergingForTokenClassification,
    TwinMergingModel,
    TwinMergingPreTrainedModel,
)


AUTO_CLASSES = {
    AutoModel: TwinMergingModel,
    AutoModelForSequenceClassification: TwinMergingForSequenceClassification,
    AutoModelForTokenClassification: TwinMergingForTokenClassification,
    AutoModelForImageClassification: TwinMergingForImageClassification,
    AutoModelForCausalLM: TwinMergingForCausalLM,
    AutoModelForSeq2SeqLM: TwinMergingForSeq2SeqLM,
    AutoModelForMaskedLM: TwinMergingForMaskedLM,
}


def register() -> None:
    """Register config and models with the Auto classes; doing it again changes nothing."""
    AutoConfig.register(TwinMergingConfig.model_type, TwinMergingConfig, exist_ok=True)
    TwinMergingConfig.register_for_auto_class()
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(TwinMergingConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)


register()

__all__ = [
    "TwinMergingConfig",
    "TwinMergingForCausalLM",
    "TwinMergingForImageClassification",
    "TwinMergingForMaskedLM",
    "TwinMergingForSeq2SeqLM",
    "TwinMergingForSequenceClassification",
    "TwinMergingForTokenClassification",
    "TwinMergingModel",
    "TwinMergingPreTrainedModel",
    "register",
]
