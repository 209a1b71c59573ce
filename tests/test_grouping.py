"""Groups of rows that share one merged model: what a group is, and that the merge is the answer of the factors."""

import copy

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from tests import files, tiny
from twin_merging_hf import TwinMergingError, grouping
from twin_merging_hf.data import read_rows
from twin_merging_hf.processing import load_processing


@pytest.fixture
def rows(world, kind):
    folder = world.experts(kind)
    media = "image" if kind == "vit" else "text"
    return [
        row
        for name, labels in tiny.LABELS.items()
        for row in read_rows(folder / f"{name}.jsonl", media, labels, False)[:6]
    ]


@pytest.fixture
def processing(artifact, kind):
    return load_processing(artifact, "image" if kind == "vit" else "text", "artifact")


def random_weights(rows: int, experts: int, seed: int = 0) -> torch.Tensor:
    logits = 3 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(dim=1)


# ---- groups -----------------------------------------------------------------------------------------------------


def test_enough_groups_leave_every_row_its_own_weights():
    weights = random_weights(9, 3)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 3, 3])]
    for count in (9, 10, 100):
        group_of, centres = grouping.group_weights(weights, count)
        assert len(centres) == 9 and torch.equal(centres[group_of], weights)
    group_of, centres = grouping.group_weights(weights, 8)
    assert len(centres) == 8 and not torch.equal(centres[group_of], weights)


def test_one_group_is_the_mean_of_all_rows_and_repeats_count():
    weights = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    group_of, centres = grouping.group_weights(weights, 1)
    assert group_of.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(centres, torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("count", [3, 5, 11])
def test_groups_stay_in_their_bin_and_their_centres_are_means(count):
    weights = random_weights(60, 3)
    group_of, centres = grouping.group_weights(weights, count, seed=1)
    assert len(centres) == count and sorted(group_of.unique().tolist()) == list(range(count))
    for group in range(count):
        members = weights[group_of == group]
        assert len(members.argmax(dim=1).unique()) == 1
        torch.testing.assert_close(centres[group], members.mean(dim=0))


def test_fewer_groups_than_bins_mix_bins():
    weights = torch.eye(3).repeat(4, 1) * 0.9 + 0.1 / 3
    group_of, centres = grouping.group_weights(weights, 2)
    assert len(centres) == 2 and len(grouping.group_weights(weights, 3)[1]) == 3
    assert (
        len(weights[group_of == group_of[0]].argmax(dim=1).unique())
        + len(weights[group_of != group_of[0]].argmax(dim=1).unique())
        == 3
    )


def test_more_groups_are_closer_to_the_rows():
    weights = random_weights(80, 4)
    errors = []
    for count in (1, 4, 8, 16, 32, 80):
        group_of, centres = grouping.group_weights(weights, count)
        errors.append(float((centres[group_of] - weights).pow(2).sum()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[3] and errors[-1] == 0


def test_grouping_is_reproducible_and_does_not_depend_on_the_order_of_rows():
    weights, order = random_weights(50, 3), torch.randperm(50, generator=torch.Generator().manual_seed(7))
    group_of, centres = grouping.group_weights(weights, 7, seed=3)
    again, same = grouping.group_weights(weights[order], 7, seed=3)
    assert torch.equal(centres, same) and torch.equal(group_of[order], again)


@pytest.mark.parametrize(("weights", "count"), [(torch.zeros(0, 3), 1), (torch.ones(2, 1), 0)])
def test_impossible_groups_are_refused(weights, count):
    with pytest.raises(TwinMergingError, match="at least one"):
        grouping.group_weights(weights, count)


# ---- merged models ----------------------------------------------------------------------------------------------


def test_a_merged_model_is_the_dense_sum_of_checkpoints(world, kind):
    """Weights 0.3, 0.5, 0.2 on full-rank deltas: shared + sum w (expert - shared), from the checkpoints' own tensors."""
    model, weights = world.model(kind), torch.tensor([0.3, 0.5, 0.2])
    merged = grouping.MergedModel(model)
    merged.become(weights)
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    experts = [auto.from_pretrained(world.experts(kind) / name).state_dict() for name in tiny.LABELS]
    heads = tuple(f"{name}." for name in model.config.head_modules)
    compared = 0
    for name, parameter in merged.stock.named_parameters():
        if name.startswith(heads):
            continue
        expected = sum(w * expert[name] for w, expert in zip(weights, experts, strict=True))
        torch.testing.assert_close(parameter, expected, atol=1e-5, rtol=0)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_merge_for_each_group_answers_as_the_factors(world, kind, rows, processing, count):
    model = world.model(kind)
    before = copy.deepcopy(model.state_dict())
    merged = grouping.answer_in_groups(model, rows, processing, count)
    factored = grouping.answer_in_groups(model, rows, processing, count, merge=False)
    assert torch.equal(merged.groups, factored.groups) and merged.centres.shape == (count, 3)
    assert torch.equal(merged.expert_weights, merged.centres[merged.groups])
    torch.testing.assert_close(merged.expert_logits, factored.expert_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.logits, factored.logits, atol=1e-4, rtol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("form", [{"dtype": "int8"}, {"dtype": "int4"}, {"method": "magnitude", "ratio": 0.2}])
@pytest.mark.parametrize("weights", [[0.3, 0.5, 0.2], [0.0, 1.0, 0.0]])
def test_a_merge_of_packed_and_sparse_deltas_answers_as_the_artifact(world, form, weights):
    form = form if "method" in form else {"rank": 4, **form}
    model, inputs, row = world.model("bert", exclusive=form), tiny.batch("bert", 4), torch.tensor(weights)
    merged = grouping.MergedModel(model)
    merged.become(torch.tensor([1.0, 0.0, 0.0]))  # nothing of an earlier merge may stay
    merged.become(row)
    with torch.no_grad():
        expected = model(**inputs, expert_weights=row[None])
        logits, expert_logits = merged.answer(inputs, row)
    torch.testing.assert_close(expert_logits, expected.expert_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-5)


def test_as_many_groups_as_rows_change_no_answer_and_one_group_does(world, kind, rows, processing):
    model = world.model(kind)
    inputs = processing.inputs(rows)
    with torch.no_grad():
        routed = model(**inputs)
    alone = grouping.answer_in_groups(model, rows, processing, len(rows))
    torch.testing.assert_close(alone.expert_weights, routed.expert_weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.expert_logits, routed.expert_logits, atol=1e-4, rtol=0)
    together = grouping.answer_in_groups(model, rows, processing, 1)
    assert (together.expert_logits - routed.expert_logits).abs().max() > 1e-2


def test_rows_padded_on_the_left_get_the_same_answers(world, rows, processing, kind):
    if kind == "vit":
        pytest.skip("pictures have no padding")
    model = world.model(kind)
    right = grouping.answer_in_groups(model, rows, processing, 3)
    processing.processor.padding_side = "left"
    left = grouping.answer_in_groups(model, rows, processing, 3)
    torch.testing.assert_close(left.expert_logits, right.expert_logits, atol=1e-4, rtol=0)


def test_the_curve_ends_where_it_began(world, kind, rows, processing):
    model = world.model(kind)
    counts = [6] * len(tiny.LABELS)
    labels = [
        model.label_space.columns(t)[rows[6 * t + i]["label"]] for t, count in enumerate(counts) for i in range(count)
    ]
    points = grouping.curve(model, rows, processing, groups=(1, 3, len(rows)), labels=labels)
    assert [point.groups for point in points] == [None, 1, 3, len(rows)]
    assert points[0].agreement == points[-1].agreement == 1.0 and points[0].score == points[-1].score
    assert points[1].used == 1 and all(point.seconds > 0 for point in points)
    with torch.no_grad():
        chosen = model(**processing.inputs(rows)).logits.argmax(dim=1)
    assert points[0].score == pytest.approx(float((chosen == torch.tensor(labels)).float().mean()))
    with pytest.raises(TwinMergingError, match="labels for"):
        grouping.curve(model, rows, processing, labels=labels[1:])


def test_numbers_are_compared_by_correlation(world):
    labels = {"a": ["score"], "b": ["stars"]}
    model, folder = world.model("bert", labels), world.experts("bert", labels)
    rows = read_rows(folder / "a.jsonl", "text", ["score"], True)
    processing = load_processing(world.artifact("bert", labels), "text", "artifact")
    points = grouping.curve(model, rows, processing, groups=(len(rows),))
    assert points[1].agreement == pytest.approx(1.0, abs=1e-4) and points[1].score is None
    with pytest.raises(TwinMergingError, match="classes"):
        grouping.curve(model, rows, processing, labels=[0] * len(rows))


def test_offloaded_weights_are_refused(world):
    model = world.model("bert")
    model.shared.to("meta")
    with pytest.raises(TwinMergingError, match="offloaded"):
        grouping.MergedModel(model)


def test_the_folder_of_the_artifact_is_not_touched(world, artifact, kind, rows, processing):
    before = files.listing(artifact)
    grouping.answer_in_groups(world.model(kind), rows, processing, 2)
    assert files.listing(artifact) == before
