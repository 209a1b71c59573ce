"""Artifacts cut down to their first layers, where a test is about how a model runs and time goes by the layer."""

import copy
from typing import Any


LAYERS = 2


def shallow(model: Any) -> Any:
    """The model's first two layers with their deltas, as a model of its own; it routes at layer 1."""
    config = copy.deepcopy(model.config)
    cut = tuple(f"{config.layers_path}.{i}." for i in range(LAYERS, config.num_hidden_layers))
    config.shared_config.num_hidden_layers = LAYERS
    config.router_layer = 1
    config.ranks = {name: ranks for name, ranks in config.ranks.items() if not name.startswith(cut)}
    config.sparse_deltas = {name: n for name, n in config.sparse_deltas.items() if not name.startswith(cut)}
    config.exact_deltas = [name for name in config.exact_deltas if not name.startswith(cut)]
    small, state = type(model)(config).eval(), model.state_dict()
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    return small
