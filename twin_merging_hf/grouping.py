"""
Group-wise merging (Twin-Merging's speed-up): rows of similar expert weights share one merged model.

Rows are binned by their largest expert weight, the bins are clustered by KMeans, and each cluster is answered by the
one model that its mean weights make: one merge for a group, and then the plain speed of a stock model.
"""

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from twin_merging_hf.modeling.padding_twin_merging import align_left
from twin_merging_hf.modeling.shared_twin_merging import build_shared

from .errors import TwinMergingError, require_extra
from .evaluation import pearson
from .inference import run_over
from .materialise import Materialised
from .processing import Processing


_STARTS = 4


@dataclass(frozen=True)
class GroupedAnswer:
    """
    An artifact's answers, group by group; rows in the order given.

    logits, expert_logits: [row, label]. expert_weights: the weights that acted, [row, expert]. groups: each row's group
    [row]. centres: the weights of each group [group, expert].
    """

    logits: torch.Tensor
    expert_logits: torch.Tensor
    expert_weights: torch.Tensor
    groups: torch.Tensor
    centres: torch.Tensor


@dataclass(frozen=True)
class CurvePoint:
    """
    One number of groups beside the answer row by row.

    groups: as asked for; None: row by row, without grouping. used: groups that there were (never more than different
        rows). agreement: share of rows with the label that the row has without grouping (all regressions: Pearson
        correlation). score: share of rows with the right label; None without labels. seconds: for 1000 rows, routing
        included.
    """

    groups: int | None
    used: int
    agreement: float
    score: float | None
    seconds: float


def group_weights(weights: torch.Tensor, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Put rows with similar expert weights into groups.

    Rows whose largest weight is the same expert's form a bin; each bin gets at least one group and the next one always
    goes to the bin with the largest squared distance to its mean for each group that it has. Inside a bin, KMeans. With
    fewer groups than bins, KMeans runs over all rows. With as many groups as different rows, every row keeps its own
    weights exactly.

    Args:
        weights: [row, expert].

    Returns:
        The group of each row [row], and the groups' mean weights [group, expert].

    Raises:
        TwinMergingError: `groups` is below 1 or there are no rows; scikit-learn is not installed.
    """
    if groups < 1 or weights.dim() != 2 or len(weights) == 0:
        raise TwinMergingError(f"grouping needs at least one row and one group, got {list(weights.shape)} and {groups}")
    distinct, inverse, counts = torch.unique(weights, dim=0, return_inverse=True, return_counts=True)
    if groups >= len(distinct):
        return inverse, distinct
    owners = distinct.argmax(dim=1)
    bins = [torch.nonzero(owners == t).flatten() for t in owners.unique().tolist()]
    if groups < len(bins):
        bins = [torch.arange(len(distinct))]
    shares = _share_out(distinct, counts, bins, groups)
    group_of = torch.zeros(len(distinct), dtype=torch.long)
    start = 0
    for members, share in zip(bins, shares, strict=True):
        group_of[members] = start + _cluster(distinct[members], counts[members], share, seed)
        start = int(group_of[members].max()) + 1
    centres = torch.stack([_mean(distinct[group_of == g], counts[group_of == g]) for g in range(start)])
    return group_of[inverse], centres.to(weights.dtype)


def _mean(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    if len(rows) == 1:
        return rows[0].double()  # the row itself: a mean would round
    return (rows.double() * counts[:, None]).sum(dim=0) / counts.sum()


def _share_out(rows: torch.Tensor, counts: torch.Tensor, bins: list[torch.Tensor], groups: int) -> list[int]:
    """How many groups each bin gets, never more than it has different rows."""
    spreads = []
    for members in bins:
        distance = (rows[members].double() - _mean(rows[members], counts[members])).pow(2).sum(dim=1)
        spreads.append(float((distance * counts[members]).sum()))
    shares = [1] * len(bins)
    for _ in range(groups - len(bins)):
        open_bins = [i for i, members in enumerate(bins) if shares[i] < len(members)]
        shares[max(open_bins, key=lambda i: spreads[i] / shares[i])] += 1
    return shares


def _cluster(rows: torch.Tensor, counts: torch.Tensor, groups: int, seed: int) -> torch.Tensor:
    """Cluster of each row [row], numbered from 0 without gaps."""
    if groups == 1:
        return torch.zeros(len(rows), dtype=torch.long)
    if groups == len(rows):
        return torch.arange(len(rows))
    means = require_extra("sklearn.cluster", "grouping").KMeans(groups, n_init=_STARTS, random_state=seed)
    labels = means.fit(rows.double().numpy(), sample_weight=counts.double().numpy()).labels_
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1].astype(np.int64))


class MergedModel:
    """
    A stock task model that becomes the merge for one row of expert weights at a time; all experts' heads stand in it.

    It is a copy: the artifact's own model is read and never changed. It is as large as the shared model.
    """

    def __init__(self, model: Any):
        self.artifact = model
        self._refuse_unreadable()
        self.stock: Any = build_shared(model.config)
        reference = next(p for p in model.shared.parameters() if p.is_floating_point())
        self.stock.to(device=reference.device, dtype=reference.dtype).eval()  # type: ignore[call-arg]
        self.stock.load_state_dict(model.shared.state_dict())
        self._merge = Materialised(model, self.stock)
        self._accepted = set(inspect.signature(type(self.stock).forward).parameters)

    def _refuse_unreadable(self) -> None:
        shared = self.artifact.shared
        if any(p.is_meta for p in shared.parameters()) or getattr(shared, "is_quantized", False):
            raise TwinMergingError(
                "merging for groups reads the model's weights, which are offloaded or quantised here; load the artifact "
                "on one device, unquantised"
            )

    def become(self, weights: torch.Tensor) -> None:
        """Set the stock model's weights to `shared + sum_t weights[t] * delta_t`, from the artifact's tensors."""
        self._merge.set(weights)

    def answer(self, inputs: dict[str, torch.Tensor], weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`logits` and `expert_logits` [row, label] of model inputs; `weights` [expert] mix the heads."""
        inputs, _ = align_left({name: value for name, value in inputs.items() if name in self._accepted})
        outputs = self.stock(**inputs).logits
        return self.artifact.label_space.compose(outputs, weights.to(outputs.device).expand(len(outputs), -1))


def answer_in_groups(
    model: Any, rows: list[dict], processing: Processing, groups: int, seed: int = 0, merge: bool = True
) -> GroupedAnswer:
    """
    Route all rows, group them, and answer each group with one row of expert weights.

    Args:
        model: a classification artifact.
        rows: with `text` (and `text_pair`) or `image`.
        merge: answer by one merged stock model for each group (fast); else by the factors, row by row (to compare).

    Raises:
        TwinMergingError: as `group_weights`; the model's weights cannot be read.
    """
    routed = _route(model, rows, processing)
    return _answer(model, rows, processing, routed, groups, seed, merge)


def _route(model: Any, rows: list[dict], processing: Processing) -> torch.Tensor:
    return run_over(model, rows, processing, lambda inputs: model.route(**inputs))


def _answer(
    model: Any, rows: list[dict], processing: Processing, routed: torch.Tensor, groups: int, seed: int, merge: bool
) -> GroupedAnswer:
    group_of, centres = group_weights(routed, groups, seed)
    width = len(model.label_space.labels)
    joined = torch.empty(len(rows), 2 * width)
    merged = MergedModel(model) if merge else None
    for group, members in _members(group_of, len(centres)):
        step = _step(model, merged, centres[group])
        joined[members] = run_over(model, [rows[i] for i in members.tolist()], processing, step)
    logits, expert_logits = joined.split([width, width], dim=1)
    return GroupedAnswer(logits, expert_logits, centres[group_of], group_of, centres)


def _members(group_of: torch.Tensor, count: int) -> Iterator[tuple[int, torch.Tensor]]:
    for group in range(count):
        yield group, torch.nonzero(group_of == group).flatten()


def _step(model: Any, merged: MergedModel | None, weights: torch.Tensor):
    if merged is None:

        def by_factors(inputs: dict) -> torch.Tensor:
            output = model(**inputs, expert_weights=weights[None])
            return torch.cat([output.logits, output.expert_logits], dim=1)

        return by_factors
    merged.become(weights)
    return lambda inputs: torch.cat(merged.answer(inputs, weights), dim=1)


def curve(
    model: Any,
    rows: list[dict],
    processing: Processing,
    groups: Sequence[int] = (1, 2, 4, 8, 16, 32),
    seed: int = 0,
    labels: Sequence[int] | None = None,
) -> list[CurvePoint]:
    """
    Score against time for several numbers of groups; the first point is the answer row by row, without grouping.

    Args:
        labels: the right label of each row, an id in the artifact's label space.
    """
    true = None if labels is None else torch.tensor(list(labels))
    if true is not None and model.label_space.kind == "value":
        raise TwinMergingError("`labels` are ids of classes; this artifact answers with a number")
    if true is not None and len(true) != len(rows):
        raise TwinMergingError(f"got {len(true)} labels for {len(rows)} rows")
    # Measured once and added to every point: grouping has to route all rows before it answers the first.
    routed, routing = _timed(lambda: _route(model, rows, processing))
    plain, seconds = _timed(lambda: run_over(model, rows, processing, lambda inputs: model(**inputs).logits))
    chosen = plain.argmax(dim=1)
    points = [CurvePoint(None, len(rows), 1.0, _share(chosen, true), _per_thousand(seconds, rows))]
    for count in groups:
        answer, seconds = _timed(lambda count=count: _answer(model, rows, processing, routed, count, seed, True))
        found = answer.logits.argmax(dim=1)
        agreement = float((found == chosen).float().mean())
        if model.label_space.kind == "value":
            agreement = pearson(answer.logits[:, 0], plain[:, 0])
        seconds = _per_thousand(routing + seconds, rows)
        points.append(CurvePoint(count, len(answer.centres), agreement, _share(found, true), seconds))
    return points


def _share(found: torch.Tensor, true: torch.Tensor | None) -> float | None:
    return None if true is None else float((found == true).float().mean())


def _per_thousand(seconds: float, rows: list[dict]) -> float:
    return 1000 * seconds / len(rows)


def _timed(work) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
