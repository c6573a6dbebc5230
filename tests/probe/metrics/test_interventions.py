"""Forwards with something replaced, against second computations and perfect and blind SAEs."""

from __future__ import annotations

import math

import pytest
import torch
from parts import probe_batches, sae_probe


class Identity(torch.nn.Module):
    """An SAE that reconstructs perfectly, or (with a constant) always says the same."""

    def __init__(self, sae, constant=None):
        super().__init__()
        self.cfg, self.constant = sae.cfg, constant

    def encode(self, x):
        self.x = x
        return torch.zeros(len(x), self.cfg.d_sae)

    def decode(self, latents):
        return self.x if self.constant is None else self.constant.expand_as(self.x)


def report(cli, saes, monkeypatch):
    callback = sae_probe(cli)
    monkeypatch.setattr(callback.probe, "saes", saes)
    monkeypatch.setattr(callback.probe, "encoders", {name: sae.encode for name, sae in saes.items()})
    return callback.probe.run(probe_batches(cli, 10), probe_batches(cli, 10))


def test_loss_recovered_is_one_for_a_perfect_sae_and_zero_for_the_mean(probed, monkeypatch):
    cli = probed
    probe = sae_probe(cli).probe
    real = probe.saes
    perfect = report(cli, {name: Identity(sae) for name, sae in real.items()}, monkeypatch)
    recovered = [row.value for row in perfect.rows if row.metric == "loss_recovered"]
    # Behind the last layer hardly anything reads image tokens: no harm done, and nothing to recover.
    assert recovered == pytest.approx([1, math.nan], abs=1e-4, nan_ok=True)
    # The group's mean over all images, which is what the ablation puts there.
    kept = {name: [] for name in real}
    index = None
    with torch.no_grad():
        for batch in probe_batches(cli, 10):
            embeds = cli.model.embed_sequences(batch, cli.model.image_tokens(batch))
            index, _ = batch.groups["image"]
            hooks = {name: lambda x, n=name, i=index: kept[n].append(x.flatten(0, 1)[i]) for name in real}
            with cli.model.llm.residual_hooks(hooks):
                cli.model.llm.decode(embeds)
    means = {name: torch.cat(parts).double().mean(0).float() for name, parts in kept.items()}
    blind = report(cli, {name: Identity(sae, means[name]) for name, sae in real.items()}, monkeypatch)
    recovered = [row.value for row in blind.rows if row.metric == "loss_recovered"]
    assert recovered == pytest.approx([0, math.nan], abs=1e-3, nan_ok=True)


def test_loss_recovered_against_a_second_computation(probed, monkeypatch):
    """Residual stream replaced by a hook in a whole forward, one image at a time."""
    cli = probed
    callback, model = sae_probe(cli), cli.model
    probe = callback.probe
    found = [row.value for row in callback.history[1] if row.metric == "loss_recovered"]
    tokens = {name: [] for name in probe.saes}
    batches = [b for b in probe_batches(cli, 10)]
    data = model.trainer.datamodule
    monkeypatch.setattr(data, "val_batch_size", 1)
    single = list(data.probe_dataloader(10))
    assert len(single) == 10

    def loss(batch, hooks) -> float:
        embeds = model.embed_sequences(batch, model.image_tokens(batch))
        with model.llm.residual_hooks(hooks):
            hidden = model.llm.decode(embeds)
        return float(model.target_losses(batch, hidden)[0].double().sum())

    with torch.no_grad():
        for batch in batches:
            for name in tokens:
                loss(batch, {name: lambda x, n=name: tokens[n].append(x[:, 1:5].flatten(0, 1))})
        for name, got in zip(probe.saes, found, strict=True):
            mean, sae = torch.cat(tokens[name]).mean(0), probe.saes[name]

            def replace(by):
                def hook(x):
                    x = x.clone()
                    x[:, 1:5] = by(x[:, 1:5])
                    return x

                return hook

            clean = spliced = ablated = 0.0
            for batch in single:
                clean += loss(batch, {})
                spliced += loss(batch, {name: replace(lambda x, s=sae: s.decode(s.encode(x)))})
                ablated += loss(batch, {name: replace(lambda x, m=mean: m.expand_as(x))})
            if name == "blocks.0.hook_resid_post":
                assert got == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-3, abs=1e-3)
            else:
                assert math.isnan(got)
                assert ablated - clean < 0.01 * clean


def test_the_diagonal_of_the_cross_layer_matrix_is_the_probe(probed, monkeypatch):
    found = report(probed, sae_probe(probed).probe.saes, monkeypatch)
    for metric in ("fvu", "l0"):
        own = [row.value for row in found.rows if (row.group, row.metric) == ("image", metric)]
        table = found.matrices["cross_layer"][metric]
        assert [table[i][i] for i in range(2)] == pytest.approx(own, rel=1e-5)
        assert table[0][1] != pytest.approx(table[0][0], rel=1e-3)
