"""What an alignment found, site by site, in numbers that can be written as JSON."""

from dataclasses import asdict, dataclass

from .permutation import Permutation
from .sweep import DualSpace, Search


@dataclass(frozen=True)
class SiteReport:
    """One site: mean similarity of matched units (None for heads and groups, which have no units of their own) and moves."""

    units: int
    similarity: float | None
    identity_similarity: float | None
    moved: float
    negative: float


@dataclass(frozen=True)
class AlignmentReport:
    """
    An alignment in numbers.

    objective, identity_objective: mean over sites of matched units' similarity, as found and with nothing moved.
    objectives: after the start and after each sweep; accepted: where it was the best so far.
    kept_identity: nothing better than the identity was found.
    """

    weight_share: float
    objective: float
    identity_objective: float
    objectives: list[float]
    accepted: list[bool]
    kept_identity: bool
    sites: dict[str, SiteReport]

    @property
    def moved(self) -> float:
        """Share of all units that left their place."""
        units = sum(site.units for site in self.sites.values())
        return sum(site.moved * site.units for site in self.sites.values()) / max(1, units)

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"moved": self.moved}


def make_report(space: DualSpace, found: Search) -> AlignmentReport:
    """Put a search's result into numbers."""
    layout, best = space.layout, found.best
    matched, identical = space.matched(best), space.matched(Permutation.identity(layout))
    sites = {
        name: SiteReport(
            units=best.index[name].numel(),
            similarity=matched.get(name),
            identity_similarity=identical.get(name),
            moved=best.moved(name),
            negative=best.negative(name),
        )
        for name in layout.sites
    }
    return AlignmentReport(
        space.share,
        found.objective,
        found.identity_objective,
        found.objectives,
        found.accepted,
        found.kept_identity,
        sites,
    )
