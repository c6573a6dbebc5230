"""Image tokens of which it is known what the probe must find."""

from __future__ import annotations

import pytest
import torch
from parts import probe_batches, sae_probe

from lightning_limber.models.image_tokens import ImageTokens


def test_planted_caption_embeddings_look_like_text(probed, monkeypatch):
    """Image tokens that ARE the caption's first embeddings give the `text` curve, within the interval.

    All but the first of them, which does not count as text.
    """
    cli = probed
    model, callback = cli.model, sae_probe(cli)
    first = len(model.collator().prompt.prefix_ids)

    def opening(batch) -> ImageTokens:
        return ImageTokens(model.llm.embed(batch.without_image.input_ids[:, first : first + 4]))

    monkeypatch.setattr(model, "image_tokens", opening)

    def batches():
        for batch in probe_batches(cli, 60):
            # The text group: the same tokens.
            alone = batch.without_image
            positions, rows = alone.groups["caption"]
            kept = alone.position_ids.flatten()[positions] < first + 4
            alone.groups["caption"] = positions[kept], rows[kept]
            positions, rows = batch.groups["image"]
            kept = batch.position_ids.flatten()[positions] > first
            batch.groups["image"] = positions[kept], rows[kept]
            yield batch

    rows = callback.probe.run(batches()).rows
    for metric in ("fvu", "mse", "cosine", "l0", "norm", "rel_error"):
        image, text = (
            [row for row in rows if (row.group, row.metric) == (group, metric)]
            for group in ("image", "text")
        )
        for a, b in zip(image, text, strict=True):
            assert a.value == pytest.approx(b.value, rel=1e-5), metric
            assert a.low <= b.value <= a.high


def test_planted_noise_gives_the_noise_curve(probed, monkeypatch):
    """Ten other draws of the same noise: the control is one more of them, real image tokens are not."""
    model, callback = probed.model, sae_probe(probed)
    own = model.image_tokens
    generator = torch.Generator().manual_seed(1)

    def of_same_norms(tokens: torch.Tensor) -> torch.Tensor:
        random = torch.randn(tokens.shape, generator=generator)
        return random * (tokens.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True))

    def noise(batch) -> ImageTokens:
        return own(batch).filled(of_same_norms)

    def curves(group: str) -> torch.Tensor:
        rows = callback.probe.run(probe_batches(probed, 60)).rows
        metrics = ("fvu", "cosine", "l0", "rel_error")
        return torch.tensor([row.value for row in rows if row.group == group and row.metric in metrics])

    real, control = curves("image"), curves("noise")
    monkeypatch.setattr(model, "image_tokens", noise)
    draws = torch.stack([curves("image") for _ in range(10)])
    assert ((control - draws.mean(0)).abs() < 4 * draws.std(0)).all()
    assert ((real - draws.mean(0)).abs() > 4 * draws.std(0)).any()
