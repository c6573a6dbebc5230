"""The linear probe by an explicit solve, on planted signals and on noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe.attributes import HALVES, Attributes
from lightning_limber.probe.metrics.linear_probe import PENALTIES, linear_probe, ridge_scores
from lightning_limber.probe.statistics import bootstrap_weights


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attributes_of(labels: torch.Tensor, samples: int = 20, count: int = 100) -> Attributes:
    names = [f"attribute {i}" for i in range(len(labels))]
    return Attributes.make(names, labels, bootstrap_weights(labels.shape[1], samples, 0), count, 0)


def means_and_labels(images: int = 90, dims: int = 200, seed: int = 0) -> tuple:
    """Mean tokens as a residual stream has them: a large mean, and one direction far longer than others."""
    means = random(images, dims, seed=seed) + 30 * random(dims, seed=seed + 1)
    means[:, 0] *= 100
    return means, random(4, images, seed=seed + 2) < -0.3


def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Weights [D] and intercept with least |y - x w - b|^2 + penalty |w|^2, by the normal equations."""
    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    ridge = penalty * np.eye(design.shape[1])
    ridge[-1, -1] = 0
    found = np.linalg.solve(design.T @ design + ridge, design.T @ y)
    return found[:-1], found[-1]


def test_it_is_an_explicit_solve_with_images_left_out_one_by_one():
    """The penalty of each draw is that of least error on left-out images; the intercept is left off."""
    x, new = random(24, 6) * torch.tensor([9.0, 3, 1, 1, 1, 0.1]) + 5, random(10, 6, seed=1) + 5
    signal = (x[:, 2:5] + 0.3 * random(24, 3, seed=3)).T > 5
    labels = torch.stack([signal, signal[:, torch.arange(24) * 7 % 24]], dim=1).double()  # [3, 2, 24]
    found = ridge_scores(x, new, labels)
    spread = float((x - x.mean(0)).pow(2).sum() / 24)
    x, new, labels = x.numpy(), new.numpy(), labels.numpy()
    chosen = []
    for draw in range(2):
        errors = dict.fromkeys(PENALTIES, 0.0)
        for penalty in errors:
            for y in labels[:, draw]:
                for i in range(24):
                    w, b = solve(np.delete(x, i, 0), np.delete(y, i), penalty * spread)
                    errors[penalty] += (y[i] - x[i] @ w - b) ** 2
        chosen.append(min(errors, key=errors.__getitem__))
        for i, y in enumerate(labels[:, draw]):
            w, _ = solve(x, y, chosen[-1] * spread)
            np.testing.assert_allclose(found[i, draw], (new - x.mean(0)) @ w, rtol=1e-6, atol=1e-9)
    assert chosen[0] != chosen[1]  # Signal and chance want other penalties.


def test_scores_are_those_of_the_other_halfs_probe():
    """AUROC over pairs within halves, in bootstrap samples and under permutations, by explicit loops."""
    means, labels = means_and_labels(41, 12)
    attributes = attributes_of(labels, samples=5, count=3)
    weights, found = bootstrap_weights(41, 5, 0), linear_probe(means, attributes)
    for draw in range(4):
        predicted = [
            ridge_scores(means[HALVES[a]], means[HALVES[b]], attributes.halves[a].labels.double())[:, draw]
            for a, b in ((1, 0), (0, 1))
        ]
        for row, drawn in enumerate(weights if draw == 0 else weights[:1]):
            for i in range(len(labels)):
                won = pairs = 0.0
                for half, slots, scores in zip(attributes.halves, HALVES, predicted, strict=True):
                    w, has = drawn[slots], half.labels[i, draw]
                    for p in has.nonzero():
                        for n in (~has).nonzero():
                            win = (scores[i, p] > scores[i, n]) + 0.5 * (scores[i, p] == scores[i, n])
                            won, pairs = won + float(win * w[p] * w[n]), pairs + float(w[p] * w[n])
                value = found.permuted[draw - 1, i] if draw else found.bootstrap[row, i]
                assert float(value) == pytest.approx(won / pairs, abs=1e-9)


def test_a_planted_direction_is_read():
    """However small beside a direction that says nothing."""
    means, labels = means_and_labels()
    means += 4 * labels.T.double() @ random(4, 200, seed=7)
    found = linear_probe(means.float(), attributes_of(labels)).compare()
    assert found.value > 0.99
    assert found.p == pytest.approx(1 / 101)
    assert 0.4 < found.chance_low < 0.5 < found.chance_high < 0.6


def test_noise_says_nothing():
    """Though every probe fits the images that it has seen: 200 dimensions, 45 images."""
    p, values = [], []
    for seed in range(30):
        means, labels = means_and_labels(seed=10 * seed)
        comparison = linear_probe(means, attributes_of(labels)).compare()
        p.append(comparison.p)
        values.append(comparison.value)
    assert abs(np.mean(values) - 0.5) < 0.02
    assert abs(np.mean(p) - 0.5) < 0.16  # Three standard errors of a uniform p.
    assert min(p) < 0.25
    assert max(p) > 0.75


@pytest.mark.parametrize("means", [torch.ones(40, 8), torch.full((40, 8), torch.nan)])
def test_images_without_a_difference_or_a_token_say_nothing(means):
    _, labels = means_and_labels(40, 8)
    found = linear_probe(means, attributes_of(labels))
    assert (found.bootstrap == 0.5).all()
    assert found.compare().p == 1


def test_an_image_without_a_token_counts_as_the_mean():
    means, labels = means_and_labels(60)
    means += 4 * labels.T.double() @ random(4, 200, seed=7)
    means[7] = torch.nan
    assert 0.95 < linear_probe(means, attributes_of(labels)).compare().value <= 1
