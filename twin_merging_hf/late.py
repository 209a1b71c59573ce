"""`router.pass: late`: which parameters act before the router has read, and so cannot differ between rows."""

import torch

from twin_merging_hf.modeling.deltas_twin_merging import parameter_owners

from .checkpoints import Checkpoint
from .probe import random_inputs
from .recipe import Recipe


WHY = "`router.pass: late`: it acts before the router has read"


def before_routing(recipe: Recipe, first: Checkpoint) -> frozenset[str]:
    """
    Backbone parameters that act below the last of `router.layer` and therefore get no delta; none unless `late`.

    A parameter that is used below and above, such as an embedding tied to the output layer, counts as below.
    """
    settings = recipe.router
    if settings.router_pass != "late" or not settings.layers:
        return frozenset()
    return _used_before(first, f"{first.layers_path}.{max(settings.layers)}")


@torch.no_grad()
def _used_before(first: Checkpoint, layer: str) -> frozenset[str]:
    """Names of the parameters whose modules run before a layer, found by a run of a random model."""
    model = first.task_class(first.config).eval()
    started: set[int] = set()
    reached: list = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, args: None if reached else started.add(id(m)))
    model.get_submodule(layer).register_forward_pre_hook(lambda m, args: reached.append(m), prepend=True)
    model(**random_inputs(model, 2, 0))
    return frozenset(
        name
        for name, (holders, _) in parameter_owners(model).items()
        if any(id(owner) in started for owner, _ in holders)
    )
