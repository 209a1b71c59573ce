"""Loads language artifacts with the code they carry and writes; run by test_remote_generation where there is no plugin.

usage: remote_generation.py EXPECTED.json OUT
"""

import json
import sys
from pathlib import Path


EXPECTED, OUT = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
PLUGIN = "twin_merging_hf"


class Block:
    """Finds no plugin, however it may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PLUGIN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Block())

import torch  # noqa: E402
import transformers  # noqa: E402


def check(case: dict, folder: str):
    auto = getattr(transformers, case["auto"])
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.split(".")[0] == "transformers_modules", type(model).__module__
    inputs = {name: torch.tensor(value) for name, value in case["inputs"].items()}
    if "sequences" in case:
        found = model.generate(**inputs, experts=case["experts"], **case["options"])
        assert found.tolist() == case["sequences"], (case["auto"], found.tolist())
        beams = model.generate(**inputs, experts=case["experts"], num_beams=2, **case["options"])
        assert beams.tolist() == case["beams"], (case["auto"], beams.tolist())
    else:
        with torch.no_grad():
            found = model(**inputs, experts=case["experts"]).logits.argmax(dim=-1)
        assert found.tolist() == case["tokens"]
    return model


for kind, case in EXPECTED.items():
    check(case, case["folder"]).save_pretrained(OUT / kind)
    check(case, str(OUT / kind))

assert not any(name.split(".")[0] == PLUGIN for name in sys.modules)
print("all is well")
