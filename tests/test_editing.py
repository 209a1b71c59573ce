"""Experts that join and leave a finished artifact: what is not theirs keeps every byte, and a full rebuild does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests import files, tiny
from tests.conftest import load
from twin_merging_hf import TwinMergingError, editing
from twin_merging_hf.artifact import check_artifact
from twin_merging_hf.builder import build_artifact
from twin_merging_hf.cli import app
from twin_merging_hf.editing import Newcomer
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import load_recipe


QUIET = Progress(quiet=True)
RANK = {"exclusive": {"rank": 3}}


class Bench:
    """Experts a, b, c of a kind, and an artifact of some of them, in a folder of the test's own."""

    def __init__(self, source: Path, root: Path, names: tuple = ("a", "b"), **overrides):
        self.folder = files.copy_inputs(source, root / "in", dict.fromkeys(("base", *names, "c")))
        self.small = self.recipe(names, "small.yaml", **overrides)
        self.all = self.recipe((*names, *(["c"] if "c" not in names else [])), "all.yaml", **overrides)
        self.artifact = build_artifact(self.small, self.folder / "artifact", QUIET).folder

    def recipe(self, names, file: str, **overrides) -> Path:
        return tiny.write_recipe(self.folder, names, file=file, **{**RANK, **overrides})

    def newcomer(self, name: str = "c", source: str = "c", data: bool = True, labels=None) -> Newcomer:
        rows = self.folder / f"{source}.jsonl" if data else None
        return Newcomer(name, str(self.folder / source), rows, labels)

    def add(self, out: str = "more", recipe: bool = True, **kwargs):
        newcomer = self.newcomer(**kwargs)
        return editing.add_expert(self.artifact, self.folder / out, newcomer, self.all if recipe else None, QUIET)


@pytest.fixture
def bench(world, tmp_path):
    return Bench(world.experts("bert"), tmp_path)


def of_router(key: str) -> bool:
    return key.startswith("router.")


def expert_part(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """All that one expert owns, cut out of the stored tensors by the config's ranks: independent of the code under test."""
    config, tensors = files.read_json(folder / "config.json"), files.tensors_of(folder)
    found = {key: value for key, value in tensors.items() if f".heads.{index}." in key}
    found = {key.replace(f".heads.{index}.", ".heads."): value for key, value in found.items()}
    for name, ranks in config["ranks"].items():
        start, stop = sum(ranks[:index]), sum(ranks[: index + 1])
        if start < stop:
            key = f"deltas.{name.replace('.', '-')}"
            found[f"{key}.up"] = tensors[f"{key}.up"][:, start:stop]
            found[f"{key}.down"] = tensors[f"{key}.down"][start:stop]
    for name in config["exact_deltas"]:
        delta = tensors[f"deltas.{name.replace('.', '-')}.delta"][index]
        if delta.any():
            found[name] = delta
    return found


def backbone(folder: Path) -> dict[str, torch.Tensor]:
    tensors = files.tensors_of(folder)
    return {key: value for key, value in tensors.items() if key.startswith("shared.") and ".heads." not in key}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) > 0
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


# ---- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["linear", "mlp", "projection"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_adding_keeps_every_byte_of_the_others_and_removing_brings_the_original_back(world, tmp_path, kind, router):
    bench = Bench(world.experts(kind), tmp_path, router={"type": router})
    before = files.listing(bench.artifact)
    more = bench.add().folder
    assert files.listing(bench.artifact) == before
    assert check_artifact(more) == []
    assert_same(backbone(bench.artifact), backbone(more))
    for index in (0, 1):
        assert_same(expert_part(bench.artifact, index), expert_part(more, index))
    back = editing.remove_expert(more, "c", bench.folder / "back", progress=QUIET).folder
    assert check_artifact(back) == []
    one, other = files.tensors_of(bench.artifact), files.tensors_of(back)
    if router != "projection":  # trained routers were trained again for three experts
        one, other = ({k: v for k, v in part.items() if not of_router(k)} for part in (one, other))
    assert_same(one, other)
    configs = [files.read_json(folder / "config.json") for folder in (bench.artifact, back)]
    for key in ("ranks", "exact_deltas", "experts", "id2label", "label2id", "router_top_k", "shared_config"):
        assert configs[0][key] == configs[1][key], key
    assert list(configs[0]["ranks"]) == list(configs[1]["ranks"])


@pytest.mark.parametrize("router", ["linear", "projection"])
def test_a_newcomer_to_a_late_artifact_acts_where_the_others_do(world, tmp_path, router):
    bench = Bench(world.experts("bert"), tmp_path, router={"type": router, "pass": "late", "layer": 2})
    more = bench.add().folder
    assert check_artifact(more) == []
    old, new = (files.read_json(folder / "config.json") for folder in (bench.artifact, more))
    for key in ("ranks", "exact_deltas"):
        assert sorted(old[key]) == sorted(new[key]), key
    assert new["router_pass"] == "late" and new["router_layer"] == 2 and new["router_site"] == old["router_site"]
    with torch.no_grad():
        output = load(more)(**tiny.batch("bert", 4))
    assert output.expert_weights.shape == (4, 3) and torch.isfinite(output.logits).all()


def test_the_new_expert_is_its_delta_from_the_stored_shared_model(world, tmp_path):
    """With full rank the new expert answers as its own checkpoint, although the shared model never saw it."""
    bench = Bench(world.experts("bert"), tmp_path, exclusive={"rank": tiny.FULL_RANK})
    model, inputs = load(bench.add().folder), tiny.batch("bert", 4)
    from transformers import AutoModelForSequenceClassification

    expert = AutoModelForSequenceClassification.from_pretrained(bench.folder / "c").eval()
    with torch.no_grad():
        expected, output = expert(**inputs).logits, model(**inputs, experts="c").expert_logits
    torch.testing.assert_close(output[:, model.label_space.columns(2)], expected, atol=1e-4, rtol=0)


def test_factors_in_bf16_stay_as_they_are(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, exclusive={"rank": 3, "dtype": "bf16"})
    more = bench.add().folder
    for index in (0, 1):
        part = expert_part(more, index)
        assert_same(expert_part(bench.artifact, index), part)
        assert any(value.dtype == torch.bfloat16 for value in part.values())


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_old_experts_answer_as_before(world, tmp_path, kind):
    bench = Bench(world.experts(kind), tmp_path)
    old, new = load(bench.artifact), load(bench.add().folder)
    inputs = tiny.batch(kind, 5)
    for name in ("a", "b"):
        with torch.no_grad():
            before, after = old(**inputs, experts=name), new(**inputs, experts=name)
        # Equal but for rounding: matrix products with more (zero-weighted) columns may sum in another order.
        columns = old.label_space.columns(["a", "b"].index(name))
        width = before.expert_logits.shape[1]
        torch.testing.assert_close(after.expert_logits[:, :width], before.expert_logits, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(after.logits[:, columns], before.logits[:, columns], atol=2e-6, rtol=1e-6)


def test_a_full_rebuild_changes_what_editing_keeps(bench):
    more = bench.add()
    rebuilt = build_artifact(bench.all, bench.folder / "rebuilt", QUIET).folder
    kept, changed = backbone(more.folder), backbone(rebuilt)
    assert any(not torch.equal(kept[key], changed[key]) for key in kept)
    part, other = expert_part(more.folder, 0), expert_part(rebuilt, 0)
    assert any(part[key].shape != other[key].shape or not torch.equal(part[key], other[key]) for key in part)
    # The drift is that distance.
    floating = [key for key in kept if kept[key].is_floating_point()]
    distance = sum(float((kept[key].double() - changed[key].double()).pow(2).sum()) for key in floating) ** 0.5
    norm = sum(float(changed[key].double().pow(2).sum()) for key in floating) ** 0.5
    assert more.drift is not None and more.drift.shared == pytest.approx(distance / norm, rel=1e-3)
    energies = [
        e for t in files.read_json(rebuilt / "report.json")["tensors"].values() for e in t.get("energy_kept", [])
    ]
    assert more.drift.energy_kept_rebuilt == pytest.approx(sum(energies) / len(energies), abs=1e-5)


def test_replacing_is_removing_and_adding_at_the_same_place(world, tmp_path):
    """The first expert is replaced by c: its part is that of an added c, the second's part stays."""
    bench = Bench(world.experts("bert"), tmp_path, router={"type": "projection"})
    replaced = editing.replace_expert(bench.artifact, bench.folder / "new", bench.newcomer("a"), progress=QUIET)
    without = editing.remove_expert(bench.artifact, "a", bench.folder / "less", progress=QUIET).folder
    added = editing.add_expert(without, bench.folder / "again", bench.newcomer("a"), progress=QUIET).folder
    assert_same(expert_part(replaced.folder, 0), expert_part(added, 1))
    assert_same(expert_part(replaced.folder, 1), expert_part(bench.artifact, 1))
    assert_same(expert_part(replaced.folder, 1), expert_part(added, 0))
    assert_same(backbone(replaced.folder), backbone(bench.artifact))
    bases = [files.tensors_of(folder)["router.basis"] for folder in (replaced.folder, added)]
    assert torch.equal(bases[0], bases[1].flip(0))
    assert replaced.labels == ["a/m", "a/n", "b/p", "b/q", "b/r"]
    assert load(replaced.folder).expert_names == ["a", "b"] and check_artifact(replaced.folder) == []


# ---- ranks, routers, labels -------------------------------------------------------------------------------------


def test_a_tensor_that_only_the_new_expert_changed_has_ranks_of_its_own(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path / "x")
    weight, bias = "bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.1.output.dense.bias"
    for name in ("a", "b"):
        files.edit_tensors(
            bench.folder / name,
            lambda tensors: tensors.update({k: torch.zeros_like(tensors[k]) for k in (weight, bias)}),
        )
    bench.artifact = build_artifact(bench.small, bench.folder / "equal", QUIET).folder
    assert weight not in files.read_json(bench.artifact / "config.json")["ranks"]
    more = bench.add().folder
    config, report = (files.read_json(more / name) for name in ("config.json", "report.json"))
    assert config["ranks"][weight] == [0, 0, 3] and bias in config["exact_deltas"]
    assert report["tensors"][weight]["ranks"] == [0, 0, 3] and report["tensors"][weight]["treatment"] == "factored"
    assert not files.tensors_of(more)[f"deltas.{bias.replace('.', '-')}.delta"][:2].any()
    back = editing.remove_expert(more, "c", bench.folder / "back", progress=QUIET).folder
    config, report = (files.read_json(back / name) for name in ("config.json", "report.json"))
    assert weight not in config["ranks"] and bias not in config["exact_deltas"]
    assert report["tensors"][weight] == {"treatment": "equal"}
    without_router = [
        {k: v for k, v in files.tensors_of(f).items() if not of_router(k)} for f in (bench.artifact, back)
    ]
    assert_same(*without_router)


@pytest.mark.parametrize("router", ["linear", "mlp", "projection"])
def test_removing_leaves_the_other_routing_logits_as_they_were(world, tmp_path, router):
    bench = Bench(world.experts("bert"), tmp_path, ("a", "b", "c"), router={"type": router})
    result = editing.remove_expert(bench.artifact, "b", bench.folder / "less", progress=QUIET)
    old, new, inputs = load(bench.artifact), load(result.folder), tiny.batch("bert", 6)
    with torch.no_grad():
        torch.testing.assert_close(new.routing_logits(**inputs), old.routing_logits(**inputs)[:, [0, 2]])
        weights = old.route(**inputs)[:, [0, 2]]
        if router != "projection":  # keeps one expert only
            torch.testing.assert_close(new.route(**inputs), weights / weights.sum(dim=1, keepdim=True))
    assert new.config.router_temperature == old.config.router_temperature
    assert result.moved == {"c/m": (5, 2), "c/n": (6, 3)} and result.labels == ["a/x", "a/y", "c/m", "c/n"]
    edit = result.report["edits"][-1]
    assert edit["labels"] == {
        "added": [],
        "removed": ["b/p", "b/q", "b/r"],
        "moved": {"c/m": [5, 2], "c/n": [6, 3]},
    }
    assert "stale" in result.report["verdict"] and "stale" in result.report["router"]


def test_added_labels_stand_at_the_end_and_old_ids_stay(bench):
    before = files.read_json(bench.artifact / "config.json")["label2id"]
    result = bench.add()
    after = files.read_json(result.folder / "config.json")["label2id"]
    assert {label: after[label] for label in before} == before and result.moved == {}
    assert {label: i for label, i in after.items() if label not in before} == {"c/m": 5, "c/n": 6}


def test_a_trained_router_is_that_of_a_build_with_the_same_shared_model(bench):
    """Trained on the same train rows of a model with the same shared tensors, the linear router has the same bytes."""
    more = bench.add()
    ready = bench.folder / "ready"
    shutil.copytree(bench.folder / "a", ready)
    kept = backbone(bench.artifact)
    files.edit_tensors(ready, lambda t: t.update({k: kept[f"shared.{k}"] for k in t if f"shared.{k}" in kept}))
    recipe = bench.recipe(("a", "b", "c"), "ready.yaml", shared_model="ready")
    built = build_artifact(recipe, bench.folder / "built", QUIET)
    assert_same(files.tensors_of(built.folder), files.tensors_of(more.folder))
    assert more.report["router"] == built.report["router"] and more.report["verdict"] == built.report["verdict"]
    assert more.report["data"] == built.report["data"] and more.report["tensors"] == built.report["tensors"]


def test_stored_paths_are_found_beside_the_artifact_and_else_asked_for(bench, tmp_path):
    result = bench.add(recipe=False)
    assert result.report["router"]["held_out_rows"] > 0 and result.drift is None
    lonely = tmp_path / "elsewhere" / "artifact"
    shutil.copytree(bench.artifact, lonely)
    with pytest.raises(TwinMergingError, match=r"rows of all experts.*give --recipe"):
        editing.add_expert(lonely, tmp_path / "out", bench.newcomer(), progress=QUIET)
    given = editing.add_expert(lonely, tmp_path / "out", bench.newcomer(), bench.all, QUIET)
    assert_same(files.tensors_of(given.folder), files.tensors_of(result.folder))
    with pytest.raises(TwinMergingError, match="give --data"):
        editing.add_expert(bench.artifact, tmp_path / "out2", bench.newcomer(data=False), progress=QUIET)


def test_the_recipe_of_an_edited_artifact_builds_its_experts(bench):
    result = bench.add()
    text = (result.folder / "recipe.yaml").read_text()
    assert "still the one merged from\n# a, b;" in text
    (bench.folder / "again.yaml").write_text(text)
    assert load_recipe(bench.folder / "again.yaml").names == ["a", "b", "c"]
    sources = files.read_json(result.folder / "config.json")["provenance"]["sources"]
    assert sources.keys() == {"base", "a", "b", "c"}
    less = editing.remove_expert(result.folder, "a", bench.folder / "less", progress=QUIET).folder
    provenance = files.read_json(less / "config.json")["provenance"]
    assert provenance["sources"].keys() == {"base", "b", "c"} and provenance["shared_experts"] == ["a", "b"]
    assert provenance["edits"] == [{"what": "add-expert", "name": "c"}, {"what": "remove-expert", "name": "a"}]


SAME = {"a": ["yes", "no"], "b": ["no", "yes"], "c": ["yes", "maybe"]}


def test_a_change_of_the_label_spaces_kind_is_refused_where_it_moves_old_ids(world, tmp_path):
    bench = Bench(world.experts("bert", SAME), tmp_path)
    with pytest.raises(TwinMergingError, match="from `same`.*to `union`.*'b' would get other ids"):
        bench.add(recipe=False)
    assert not (bench.folder / "more").exists()
    rows = [{"text": tiny.WORDS[i], "label": i % 2} for i in range(12)]
    files.write_rows(bench.folder / "c.jsonl", rows)
    assert bench.add(recipe=False, labels=("no", "yes")).labels == ["yes", "no"]


def test_one_expert_grows_to_a_union_and_back(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, ("a",))
    more = bench.add()
    assert more.labels == ["a/x", "a/y", "c/m", "c/n"]
    assert any("from `same` to `union`" in note for note in more.report["edits"][-1]["notes"])
    back = editing.remove_expert(more.folder, "c", bench.folder / "back", progress=QUIET)
    assert back.labels == ["x", "y"] and check_artifact(back.folder) == []


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_impossible_edits_are_refused_and_write_nothing(bench, tmp_path):
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.mkdir()
    wide = tiny.make_experts("bert", tmp_path / "wide", {"d": ["m", "n"]}, intermediate_size=48)
    shutil.copytree(bench.folder / "c", tmp_path / "bad")
    files.edit_tensors(tmp_path / "bad", lambda t: t["classifier.bias"].fill_(float("nan")))
    other = tiny.make_experts("distilbert", tmp_path / "other", {"d": ["m", "n"]})
    cases = [
        (lambda: editing.remove_expert(bench.artifact, "z", out, progress=QUIET), "no expert 'z'; it has a, b"),
        (lambda: editing.replace_expert(bench.artifact, out, bench.newcomer("z"), progress=QUIET), "no expert 'z'"),
        (lambda: editing.add_expert(bench.artifact, out, bench.newcomer("B"), progress=QUIET), "already"),
        (lambda: editing.add_expert(bench.artifact, out, bench.newcomer("all"), progress=QUIET), "reserved"),
        (lambda: editing.remove_expert(bench.artifact, "a", taken, progress=QUIET), "exists already"),
        (lambda: bench.add(labels=("m",)), "its head has 2"),
        (lambda: editing.remove_expert(bench.folder / "a", "a", out, progress=QUIET), "not an artifact"),
    ]
    for folder, reason in (
        (wide / "d", "all must be fine-tuned from one base model"),
        (tmp_path / "bad", "NaN"),
        (other / "d", "all experts must be of one class"),
    ):
        newcomer = Newcomer("d", str(folder), bench.folder / "c.jsonl")
        cases.append((lambda n=newcomer: editing.add_expert(bench.artifact, out, n, progress=QUIET), reason))
    for action, reason in cases:
        with pytest.raises(TwinMergingError, match=reason):
            action()
    assert not out.exists() and not list(taken.iterdir())


def test_the_last_expert_stays(world, tmp_path):
    bench = Bench(world.experts("bert"), tmp_path, ("a",))
    with pytest.raises(TwinMergingError, match="only expert"):
        editing.remove_expert(bench.artifact, "a", tmp_path / "out", progress=QUIET)


# ---- the command ------------------------------------------------------------------------------------------------


def call(*args, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_the_commands(bench, tmp_path):
    folder = bench.folder
    options = ["--model", folder / "c", "--data", folder / "c.jsonl", "--recipe", bench.all, "-q"]
    text = call("add-expert", bench.artifact, tmp_path / "more", "--name", "c", "--labels", "n, m", *options)
    assert "5 c/n" in text and "full rebuild" in text and "router accuracy" in text
    text = call("remove-expert", tmp_path / "more", "b", tmp_path / "less", "-q")
    assert "moved: c/n was 5 and is 2" in text and "no --recipe" in text
    text = call("replace-expert", tmp_path / "more", "a", tmp_path / "other", *options)
    assert "0 a/m" in text and "1 a/n" in text
    for name in ("more", "less", "other"):
        assert "is whole" in call("check", tmp_path / name)
        assert json.loads(call("inspect", tmp_path / name, "--json"))["provenance"]["edits"]
    assert "no expert 'z'" in call("remove-expert", tmp_path / "more", "z", tmp_path / "no", code=2)
