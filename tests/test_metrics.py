"""Every metric against numpy, and the contract of a streamed metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.metrics import SAEAlignment, shared_latents

D, K = 6, 10


def tokens(n: int = 40, mean: float = 0.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) + mean
    reconstruction = x + 0.3 * torch.randn(n, D, generator=generator, dtype=torch.float64)
    latents = torch.relu(torch.randn(n, K, generator=generator, dtype=torch.float64) - 1)
    latents[:, -1] = 0
    return x, reconstruction, latents


def measure(*batches) -> dict[str, torch.Tensor]:
    metric = SAEAlignment(D, K)
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def reference(x, reconstruction, latents) -> dict[str, float]:
    """Written from the definitions, in numpy, with two passes over the data."""
    x, y, z = (np.asarray(a, dtype=np.float64) for a in (x, reconstruction, latents))
    norm_x, norm_y = (np.sqrt((a**2).sum(1)) for a in (x, y))
    return {
        "fvu": ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": np.mean((x - y) ** 2),
        "cosine": np.mean((x * y).sum(1) / norm_x / norm_y),
        "norm_ratio": np.mean(norm_y / norm_x),
        "norm": norm_x.mean(),
        "l0": (z > 0).sum(1).mean(),
        "sparsity": (z > 0).mean(),
        "alive": (z > 0).any(0).mean(),
        "outliers": 0.0,
        "tokens": len(x),
    }


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
def test_against_numpy(mean):
    data = tokens(mean=mean)
    values = measure(data)
    for name, expected in reference(*data).items():
        # A mean of 1000 deviations costs six of float64's sixteen digits.
        assert float(values[name]) == pytest.approx(expected, rel=1e-9), name


def test_perfect_and_predicting_the_mean():
    x, _, latents = tokens()
    assert float(measure((x, x, latents))["fvu"]) == 0
    assert float(measure((x, x, latents))["cosine"]) == pytest.approx(1)
    mean = x.mean(0).expand_as(x)
    assert float(measure((x, mean, latents))["fvu"]) == pytest.approx(1, rel=1e-12)


def test_does_not_depend_on_batches():
    x, y, z = tokens(41)
    whole = measure((x, y, z))
    for size in (1, 7, 40):
        parts = measure(*zip(x.split(size), y.split(size), z.split(size), strict=True))
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=0)


def test_bfloat16_input_is_summed_exactly():
    batch = [a.bfloat16() for a in tokens(500, mean=1.0)]
    values, expected = measure(batch), reference(*[a.double() for a in batch])
    assert float(values["fvu"]) == pytest.approx(expected["fvu"], rel=1e-12)


def test_left_out_tokens_change_nothing_but_their_share():
    x, y, z = tokens(40)
    x[3] = 1e6
    keep = torch.ones(40, dtype=torch.bool)
    keep[3] = False
    values, expected = measure((x, y, z, keep)), measure((x[keep], y[keep], z[keep]))
    assert float(values["outliers"]) == 1 / 40
    for name in set(expected) - {"outliers"}:
        torch.testing.assert_close(values[name], expected[name], rtol=1e-12, atol=0)


def test_empty_batches_add_nothing_and_an_empty_group_is_nan():
    x, y, z = tokens(5)
    empty = (x[:0], y[:0], z[:0])
    assert measure(empty, (x, y, z), empty)["fvu"] == measure((x, y, z))["fvu"]
    values = measure(empty)
    assert torch.isnan(values["fvu"])
    assert torch.isnan(values["cosine"])
    assert values["tokens"] == 0


def test_shared_latents():
    a, b = torch.tensor([1, 2, 0, 0, 1]), torch.tensor([0, 9, 1, 0, 3])
    assert float(shared_latents(a, b)) == 2 / 4
    assert float(shared_latents(a, a)) == 1


def _two_process_worker(rank: int, path: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    x, y, z = tokens(41)
    metric = SAEAlignment(D, K)
    metric.update(x[rank::2], y[rank::2], z[rank::2])
    torch.save(metric.compute(), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(
        _two_process_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=2
    )
    whole = measure(tokens(41))
    for rank in (0, 1):
        values = torch.load(tmp_path / f"out.{rank}")
        for name in whole:
            torch.testing.assert_close(values[name], whole[name], rtol=1e-12, atol=0)
