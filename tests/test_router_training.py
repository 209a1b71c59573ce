"""Routers: what training finds, what temperature does, and that test rows are never looked at."""

import pytest
import torch
from torch import nn

from tests import files, tiny
from twin_merging_hf import TwinMergingError
from twin_merging_hf.build_router import readers_of_layer
from twin_merging_hf.builder import Progress, build_artifact
from twin_merging_hf.checkpoints import open_checkpoint
from twin_merging_hf.modeling.routing_twin_merging import LinearRouter, MLPRouter, ProjectionRouter
from twin_merging_hf.recipe import RouterSettings
from twin_merging_hf.router_training import (
    RouterData,
    router_report,
    subspace,
    train_router,
)
from twin_merging_hf.temperature import fit_temperature


HIDDEN, EXPERTS = 8, 3


def clusters(distance: float, rows: int = 60, seed: int = 0, counts=(1, 1, 1)) -> RouterData:
    """Features of three experts around three centres that far apart; `counts` scales each one's training rows."""
    rng = torch.Generator().manual_seed(seed)
    centres = distance * torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=rng)).Q[:EXPERTS]

    def draw(expert: int, n: int) -> torch.Tensor:
        return centres[expert] + torch.randn(n, HIDDEN, generator=rng)

    train = [draw(t, rows * counts[t]) for t in range(EXPERTS)]
    held_out = [draw(t, rows) for t in range(EXPERTS)]
    return RouterData(
        torch.cat(train),
        torch.cat([torch.full((len(part),), t) for t, part in enumerate(train)]),
        torch.cat(held_out),
        torch.arange(EXPERTS).repeat_interleave(rows),
    )


def trained(kind: type, data: RouterData, epochs: int = 10, lr: float = 5e-3, seed: int = 0) -> nn.Module:
    router = kind(HIDDEN, EXPERTS)
    train_router(router, data, RouterSettings(epochs=epochs, lr=lr), seed)
    return router.eval()


def report_of(router: nn.Module, data: RouterData, temperature: float | None = None):
    return router_report(router, data, "linear", temperature)


# ---- linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LinearRouter, MLPRouter])
def test_separable_data_is_separated_and_noise_is_not(kind):
    assert report_of(trained(kind, clusters(20.0)), clusters(20.0)).accuracy == 1.0
    assert report_of(trained(kind, clusters(0.0)), clusters(0.0)).accuracy < 0.5


def test_a_linear_router_does_not_care_how_features_are_scaled():
    data = clusters(3.0)
    scale, shift = torch.logspace(-3, 3, HIDDEN), torch.linspace(-50, 50, HIDDEN)
    moved = RouterData(
        data.train * scale + shift, data.train_experts, data.held_out * scale + shift, data.held_out_experts
    )
    plain = trained(LinearRouter, data).score(data.held_out)
    torch.testing.assert_close(trained(LinearRouter, moved).score(moved.held_out), plain, rtol=0, atol=0.05)


def test_a_linear_router_is_where_its_loss_is_lowest():
    data = clusters(2.0)
    router = trained(LinearRouter, data)

    def loss() -> float:
        return nn.functional.cross_entropy(router.score(data.train), data.train_experts).item()

    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        best = loss()
        for _ in range(10):
            weight = router.classifier.weight.clone()
            router.classifier.weight += 0.5 * torch.randn(weight.shape, generator=rng)
            assert loss() > best
            router.classifier.weight.copy_(weight)


def test_an_expert_with_more_rows_gets_no_bonus():
    even, skewed = clusters(1.5), clusters(1.5, counts=(20, 1, 1))
    share = [report_of(trained(LinearRouter, data), clusters(1.5)).confusion for data in (even, skewed)]
    taken = [sum(row[0] for row in confusion) for confusion in share]
    assert taken[1] < 1.5 * taken[0]


def test_a_feature_that_never_changes_does_no_harm():
    data = clusters(20.0)
    for part in (data.train, data.held_out):
        part[:, 0] = 7.0
    router = trained(LinearRouter, data)
    assert torch.isfinite(router.score(data.held_out)).all() and report_of(router, data).accuracy == 1.0


# ---- mlp --------------------------------------------------------------------------------------------------------


def test_the_mlp_keeps_the_epoch_that_does_best_on_held_out_rows():
    """Labels of the training rows are wrong, so that every further epoch makes held-out rows worse."""
    data = clusters(6.0)
    wrong = RouterData(data.train, (data.train_experts + 1) % EXPERTS, data.held_out, data.held_out_experts)
    said: list[str] = []
    router = MLPRouter(HIDDEN, EXPERTS)
    train_router(router, wrong, RouterSettings(epochs=6, lr=5e-3), 0, said.append)
    losses = [float(line.rsplit(" ", 1)[1]) for line in said]
    assert len(losses) == 6 and losses[-1] > min(losses)
    kept = report_of(router.eval(), wrong, temperature=1.0).negative_log_likelihood
    assert kept == pytest.approx(min(losses), abs=1e-3)


def test_the_mlp_gets_better_by_training():
    data, said = clusters(3.0), []
    train_router(MLPRouter(HIDDEN, EXPERTS), data, RouterSettings(epochs=12, lr=2e-2), 0, said.append)
    losses = [float(line.rsplit(" ", 1)[1]) for line in said]
    assert min(losses) < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore")
def test_an_mlp_that_diverges_says_so():
    data = clusters(3.0)
    data.train[:] = float("inf")
    data.held_out[:] = float("inf")
    with pytest.raises(TwinMergingError, match=r"not finite; lower `router.lr`"):
        trained(MLPRouter, data)


@pytest.mark.parametrize("rows", [1, 64 // 3 + 1, 65])
def test_any_number_of_rows_trains(rows):
    """65 rows leave a last batch of one, of which there is no variance."""
    data = clusters(20.0, rows=65)
    some = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: max(2, rows)]
    fewer = RouterData(data.train[some], data.train_experts[some], data.held_out, data.held_out_experts)
    for kind in (LinearRouter, MLPRouter):
        assert torch.isfinite(trained(kind, fewer, epochs=1).score(data.held_out)).all()


@pytest.mark.parametrize("kind", [LinearRouter, MLPRouter])
def test_training_depends_on_the_seed_alone(kind):
    data = clusters(3.0)
    torch.manual_seed(1)
    first = trained(kind, data, epochs=2)
    torch.manual_seed(2)
    again = trained(kind, data, epochs=2)
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    if kind is MLPRouter:
        other = trained(kind, data, epochs=2, seed=1)
        assert not torch.equal(first.network[0].weight, other.network[0].weight)


# ---- temperature and report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.05, 1.0, 5.0, 30.0])
def test_temperature_lowers_the_loss_and_undoes_a_scale(factor):
    rng = torch.Generator().manual_seed(0)
    calibrated = 2 * torch.randn(2000, EXPERTS, generator=rng)
    experts = torch.multinomial(calibrated.softmax(-1), 1, generator=rng)[:, 0]
    logits = factor * calibrated
    temperature = fit_temperature(logits, experts)
    cost = nn.functional.cross_entropy
    assert cost(logits / temperature, experts) <= cost(logits, experts)
    assert min(max(factor, 0.0317), 10.0) == pytest.approx(temperature, rel=0.15)


def test_a_given_temperature_is_kept():
    data = clusters(3.0)
    router = trained(LinearRouter, data)
    assert report_of(router, data, 4.0).temperature == 4.0
    fitted = report_of(router, data)
    assert fitted.negative_log_likelihood <= report_of(router, data, 1.0).negative_log_likelihood


def test_the_report_counts_held_out_rows():
    data = clusters(2.0)
    router = trained(LinearRouter, data)
    report = report_of(router, data)
    chosen = router.score(data.held_out).argmax(1)
    assert report.held_out_rows == len(data.held_out) == sum(map(sum, report.confusion))
    for i in range(EXPERTS):
        for j in range(EXPERTS):
            assert report.confusion[i][j] == int(((data.held_out_experts == i) & (chosen == j)).sum())
    diagonal = sum(report.confusion[i][i] for i in range(EXPERTS))
    assert report.accuracy == pytest.approx(diagonal / report.held_out_rows)


# ---- projection -------------------------------------------------------------------------------------------------


def test_a_subspace_is_orthonormal_and_the_planted_one():
    rng = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(20, 20, generator=rng)).Q[:3]
    matrices = [torch.randn(10, 3, generator=rng) @ planted + 1e-3 * torch.randn(10, 20, generator=rng) for _ in "qkv"]
    basis = subspace(matrices, 3, "x")
    torch.testing.assert_close(basis @ basis.T, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis.T @ basis, planted.T @ planted, rtol=0, atol=1e-2)


def test_missing_directions_are_zero():
    rng = torch.Generator().manual_seed(0)
    basis = subspace([torch.randn(10, 2, generator=rng) @ torch.randn(2, 20, generator=rng)], 5, "x")
    assert basis.shape == (5, 20) and not basis[2:].any()
    torch.testing.assert_close(basis[:2] @ basis[:2].T, torch.eye(2), rtol=0, atol=1e-5)
    assert not subspace([torch.zeros(4, 20)], 5, "x").any()


def test_a_projection_router_knows_states_of_planted_subspaces():
    rng = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(24, 24, generator=rng)).Q
    bases = [frame[t * 4 : t * 4 + 4] for t in range(EXPERTS)]
    router = ProjectionRouter(24, EXPERTS, 4)
    with torch.no_grad():
        router.basis.copy_(torch.stack(bases))
    for t, basis in enumerate(bases):
        states = torch.randn(40, 6, 4, generator=rng) @ basis + 0.1 * torch.randn(40, 6, 24, generator=rng)
        scores = router(states, None)
        assert (scores.argmax(1) == t).all() and (scores >= 0).all() and (scores.sum(1) <= 1 + 1e-5).all()


def test_the_readers_of_a_layer_are_query_key_and_value(world, kind):
    checkpoint = open_checkpoint("a", world.experts(kind), "expert 'a'")
    readers = readers_of_layer(checkpoint, f"{checkpoint.layers_path}.1")
    assert len(readers) == 3
    modules = [checkpoint.skeleton.get_submodule(name) for name in readers]
    assert all(module.in_features == module.out_features == tiny.HIDDEN for module in modules)


def test_a_built_projection_router_holds_the_subspaces_of_what_experts_changed(world):
    model = world.model("bert", router={"type": "projection", "rank": 4, "layer": 1}, data=False)
    folder = world.experts("bert")
    base = files.tensors_of(folder / "base")
    for t, name in enumerate("abc"):
        expert = files.tensors_of(folder / name)
        keys = [f"bert.encoder.layer.1.attention.self.{part}.weight" for part in ("query", "key", "value")]
        changed = torch.cat([expert[key] - base[key] for key in keys])
        vh = torch.linalg.svd(changed, full_matrices=False).Vh[:4]
        basis = model.router.basis[t].detach()
        torch.testing.assert_close(basis.T @ basis, vh.T @ vh, rtol=0, atol=1e-4)


# ---- what a build looks at --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["deleted", "garbage"])
def test_test_files_are_never_read(world, tmp_path, damage):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    if damage == "garbage":
        (folder / "test.jsonl").write_bytes(b"\xff\x00 not rows")
    experts = {name: {"data": {"train": f"{name}.jsonl", "test": "test.jsonl"}} for name in "ab"}
    recipe = tiny.write_recipe(folder, ("a", "b"), experts=experts)
    report = build_artifact(recipe, tmp_path / "out", Progress(quiet=True)).report
    assert report["router"]["held_out_rows"] > 0


def test_given_validation_rows_are_the_held_out_ones(world, tmp_path):
    folder = files.copy_inputs(world.experts("bert"), tmp_path / "in")
    for name in "ab":
        rows = [{"text": f"w{i} w{i + 1}", "label": i % 2} for i in range(7)]
        files.write_rows(folder / f"{name}-held.jsonl", rows)
    experts = {name: {"data": {"train": f"{name}.jsonl", "validation": f"{name}-held.jsonl"}} for name in "ab"}
    recipe = tiny.write_recipe(folder, ("a", "b"), experts=experts)
    report = build_artifact(recipe, tmp_path / "out", Progress(quiet=True)).report
    assert [entry["held_out"]["rows"] for entry in report["data"].values()] == [7, 7]
    assert [entry["train"]["rows"] for entry in report["data"].values()] == [20, 20]
    assert report["router"]["held_out_rows"] == 14 and report["verdict"]["rows"] == {"a": 7, "b": 7}
