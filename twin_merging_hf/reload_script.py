"""
Loads an artifact as someone does who does not have this package; `reload.py` runs it in a process of its own.

usage: reload_script.py FOLDER AUTO_CLASS   (prints one line of JSON)
"""

import importlib.util
import json
import sys
from pathlib import Path


class Block:
    """Finds no plugin, however it may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "twin_merging_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def main(folder: str, auto_class: str) -> dict:
    sys.meta_path.insert(0, Block())  # type: ignore[arg-type]
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    load_processing(folder)
    state = model.state_dict()
    return {
        "module": type(model).__module__.split(".")[0],
        "class": type(model).__name__,
        "tensors": sorted(state),
        "not_finite": [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()],
    }


def load_processing(folder: str) -> None:
    """Load the tokenizer and the image processor, where there are any: a pipeline would."""
    from transformers import AutoTokenizer

    # From where it is defined: the package's own name for it asks for torchvision in older releases, the class does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    files = {path.name for path in Path(folder).iterdir()}
    if files & {"tokenizer.json", "tokenizer_config.json"}:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if files & {"preprocessor_config.json", "processor_config.json"} and importlib.util.find_spec("PIL"):
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


if __name__ == "__main__":
    try:
        found = main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    sys.stdout.write(json.dumps(found) + "\n")
