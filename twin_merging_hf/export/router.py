"""The router alone: the embedding, the layers that it reads through, and its own weights, in a small folder that loads."""

from pathlib import Path
from typing import Any

import torch

from twin_merging_hf import modeling
from twin_merging_hf.errors import TwinMergingError
from twin_merging_hf.modeling.modeling_twin_merging import AUTO_MAP
from twin_merging_hf.probe import random_inputs

from .source import Source


_TOLERANCE = 1e-5
_ROWS = 5


@torch.no_grad()
def export_router(source: Source, folder: Path) -> None:
    """
    Write what is needed to route: `AutoModel.from_pretrained(folder).route(**inputs)` gives the artifact's expert weights.

    A `prefix` router needs the layers up to the one that it stops at; a `full` one needs all. The output layer is not used;
    tied to the embedding it takes no room.

    Raises:
        TwinMergingError: the small model does not route as the artifact does.
    """
    config = type(source.config).from_dict(source.config.to_dict())
    config.ranks, config.exact_deltas, config.sparse_deltas = {}, [], {}
    config.shared_reference = None  # the folder stands alone
    config.provenance = {"router_of": str(source.folder), "companions": []}
    config.auto_map = dict(AUTO_MAP)
    _shorten(config)
    small: Any = modeling.TwinMergingModel(config).to(next(source.model.shared.parameters()).dtype).eval()
    small.router.float()
    whole, tied = source.model.state_dict(), small.all_tied_weights_keys
    small.load_state_dict({name: whole[tied.get(name, name)] for name in small.state_dict()})
    small.tie_weights()
    inputs = random_inputs(source.model.shared, _ROWS, 0)
    difference = float((small.route(**inputs) - source.model.route(**inputs)).abs().max())
    if not difference <= _TOLERANCE:
        raise TwinMergingError(
            f"the exported router differs from the artifact's by {difference:.1e}: the layers of {config.shared_class} cannot "
            "be cut off where it reads; please report this architecture"
        )
    small.save_pretrained(folder)
    source.copy_processing(folder)


def _shorten(config: Any) -> None:
    """Cut the shared model's config to the layers that the router reads through."""
    shared = config.shared_config
    if getattr(shared, "tie_word_embeddings", None) is False:
        shared.tie_word_embeddings = True
    if config.router_pass == "late":  # without experts, what it reads is what a pass that stops there reads
        config.router_pass = "prefix"
    if config.router_pass != "prefix" or config.router_layer is None:
        return
    count, kept = shared.num_hidden_layers, config.router_layer + 1
    if len(getattr(shared, "layer_types", None) or []) == count:
        shared.layer_types = shared.layer_types[:kept]
    shared.num_hidden_layers = kept
