"""How far an edited artifact is from a full rebuild: its shared model was merged from other experts."""

from dataclasses import dataclass

import torch

from .preflight import Inputs
from .separation import Separation, separate


@dataclass(frozen=True)
class Drift:
    """
    shared: ||shared as built - shared rebuilt|| / ||shared rebuilt||, over all floating backbone tensors.
    shared_per_delta: the same distance over the root mean square norm of the experts' deltas from the rebuilt shared
        model, which tells whether it matters: deltas are small beside the model.
    energy_kept, energy_kept_rebuilt: mean over factored tensors and experts of the share of a delta's squared norm that
        its factors keep, as the artifact is and after a full rebuild.
    """

    shared: float
    shared_per_delta: float
    energy_kept: float
    energy_kept_rebuilt: float


def measure_drift(state: dict[str, torch.Tensor], coverage: dict[str, dict], inputs: Inputs) -> Drift:
    """
    Build the split again from all experts, and compare.

    Args:
        state, coverage: of the edited artifact, by state-dict key and by tensor.
        inputs: all of its experts, as for a build.
    """
    rebuilt: Separation = separate(inputs)
    distance = norm = deltas = 0.0
    for name in inputs.experts[0].backbone:
        again = rebuilt.state[f"shared.{name}"]
        if not again.is_floating_point():
            continue
        again = again.double()
        distance += float((state[f"shared.{name}"].double() - again).pow(2).sum())
        norm += float(again.pow(2).sum())
        for expert in inputs.experts:
            deltas += float((expert.tensor(name).double() - again).pow(2).sum())
    deltas /= len(inputs.experts)
    return Drift(
        shared=_ratio(distance, norm),
        shared_per_delta=_ratio(distance, deltas),
        energy_kept=mean_energy(coverage),
        energy_kept_rebuilt=mean_energy(rebuilt.coverage),
    )


def _ratio(squared: float, squared_norm: float) -> float:
    return float(f"{(squared / squared_norm) ** 0.5:.4g}") if squared_norm > 0 else 0.0


def mean_energy(coverage: dict[str, dict]) -> float:
    """Mean `energy_kept` over factored tensors and experts; 1 if nothing is factored."""
    kept = [value for entry in coverage.values() for value in entry.get("energy_kept", [])]
    return round(sum(kept) / len(kept), 6) if kept else 1.0
