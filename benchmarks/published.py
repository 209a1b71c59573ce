"""
Twin-Merging as its authors' code runs it (arXiv 2406.15479, github LZY-the-boys/Twin-Merging), with its oracle or without.

The published run knows the true task: its head answers and its biases act (they are left out of the merge). Its router
reads the last layer's mean over all tokens, padding included, and keeps the epoch that is best on test rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from artifacts import Artifact, all_head_outputs
from bench import Bench
from features import Features
from running import backbone
from torch import nn
from transformers import AutoConfig


SCALING, RATIO = 0.3, 0.1
RECIPE = {
    "merge_method": "task_arithmetic",
    "parameters": {"lambda": SCALING},
    "exclusive": {"ratio": RATIO},
    "exclude": [".*bias.*"],
    "router": {"type": "projection"},  # never asked: the benchmark's own router gives the weights
}
ROUTER_ROWS, EPOCHS, LEARNING_RATE, BATCH = 1000, 10, 5e-4, 64


@dataclass(frozen=True)
class Setting:
    """
    One rung of the ladder from the published run to ours.

    oracle: true head, true biases, the router's epoch by test rows; else the likeliest expert's, by validation rows.
    masked: the mean leaves padding out. middle: the router reads the state before the middle layer, else the last one.
    fitted: the softmax's temperature is fitted on validation rows, else 1. linear: the router is linear, else the MLP.
    """

    oracle: bool = False
    masked: bool = False
    middle: bool = False
    fitted: bool = False
    linear: bool = False


def shared_state(bench: Bench) -> dict[str, torch.Tensor]:
    """theta_0 + 0.3 sum_t (theta_t - theta_0)."""
    base, experts = backbone(bench, bench.base), [backbone(bench, path) for path in bench.experts]
    return {name: start + SCALING * sum(e[name] - start for e in experts) for name, start in base.items()}


def router_logits(found: Features, setting: Setting, seed: int) -> dict[str, np.ndarray]:
    """
    Train the router on shared features of train rows; its logits [row, expert] on validation and test rows.

    Args:
        found: of the shared model.
    """
    x = {split: torch.tensor(found.state(split, setting.masked, setting.middle)) for split in found.splits}
    y = {split: torch.tensor(found.task[split]) for split in found.splits}
    experts = int(y["train"].max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if setting.linear:
            return _linear(x, y, seed)
        judge = "test" if setting.oracle else "validation"
        router = train_mlp(x["train"], y["train"], x[judge], y[judge], experts)
        with torch.no_grad():
            return {split: router(x[split]).numpy() for split in ("validation", "test")}


def new_mlp(width: int, experts: int) -> nn.Sequential:
    """The authors' `SimpleMLP`: d -> 2d -> 2d -> experts, BatchNorm, LeakyReLU, dropout 0.5."""
    layers: list[nn.Module] = []
    for size in (width, 2 * width):
        layers += [nn.Linear(size, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(2 * width, experts))


def train_mlp(
    x: torch.Tensor, y: torch.Tensor, judge_x: torch.Tensor, judge_y: torch.Tensor, experts: int
) -> nn.Sequential:
    """Adam and cross-entropy from the global random state; the epoch with the best accuracy on the judging rows."""
    router = new_mlp(x.shape[1], experts)
    optimizer = torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)
    best, best_state = -1.0, router.state_dict()
    for _ in range(EPOCHS):
        router.train()
        for rows in torch.randperm(len(x)).split(BATCH):
            if len(rows) > 1:  # BatchNorm has no variance of one row
                optimizer.zero_grad()
                nn.functional.cross_entropy(router(x[rows]), y[rows]).backward()
                optimizer.step()
        router.eval()
        with torch.no_grad():
            accuracy = float((router(judge_x).argmax(1) == judge_y).float().mean())
        if accuracy > best:
            best, best_state = accuracy, {name: value.clone() for name, value in router.state_dict().items()}
    router.load_state_dict(best_state)
    return router.eval()


def _linear(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor], seed: int) -> dict[str, np.ndarray]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x["train"])
    model = LogisticRegression(C=0.05, max_iter=300, random_state=seed).fit(scaler.transform(x["train"]), y["train"])
    logits = {split: model.decision_function(scaler.transform(x[split])) for split in ("validation", "test")}
    # Two classes have one score in scikit-learn.
    return {split: np.stack([-z / 2, z / 2], 1) if z.ndim == 1 else z for split, z in logits.items()}


def weights_of(logits: dict[str, np.ndarray], task: np.ndarray, setting: Setting) -> np.ndarray:
    """Softmax over experts [row, expert] of test rows, at 1 or at the temperature likeliest on validation rows."""
    temperature = 1.0
    if setting.fitted:
        grid = np.logspace(-1.5, 1.0, 51)
        losses = [-np.log(softmax(logits["validation"] / t)[np.arange(len(task)), task] + 1e-12).mean() for t in grid]
        temperature = float(grid[int(np.argmin(losses))])
    return softmax(logits["test"] / temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


class Published:
    """The dense mixture: task-arithmetic shared model, all experts' truncated deltas, one expert's biases for each row."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.artifact = Artifact(bench, "published", RECIPE, with_data=False, keep=True)

    def outputs(self, weights: np.ndarray, owner: np.ndarray) -> np.ndarray:
        """
        Raw outputs of all heads [row, width] for test rows.

        Args:
            weights: [row, expert]. owner: [row], the expert whose biases act.
        """
        rows = self.bench.part("test").rows
        found = np.zeros((len(rows), self.bench.width), np.float32)
        for expert in np.unique(owner):
            self._take_biases(int(expert))
            own = np.flatnonzero(owner == expert)
            title = f"published, biases of {self.bench.names[expert]}"
            chosen = [rows[i] for i in own]
            found[own] = all_head_outputs(self.artifact, chosen, title, expert_weights=weights[own])
        return found

    def _take_biases(self, expert: int) -> None:
        state = self.artifact.model.state_dict()
        for name, value in backbone(self.bench, self.bench.experts[expert]).items():
            if "bias" in name:
                state[f"shared.{name}"].copy_(value)

    @property
    def ratio(self) -> float:
        """Storage with the MLP router and every expert's biases, over the base's."""
        sizes = self.artifact.report["storage"]
        first = backbone(self.bench, self.bench.experts[0])
        biases = sum(value.nbytes for name, value in first.items() if "bias" in name)
        hidden = AutoConfig.from_pretrained(self.bench.base).hidden_size
        router = sum(value.nbytes for value in new_mlp(hidden, len(self.bench.experts)).state_dict().values())
        total = sizes["shared"] + sizes["deltas"] + sizes["heads"] + router + len(self.bench.experts) * biases
        return total / sizes["shared"]
