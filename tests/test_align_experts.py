"""Experts of different initialisation in a build, in `twin-merging align`, and what both say about them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from tests import tiny
from tests.conftest import load
from twin_merging_hf.align_experts import align_inputs
from twin_merging_hf.alignment import Permutation, layout_of
from twin_merging_hf.builder import build_artifact, plan_build
from twin_merging_hf.cli import app
from twin_merging_hf.editing import Newcomer, add_expert
from twin_merging_hf.evaluation import static_merge
from twin_merging_hf.initialisation import cosines
from twin_merging_hf.preflight import preflight
from twin_merging_hf.progress import Progress
from twin_merging_hf.recipe import load_recipe


QUIET = Progress(quiet=True)
_SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Experts a, b, c of one base, of which b and c stand in another order of units: strangers to look at."""
    folder = tiny.make_experts("bert", tmp_path_factory.mktemp("strangers") / "bert", std=0.003, **_SMALL)
    for seed, name in ((1, "b"), (2, "c")):
        model = AutoModelForSequenceClassification.from_pretrained(folder / name)
        Permutation.random(layout_of(model), seed).apply(model)
        model.save_pretrained(folder / name)
    return folder


def _recipe(folder, file="recipe.yaml", **overrides):
    return tiny.write_recipe(folder, file=file, **{"base_model": None, "alignment": "auto", **overrides})


@pytest.fixture(scope="module")
def built(strangers):
    recipe = _recipe(strangers, exclusive={"rank": 4})
    return build_artifact(recipe, strangers / "aligned", QUIET)


def test_aligned_experts_build_like_any_others_and_say_so(built):
    report = built.report
    assert report["alignment"]["reference"] == "a" and set(report["alignment"]["experts"]) == {"b", "c"}
    assert report["alignment"]["calibration_rows"] > 0
    assert sum("different initialisations" in note and "aligned" in note for note in report["notes"]) >= 2
    for found in report["alignment"]["experts"].values():
        assert found["objective"] > 0.9 > found["identity_objective"] and found["moved"] > 0.5
    assert json.loads((built.folder / "report.json").read_text())["alignment"] == report["alignment"]


def test_the_same_bytes_keep_far_more_of_aligned_experts(built, strangers):
    recipe = _recipe(strangers, "plain.yaml", alignment="none", exclusive={"rank": 4})
    plain = build_artifact(recipe, strangers / "plain", QUIET).report
    assert plain["storage"]["deltas"] == built.report["storage"]["deltas"]
    assert built.report["exclusive"]["relative_error"] < plain["exclusive"]["relative_error"]
    hints = [note for note in plain["notes"] if "different initialisations" in note]
    assert hints and all("`alignment: auto`" in note for note in hints)
    assert "alignment" not in plain


def test_every_expert_answers_as_itself_at_full_rank(strangers):
    recipe = _recipe(strangers, "full.yaml", exclusive={"rank": tiny.FULL_RANK})
    model = load(build_artifact(recipe, strangers / "full", QUIET).folder)
    batch = tiny.text_batch(4)
    for index, name in enumerate(model.expert_names):
        expert = AutoModelForSequenceClassification.from_pretrained(strangers / name).eval()
        with torch.no_grad():
            found = model(**batch, experts=name).expert_logits[:, model.label_space.columns(index)]
            torch.testing.assert_close(found, expert(**batch).logits, rtol=1e-4, atol=1e-4)


def test_auto_leaves_relatives_alone(tmp_path):
    folder = tiny.make_experts("bert", tmp_path / "bert", std=0.003, **_SMALL)
    inputs = preflight(load_recipe(_recipe(folder)))
    aligned = align_inputs(inputs, QUIET)
    assert aligned.experts is inputs.experts and aligned.alignment is None
    assert any("of one initialisation" in note for note in aligned.notes)
    assert all(value > 0.9 for value in cosines(inputs.experts).values())


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"weight_share": 1, "reference": "b", "max_sweeps": 3, "seed": 5}, 48),
        ({"calibration": 0, "max_sweeps": 2}, 0),
        ({"calibration": "unlabelled.jsonl"}, 5),
        ({"weight_share": "search", "max_sweeps": 1}, 48),
    ],
)
def test_settings_are_followed(strangers, settings, rows):
    lines = [json.dumps({"text": f"w{i} w{i + 1} w{2 * i}"}) for i in range(5)]
    (strangers / "unlabelled.jsonl").write_text("\n".join(lines))
    inputs = preflight(load_recipe(_recipe(strangers, "settings.yaml", alignment=settings)))
    aligned = align_inputs(inputs, QUIET)
    report = aligned.alignment
    assert report["calibration_rows"] == rows
    assert report["reference"] == settings.get("reference", "a") and report["reference"] not in report["experts"]
    if rows == 0:
        assert any("by weights alone" in note for note in aligned.notes)
        assert all(found["weight_share"] == 1.0 for found in report["experts"].values())
    if settings.get("weight_share") == "search":
        assert set(report["search"]) == {"0", "0.25", "0.5", "0.75", "1"}
        best = max(report["search"].values())
        shares = {f"{found['weight_share']:g}" for found in report["experts"].values()}
        assert any(report["search"][share] == best for share in shares)
    name = "bert.encoder.layer.1.output.dense.weight"
    tensors = [checkpoint.tensor(name) for checkpoint in aligned.experts]
    assert all(torch.nn.functional.cosine_similarity(t.flatten(), tensors[0].flatten(), dim=0) > 0.8 for t in tensors)


def test_a_dry_run_says_that_experts_will_be_aligned(strangers):
    notes = plan_build(_recipe(strangers, "dry.yaml"), strangers / "dry").notes
    assert sum("so they are aligned first" in note for note in notes) >= 2


def test_a_base_is_left_aside_by_linear(strangers):
    inputs = preflight(load_recipe(_recipe(strangers, "based.yaml", base_model="base")))
    aligned = align_inputs(inputs, QUIET)
    assert aligned.base is None and any("base model was left aside" in note for note in aligned.notes)


def test_an_architecture_without_known_symmetries_is_refused(tmp_path):
    folder = tiny.make_experts("electra", tmp_path / "electra", {"a": ["x", "y"], "b": ["p", "q"]}, rows=0)
    recipe = tiny.write_recipe(folder, ["a", "b"], data=False, base_model=None, alignment="mudsc")
    with pytest.raises(ValueError, match="'electra' cannot be aligned.*register_spec"):
        align_inputs(preflight(load_recipe(recipe)), QUIET)


def test_init_sees_strangers_and_writes_a_recipe_that_aligns_them(strangers):
    recipe = strangers / "init.yaml"
    result = CliRunner().invoke(app, ["init", str(strangers / "a"), str(strangers / "b"), "-o", str(recipe)])
    assert result.exit_code == 0, result.output
    text = recipe.read_text()
    assert "# expert 'a' and expert 'b' look like different initialisations" in text
    assert load_recipe(recipe).alignment.method == "auto"


def test_a_stranger_that_joins_is_aligned_with_the_shared_model(strangers):
    recipe = tiny.write_recipe(
        strangers, ["a", "b"], file="two.yaml", base_model=None, alignment="auto", exclusive={"rank": tiny.FULL_RANK}
    )
    artifact = build_artifact(recipe, strangers / "two", QUIET).folder
    newcomer = Newcomer("c", str(strangers / "c"), strangers / "c.jsonl", None)
    result = add_expert(artifact, strangers / "three", newcomer, progress=QUIET)
    assert any("expert 'c' was aligned with the shared model" in note for note in result.report["edits"][-1]["notes"])
    model, batch = load(strangers / "three"), tiny.text_batch(4)
    expert = AutoModelForSequenceClassification.from_pretrained(strangers / "c").eval()
    with torch.no_grad():
        found = model(**batch, experts="c").expert_logits[:, model.label_space.columns(2)]
        torch.testing.assert_close(found, expert(**batch).logits, rtol=1e-4, atol=1e-4)
        # It is close to the others now: their mean serves it, too.
        shared = model(**batch, experts="__shared__").expert_logits[:, model.label_space.columns(2)]
    assert float((shared - found).abs().max()) < 0.5 * float(found.abs().max())


def test_static_merges_are_of_aligned_experts_under_aligned_heads(strangers):
    inputs = preflight(load_recipe(_recipe(strangers)))
    merged = static_merge(align_inputs(inputs, QUIET), 1, "linear")
    expert = AutoModelForSequenceClassification.from_pretrained(strangers / "b").eval()
    batch = tiny.text_batch(4)
    with torch.no_grad():
        expected = expert(**batch).logits
        # All three are one function but for noise, so their mean is, too: as found, not as they stand.
        aligned, plain = (m(**batch).logits - expected for m in (merged, static_merge(inputs, 1, "linear")))
    assert float(aligned.abs().max()) < 0.3 * float(plain.abs().max())


# ---- twin-merging align ---------------------------------------------------------------------------------------------


def test_align_writes_the_same_experts_in_one_order(strangers):
    out = strangers / "out"
    result = CliRunner().invoke(app, ["align", str(_recipe(strangers)), str(out), "-q"])
    assert result.exit_code == 0, result.output
    assert "reference: a" in result.output and "similarity of matched units" in result.output
    report = json.loads((out / "alignment.json").read_text())
    assert set(report["experts"]) == {"b", "c"} and (out / "alignment.png").is_file()
    batch, vectors = tiny.text_batch(4), []
    for name in tiny.LABELS:
        model, info = AutoModelForSequenceClassification.from_pretrained(out / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expert = AutoModelForSequenceClassification.from_pretrained(strangers / name).eval()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).logits, expert(**batch).logits, rtol=1e-5, atol=1e-5)
        assert model.config.to_dict() == expert.config.to_dict() | {"_name_or_path": str(out / name)} or (
            type(model) is type(expert)
        )
        assert (out / name / "tokenizer.json").is_file()
        vectors.append(model.bert.encoder.layer[0].output.dense.weight.detach().flatten())
    assert torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0) > 0.8


@pytest.mark.parametrize("heads", ["keep", "average"])
def test_align_in_mode_zip_writes_one_checkpoint_with_its_matrices(strangers, heads):
    names = ["a", "b"] if heads == "keep" else ["a", "c"]  # a and c have two labels each
    recipe = tiny.write_recipe(strangers, names, file=f"zip-{heads}.yaml", base_model=None)
    out = strangers / f"zip-{heads}"
    result = CliRunner().invoke(app, ["align", str(recipe), str(out), "--mode", "zip", "--heads", heads, "-q"])
    assert result.exit_code == 0, result.output
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    matrices = load_file(out / "zip.safetensors")
    assert matrices["a.ff.0"].shape == (64, 64) and matrices[f"{names[1]}.vo.1"].shape == (4, 8, 8)
    assert (matrices["a.ff.0"].sum(1) == 1).all()
    report = json.loads((out / "alignment.json").read_text())
    assert {"ff.0", "ff.1", "vo.0", "vo.1", "pool"} == set(report["zipped_sites"])
    if heads == "average":
        assert not (out / "heads").exists()
        return
    # Each expert's own head on the merged backbone: b is a copy of a's function but for noise, so it still does its task.
    batch = tiny.text_batch(8)
    expert = AutoModelForSequenceClassification.from_pretrained(strangers / "b").eval()
    head = load_file(out / "heads" / "b.safetensors")
    with torch.no_grad():
        pooled = model.eval().bert(**batch).pooler_output
        found = pooled @ head["classifier.weight"].T + head["classifier.bias"]
        expected = expert(**batch).logits
    assert float((found - expected).abs().max()) < 0.5 * float(expected.abs().max())


def test_what_cannot_be_aligned_leaves_nothing_behind(strangers):
    out = strangers / "nothing"
    result = CliRunner().invoke(app, ["align", str(_recipe(strangers)), str(out), "--mode", "weld"])
    assert result.exit_code == 2 and "must be align or zip" in result.output
    recipe = tiny.write_recipe(strangers, ["a", "b"], file="labels.yaml", base_model=None)
    result = CliRunner().invoke(app, ["align", str(recipe), str(out), "--mode", "zip", "--heads", "average", "-q"])
    assert result.exit_code == 2 and "keep them per task" in result.output
    assert not out.exists()
