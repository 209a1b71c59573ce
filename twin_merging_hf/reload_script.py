"""
Loads an artifact as someone does who does not have this package; `reload.py` runs it in a process of its own.

usage: reload_script.py FOLDER AUTO_CLASS   (prints one line of JSON)
"""

import json
import sys


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
    state = model.state_dict()
    return {
        "module": type(model).__module__.split(".")[0],
        "class": type(model).__name__,
        "tensors": sorted(state),
        "not_finite": [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()],
    }


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    sys.stdout.write(json.dumps(found) + "\n")
