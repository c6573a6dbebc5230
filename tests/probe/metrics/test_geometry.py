"""Every metric against numpy, the contract of a streamed metric, and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_limber.probe.metrics.geometry import ratios_by_image, reconstruction_metrics
from lightning_limber.probe.metrics.shared import jaccard, jaccard_of_independent
from lightning_limber.probe.statistics import bootstrap_weights, interval
from lightning_limber.probe.token_stats import ImageStats, TokenStats

D, K, TEXT_VARIANCE = 6, 10, 2.5
LENGTHS = (9, 4, 0, 12, 7)
"""Tokens of each image; one image has none."""
METRICS = (
    "fvu fvu_text mse rel_error cosine norm_ratio norm variance l0 sparsity alive outliers tokens".split()
)

Image = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""One image's tokens: x [n, D], reconstruction [n, D], latents [n, K], keep [n]."""


def make(lengths=LENGTHS, mean: float = 0.0, outliers: bool = False, seed: int = 0) -> list[Image]:
    """Images with spread and error of their own; the last latent never fires."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    images = []
    for n in lengths:
        x = normal(n, D) * (0.5 + normal(1).abs()) + normal(D) + mean
        y = x + 0.3 * normal(n, D) * normal(1).abs()
        z = torch.relu(normal(n, K) - 1)
        z[:, -1] = 0
        images.append((x, y, z, normal(n) < 1 if outliers else torch.ones(n, dtype=torch.bool)))
    return images


def add(metric: TokenStats, images: list[Image], places: list[int]) -> None:
    """One call with these images, their tokens in order."""
    row = torch.arange(len(places)).repeat_interleave(torch.tensor([len(images[i][0]) for i in places]))
    x, y, z, keep = (torch.cat(parts) for parts in zip(*(images[i] for i in places), strict=True))
    metric.update(x, y, z, row, places, keep)


def sums_of(images: list[Image], calls: list[list[int]] | None = None) -> ImageStats:
    metric = TokenStats()
    for places in calls or [list(range(len(images)))]:
        add(metric, images, places)
    return metric.compute()


def measure(images: list[Image], calls: list[list[int]] | None = None) -> dict[str, float]:
    values = reconstruction_metrics(sums_of(images, calls), text_variance=TEXT_VARIANCE)
    return {name: float(value) for name, value in values.items()}


def reference(images: list[Image]) -> dict[str, float]:
    """From the definitions, in numpy, over all tokens at once and with two passes."""
    x, y, z, keep = (np.concatenate([np.asarray(i[part]) for i in images]) for part in range(4))
    left_out = (~keep).sum()
    x, y, z = x[keep].astype(float), y[keep].astype(float), z[keep]
    norm_x, norm_y = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    error = ((x - y) ** 2).sum(1)
    return {
        "fvu": error.sum() / ((x - x.mean(0)) ** 2).sum(),
        "fvu_text": error.mean() / TEXT_VARIANCE,
        "mse": ((x - y) ** 2).mean(),
        "rel_error": error.sum() / (x**2).sum(),
        "cosine": np.mean([a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(x, y, strict=True)]),
        "norm_ratio": (norm_y / norm_x).mean(),
        "norm": norm_x.mean(),
        "variance": ((x - x.mean(0)) ** 2).sum(1).mean(),
        "l0": (z > 0).sum(1).mean(),
        "sparsity": (z > 0).mean(),
        "alive": (z > 0).any(0).mean(),
        "outliers": left_out / (left_out + len(x)),
        "tokens": len(x),
    }


# -- definitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("outliers", [False, True])
def test_against_numpy(mean, outliers):
    images = make(mean=mean, outliers=outliers)
    # A mean of 1000 deviations costs six of float64's sixteen digits.
    assert measure(images) == pytest.approx(reference(images), rel=1e-9)


def test_perfect_reconstruction():
    images = [(x, x, z, keep) for x, _, z, keep in make()]
    values = measure(images)
    assert [values[name] for name in ("fvu", "fvu_text", "mse", "rel_error")] == [0, 0, 0, 0]
    assert [values[name] for name in ("cosine", "norm_ratio")] == pytest.approx([1, 1], rel=1e-14)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_predicting_the_mean_is_fvu_1(mean):
    """The mean of all the group's tokens: not of an image, and not of all images' means."""
    images = make(mean=mean)
    centre = torch.cat([image[0] for image in images]).mean(0)
    images = [(x, centre.expand_as(x), z, keep) for x, _, z, keep in images]
    assert measure(images)["fvu"] == pytest.approx(1, rel=1e-9)


def test_fvu_text_is_fvu_where_text_has_the_groups_own_variance():
    images = make()
    x = np.concatenate([image[0] for image in images])
    variance = ((x - x.mean(0)) ** 2).sum(1).mean()
    values = reconstruction_metrics(sums_of(images), text_variance=variance)
    torch.testing.assert_close(values["fvu_text"], values["fvu"], rtol=1e-12, atol=0)
    assert torch.isnan(reconstruction_metrics(sums_of(images))["fvu_text"]).all()


def test_jaccard():
    a = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    b = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    torch.testing.assert_close(jaccard(a, b), torch.tensor([2 / 4, 1, torch.nan]).double(), equal_nan=True)


def test_jaccard_of_independent_sets():
    """Of shares 1/2 and 1/4 one in eight is in both, and five in eight in either; and of drawn sets."""
    a, b = torch.arange(8) < 4, torch.arange(8) < 2
    assert float(jaccard_of_independent(a, b)) == 0.125 / 0.625
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(20_000, generator=generator) < share for share in (0.3, 0.7))
    assert float(jaccard_of_independent(a, b)) == pytest.approx(float(jaccard(a, b)), abs=0.01)


def test_what_is_kept_of_an_image():
    """Its mean token, and how strongly each latent fired; both without outliers."""
    images = make(outliers=True)
    sums = sums_of(images)
    for i, (x, _, z, keep) in enumerate(images):
        torch.testing.assert_close(sums.means[i], x[keep].mean(0), rtol=1e-12, atol=0, equal_nan=True)
        torch.testing.assert_close(sums.activation_sum[i].double(), z[keep].sum(0), rtol=2**-8, atol=0)
        assert torch.equal(sums.activation_sum[i] > 0, (z[keep] > 0).any(0))
    assert sums.activation_max.shape == (5, 0)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_largest_activation_of_an_image(sparse):
    """Kept where it is asked for; without outliers, and 0 for an image without tokens."""
    images = make(outliers=True)
    metric = TokenStats(keep_activation_sum=False, keep_activation_max=True)
    for i, (x, y, z, keep) in enumerate(images):
        z = z.to_sparse() if sparse else z
        metric.update(x, y, z, torch.zeros(len(x), dtype=torch.long), [i], keep)
    found = metric.compute()
    assert found.activation_sum.shape == (5, 0)
    for of_image, (_, _, z, keep) in zip(found.activation_max, images, strict=True):
        expected = z[keep].amax(0) if keep.any() else torch.zeros(K)
        torch.testing.assert_close(of_image, expected.bfloat16(), rtol=0, atol=0)
    assert torch.equal(found.fires, sums_of(images).fires)


# -- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calls", [[[0], [1], [2], [3], [4]], [[3, 1], [4, 0, 2]], [[4, 3, 2, 1, 0]], [[2], [0, 1, 3, 4]]]
)
def test_batches_and_their_order_change_no_bit(calls):
    images = make(outliers=True)
    whole, parts = sums_of(images), sums_of(images, calls)
    assert parts.index.tolist() == [0, 1, 2, 3, 4]
    for name, value in vars(whole).items():
        assert torch.equal(getattr(parts, name), value), name
    assert measure(images, calls) == measure(images)


def test_tokens_of_a_call_in_any_order():
    images = make()
    x, y, z, keep = (torch.cat(parts) for parts in zip(*images, strict=True))
    row = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    metric = TokenStats()
    metric.update(x[order], y[order], z[order], row[order], torch.arange(5), keep[order])
    values = {
        name: float(v) for name, v in reconstruction_metrics(metric.compute(), None, TEXT_VARIANCE).items()
    }
    assert values == pytest.approx(measure(images), rel=1e-12)


def test_computing_between_calls_changes_nothing():
    images, metric = make(), TokenStats()
    add(metric, images, [0, 1])
    assert len(metric.compute().index) == 2
    add(metric, images, [2, 3, 4])
    assert torch.equal(metric.compute().sums, sums_of(images).sums)


def test_bfloat16_input_is_summed_exactly():
    images = [(*(part.bfloat16() for part in image[:3]), image[3]) for image in make((500, 300), mean=1)]
    exact = [(*(part.double() for part in image[:3]), image[3]) for image in images]
    assert measure(images) == measure(exact) == pytest.approx(reference(exact), rel=1e-12)


def test_left_out_tokens_change_nothing_but_their_share():
    images = make()
    expected = measure(images)
    dirty = []
    for x, y, z, keep in images:
        sink = torch.full((2, D), 1e6, dtype=torch.float64)
        kept = torch.cat([keep, torch.zeros(2, dtype=torch.bool)])
        dirty.append((torch.cat([x, sink]), torch.cat([y, -sink]), torch.cat([z, torch.ones(2, K)]), kept))
    assert measure(dirty) == {**expected, "outliers": 10 / (10 + sum(LENGTHS))}


def test_left_out_tokens_may_be_infinite():
    images = make((5, 6))
    x, y, _, keep = images[0]
    x[2], y[2], keep[2] = torch.inf, torch.nan, False
    assert measure(images) == pytest.approx(reference(images), rel=1e-9)


def test_an_empty_group_is_nan():
    values = measure(make((0, 0, 0)))
    # The probe makes NaN of `alive` too.
    assert values.pop("tokens") == values.pop("alive") == 0
    assert all(np.isnan(value) for value in values.values()), values


def test_an_image_without_tokens_adds_nothing():
    """LENGTHS has one; without it every metric is the same."""
    images = make(outliers=True)
    sums = sums_of(images)
    assert torch.isnan(sums.means[2]).all()
    assert measure(images) == pytest.approx(measure(images[:2] + images[3:]), rel=1e-14)


def test_a_group_without_variance_has_no_fvu():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = 10 * torch.randn(1, 64, generator=generator).expand(3, 64)
        metric = TokenStats()
        metric.update(x, x + 0.1, torch.ones(3, K), torch.zeros(3, dtype=torch.long), [0])
        assert torch.isnan(reconstruction_metrics(metric.compute())["fvu"])


def _process(rank: int, path: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    images, metric = make(outliers=True), TokenStats()
    for places in ([[0, 2], [4]], [[3, 1]])[rank]:
        add(metric, images, places)
    torch.save(vars(metric.compute()), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Three images here, two there, in another number of calls: bit-equal on both."""
    # As with spawn both are fresh processes, but torch, which is what takes the time, is imported once.
    torch.multiprocessing.set_forkserver_preload(["lightning_limber.probe.token_stats"])
    args = str(tmp_path / "rendezvous"), str(tmp_path / "out")
    torch.multiprocessing.start_processes(_process, args, nprocs=2, start_method="forkserver")
    whole = vars(sums_of(make(outliers=True)))
    for rank in (0, 1):
        sums = torch.load(tmp_path / f"out.{rank}")
        for name, value in whole.items():
            assert torch.equal(sums[name], value), name


# -- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_is_that_of_repeated_images():
    """Row by row the metrics of a data set with each image as often as it was drawn."""
    images = make((9, 4, 0, 12, 7, 3, 8, 5), outliers=True)
    weights = bootstrap_weights(8, 200, seed=0)
    values = reconstruction_metrics(sums_of(images), weights, TEXT_VARIANCE)
    assert set(values) == set(METRICS)
    repeated = [
        reference([image for image, times in zip(images, row, strict=True) for _ in range(int(times))])
        for row in weights.tolist()
    ]
    for name in set(METRICS) - {"alive"}:
        expected = np.array([sample[name] for sample in repeated])
        np.testing.assert_allclose(values[name].numpy(), expected, rtol=1e-9, err_msg=name)
        ends = np.percentile(expected[1:], [2.5, 97.5])
        assert interval(values[name]) == pytest.approx((reference(images)[name], *ends), rel=1e-9), name


def test_ratios_by_image_add_up_to_the_metrics():
    """And a bootstrap of them is that of the metrics, but for the mean of fvu and variance."""
    images = make((9, 4, 0, 12, 7, 3, 8, 5), outliers=True)
    sums, weights = sums_of(images), bootstrap_weights(8, 200, seed=0)
    values = reconstruction_metrics(sums, weights, TEXT_VARIANCE)
    ratios = ratios_by_image(sums, TEXT_VARIANCE)
    assert set(values) - set(ratios) == {"sparsity", "alive", "tokens"}
    expected = reference(images)
    for name, ratio in ratios.items():
        over, under = (weights @ part for part in ratio)
        assert float(over[0] / under[0]) == pytest.approx(expected[name], rel=1e-9), name
        if name not in ("fvu", "variance"):
            torch.testing.assert_close(over / under, values[name], rtol=1e-9, atol=1e-12)
    # Around its own mean a sample varies least.
    over, under = (weights @ part for part in ratios["variance"])
    gain = over[1:] / under[1:] - values["variance"][1:]
    assert gain.min() > -1e-9
    assert gain.mean() > 0.1


def test_interval_covers_the_truth():
    """In 95 of 100 worlds, where images differ more than the tokens of an image do.

    600 worlds of 100 images: 3 standard errors are 2.7 %, and percentile intervals are known to be a
    little short. Intervals over tokens cover 54 % here, 90 % intervals 89 %.
    """
    worlds, images, length = 600, 100, 8
    generator = np.random.default_rng(0)
    row = torch.arange(images).repeat_interleave(length)
    covered = 0
    for world in range(worlds):
        scale = np.repeat(generator.uniform(1, 3, images), length)
        error = torch.tensor(scale * generator.choice([0.9, 1.1], images * length))[:, None]
        metric = TokenStats()
        metric.update(torch.ones_like(error), 1 + error, error, row, range(images))
        _, low, high = interval(
            reconstruction_metrics(metric.compute(), bootstrap_weights(images, 400, world))["mse"]
        )
        # E[u^2] of u uniform on 1..3 is 13/3, and E of .9^2 and 1.1^2 is 1.01.
        covered += low <= 13 / 3 * 1.01 <= high
    assert 0.92 <= covered / worlds <= 0.97
