"""Excess over controls: against numpy, its edges, and a planted truth, which it finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from parts import probe_batches, sae_probe

from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.probe.metrics.excess import LOGARITHM, excess
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.statistics import bootstrap_weights, interval
from lightning_limber.probe.token_stats import ImageStats, TokenStats

D, K, IMAGES, TOKENS = 16, 64, 128, 6


def test_against_numpy():
    generator = torch.Generator().manual_seed(0)
    control, group, text = (
        base + torch.rand(200, generator=generator, dtype=torch.float64) for base in (9, 5, 2)
    )
    c, g, t = (x.numpy() for x in (control, group, text))
    plain, logs = (excess(control, group, text, logarithm).numpy() for logarithm in (False, True))
    np.testing.assert_allclose(plain, (c - g) / (c - t), rtol=1e-6)
    np.testing.assert_allclose(logs, np.log(c / g) / np.log(c / t), rtol=1e-6)


def test_ends_and_what_cannot_be_told_apart():
    control, text = torch.linspace(8, 9, 101).double(), torch.linspace(2, 3, 101).double()
    for logarithm in (False, True):
        assert excess(control, control, text, logarithm).tolist() == [0] * 101
        torch.testing.assert_close(excess(control, text, text, logarithm), torch.ones(101).double())
        # A control that is now above text and now below it: no distance to close.
        assert excess(text, control, text.flip(0), logarithm).isnan().all()


class World:
    """Vectors of a vocabulary, and an SAE with random weights."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary = self._normal(500, D) + self._normal(D)
        self.encoder, self.decoder = self._normal(D, K) / D**0.5, self._normal(K, D) / 4
        # Of each image's tokens, and of the image: as different as real ones.
        norms = 8 * (1 + self._normal(IMAGES, 1).abs()) * (0.5 + self._normal(IMAGES, TOKENS).abs())
        self.norms = norms.flatten()[:, None]

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator)

    def stats(self, long: bool) -> ImageStats:
        """Random words in place of the images, of one norm or of the images' norms."""
        x = self.vocabulary[torch.randint(500, (IMAGES * TOKENS,), generator=self.generator)]
        x = x / x.norm(dim=-1, keepdim=True) * (self.norms if long else 2)
        latents = torch.relu(x @ self.encoder - 1)
        metric = TokenStats()
        metric.update(
            x, latents @ self.decoder, latents, torch.arange(IMAGES * TOKENS) // TOKENS, range(IMAGES)
        )
        return metric.compute()


def coverage(seeds: range, share_of_text: float = 0.0) -> dict[str, float]:
    """How often the interval of the excess of random words over others of the same norms holds 0, where
    there is one.
    """
    held: dict[str, list[bool]] = {metric: [] for metric in ("l0", "fvu_text", "cosine")}
    for seed in seeds:
        world, weights = World(seed), bootstrap_weights(IMAGES, 300, seed)
        control, image, text = (
            reconstruction_metrics(world.stats(long), weights, text_variance=3.0)
            for long in (True, True, False)
        )
        for metric in held:
            group = image[metric] + share_of_text * (text[metric] - image[metric])
            _, low, high = interval(excess(control[metric], group, text[metric], LOGARITHM[metric]))
            if not math.isnan(low):
                held[metric].append(low <= 0 <= high)
    assert min(map(len, held.values())) > 0.7 * len(seeds)  # Where control and text differ.
    return {metric: sum(found) / len(found) for metric, found in held.items()}


def test_random_words_at_the_images_norms_have_no_excess():
    """Nor is it hidden where there is some: a tenth of the way to text is found."""
    # 40 draws of 0.95: below 0.85 once in a hundred times.
    assert min(coverage(range(40)).values()) >= 0.85
    assert max(coverage(range(10), share_of_text=0.3).values()) <= 0.5


@pytest.mark.slow
def test_intervals_of_no_excess_cover_it():
    # Of 200 at 0.95: three standard errors.
    for share in coverage(range(200)).values():
        assert 0.904 <= share <= 0.99


def test_controls_of_the_default_probe(fit):
    """Rows of image tokens over both controls, of a control over the other; direction alone, too."""
    cli = fit("--trainer.max_steps=1", "--probe.metrics=[direction,noise,words_long,told]", probe=True)
    callback = sae_probe(cli)
    rows = {(r.layer, r.group, r.metric): r for r in callback.history[0]}
    found = {(group, metric) for layer, group, metric in rows if metric.startswith("excess")}
    controls = {"noise", "words_long"}
    assert found == {
        (group, f"excess_{metric}_over_{control}")
        for metric in LOGARITHM
        for control in controls
        for group in {"image", "told", *controls} - {control}
    }
    for layer in (0, 2):
        for metric, logarithm in LOGARITHM.items():
            c, g, t = (rows[layer, group, metric].value for group in ("noise", "image", "text"))
            c, g, t = (math.log(x) if logarithm else x for x in (c, g, t))
            value = rows[layer, "image", f"excess_{metric}_over_noise"].value
            assert math.isnan(value) or value == pytest.approx((c - g) / (c - t), rel=1e-6)


def test_direction_against_a_second_computation(fit):
    """Image tokens one by one, scaled to text's median norm, through the SAE's own encode; numpy sums."""
    cli = fit("--trainer.max_steps=1", "--probe.metrics=[direction]", probe=True)
    callback, model = sae_probe(cli), cli.model
    probe = callback.probe
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in probe.saes}
    with torch.no_grad():
        for batch in probe_batches(cli, 10):
            embeds = embed_sequences(model.llm, batch, model.image_tokens(batch))
            hooks = {name: lambda x, n=name: kept[n].append(x[:, 1:5].flatten(0, 1)) for name in probe.saes}
            with model.llm.residual_hooks(hooks):
                model.llm.decode(embeds)
    for name, sae in probe.saes.items():
        text, x = probe.text[name], torch.cat(kept[name])
        x = x[torch.cosine_similarity(x, torch.tensor(text.sink)[None]) <= 0.8] if text.sink else x
        x = x / x.norm(dim=-1, keepdim=True) * text.median_norm
        latents = sae.encode(x)
        error = ((x.double() - sae.decode(latents).double()).numpy() ** 2).sum(1).mean()
        rows = {
            row.metric: row.value
            for row in callback.history[max(callback.history)]
            if (row.layer, row.group) == (probe.layers[name], "image")
        }
        assert rows["direction_l0"] == pytest.approx((latents > 0).sum(1).double().mean().item(), rel=1e-4)
        assert rows["direction_fvu"] == pytest.approx(error / text.variance, rel=1e-4)
