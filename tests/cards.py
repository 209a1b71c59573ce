"""What a reader would miss in a model card: sections, tables and listings without content, and values that nobody filled in."""

import re
from collections.abc import Iterator

from huggingface_hub import ModelCard


_UNFILLED = re.compile(r"\b(None|NaN|nan|inf|null|undefined)\b|\{\w*\}")
_RULE = re.compile(r"[|:\- ]+")


def complaints(text: str) -> list[str]:
    """Everything that is empty, ragged or unfilled below the metadata, each with the heading it stands under."""
    return [f"{title}: {what}" for title, body in sections(ModelCard(text).text) for what in _of_section(body)]


def sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Headings of any depth and the lines up to the next one; `#` in a listing is no heading."""
    title, body, fence = "", [], ""
    for line in text.splitlines():
        fence = _fence_after(line, fence)
        if not fence and re.match("#+ ", line):
            if title or any(body):
                yield title, body
            title, body = line.lstrip("# "), []
        else:
            body.append(line)
    yield title, body


def _fence_after(line: str, fence: str) -> str:
    """The open fence after a line: a longer run of backticks inside a listing does not end it."""
    run = re.match("`{3,}", line)
    if run is None:
        return fence
    return run[0] if not fence else "" if line.strip() == fence else fence


def _of_section(body: list[str]) -> Iterator[str]:
    if len(" ".join(body).strip()) <= 20:
        yield "hardly a word below it"
    fence, table, listing = "", [], []
    for line in [*body, ""]:
        before, fence = fence, _fence_after(line, fence)
        if before and not fence and not any(listing):
            yield "an empty listing"
        listing = [*listing, line.strip()] if before and fence else []
        prose = not before and not fence
        if prose and line.startswith("|"):
            table.append(line)
        elif table:
            yield from _of_table(table)
            table = []
        if prose and (found := _UNFILLED.search(line)):
            yield f"{found[0]!r} in {line!r}"


def _of_table(lines: list[str]) -> Iterator[str]:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    if len(rows) < 3 or not _RULE.fullmatch(lines[1]):
        yield f"a table without rows: {lines}"
    for row in rows:
        if len(row) != len(rows[0]) or not all(row):
            yield f"an empty or missing cell: {row}"
