"""What became of each tensor, as `tensors` in report.json, when an expert leaves or joins; and sums over it."""

from twin_merging_hf.modeling.deltas_twin_merging import delta_key


# Per-expert items of an expert whose delta of a tensor is zero; anything else that is listed counts from 0.
_NOTHING = {"energy_kept": 1.0, "energy": 0.0, "relative_error": 0.0}
_SIZES = {"factored": "ranks", "dropped": "ranks", "sparse": "entries"}


def without_item(entry: dict, position: int, count: int) -> dict:
    """
    A tensor's entry without one of `count` experts' items.

    A tensor in which no other expert differs is `equal` now; one of which no other expert has anything stored, although
    it differs, is `dropped`.
    """
    result = {
        key: [*value[:position], *value[position + 1 :]] if isinstance(value, list) and len(value) == count else value
        for key, value in entry.items()
    }
    if entry["treatment"] not in ("exact", "excluded", *_SIZES):
        return result
    if "energy" in result and not any(result["energy"]):
        return {"treatment": "equal"}
    if entry["treatment"] in ("excluded", "dropped") and "energy" in result:
        result["dropped_energy"] = sum(result["energy"])
    unit = _SIZES.get(entry["treatment"])
    if unit is not None and entry["treatment"] != "dropped" and not any(result[unit]):
        result |= {"treatment": "dropped", "dropped_energy": sum(result.get("energy", []))}
    return result


def with_item(old: dict | None, new: dict | None, position: int, count: int) -> dict:
    """A tensor's entry for `count` experts with the new expert's item at `position` in all that has one for each."""
    if old is None or new is None:
        return new or old or {}
    if old["treatment"] == "head" or (old["treatment"] == new["treatment"] == "equal"):
        return old
    old, new = _filled(old, new, count), _filled(new, old, 1)
    merged = {**new, **old}
    # `equal` took the other's treatment; a delta that one of the experts has stored is no longer dropped.
    if "dropped" in (old["treatment"], new["treatment"]) and old["treatment"] != new["treatment"]:
        merged["treatment"] = next(entry["treatment"] for entry in (old, new) if entry["treatment"] != "dropped")
        merged.pop("dropped_energy", None)
    elif "dropped_energy" in merged:
        merged["dropped_energy"] = old.get("dropped_energy", 0.0) + new.get("dropped_energy", 0.0)
    for key, value in old.items():
        if isinstance(value, list) and len(value) == count and len(new.get(key, [])) == 1:
            merged[key] = [*value[:position], *new[key], *value[position:]]
    return merged


def _filled(entry: dict, other: dict, count: int) -> dict:
    """An `equal` entry in the form of another's: of each of `count` experts, nothing."""
    if entry["treatment"] != "equal":
        return entry
    items = {key: [_NOTHING.get(key, 0)] * count for key, value in other.items() if isinstance(value, list)}
    return {"treatment": other["treatment"], **items}


def with_bytes(coverage: dict[str, dict], sizes: dict[str, int]) -> dict[str, dict]:
    """Bytes of the deltas by the sizes of the tensors on disk."""
    result = {}
    for name, entry in coverage.items():
        if entry.get("treatment") in ("exact", *_SIZES):
            prefix = f"deltas.{delta_key(name)}."
            entry = {**entry, "bytes": sum(size for key, size in sizes.items() if key.startswith(prefix))}
        result[name] = entry
    return result


def sums(coverage: dict[str, dict], delta_bytes: int) -> dict | None:
    """Energy kept, relative error and bytes of all deltas together, as a build reports them; None if energies are missing."""
    energy = kept = lost = 0.0
    for entry in coverage.values():
        if entry["treatment"] in ("equal", "head"):
            continue
        if "energy" not in entry:
            return None
        own = entry["energy"]
        energy += sum(own)
        if entry["treatment"] == "excluded":
            lost += sum(own)
            continue
        shares, errors = (
            entry.get(key, [default] * len(own)) for key, default in (("energy_kept", 1.0), ("relative_error", 0.0))
        )
        kept += sum(e * share for e, share in zip(own, shares, strict=True))
        lost += sum(e * error**2 for e, error in zip(own, errors, strict=True))
    return {
        "energy_kept": round(kept / energy, 6) if energy else 1.0,
        "relative_error": round((lost / energy) ** 0.5, 6) if energy else 0.0,
        "bytes": delta_bytes,
    }
