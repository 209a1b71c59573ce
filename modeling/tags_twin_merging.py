"""The union of all experts' tags: one shared `O`, every other tag with its expert's name inside."""

import re


OUTSIDE = "O"
TOKEN_CLASSES = "token_classification"
"""`problem_type` of an expert that tags tokens."""
_CHUNK = re.compile(r"([BIESLU])-(.+)")


def union_tags(experts: list) -> tuple[tuple, tuple]:
    """
    Name the tags of all experts, experts in order and each one's tags in id order.

    `O`, the tag of tokens outside of everything, is one for all and stands where it first occurs. In a chunk scheme (some
    tag begins with `B-` or `I-`) `B-PER` of expert `ner` becomes `B-ner/PER`, so that readers of such schemes, as
    Transformers' pipeline, still group it; any other tag becomes `ner/TAG`.

    Args:
        experts: config entries `{"name", "labels", ...}`.

    Returns:
        The names, and for each expert the position in them of each of its own tags.

    Raises:
        ValueError: two experts' tags would get one name.
    """
    names: list = []
    places = []
    for expert in experts:
        chunked = any(tag.startswith(("B-", "I-")) for tag in expert["labels"])
        own = []
        for tag in expert["labels"]:
            name = _union_name(tag, expert["name"], chunked)
            if name in names and tag != OUTSIDE:
                raise ValueError(
                    f"two tags would be called {name!r} in the union of tags; rename expert {expert['name']!r}"
                )
            if name not in names:
                names.append(name)
            own.append(names.index(name))
        places.append(tuple(own))
    return tuple(names), tuple(places)


def _union_name(tag: str, expert: str, chunked: bool) -> str:
    chunk = _CHUNK.fullmatch(tag) if chunked else None
    if tag == OUTSIDE:
        return OUTSIDE
    return f"{chunk[1]}-{expert}/{chunk[2]}" if chunk else f"{expert}/{tag}"
