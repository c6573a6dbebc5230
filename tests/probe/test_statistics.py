"""Bootstrap and permutation: what they draw, and that chance is where it should be.

Counts over seeds are held against the binomial's 3 standard errors at fixed seeds: what is right passes,
and each bound says what it would catch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe.statistics import bootstrap_weights, compare_hits, interval, permutations


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def repeated(row: torch.Tensor) -> torch.Tensor:
    """Weights [I] as indices: each image as often as it was drawn."""
    return torch.arange(len(row)).repeat_interleave(row.long())


def test_bootstrap_weights():
    """Multinomial counts, the sample itself first, a function of the seed."""
    weights = bootstrap_weights(50, 4000, seed=1)
    assert weights.shape == (4001, 50)
    assert torch.equal(weights[0], torch.ones(50).double())
    assert (weights.sum(-1) == 50).all()
    assert torch.equal(weights, bootstrap_weights(50, 4000, seed=1))
    assert not torch.equal(weights, bootstrap_weights(50, 4000, seed=2))
    # A binomial(50, 1/50) has mean 1 and variance .98; 4000 of them stray by .016 and .03 or so.
    torch.testing.assert_close(weights[1:].mean(0), torch.ones(50).double(), rtol=0, atol=0.08)
    torch.testing.assert_close(weights[1:].var(0), torch.full((50,), 0.98).double(), rtol=0, atol=0.15)


def test_interval():
    values = torch.cat([torch.tensor([7.0]), torch.arange(41.0)])
    assert interval(values) == (7, 1, 39)
    # A sample without a value, as fvu of images without tokens, is left out.
    assert interval(torch.cat([values, torch.tensor([torch.nan])])) == (7, 1, 39)


def test_permutations():
    """Permutations, a function of the seed, in which every caption comes to every image alike."""
    pairs = permutations(20, 4000, seed=3)
    assert torch.equal(pairs.sort(dim=-1).values, torch.arange(20).expand(4000, -1))
    assert torch.equal(pairs, permutations(20, 4000, seed=3))
    assert not torch.equal(pairs, permutations(20, 4000, seed=4))
    counts = torch.nn.functional.one_hot(pairs, 20).sum(0)  # [image, caption], 200 of each
    assert (counts - 200).abs().max() < 5 * 200**0.5


def test_compare_hits_by_hand():
    hits = random(12, 12)
    weights, pairs = bootstrap_weights(12, 50, 0), permutations(12, 60, 0)
    found = compare_hits(hits, weights, pairs)
    table = hits.double().numpy()
    own = [np.mean([table[i, i] for i in repeated(row)]) for row in weights]
    other = [np.mean([table[i, pair[i]] for i in range(12)]) for pair in pairs.tolist()]
    assert (found.value, found.low, found.high) == pytest.approx(
        (np.trace(table) / 12, *np.percentile(own[1:], [2.5, 97.5]))
    )
    assert (found.chance, found.chance_low, found.chance_high) == pytest.approx(
        (np.mean(other), *np.percentile(other, [2.5, 97.5]))
    )
    assert found.p == (1 + sum(value >= own[0] for value in other)) / 61


def test_a_tie_with_chance_is_no_finding():
    """Captions that are all alike: every pairing reaches the value, whatever the rounding."""
    hits = random(30, 1).expand(30, 30)
    found = compare_hits(hits, bootstrap_weights(30, 9, 0), permutations(30, 99, 0))
    assert found.p == 1
    assert found.value == pytest.approx(found.chance)


def test_range_and_p_of_what_is_chance():
    """Under chance p is uniform, and 95 of 100 values (not all) lie in the range.

    500 seeds: 3 standard errors of 95 % are 2.9 %; a 90 % range would cover 90 %. The bound of
    Kolmogorov and Smirnov is that of 1 %.
    """
    seeds, inside, p = 500, 0, []
    for seed in range(seeds):
        hits = random(40, 40, seed=seed) * random(40, 1, seed=seed + 9999)  # Some images hit with all.
        found = compare_hits(hits, bootstrap_weights(40, 2, seed), permutations(40, 399, seed))
        inside += found.chance_low <= found.value <= found.chance_high
        p.append(found.p)
    assert abs(inside / seeds - 0.95) < 0.029
    ranks = np.arange(seeds + 1) / seeds
    p = np.sort(p)
    assert max(np.abs(p - ranks[1:]).max(), np.abs(p - ranks[:-1]).max()) < 1.63 / seeds**0.5
