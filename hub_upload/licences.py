"""Licences of all sources of an artifact: what to put into the card, and when to warn."""

from collections.abc import Mapping
from dataclasses import dataclass


# These ask for little more than to be named, so that parts under them may stand together.
_PERMISSIVE = frozenset(
    {"0bsd", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "mit", "unlicense"}
)
SEVERAL = "licences-of-the-sources"


@dataclass(frozen=True)
class Licences:
    """
    by_source: identifiers by source, as its own card gives them; unknown: sources whose licence is not recorded.
    metadata: what the card's metadata says (`license`, `license_name`), empty if nothing is known.
    warning: what a reader has to know before using or sharing the artifact.
    """

    by_source: dict[str, list[str]]
    unknown: list[str]
    metadata: dict[str, str]
    warning: str


def licences_of(sources: Mapping[str, Mapping]) -> Licences:
    """
    Compare the licences of an artifact's sources (`provenance.sources`).

    Different licences conflict as soon as one of them is more than permissive: whether they may stand in one model is for
    people to judge, so the card says `other` and lists them.
    """
    by_source = {name: _identifiers(sources[name]) for name in sorted(sources)}
    unknown = [name for name, found in by_source.items() if not found]
    known = {name: found for name, found in by_source.items() if found}
    different = sorted({identifier for found in known.values() for identifier in found})
    if not different:
        return Licences(
            known, unknown, {}, "No source records a licence: ask their authors before you share this model."
        )
    sentences = []
    if len(different) > 1 and not set(different) <= _PERMISSIVE:
        sentences.append(
            f"**The sources' licences differ ({', '.join(different)}) and may conflict:** this model holds parts of all of "
            "them, so check that you may combine and share them."
        )
    elif len(different) > 1:
        sentences.append(f"The sources are under {', '.join(different)}; keep the notices of all of them.")
    else:
        sentences.append(f"All sources with a recorded licence are under {different[0]}.")
    if unknown:
        sentences.append(f"**No licence is recorded for {', '.join(unknown)}:** ask before you share this model.")
    one = len(different) == 1 and not unknown
    metadata = {"license": different[0]} if one else {"license": "other", "license_name": SEVERAL}
    return Licences(known, unknown, metadata, " ".join(sentences))


def _identifiers(source: Mapping) -> list[str]:
    """Identifiers, lower case; `other` is called by its own name where the source gives one."""
    found = source.get("license") or []
    identifiers = [str(item).lower() for item in (found if isinstance(found, list) else [found])]
    name = source.get("license_name")
    return [
        str(name).lower() if identifier == "other" and isinstance(name, str) else identifier
        for identifier in identifiers
    ]
