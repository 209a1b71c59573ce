"""Pushing a loaded model to the Hub with all that belongs to its artifact: our card, tokenizer, recipe, pictures."""

import os
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.hub import ModelCard


CARD = "README.md"


class PushMixin(PreTrainedModel):
    """
    Makes `push_to_hub` and `save_pretrained(push_to_hub=True)` upload whole artifacts.

    Transformers writes the repository's card, or an empty template where it has none, over README.md and uploads only files
    that it wrote itself. Here the folder is finished again before anything is sent.
    """

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):  # type: ignore[override]
        path = os.path.join(save_directory, CARD)
        if push_to_hub and os.path.isfile(path):
            with open(path, encoding="utf-8") as stream:
                self._own_card = stream.read()
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self._own_card = None

    _own_card: str | None = None
    """Content of a card that lay in the folder of `save_pretrained` before."""

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):  # type: ignore[override]
        artifact: Any = self
        companions = artifact.config.provenance.get("companions", [])
        path = os.path.join(working_dir, CARD)
        tags = ModelCard.load(path).data.tags if os.path.isfile(path) else None
        artifact._restore_config(working_dir)
        if self._own_card is not None:
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(self._own_card)
        elif CARD in companions and artifact._has_companions() and os.path.isfile(path):
            os.remove(path)
        artifact._copy_companions(working_dir)
        if os.path.isfile(path):
            _add_tags(path, tags)
        # Companions that an earlier save left in the folder belong to the artifact as well.
        stamps = {name: time for name, time in files_timestamps.items() if name not in companions}
        return super()._upload_modified_files(working_dir, repo_id, stamps, *args, **kwargs)


def _add_tags(path: str, tags: Any) -> None:
    """Add tags to a card, which otherwise keeps every word."""
    card = ModelCard.load(path)
    new = [tag for tag in tags or [] if tag not in (card.data.tags or [])]
    if new:
        card.data.tags = [*(card.data.tags or []), *new]
        card.save(path)
