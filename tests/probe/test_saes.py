"""Sparse encoders give the latents of `sae.encode`, whatever the shortcut."""

from __future__ import annotations

import pytest
import torch

from lightning_limber.probe.products import RELATIVE_ERROR, SplitProducts, sae_products
from lightning_limber.probe.screened_encoder import ScreenedEncoder, make_encoder
from lightning_limber.probe.token_stats import active_latents

CPU = torch.device("cpu")


def make_sae(kind: str, d_in: int = 96, d_sae: int = 512, **kwargs):
    """An SAE with random weights on which a few in a hundred latents are active."""
    from sae_lens import (
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

    classes = {
        "standard": (StandardSAE, StandardSAEConfig),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
        "topk": (TopKSAE, TopKSAEConfig),
    }
    sae_class, config_class = classes[kind]
    config = config_class(d_in=d_in, d_sae=d_sae, dtype="float32", device="cpu", **kwargs)
    torch.manual_seed(0)
    sae = sae_class(config).eval().requires_grad_(False)
    sae.W_enc.normal_().mul_(torch.rand(d_sae))  # Rows of many lengths.
    sae.b_enc.normal_().sub_(8 if kind == "standard" else 1)
    sae.b_dec.normal_()[3] = 200  # As a trained SAE's, near the mean of what it sees.
    if kind == "jumprelu":
        sae.threshold.normal_().add_(8)
    return sae


def tokens(n: int = 200, d_in: int = 96) -> torch.Tensor:
    """As in a residual stream: a mean far from zero, norms that differ, one channel that towers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator) * 10
    x[:, 3] += 200
    x[5] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("standard", {}),
        ("jumprelu", {}),
        ("jumprelu", {"normalize_activations": "layer_norm"}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
    ],
)
def test_screened_latents_are_those_of_the_sae(kind, kwargs, dtype):
    sae, x = make_sae(kind, **kwargs), tokens()
    sae.W_enc[:, 7] = 0  # A dead encoder row, whose bias alone decides,
    sae.W_enc[:, 8], sae.b_enc[8] = 0, 100  # and one that is always on.
    expected = sae.encode(x)
    reconstruction = sae.decode(expected)
    assert 0.001 < (expected > 0).double().mean() < 0.5
    assert (expected[:, 8] > 0).all()
    found = ScreenedEncoder(sae, dtype)(x)
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-4, atol=1e-3)
    # None is missed; float32 sums in another order decide the few that stand on their threshold.
    assert ((found.to_dense() > 0) != (expected > 0)).sum() <= 2
    assert torch.equal(active_latents(found), (found.to_dense() > 0).sum(-1).double())
    # Within the rounding of float32 against the longest token.
    atol = 1e-5 * float(reconstruction.norm(dim=-1).max())
    torch.testing.assert_close(sae.decode(found), reconstruction, rtol=1e-4, atol=atol)
    # It is the same SAE as before.
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latents_on_their_threshold_are_computed(dtype):
    """Pre-activations within bfloat16's rounding of the threshold, where its product alone would guess."""
    sae, x = make_sae("jumprelu"), tokens()
    before = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    # For each latent a token just above its threshold and many below.
    sae.threshold.copy_(before.quantile(0.9, dim=0) * (1 - 1e-5)).clamp_(min=0.01)
    expected = sae.encode(x) > 0
    found = ScreenedEncoder(sae, dtype)(x).to_dense() > 0
    assert expected.sum() > 1000
    assert ((found != expected) & ((before / sae.threshold - 1).abs() > 2e-6)).sum() == 0


def test_screening_leaves_most_latents_out():
    """What is computed in float32 is a small multiple of what fires, not the whole matrix."""
    sae, x = make_sae("jumprelu"), tokens()
    sae.threshold.copy_((sae.process_sae_in(x) @ sae.W_enc + sae.b_enc).quantile(0.97, dim=0))
    found = ScreenedEncoder(sae, torch.bfloat16)(x)
    active = (found.values() > 0).sum()
    assert 0.02 * found.numel() < active < len(found.values()) < 2 * active


def test_topk_latents_stay_sparse():
    sae, x = make_sae("topk", k=8), tokens()
    expected, reconstruction = sae.encode(x), sae.decode(sae.encode(x))
    found = make_encoder(sae, CPU)(x)
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), expected)
    assert active_latents(found).tolist() == (expected > 0).sum(-1).tolist()
    torch.testing.assert_close(sae.decode(found), reconstruction, rtol=1e-4, atol=1e-4)


def test_other_devices_encode_densely():
    sae, x = make_sae("jumprelu"), tokens()
    assert torch.equal(make_encoder(sae, torch.device("cuda"))(x), sae.encode(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_token_and_no_active_latent(dtype):
    sae = make_sae("jumprelu")
    none = ScreenedEncoder(sae, dtype)(torch.zeros(0, 96))
    assert (none.shape, sae.decode(none).shape) == ((0, 512), (0, 96))
    sae.threshold.fill_(1e9)
    silent = ScreenedEncoder(sae, dtype)(tokens())
    assert not silent.to_dense().any()
    torch.testing.assert_close(sae.decode(silent), sae.b_dec.expand(200, 96))


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
def test_split_products_are_float32s_within_their_error(kind):
    """Latents and reconstructions are those of exact products, but where a latent is at its threshold."""
    sae = make_sae(kind, **({"k": 8} if kind == "topk" else {}))
    x = tokens()
    exact = sae.encode(x)
    with SplitProducts():
        split = sae.encode(x)
        decoded = sae.decode(exact)
    inside = sae.process_sae_in(x)
    error = RELATIVE_ERROR * inside.norm(dim=1)[:, None] * sae.W_enc.norm(dim=0)  # [n, K]
    assert not torch.equal(split, exact)
    above = inside.double() @ sae.W_enc.double() + sae.b_enc - getattr(sae, "threshold", 0.0)
    if kind == "topk":
        above = above - above.topk(9).values[:, 7:].mean(1, keepdim=True)
    sure = above.abs() > 2 * error
    assert sure.float().mean() > 0.99
    assert ((split > 0) == (exact > 0))[sure].all()
    assert ((split - exact).abs() <= error)[sure].all()
    off = (decoded - sae.decode(exact)).norm(dim=1)
    assert (off <= RELATIVE_ERROR * exact.norm(dim=1) * sae.W_dec.norm()).all()


def test_other_products_stay_what_they_are():
    with SplitProducts():
        for x in (torch.randn(2, 3, 4), torch.randn(3, 4).double(), torch.randn(3, 4).bfloat16()):
            assert torch.equal(x @ x.mT, torch.einsum("...ij,...kj->...ik", x, x))
    with sae_products(CPU):
        x = torch.randn(30, 40)
        assert torch.equal(x @ x.T, torch.mm(x, x.T))
