"""
Routers that are solved rather than trained: class centres under one common covariance.

All work in float64 on features [row, feature] with the expert that each row belongs to [row]. Where there are fewer rows
than features the covariance is never formed: its row space says it all.
"""

import torch

from twin_merging_hf.modeling.routing_twin_merging import (
    CentroidRouter,
    LexicalRouter,
    NeighbourRouter,
    Novelty,
)

from .errors import TwinMergingError
from .temperature import temperature_losses


# Share of the average variance that is added to every direction: features outnumber what the rows can tell about them.
_SHRINKAGE = 0.01
_LARGEST_COVARIANCE = 4096
# Rows that a token is taken to have been seen in besides those it was (naive Bayes' smoothing).
_SMOOTHING = 0.1
_LEXICAL_WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)


def centres_of(features: torch.Tensor, experts: torch.Tensor, count: int) -> torch.Tensor:
    """Mean features of each expert's rows: [expert, feature]."""
    return torch.stack([features[experts == t].mean(dim=0) for t in range(count)])


def fit_centroid(router: CentroidRouter, features: torch.Tensor, groups: torch.Tensor) -> None:
    """
    Nearest centre under the rows' common covariance (discriminant analysis with subclasses), in place.

    Every expert has the same prior, however many rows it has; within an expert, centres count by their rows.

    Args:
        groups: for each row, which of all centres it belongs to [row]; experts' centres follow each other.
    """
    features, total = features.double(), sum(router.centres)
    centres = centres_of(features, groups, total)
    # What all centres have in common moves all logits alike: without it they are small, and keep their digits in float32.
    middle = centres.mean(dim=0)
    weight = _within_inverse(features - centres[groups], centres - middle)
    counts = torch.bincount(groups, minlength=total).double()
    shares = torch.cat([block / block.sum() for block in counts.split(router.centres)])
    with torch.no_grad():
        router.classifier.weight.copy_(weight)
        router.classifier.bias.copy_(-0.5 * (weight * (centres + middle)).sum(dim=1) + shares.log())


def fit_lexicon(router: LexicalRouter, tokens: list[torch.Tensor], experts: torch.Tensor) -> None:
    """
    Count in how many rows of each expert every token occurs, and turn that into log-likelihood ratios, in place.

    Args:
        tokens: token ids of each train row. experts: the expert of each [row].
    """
    vocabulary, count = router.table.shape
    seen = torch.zeros(vocabulary, count, dtype=torch.float64)
    for ids, expert in zip(tokens, experts.tolist(), strict=True):
        seen[ids.unique(), expert] += 1
    ratios = ((seen + _SMOOTHING) / (seen + _SMOOTHING).sum(dim=0)).log()
    ratios -= ratios.mean(dim=1, keepdim=True)
    ratios[seen.sum(dim=1) == 0] = 0
    scale = max(float(ratios.abs().max()) / 127, 1e-12)
    with torch.no_grad():
        router.table.copy_((ratios / scale).round().to(torch.int8))
        router.scale.fill_(scale)


@torch.no_grad()
def fit_lexical_weight(router: LexicalRouter, held_out: torch.Tensor, experts: torch.Tensor) -> None:
    """Choose how much the tokens count, beside the states, by the likelihood of held-out rows at the best temperature."""
    best, chosen = float("inf"), 0.0
    for weight in _LEXICAL_WEIGHTS:
        router.weight.fill_(weight)
        loss = float(temperature_losses(router.score(held_out), experts).min())
        if loss < best:
            best, chosen = loss, weight
    router.weight.fill_(chosen)


def _within_inverse(residuals: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [n, feature] times the inverse of the shrunk covariance of `residuals` [row, feature]."""
    rows, size = residuals.shape
    share, ridge = _shares(residuals)
    if size <= min(rows, _LARGEST_COVARIANCE):
        covariance = share * residuals.T @ residuals + ridge * torch.eye(size, dtype=residuals.dtype)
        return torch.linalg.solve(covariance, vectors.T).T
    # Woodbury: (a R'R + b I)^-1 v = (v - R' (R R' + b/a I)^-1 R v) / b
    gram = residuals @ residuals.T + (ridge / share) * torch.eye(rows, dtype=residuals.dtype)
    inner = torch.linalg.solve(gram, residuals @ vectors.T)
    return (vectors - (residuals.T @ inner).T) / ridge


def _shares(residuals: torch.Tensor) -> tuple[float, float]:
    """Factors of R'R and of the identity in the shrunk covariance."""
    variance = float(residuals.pow(2).mean())
    if variance == 0:
        raise TwinMergingError("all rows of an expert look the same to the router; use another `router.layer`")
    return (1 - _SHRINKAGE) / len(residuals), _SHRINKAGE * variance


def whitening(features: torch.Tensor, experts: torch.Tensor, count: int, dimension: int) -> torch.Tensor:
    """
    Projection [dimension, feature] to where rows of one expert scatter evenly; first the directions that tell experts
    apart, then those in which rows vary most beyond the common covariance.
    """
    features = features.double()
    centres = centres_of(features, experts, count)
    residuals = features - centres[experts]
    share, ridge = _shares(residuals)
    _, s, vh = torch.linalg.svd(residuals, full_matrices=False)
    scale = (share * s.pow(2) + ridge).rsqrt()
    whitener = scale[:, None] * vh  # within it, the residuals' covariance is (nearly) the identity
    apart = (centres - centres.mean(dim=0)) @ whitener.T
    _, strength, between = torch.linalg.svd(apart, full_matrices=False)
    between = between[strength > 1e-6 * strength.max().clamp(min=1e-30)]
    rest = torch.eye(len(whitener), dtype=features.dtype) - between.T @ between
    # The leading residual directions come first in the whitener, so their part outside `between` fills the rest.
    filled = torch.linalg.qr(torch.cat([between, rest]).T).Q.T
    return filled[: min(dimension, len(whitener))] @ whitener


def fit_neighbours(router: NeighbourRouter, features: torch.Tensor, experts: torch.Tensor, seed: int) -> None:
    """Choose exemplars of every expert (seeded) and the space in which neighbours are sought, in place."""
    count, kept, dimension = router.exemplars.shape
    projection = whitening(features, experts, count, dimension)
    shift = -(features.double().mean(dim=0) @ projection.T)
    generator = torch.Generator().manual_seed(seed)
    exemplars = []
    for t in range(count):
        rows = features[experts == t].double()
        chosen = torch.randperm(len(rows), generator=generator)[:kept]
        # Fewer rows than exemplars: some are there twice, which leaves the vote between experts even.
        chosen = chosen.repeat(-(-kept // len(chosen)))[:kept]
        exemplars.append(rows[chosen] @ projection.T + shift)
    with torch.no_grad():
        router.projection.zero_()
        router.projection[: len(projection)] = projection.float()
        router.shift.zero_()
        router.shift[: len(projection)] = shift.float()
        router.exemplars.zero_()
        router.exemplars[..., : len(projection)] = torch.stack(exemplars).float()


def fit_novelty(
    novelty: Novelty, features: torch.Tensor, experts: torch.Tensor, held_out: torch.Tensor, share: float
) -> float:
    """
    Learn what the experts' rows look like, in place, and return the distance beyond which a row is strange.

    Args:
        share: how many of the experts' own held-out rows may lie beyond it.
    """
    count, dimension = novelty.centres.shape
    projection = whitening(features, experts, count, dimension)
    points = features.double() @ projection.T
    mean = points.mean(dim=0)
    # Square root of the inverse covariance of all rows, shrunk as the one within experts is.
    _, s, vh = torch.linalg.svd(points - mean, full_matrices=False)
    spread = (s.pow(2) / len(points) * (1 - _SHRINKAGE) + _SHRINKAGE).rsqrt()
    whole = spread[:, None] * vh
    used = len(projection)
    with torch.no_grad():
        for parameter in novelty.parameters():
            parameter.zero_()
        novelty.projection[:used] = projection.float()
        novelty.centres[:, :used] = centres_of(points, experts, count).float()
        novelty.whole[: len(whole), :used] = whole.float()
        novelty.whole[: len(whole), -1] = -(whole @ mean).float()
        return float(torch.quantile(novelty(held_out.float()), 1 - share))
