"""The shared task model: one of Transformers' own classes, with all experts' heads in the place of its head."""

import copy
import inspect

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .configuration_twin_merging import TwinMergingConfig
from .heads_twin_merging import ExpertHeads


# Which of Transformers' own classes may be the shared model, by the wrapper that serves them.
SHARED_CLASSES = {
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    # Before masked ones: BART's class is in both mappings.
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
"""Auto classes whose models write tokens: their heads are backbone, and their experts have no labels."""


def find_shared_class(name: str) -> tuple[type[PreTrainedModel], str]:
    """
    Return the Transformers class called `name` and the Auto class it belongs to.

    Raises:
        ValueError: the name is not one of Transformers' own classes of a supported kind.
    """
    for auto_class, mapping in SHARED_CLASSES.items():
        for names in getattr(modeling_auto, mapping).values():
            if name in ([names] if isinstance(names, str) else names):
                return getattr(transformers, name), auto_class
    raise ValueError(
        f"`shared_class` {name!r} is not a Transformers class that a Twin-Merging model can wrap "
        f"(supported: classes of {', '.join(SHARED_CLASSES)})"
    )


_OTHER_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values")


def refuse_unservable(shared_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """
    Raise `ValueError`, with the reason, for models whose rows cannot each have their own mixture.

    Language models that are recurrent, read more than text or are made of several models; classifiers that are
    encoder-decoders, whose head reads the decoder's state at the last end-of-sequence token.
    """
    name, inputs = shared_class.__name__, inspect.signature(shared_class.forward).parameters
    if find_shared_class(name)[1] not in LANGUAGE_MODELS:
        if config.is_encoder_decoder:
            raise ValueError(f"{name} reads its answer from a decoder that follows an encoder")
        return
    others = [key for key in _OTHER_INPUTS if key in inputs]
    if others or shared_class.main_input_name != "input_ids":
        raise ValueError(f"{name} reads more than text ({', '.join(others) or shared_class.main_input_name})")
    if config.sub_configs:
        raise ValueError(f"{name} is made of several models ({', '.join(config.sub_configs)})")
    keeps_cache = getattr(shared_class, "_supports_default_dynamic_cache", lambda: True)()
    if getattr(shared_class, "_is_stateful", False) or not keeps_cache:
        raise ValueError(f"{name} keeps a recurrent state in the place of a key-value cache")


def build_shared(config: TwinMergingConfig) -> PreTrainedModel:
    """Make the shared task model with `ExpertHeads` in the place of its head modules."""
    shared_class, _ = find_shared_class(config.shared_class)
    refuse_unservable(shared_class, config.shared_config)
    shared = shared_class(copy.deepcopy(config.shared_config))
    heads: dict[str, list] = {name: [] for name in config.head_modules}
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    for expert in config.experts:
        task_config = copy.deepcopy(config.shared_config)
        task_config.num_labels = len(expert["labels"])
        # On meta: only the head of this model is wanted, its backbone would be made for nothing.
        with torch.device("meta"):
            task_model = shared_class(task_config)
        for name in heads:
            head = task_model.get_submodule(name)
            heads[name].append(_materialised(head, device, dtype))
    for position, (name, modules) in enumerate(heads.items()):
        shared.set_submodule(name, ExpertHeads(modules, chained=position > 0))
    return shared


def _materialised(head: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if device.type != "meta":
        head = head.to_empty(device=device).to(dtype)
    for module in head.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for parameter in head.parameters():
        parameter.__dict__.pop("_is_hf_initialized", None)
    return head
