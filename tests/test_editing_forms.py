"""Edits of artifacts of every form: integer and sparse deltas, all routers, tags; and what an edited artifact records."""

import json
from pathlib import Path

import pytest
import torch

from tests import files, tiny
from tests.conftest import load
from tests.test_editing import QUIET, Bench, assert_same, backbone, of_router
from twin_merging_hf import TwinMergingError, editing
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.evaluate_artifact import evaluate_artifact
from twin_merging_hf.row_hashes import read_hashes, row_hash


FORMS = {
    "int8": {"rank": 3, "dtype": "int8"},
    "int4": {"rank": 3, "dtype": "int4"},
    "energy": {"energy": 0.4},
    "budget": {"budget": 0.3},
    "budget in int4": {"budget": 0.1, "dtype": "int4"},
    "magnitude": {"method": "magnitude", "ratio": 0.1},
    "bernoulli": {"method": "bernoulli", "ratio": 0.1, "dtype": "bf16"},
}


def remove(folder: Path, name: str, out: Path, recipe: Path | None = None) -> editing.EditResult:
    return editing.remove_expert(folder, name, out, recipe, QUIET)


def blocks(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """One expert's stored deltas as they lie on disk, cut by the config's sizes: packed bytes stay packed."""
    config, tensors = files.read_json(folder / "config.json"), files.tensors_of(folder)
    found = {}
    for name, sizes in {**config["ranks"], **config["sparse_deltas"]}.items():
        cut = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        for part in ("up", "down", "scale", "values", "indices"):
            key = f"deltas.{name.replace('.', '-')}.{part}"
            if key in tensors and sizes[index]:
                found[key] = tensors[key][:, cut] if part == "up" else tensors[key][cut]
    for name in config["exact_deltas"]:
        found[name] = tensors[f"deltas.{name.replace('.', '-')}.delta"][index]
    return found


# ---- how deltas are stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_add_and_remove_keep_every_byte_of_every_form(world, tmp_path, form):
    """vit: odd sides (a patch table of 17 rows), so that int4's last byte is half empty."""
    bench = Bench(world.experts("vit"), tmp_path, exclusive=FORMS[form], router={"type": "projection"})
    more = bench.add(recipe=False).folder
    assert check_artifact(more) == []
    assert_same(backbone(bench.artifact), backbone(more))
    for index in (0, 1):
        assert_same(blocks(bench.artifact, index), blocks(more, index))
    assert len(blocks(more, 2)) > 20
    kinds = {value.dtype for key, value in blocks(more, 2).items() if key.endswith((".up", ".values"))}
    expected = {"int8": torch.int8, "int4": torch.uint8, "budget in int4": torch.uint8, "bernoulli": torch.bfloat16}
    assert kinds == {expected.get(form, torch.float32)}
    back = remove(more, "c", bench.folder / "back").folder
    assert check_artifact(back) == []
    assert_same(files.tensors_of(bench.artifact), files.tensors_of(back))
    one, other = (files.read_json(folder / "report.json") for folder in (bench.artifact, back))
    assert one["tensors"] == other["tensors"]
    assert other["exclusive"] == {key: pytest.approx(v, abs=2e-6) if isinstance(v, float) else v
                                  for key, v in one["exclusive"].items()}  # fmt: skip
    assert other["exclusive"] != files.read_json(more / "report.json")["exclusive"]


@pytest.mark.parametrize("form", ["int8", "int4", "magnitude"])
def test_the_newcomer_has_the_bytes_of_a_build_with_the_same_shared_model(world, tmp_path, form):
    bench = Bench(world.experts("bert"), tmp_path, exclusive=FORMS[form], router={"type": "projection"})
    more = bench.add(recipe=False)
    kept = {key.removeprefix("shared."): value for key, value in backbone(bench.artifact).items()}
    ready = files.copy_inputs(bench.folder, bench.folder / "copied", ("a",)) / "a"
    files.edit_tensors(ready, lambda t: t.update({k: kept[k] for k in t if k in kept}))
    recipe = bench.recipe(
        ("a", "b", "c"), "ready.yaml", exclusive=FORMS[form], shared_model="copied/a", router={"type": "projection"}
    )
    built = build_artifact(recipe, bench.folder / "built", QUIET)
    assert_same(files.tensors_of(built.folder), files.tensors_of(more.folder))
    for key, value in built.report["exclusive"].items():
        assert more.report["exclusive"][key] == (pytest.approx(value, abs=2e-6) if isinstance(value, float) else value)


def test_the_middle_expert_of_packed_factors_leaves_the_others_answers(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, ("a", "b", "c"), exclusive=FORMS["int4"])
    less = remove(bench.artifact, "b", bench.folder / "less").folder
    old, new, inputs = load(bench.artifact), load(less), tiny.batch("bert", 5)
    with torch.no_grad():
        for name in ("a", "c"):
            before, after = old(**inputs, experts=name), new(**inputs, experts=name)
            columns = [model.label_space.columns(model.expert_names.index(name)) for model in (old, new)]
            torch.testing.assert_close(after.logits[:, columns[1]], before.logits[:, columns[0]], atol=2e-6, rtol=1e-6)


def test_under_a_budget_the_newcomer_gets_the_others_mean_ranks(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, exclusive={"budget": 0.3, "dtype": "int4"})
    ranks = files.read_json(bench.add().folder / "config.json")["ranks"]
    assert len({own for *_, own in ranks.values()}) > 1
    for *others, own in ranks.values():
        assert own == round(sum(others) / 2)


def test_another_method_than_the_artifacts_is_refused(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, exclusive=FORMS["magnitude"])
    (bench.artifact / "recipe.yaml").write_text(bench.recipe(("a", "b"), "svd.yaml").read_text())
    with pytest.raises(TwinMergingError, match="stored as single entries.*`exclusive.method`"):
        bench.add(recipe=False)


# ---- routers ------------------------------------------------------------------------------------------------------

SETTINGS = {
    "centroid": {"type": "centroid", "layer": [0, 2]},
    "knn": {"type": "knn", "layer": [1, 2], "exemplars": 4, "neighbours": 3, "rank": 5},
    "full": {"type": "linear", "pass": "full"},
    "auto": {"type": "auto"},
    "none": {"type": "linear", "none": 0.2},
    "none of knn": {"type": "knn", "none": True, "exemplars": 4},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_router_is_trained_again_as_a_build_of_its_type_and_layers_trains_it(world, tmp_path, case):
    """The other side: a build from scratch of all experts on the artifact's own shared model."""
    bench = Bench(world.experts("bert"), tmp_path, router=SETTINGS[case])
    more = bench.add(recipe=False)
    old, new = (files.read_json(folder / "config.json") for folder in (bench.artifact, more.folder))
    kept = ("router_type", "router_pass", "router_layer", "router_layers", "router_exemplars", "router_neighbours",
            "router_input_size")  # fmt: skip
    assert {key: old[key] for key in kept} == {key: new[key] for key in kept}
    shared = {key.removeprefix("shared."): value for key, value in backbone(bench.artifact).items()}
    ready = files.copy_inputs(bench.folder, bench.folder / "copied", ("a",)) / "a"
    files.edit_tensors(ready, lambda t: t.update({k: shared[k] for k in t if k in shared}))
    layers = [*old["router_layers"], *([old["router_layer"]] if old["router_layer"] is not None else [])]
    settings = {**SETTINGS[case], "type": old["router_type"], "pass": old["router_pass"]}
    settings |= {"layer": layers} if layers else {}
    built = build_artifact(
        bench.recipe(("a", "b", "c"), "ready.yaml", shared_model="copied/a", router=settings), tmp_path / "built", QUIET
    )
    one, other = (
        {key: value for key, value in files.tensors_of(folder).items() if of_router(key)}
        for folder in (built.folder, more.folder)
    )
    assert_same(one, other)
    config = files.read_json(built.folder / "config.json")
    for key in ("router_temperature", "router_none_distance", "router_rank"):
        assert config[key] == new[key], key
    assert built.report["router"] == more.report["router"]


def test_removing_from_knn_leaves_the_others_exemplars_to_vote(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, ("a", "b", "c"), router=SETTINGS["knn"])
    less = remove(bench.artifact, "b", bench.folder / "less").folder
    one, other = files.tensors_of(bench.artifact), files.tensors_of(less)
    assert torch.equal(other["router.exemplars"], one["router.exemplars"][[0, 2]])
    assert torch.equal(other["router.projection"], one["router.projection"])


def novelty(tensors: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    projection, centres, whole = (tensors[f"router.novelty.{key}"] for key in ("projection", "centres", "whole"))
    points = features @ projection.T
    nearest = torch.stack([(points - centre).pow(2).sum(dim=1) for centre in centres]).amin(dim=0)
    return nearest - (points @ whole[:, :-1].T + whole[:, -1]).pow(2).sum(dim=1)


def test_without_rows_the_none_route_loses_a_centre_and_keeps_its_distance(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, ("a", "b", "c"), router=SETTINGS["none"])
    result = remove(bench.artifact, "b", bench.folder / "less")
    old, new = (files.read_json(folder / "config.json") for folder in (bench.artifact, result.folder))
    assert new["router_none_distance"] == old["router_none_distance"] and new["router_none_dimension"] == 2
    assert any("count as strange" in note for note in result.report["edits"][-1]["notes"])
    tensors = files.tensors_of(bench.artifact)
    tensors["router.novelty.centres"] = tensors["router.novelty.centres"][[0, 2]]
    model, inputs = load(result.folder), tiny.batch("bert", 8)
    with torch.no_grad():
        features = model.routing_features(**inputs)
        torch.testing.assert_close(model.router.novelty(features), novelty(tensors, features))
    # With rows it is learned again, in a space of its own size.
    given = remove(bench.artifact, "b", bench.folder / "given", bench.recipe(("a", "c"), "two.yaml"))
    config = files.read_json(given.folder / "config.json")
    assert config["router_none_dimension"] is None and config["router_none_distance"] != old["router_none_distance"]
    assert files.tensors_of(given.folder)["router.novelty.centres"].shape == (2, 1)
    assert given.report["router"]["none_share"] is not None
    again = remove(result.folder, "c", bench.folder / "one")  # twice without rows
    assert files.read_json(again.folder / "config.json")["router_none_dimension"] == 2
    assert check_artifact(again.folder) == []


def test_none_over_projection_needs_rows(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, router={"type": "projection", "none": True})
    with pytest.raises(TwinMergingError, match="none.*over `projection`.*give --recipe"):
        remove(bench.artifact, "b", tmp_path / "less")
    with pytest.raises(TwinMergingError, match="give --data"):
        bench.add(recipe=False, data=False)
    more = bench.add(recipe=False)
    assert more.report["router"]["none_share"] is not None and check_artifact(more.folder) == []
    less = remove(more.folder, "a", tmp_path / "given", bench.recipe(("b", "c"), "two.yaml"))
    assert check_artifact(less.folder) == []


# ---- tags ---------------------------------------------------------------------------------------------------------


def test_tags_come_and_go_with_their_shared_outside(world, tmp_path):
    bench = Bench(world.experts("bert-tokens", tiny.TAGS), tmp_path)
    before = files.read_json(bench.artifact / "config.json")["label2id"]
    more = bench.add()
    assert more.labels == [*sorted(before, key=before.get), "c/noun", "c/verb"] and more.moved == {}
    assert more.verdict.agreement is not None and check_artifact(more.folder) == []
    back = remove(more.folder, "c", bench.folder / "back")
    assert files.read_json(back.folder / "config.json")["label2id"] == before
    one, other = (
        {key: value for key, value in files.tensors_of(folder).items() if not of_router(key)}
        for folder in (bench.artifact, back.folder)
    )
    assert_same(one, other)
    less = remove(more.folder, "a", bench.folder / "less")
    assert less.labels == ["B-b/LOC", "I-b/LOC", "O", "B-b/PER", "c/noun", "c/verb"] and less.moved["O"] == (0, 2)
    replaced = editing.replace_expert(bench.artifact, bench.folder / "new", bench.newcomer("b"), bench.all, QUIET)
    assert replaced.labels == ["O", "B-a/PER", "I-a/PER", "b/noun", "b/verb"] and replaced.moved == {}


def test_equal_tags_that_would_split_are_refused(world, tmp_path):
    tags = {"a": ["O", "B-X"], "b": ["O", "B-X"], "c": ["O", "B-Y"]}
    bench = Bench(world.experts("bert-tokens", tags), tmp_path)
    with pytest.raises(TwinMergingError, match="from `same`.*to `tags`.*'b' would get other ids"):
        bench.add(recipe=False)


# ---- what is recorded ---------------------------------------------------------------------------------------------


def of_file(path: Path) -> set[str]:
    return {row_hash(json.loads(line)) for line in path.read_text().splitlines()}


def test_rows_of_all_who_were_ever_there_stay_recorded(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path)
    rows = {name: of_file(bench.folder / f"{name}.jsonl") for name in ("a", "b", "c")}
    more = bench.add().folder
    assert {n: set(parts["train"]) for n, parts in read_hashes(more / "rows.json").items()} == rows
    less = remove(more, "b", bench.folder / "less").folder
    assert read_hashes(less / "rows.json").keys() == {"a", "b", "c"}
    replaced = editing.replace_expert(bench.artifact, bench.folder / "new", bench.newcomer("b"), None, QUIET).folder
    found = read_hashes(replaced / "rows.json")
    assert set(found["b"]["train"]) == rows["b"] | rows["c"] and set(found["a"]["train"]) == rows["a"]
    for folder in (more, less, replaced):
        assert "rows.json" in files.read_json(folder / "config.json")["provenance"]["companions"]


def test_evaluate_refuses_rows_of_the_newcomer_and_of_the_one_who_left(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path)
    files.write_rows(tmp_path / "new.jsonl", [{"text": f"{tiny.WORDS[i]} unseen", "label": i % 2} for i in range(8)])
    replaced = editing.replace_expert(bench.artifact, bench.folder / "new", bench.newcomer("a"), None, QUIET).folder
    data = {"a": bench.folder / "c.jsonl"}
    with pytest.raises(TwinMergingError, match="20 of 20 rows overlap: 20 among the train rows of 'a'"):
        evaluate_artifact(replaced, data)
    less = remove(replaced, "b", bench.folder / "less").folder
    rows = [json.loads(line) for line in (bench.folder / "b.jsonl").read_text().splitlines()]
    files.write_rows(tmp_path / "old.jsonl", [{**row, "label": 0} for row in rows])
    with pytest.raises(TwinMergingError, match="20 of 20 rows overlap: 20 among the train rows of 'b'"):
        evaluate_artifact(less, {"a": tmp_path / "old.jsonl"})
    assert evaluate_artifact(less, {"a": tmp_path / "new.jsonl"}, resamples=10)["artifact"] == str(less)


def test_figures_of_the_newcomer_are_measured_and_the_others_kept(world, tmp_path):
    """A regression joins by its own rows alone: its mean label and its own score; old figures stay."""
    labels = {"a": ["x", "y"], "b": ["stars"], "c": ["score"]}
    bench = Bench(world.experts("bert", labels), tmp_path, router={"type": "projection"})
    old = files.read_json(bench.artifact / "report.json")
    more = bench.add(recipe=False).report
    assert more["data"].keys() == {"a", "b", "c"} and {**more["data"]}["b"] == old["data"]["b"]
    rows = [json.loads(line)["label"] for line in (bench.folder / "c.jsonl").read_text().splitlines()]
    assert more["data"]["c"]["train"]["rows"] < len(rows) and min(rows) < more["data"]["c"]["train_mean"] < max(rows)
    scores = more["verdict"]["expert_scores"]
    assert {name: scores[name] for name in ("a", "b")} == old["verdict"]["expert_scores"]
    built = build_artifact(bench.all, bench.folder / "all", QUIET).report
    assert scores["c"] == built["verdict"]["expert_scores"]["c"] and more["data"]["c"] == built["data"]["c"]
    less = remove(bench.folder / "more", "a", bench.folder / "less").report
    assert less["verdict"]["expert_scores"].keys() == {"b", "c"} == less["data"].keys() and "stale" in less["verdict"]
