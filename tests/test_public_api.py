"""What `import twin_merging_hf` gives, and that importing again changes nothing."""

import importlib
import re

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import twin_merging_hf
from twin_merging_hf import hub_upload, merging, modeling


def test_public_names_are_these():
    assert twin_merging_hf.__all__ == [
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
    assert modeling.__all__ == [
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
    assert hub_upload.__all__ == ["Pushed", "push_artifact", "render_card", "write_card"]
    assert merging.__all__ == [
        "DEFAULTS",
        "MERGE_METHODS",
        "PIECE",
        "WHOLE_MATRICES",
        "MergeSettings",
        "MethodDefaults",
        "dare_linear",
        "dare_ties",
        "kth_largest_magnitude",
        "linear",
        "settings_for",
        "task_arithmetic",
        "ties",
        "trim_thresholds",
        "tsv_m",
    ]
    for module in (twin_merging_hf, modeling, hub_upload, merging):
        assert all(hasattr(module, name) for name in module.__all__)


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", twin_merging_hf.__version__)


def registered() -> dict:
    """Which class each Auto class gives for our config."""
    autos = (
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForImageClassification,
    )
    found = {auto.__name__: auto._model_mapping[modeling.TwinMergingConfig] for auto in autos}
    return {**found, "AutoConfig": type(AutoConfig.for_model("twin_merging"))}


def test_every_auto_class_knows_its_model():
    assert registered() == {
        "AutoConfig": modeling.TwinMergingConfig,
        "AutoModel": modeling.TwinMergingModel,
        "AutoModelForSequenceClassification": modeling.TwinMergingForSequenceClassification,
        "AutoModelForTokenClassification": modeling.TwinMergingForTokenClassification,
        "AutoModelForImageClassification": modeling.TwinMergingForImageClassification,
    }


def test_registering_again_registers_nothing_more():
    before = registered()
    sizes = [len(auto._model_mapping._extra_content) for auto in (AutoModel, AutoModelForSequenceClassification)]
    modeling.register()
    modeling.register()
    assert registered() == before
    assert sizes == [len(a._model_mapping._extra_content) for a in (AutoModel, AutoModelForSequenceClassification)]


def test_importing_again_is_harmless():
    before, path = registered(), list(twin_merging_hf.__path__)
    classes = {name: getattr(twin_merging_hf, name) for name in twin_merging_hf.__all__}
    for _ in range(2):
        assert importlib.reload(twin_merging_hf) is twin_merging_hf
        importlib.reload(modeling)
    assert list(twin_merging_hf.__path__) == path
    assert {name: getattr(twin_merging_hf, name) for name in twin_merging_hf.__all__} == classes
    assert registered() == before


def test_importing_leaves_transformers_settings_alone():
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.WARNING
