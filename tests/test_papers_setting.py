"""The setting of arXiv 2406.15479 as one recipe, against a dense recomputation from the checkpoints alone."""

import pytest
import torch
from torch.func import functional_call

from tests import files, tiny
from tests.conftest import load
from tests.modeling.dense import EXPERTS, assert_close, columns, row, stock
from twin_merging_hf.builder import Progress, build_artifact


# Section 4 and the authors' code: task arithmetic, a tenth of full rank, no biases, an MLP on the last layer, softmax at 1.
SCALING, RATIO = 0.3, 0.1
PAPER = {
    "merge_method": "task_arithmetic",
    "parameters": {"lambda": SCALING},
    "exclusive": {"ratio": RATIO},
    "exclude": [".*bias.*"],
    "router": {"type": "mlp", "pass": "full", "temperature": 1.0, "epochs": 40, "lr": 5e-3},  # longer: few rows here
}
# Wide enough for a tenth of full rank to be more than one direction.
WIDE = {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The folder of experts, and the artifact's model."""
    folder = tiny.make_experts("bert", tmp_path_factory.mktemp("paper"), **WIDE)
    recipe = tiny.write_recipe(folder, **PAPER)
    return folder, load(build_artifact(recipe, folder / "artifact", Progress(quiet=True)).folder)


@pytest.fixture(scope="module")
def shared(paper):
    """theta_0 + 0.3 sum_t (theta_t - theta_0), by names in the task model."""
    base, *experts = (files.tensors_of(paper[0] / name) for name in ("base", *EXPERTS))
    names = [name for name in base if not name.startswith("classifier.")]
    return {name: base[name] + SCALING * sum(expert[name] - base[name] for expert in experts) for name in names}


@pytest.fixture(scope="module")
def deltas(paper, shared):
    """For each expert, what is added for it: SVD of theta_t - theta_s; vectors whole; no biases."""
    found = []
    for name in EXPERTS:
        expert, delta = files.tensors_of(paper[0] / name), {}
        for key, value in shared.items():
            if "bias" in key:
                continue
            delta[key] = expert[key] - value
            if value.dim() == 2:
                u, s, vh = torch.linalg.svd(delta[key].double(), full_matrices=False)
                rank = max(1, int(RATIO * min(value.shape)))
                delta[key] = (u[:, :rank] * s[:rank] @ vh[:rank]).float()
        found.append(delta)
    return found


def test_the_shared_model_is_task_arithmetic(paper, shared):
    state = paper[1].state_dict()
    for name, value in shared.items():
        assert_close(state[f"shared.{name}"], value)


def test_deltas_are_truncated_svds_and_biases_have_none(paper, deltas):
    state, ranks = paper[1].state_dict(), paper[1].config.ranks
    for index, delta in enumerate(deltas):
        for name, expected in delta.items():
            place = f"deltas.{name.replace('.', '-')}"
            if f"{place}.up" in state:
                block = slice(sum(ranks[name][:index]), sum(ranks[name][: index + 1]))
                found = state[f"{place}.up"][:, block] @ state[f"{place}.down"][block]
            else:
                found = state[f"{place}.delta"][index]
            assert_close(found.reshape(expected.shape), expected)
    assert not [key for key in state if key.startswith("deltas.") and "bias" in key]
    assert max(map(max, ranks.values())) == int(RATIO * 32) == 3


@torch.no_grad()
def expected_weights(paper, shared, inputs) -> torch.Tensor:
    """Softmax of the network on the masked mean of the dense shared model's last state [row, expert]."""
    own = stock("bert", paper[0] / EXPERTS[0])
    state = {name.removeprefix("bert."): value for name, value in shared.items()}
    hidden = functional_call(own.base_model, state, kwargs=inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    x = (hidden * mask).sum(1) / mask.sum(1)
    tensors = {
        name.removeprefix("router.network."): v for name, v in paper[1].state_dict().items() if "router." in name
    }
    for layer, norm in ((0, 1), (4, 5)):
        x = x @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"]
        x = (x - tensors[f"{norm}.running_mean"]) / (tensors[f"{norm}.running_var"] + 1e-5).sqrt()
        x = x * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"]
        x = torch.where(x > 0, x, 0.01 * x)
    return (x @ tensors["8.weight"].T + tensors["8.bias"]).softmax(-1)


@torch.no_grad()
def test_weights_are_the_networks_softmax_at_one(paper, shared):
    inputs = tiny.batch("bert", 6)
    weights = paper[1].route(**inputs)
    assert_close(weights, expected_weights(paper, shared, inputs))
    assert weights.std() > 0.01  # equal ones would prove nothing


@torch.no_grad()
def test_each_row_is_answered_by_its_dense_mixture(paper, shared, deltas):
    inputs = tiny.batch("bert", 6)
    weights, found = expected_weights(paper, shared, inputs), paper[1](**inputs).expert_logits
    for index in range(6):
        mixed = {
            name: value + sum(w * delta[name] for w, delta in zip(weights[index], deltas, strict=True) if name in delta)
            for name, value in shared.items()
        }
        for name in EXPERTS:
            own = stock("bert", paper[0] / name)
            dense = functional_call(own, {**own.state_dict(), **mixed}, kwargs=row(inputs, index)).logits[0]
            assert_close(found[index, columns(paper[1], name)], dense)
