"""Experts that join or leave a loaded model, in place. The work is the package's, which must be installed."""

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .export_twin_merging import refuse_unreadable


_EDITING = "twin_merging_hf.editing"


class EditMixin(PreTrainedModel):
    """What lets a loaded artifact gain and lose experts."""

    def load_expert(self, name: str, checkpoint: str, data: str | None = None, labels=None, recipe=None) -> None:
        """
        Add an expert, as `twin-merging add-expert`: all other experts and the shared model stay as they are.

        Args:
            name: the new expert's.
            checkpoint: a folder or Hub id: a full checkpoint, or a PEFT LoRA.
            data: JSONL file with the expert's rows. A trained router is trained again, so it needs rows of all experts:
                from `recipe`, else from the paths of the artifact's own recipe, seen from the current folder. `projection`
                routers need none.
            labels: new label names, in id order.
            recipe: a recipe file with models and `data` of the other experts.

        Raises:
            ImportError: the package is not installed.
            ValueError: what `add-expert` refuses, or weights that cannot be read (offloaded, quantised). The model is then
                as it was.
        """
        editing = _package()
        newcomer = editing.Newcomer(
            name, os.fspath(checkpoint), data and Path(data), None if labels is None else tuple(labels)
        )
        self._become(
            lambda before, after: editing.add_expert(before, after, newcomer, recipe, editing.Progress(quiet=True))
        )

    def delete_expert(self, name: str, recipe=None) -> None:
        """
        Remove an expert, as `twin-merging remove-expert`; label ids after its own close up.

        Args:
            recipe: a recipe file with `data` of the remaining experts, to fit the router's temperature again.

        Raises:
            ImportError: the package is not installed.
            ValueError: an unknown or the last expert, or weights that cannot be read (offloaded, quantised). The model is
                then as it was.
        """
        editing = _package()
        self._become(
            lambda before, after: editing.remove_expert(before, name, after, recipe, editing.Progress(quiet=True))
        )

    def _become(self, edit: Callable) -> None:
        """Save, edit the folder, and take over all that the edited artifact is; what was set on the model stays set."""
        refuse_unreadable(self)
        model: Any = self
        with tempfile.TemporaryDirectory(prefix="twin-merging-edit-") as scratch:
            before, after = os.path.join(scratch, "before"), os.path.join(scratch, "after")
            model.save_pretrained(before)
            edit(before, after)
            options = {"dtype": model.shared.dtype, "attn_implementation": model.config._attn_implementation}
            new: Any = type(self).from_pretrained(after, shared_model=getattr(model, "_shared_source", None), **options)
            kept = {}
            for companion in new.config.provenance.get("companions", []):
                with open(os.path.join(after, companion), "rb") as stream:
                    kept[companion] = stream.read()
        new._kept_companions, new._artifact_source = kept, None
        new.to(model.device)
        new.train(self.training)
        new._plan_choice = model._plan_choice
        self.__dict__.clear()
        self.__dict__.update(new.__dict__)


def _package() -> Any:
    try:
        return importlib.import_module(_EDITING)
    except ModuleNotFoundError as error:
        raise ImportError("editing an artifact needs its package: pip install twin-merging-hf") from error
