"""
Loads an artifact by its Hub id as users do, first without the plugin, then with it; run by test_upload.

usage: hub_script.py REPO_ID COMMIT TASK ROW OUT.json
"""

import importlib
import json
import sys


REPO_ID, COMMIT, TASK, ROW, OUT = sys.argv[1:]
PLUGIN = "twin_merging_hf"


class Block:
    """Finds no plugin, however it may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PLUGIN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


block = Block()
sys.meta_path.insert(0, block)

from transformers import AutoModel, pipeline  # noqa: E402


answers = {}
try:
    AutoModel.from_pretrained(REPO_ID, revision=COMMIT)
except ValueError as error:
    answers["without trust"] = str(error)
pipe = pipeline(TASK, model=REPO_ID, revision=COMMIT, trust_remote_code=True)
assert type(pipe.model).__module__.startswith("transformers_modules.")
answers["without plugin"] = pipe(ROW, top_k=None)
sys.meta_path.remove(block)
importlib.import_module(PLUGIN)
pipe = pipeline(TASK, model=REPO_ID)
assert type(pipe.model).__module__.startswith(f"{PLUGIN}.")
answers["with plugin"] = pipe(ROW, top_k=None)
with open(OUT, "w", encoding="utf-8") as stream:
    json.dump(answers, stream)
