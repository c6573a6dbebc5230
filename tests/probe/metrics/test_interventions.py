"""Forwards with something replaced, against second computations and perfect and blind SAEs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parts import probe_batches, sae_probe

from lightning_limber.probe.intervention import Intervention
from lightning_limber.probe.metrics.base import Found
from lightning_limber.probe.metrics.loss_recovered import LossRecovered
from lightning_limber.probe.statistics import bootstrap_weights


class Identity(torch.nn.Module):
    """An SAE that reconstructs perfectly."""

    def __init__(self, sae):
        super().__init__()
        self.cfg = sae.cfg

    def encode(self, x):
        self.x = x
        return torch.zeros(len(x), self.cfg.d_sae)

    def decode(self, latents):
        return self.x


def report(cli, saes, monkeypatch, **options):
    callback = sae_probe(cli)
    monkeypatch.setattr(callback.probe, "saes", saes)
    monkeypatch.setattr(callback.probe, "encoders", {name: sae.encode for name, sae in saes.items()})
    return callback.probe.run(probe_batches(cli, 10), probe_batches(cli, 10, interventions=True), **options)


def by_layer(rows, group, metric):
    return [row for row in rows if (row.group, row.metric) == (group, metric)]


def test_a_perfect_sae_does_no_harm(probed, monkeypatch):
    real = sae_probe(probed).probe.saes
    found = report(probed, {name: Identity(sae) for name, sae in real.items()}, monkeypatch).rows
    for group in ("image", "text"):
        assert [row.value for row in by_layer(found, group, "harm_splice")] == pytest.approx(
            [0, 0], abs=1e-6
        )
    use = by_layer(found, "image", "use")
    for recovered, used in zip(by_layer(found, "image", "loss_recovered"), use, strict=True):
        certain = used.value >= 0.1 and used.low > 0
        assert recovered.value == pytest.approx(1 if certain else math.nan, abs=1e-4, nan_ok=True)


def test_interventions_against_a_second_computation(probed, monkeypatch):
    """The residual stream replaced by a hook in a whole forward, one image at a time, in numpy."""
    cli = probed
    model, data = cli.model, cli.datamodule
    found = report(cli, sae_probe(cli).probe.saes, monkeypatch).rows
    monkeypatch.setattr(data, "val_batch_size", 1)
    single = list(data.probe_dataloader(10, interventions=True))
    assert len(single) == 10

    def losses(sequences, tokens, hooks) -> float:
        with model.llm.residual_hooks(hooks):
            hidden = model.decode(sequences, tokens)
        return float(model.target_losses(sequences, hidden)[0].double().sum())

    def replace(positions, new):
        def hook(x):
            flat = x.clone().flatten(0, 1)
            flat[positions] = new(flat[positions])
            return flat.view_as(x)

        return hook

    for name, sae in sae_probe(cli).probe.saes.items():
        layer = sae_probe(cli).probe.layers[name]

        def splice(x, sae=sae):
            return sae.decode(sae.encode(x))

        table = []
        with torch.no_grad():
            for batch in single:
                opening, kept = batch.other.without_captions, []
                with model.llm.residual_hooks({name: kept.append}):
                    model.decode(opening, model.image_tokens(batch.other))
                other = kept[0].flatten(0, 1)[opening.groups["image"][0]]
                places, tokens = batch.groups["image_copies"][0], model.image_tokens(batch)
                text = batch.without_image
                caption = text.groups["caption"][0]
                table.append([
                    losses(batch, tokens, {}),
                    losses(batch, tokens, {name: replace(places, splice)}),
                    losses(batch, tokens, {name: replace(places, lambda x, o=other: o)}),
                    len(batch.labels),
                    losses(text, None, {}),
                    losses(text, None, {name: replace(caption, splice)}),
                ])  # fmt: skip
        clean, spliced, swapped, targets, text, spliced_text = np.array(table).sum(0)
        expected = {
            ("image", "use"): (swapped - clean) / targets,
            ("image", "harm_splice"): (spliced - clean) / targets,
            ("text", "harm_splice"): (spliced_text - text) / targets,
        }
        got = {(row.group, row.metric): row.value for row in found if row.layer == layer}
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, abs=2e-6), key


@pytest.mark.parametrize(
    ("harm", "spread", "known"),
    [(0.5, 0.01, True), (0.09, 0.001, False), (0.5, 5.0, False)],
    ids=["certain", "small", "uncertain"],
)
def test_loss_is_recovered_where_there_is_some_to_recover(harm, spread, known):
    """Against a bootstrap by hand, in numpy."""
    random = np.random.default_rng(0)
    targets = random.integers(5, 20, 40).astype(float)
    clean = random.uniform(1, 2, 40) * targets
    swapped = clean + targets * random.normal(harm, spread, 40)
    spliced = clean + targets * random.normal(0.2, 0.1, 40)
    sums = np.stack([clean, spliced, swapped, targets, clean, clean], axis=-1)
    weights = bootstrap_weights(40, 500, 3)
    by_image = {}

    def add_ratio(metric, group, layer, over, under, items):
        assert (layer, items) == (7, halves)
        by_image[group, metric] = float(over.sum() / under.sum())

    data = SimpleNamespace(
        layers={"hook": 7}, bootstrap_weights=lambda images: weights, add_ratio=add_ratio
    )
    halves = [(list(range(20, 40)), torch.tensor(sums[20:])), (list(range(20)), torch.tensor(sums[:20]))]
    estimates = {
        (e.group, e.metric): e.rows()[0] for e in LossRecovered().compute(data, Found({}, {"hook": halves}))
    }
    got = estimates["image", "loss_recovered"]
    total = np.array([row @ np.stack([clean, spliced, swapped], axis=-1) for row in weights.numpy()])
    samples = (total[:, 2] - total[:, 1]) / (total[:, 2] - total[:, 0])
    expected = [samples[0], *np.quantile(samples[1:], [0.025, 0.975])]
    assert by_image.keys() == estimates.keys()
    assert by_image["image", "loss_recovered"] == pytest.approx(samples[0])
    if not known:
        expected = [math.nan] * 3
    assert [got.value, got.low, got.high] == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert got.layer == 7


def test_tokens_that_do_not_depend_on_the_image_are_of_no_use(probed, monkeypatch):
    monkeypatch.setattr(probed.model, "features", lambda batch: torch.ones(len(batch.image_ids), 4, 24))
    found = report(probed, sae_probe(probed).probe.saes, monkeypatch).rows
    assert [row.value for row in by_layer(found, "image", "use")] == pytest.approx([0, 0], abs=1e-6)
    assert all(math.isnan(row.value) for row in by_layer(found, "image", "loss_recovered"))


def test_text_that_is_known_is_not_computed_again(probed, monkeypatch):
    saes = sae_probe(probed).probe.saes
    probe = sae_probe(probed).probe
    [metric] = [metric for metric in probe.metrics if metric.name == "loss_recovered"]
    monkeypatch.setattr(metric, "_text", {})
    first = report(probed, saes, monkeypatch, same_captions=True).rows
    monkeypatch.setattr(Intervention, "spliced_text_losses", None)
    again = report(probed, saes, monkeypatch, same_captions=True).rows
    assert by_layer(first, "text", "harm_splice") == by_layer(again, "text", "harm_splice")


def test_the_diagonal_of_the_cross_layer_matrix_is_the_probe(probed, monkeypatch):
    found = report(probed, sae_probe(probed).probe.saes, monkeypatch)
    for metric in ("fvu", "l0"):
        for group, suffix in (("image", ""), ("noise", " of noise")):
            own = [row.value for row in by_layer(found.rows, group, metric)]
            table = found.matrices["cross_layer"][metric + suffix]
            assert [table[i][i] for i in range(2)] == pytest.approx(own, rel=1e-5)
            assert table[0][1] != pytest.approx(table[0][0], rel=1e-3)
