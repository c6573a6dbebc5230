"""Held-out loss: a mean over all labels, its bootstrap by hand, and no trace of batches and processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_limber.models.held_out import HeldOut, in_words
from lightning_limber.utils.bootstrap import bootstrap_weights, resampled_sums


def make(images: int = 9) -> list[dict[str, np.ndarray]]:
    """Losses and hits of each image's labels, in float32; some have no label of another's caption."""
    draw = np.random.default_rng(0)
    return [
        {
            "loss": draw.gamma(2, 1, 3 + i % 4).astype(np.float32),
            "correct": draw.random(3 + i % 4) < 0.4,
            "shuffled": draw.gamma(3, 1, i % 3).astype(np.float32),
        }
        for i in range(images)
    ]


def add(metric: HeldOut, images: list[dict[str, np.ndarray]], places: list[int]) -> None:
    """One batch of these images."""
    chosen = [images[i] for i in places]
    own, other = ([len(image[name]) for image in chosen] for name in ("loss", "shuffled"))
    losses = np.concatenate([image[name] for name in ("loss", "shuffled") for image in chosen])
    correct = np.concatenate([image["correct"] for image in chosen] + [np.ones(sum(other), dtype=bool)])
    rows = np.concatenate([np.repeat(np.arange(len(chosen)), counts) for counts in (own, other)])
    batch = SimpleNamespace(index=places, label_images=torch.tensor(rows), own_labels=sum(own))
    metric.update(batch, torch.tensor(losses), torch.tensor(correct))


def found_of(images: list[dict[str, np.ndarray]], batches: list[list[int]]):
    metric = HeldOut()
    for places in batches:
        add(metric, images, places)
    return metric.compute()


def reference(images: list[dict[str, np.ndarray]]) -> dict[str, float]:
    loss, correct, shuffled = (
        np.concatenate([image[name].astype(np.float64) for image in images])
        for name in ("loss", "correct", "shuffled")
    )
    return {
        "loss": loss.mean(),
        "loss_shuffled": shuffled.mean(),
        "perplexity": np.exp(loss.mean()),
        "accuracy": correct.mean(),
    }


def test_scores_are_those_of_repeated_images():
    images = make()
    scores = found_of(images, [[0, 1, 2, 3], [4, 5, 6, 7, 8]]).scores
    samples = [
        reference([image for image, times in zip(images, row, strict=True) for _ in range(int(times))])
        for row in bootstrap_weights(9, 1000, 0).tolist()
    ]
    assert list(scores) == ["loss", "loss_shuffled", "perplexity", "accuracy"]
    for name, found in scores.items():
        ends = np.percentile([sample[name] for sample in samples[1:]], [2.5, 97.5])
        assert found == pytest.approx((reference(images)[name], *ends), rel=1e-12), name


def test_batches_leave_no_trace():
    images = make()
    whole = found_of(images, [list(range(9))])
    assert whole.index.tolist() == list(range(9))
    for batches in ([[i] for i in range(9)], [[7, 8], [2, 0, 5], [1, 3, 4, 6]]):
        split = found_of(images, batches)
        assert torch.equal(split.index, whole.index)
        assert torch.equal(split.sums, whole.sums)


def _process(rank: int, path: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = found_of(make(), ([[0, 2, 4, 6], [8]], [[1, 3, 5, 7]])[rank])
    torch.save({"index": found.index, "sums": found.sums}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.set_forkserver_preload(["lightning_limber.models.held_out"])
    args = str(tmp_path / "rendezvous"), str(tmp_path / "out")
    torch.multiprocessing.start_processes(_process, args, nprocs=2, start_method="forkserver")
    whole = found_of(make(), [list(range(9))])
    for rank in (0, 1):
        found = torch.load(tmp_path / f"out.{rank}")
        assert torch.equal(found["index"], whole.index)
        assert torch.equal(found["sums"], whole.sums)


def test_a_bootstrap_in_little_memory_is_the_same():
    sums = torch.rand(37, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = bootstrap_weights(37, 50, 3) @ sums
    torch.testing.assert_close(resampled_sums(sums, 50, 3), expected, rtol=1e-13, atol=0)


def test_the_printed_line():
    assert in_words({"loss": (0.338, 0.31, 0.37)}) == "loss 0.338 [0.31, 0.37]"
