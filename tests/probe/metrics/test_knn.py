"""Neighbours by hand, and chance for spaces that have nothing in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe.metrics.knn import mutual_knn, neighbours
from lightning_limber.probe.statistics import bootstrap_weights, permutations


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def repeated(row: torch.Tensor) -> torch.Tensor:
    """Weights [I] as indices: each image as often as it was drawn."""
    return torch.arange(len(row)).repeat_interleave(row.long())


def clouds(seed: int = 0, images: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(images, d, generator=generator).double() for d in (8, 5))
    return a + 100, b - 30  # A common mean, as token means have.


def test_neighbours_by_hand():
    means, _ = clouds()
    x = (means - means.mean(0)).numpy()
    x /= np.linalg.norm(x, axis=1)[:, None]
    for i, near in enumerate(neighbours(means, 4)):
        cosines = {j: x[i] @ x[j] for j in range(40) if j != i}
        assert set(near.nonzero()[:, 0].tolist()) == set(sorted(cosines, key=cosines.get)[-4:])
    assert neighbours(means[:3], 10).sum(-1).tolist() == [2, 2, 2]


def test_knn_by_hand():
    """A random pairing is what one gets from the means in that order."""
    a, b = clouds()
    weights, pairs = bootstrap_weights(40, 30, 0), permutations(40, 20, 0)
    found = mutual_knn(a, b, 5, weights, pairs)

    def overlap(second: torch.Tensor) -> torch.Tensor:
        return (neighbours(a, 5) & neighbours(second, 5)).sum(-1).double() / 5

    own = [float(overlap(b)[repeated(row)].mean()) for row in weights]
    other = [float(overlap(b[pair]).mean()) for pair in pairs]
    assert (found.value, found.low, found.high) == pytest.approx(
        (own[0], *np.percentile(own[1:], [2.5, 97.5]))
    )
    assert (found.chance, found.chance_low, found.chance_high) == pytest.approx(
        (np.mean(other), *np.percentile(other, [2.5, 97.5])), rel=1e-6
    )


def test_knn_of_one_space_turned_and_of_two():
    a, _ = clouds()
    turn, _ = torch.linalg.qr(random(8, 8).double())
    weights, pairs = bootstrap_weights(40, 30, 0), permutations(40, 99, 0)
    same = mutual_knn(a, 7 * a @ turn + 3, 5, weights, pairs)
    assert (same.value, same.low, same.p) == (1, 1, 0.01)
    assert same.chance_high < 0.3
    # Of two that have nothing in common few are found: 3 standard errors of 5 % in 100 are 6.5 %.
    p = [mutual_knn(*clouds(seed), 5, weights, pairs).p for seed in range(100)]
    assert sum(value <= 0.05 for value in p) <= 11
    assert abs(np.mean(p) - 0.5) < 3 * 0.029


def test_knn_ties_with_chance():
    weights, pairs = bootstrap_weights(10, 2, 0), torch.arange(10).expand(9, 10)
    assert all(mutual_knn(*clouds(s, 10), 3, weights, pairs).p == 1 for s in range(200))
