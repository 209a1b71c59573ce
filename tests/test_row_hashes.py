"""Rows that an artifact was made with: recorded by their input alone, and refused as rows to score."""

import hashlib
import json
import re

import pytest

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.row_hashes import hashes_of, read_hashes, refuse_overlap, row_hash, write_hashes


TEXT = "The Cafe\u0301 is open"
SAME = [" The  Cafe\u0301\tis open\n", "the caf\u00e9 IS open", "The Caf\u00e9\u00a0is open"]


def test_a_hash_is_of_the_normalised_texts():
    expected = hashlib.sha256(json.dumps(["the caf\u00e9 is open", ""]).encode()).hexdigest()[:16]
    assert row_hash({"text": TEXT, "label": 1}) == expected


@pytest.mark.parametrize("text", SAME)
def test_white_space_case_and_composition_do_not_matter(text):
    assert row_hash({"text": text, "label": 0}) == row_hash({"text": TEXT, "label": 1})
    assert row_hash({"text": "x", "text_pair": text}) == row_hash({"text": "x", "text_pair": TEXT})


def test_everything_else_does():
    rows = [
        {"text": "a b"},
        {"text": "ab"},
        {"text": "a", "text_pair": "b"},
        {"text": "b", "text_pair": "a"},
        {"text": "a"},
        {"text": "a."},
    ]
    assert len({row_hash(row) for row in rows}) == len(rows)
    assert row_hash({"text": "a", "text_pair": ""}) == row_hash({"text": "a"})


def test_an_image_is_its_bytes_wherever_it_lies(tmp_path):
    tiny.picture(0, 1).save(tmp_path / "one.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "two.png").write_bytes((tmp_path / "one.png").read_bytes())
    tiny.picture(0, 2).save(tmp_path / "three.png")
    one, two, three = (row_hash({"image": tmp_path / name}) for name in ("one.png", "sub/two.png", "three.png"))
    assert one == two != three


def test_hashes_on_disk_are_the_same_bytes_in_any_order_and_come_back(tmp_path):
    rows = [{"text": str(i % 7)} for i in range(20)]
    for name, order in (("one", rows), ("two", rows[::-1])):
        write_hashes(tmp_path / name, {"a": {"train": hashes_of(order), "validation": []}, "b": {"train": []}})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_hashes(tmp_path / "one")
    assert list(found) == ["a", "b"] and found["a"]["validation"] == []
    assert found["a"]["train"] == sorted({row_hash(row) for row in rows}) and len(found["a"]["train"]) == 7


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"version": 1}', '{"version": 9, "experts": {}}', "null"])
def test_damaged_hashes_are_no_empty_ones(tmp_path, content):
    if content is not None:
        (tmp_path / "rows.json").write_text(content)
    with pytest.raises(TwinMergingError, match="rows.json cannot be read.*build the artifact again"):
        read_hashes(tmp_path / "rows.json")


def test_overlap_names_file_counts_origin_and_lines(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(12)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(row) for row in rows))  # rows on lines 2, 4, 6, ...
    recorded = {"a": {"train": hashes_of(rows[1:8])}, "b": {"validation": hashes_of(rows[9:10])}}
    with pytest.raises(TwinMergingError) as error:
        refuse_overlap({"a": (path, rows), "b": (path, rows[:1])}, [("the artifact", recorded)])
    text = str(error.value)
    assert f"{path}: 8 of 12 rows overlap" in text and "lines 4, 6, 8, 10, 12, ..." in text
    assert "7 among the train rows of 'a' (the artifact)" in text
    assert "1 among the validation rows of 'b' (the artifact)" in text
    assert text.count("overlap:") == 1  # the second file holds nothing that was seen


def test_rows_that_nobody_saw_pass(tmp_path):
    recorded = {"a": {"train": hashes_of([{"text": "seen"}])}}
    refuse_overlap({"a": (tmp_path / "x", [{"text": "new"}])}, [("the artifact", recorded)])


# ---- a build records ---------------------------------------------------------------------------------------------


def test_a_build_records_every_row_of_its_files_and_none_of_test(world, kind, tmp_path):
    """Those beyond the router's limit too: the experts were trained on them."""
    folder = files.copy_inputs(world.experts(kind), tmp_path / "in")
    tiny.write_data(kind, folder, "held", tiny.LABELS["a"], 2, rows=9)
    tiny.write_data(kind, folder, "later", tiny.LABELS["a"], 5, rows=5)
    data = {"train": "a.jsonl", "validation": "held.jsonl", "test": "later.jsonl"}
    recipe = tiny.write_recipe(folder, ("a", "b"), experts={"a": {"data": data}}, router={"rows": 6})
    result = build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    found = read_hashes(tmp_path / "out" / "rows.json")

    def independent(name: str) -> list[str]:
        hashes = set()
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            content = (folder / row["image"]).read_bytes() if "image" in row else json.dumps([row["text"], ""]).encode()
            hashes.add(hashlib.sha256(content).hexdigest()[:16])
        return sorted(hashes)

    assert found == {
        "a": {"train": independent("a"), "validation": independent("held")},
        "b": {"train": independent("b")},
    }
    assert len(found["a"]["train"]) > result.report["data"]["a"]["train"]["rows"] == 6
    assert not set(independent("later")) & {
        value for parts in found.values() for part in parts.values() for value in part
    }
    companions = files.read_json(tmp_path / "out" / "config.json")["provenance"]["companions"]
    assert "rows.json" in companions
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in found["b"]["train"])


def test_a_build_without_data_records_nothing(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    build_artifact(tiny.write_recipe(folder, ("a", "b"), data=False), tmp_path / "out", Progress(quiet=True))
    assert not (tmp_path / "out" / "rows.json").exists()


def test_data_of_one_expert_alone_is_recorded_although_no_router_is_trained(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    recipe = tiny.write_recipe(folder, ("a", "b"), experts={"b": {"data": None}})
    build_artifact(recipe, tmp_path / "out", Progress(quiet=True))
    assert list(read_hashes(tmp_path / "out" / "rows.json")) == ["a"]
