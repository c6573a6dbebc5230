"""Norm control: exact norms, moments of text, gradients, state, one process and two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_limber.models import norm_control
from lightning_limber.models.norm_control import NormControl

WIDTH = 12


def text_moments(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    mix = torch.randn(width, width) * torch.logspace(0, -1, width)
    return torch.randn(width), mix @ mix.T


def control(kind: str, tokens: Tensor, norm: float = 3.2) -> NormControl:
    torch.manual_seed(1)
    made = NormControl(kind, tokens.shape[-1])
    made.calibrate(norm, *text_moments(tokens.shape[-1]), tokens)
    return made


@pytest.fixture
def tokens() -> Tensor:
    """More tokens than channels, of a mean, with correlated channels of different scales."""
    torch.manual_seed(0)
    return 5 * torch.randn(4, 16, WIDTH) @ torch.randn(WIDTH, WIDTH) + 20 * torch.randn(WIDTH)


def test_none_is_the_identity_and_has_no_state(tokens):
    made = NormControl("none", WIDTH)
    assert made(tokens) is tokens
    made.calibrate(3.2, *text_moments(), tokens)
    assert made(tokens) is tokens
    assert not made.state_dict()


def test_wrong_kind():
    with pytest.raises(ValueError, match="entry.norm='some': allowed are none, fixed, learned, moments"):
        NormControl("some", WIDTH)


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_the_norm_is_exact_and_the_direction_stays(kind, tokens):
    made = control(kind, tokens)
    for scale in (1e-3, 1.0, 1e3):
        found = made(scale * tokens)
        torch.testing.assert_close(found.norm(dim=-1), torch.full((4, 16), 3.2), rtol=1e-6, atol=0)
        torch.testing.assert_close(found / 3.2, tokens / tokens.norm(dim=-1, keepdim=True))


def test_the_learned_scale(tokens):
    made = control("learned", tokens)
    assert [name for name, _ in made.named_parameters()] == ["log_scale"]
    with torch.no_grad():
        made.log_scale.fill_(0.5)
    expected = torch.full((4, 16), 3.2).double() * torch.tensor(0.5).double().exp()
    torch.testing.assert_close(made(tokens).norm(dim=-1).double(), expected, rtol=1e-6, atol=0)
    # d|x| / dg = |x|.
    made(tokens).norm(dim=-1).sum().backward()
    assert made.log_scale.grad.item() == pytest.approx(expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_no_gradient_along_the_token(kind, tokens):
    tokens.requires_grad_()
    (control(kind, tokens.detach())(tokens) * torch.randn(4, 16, WIDTH)).sum().backward()
    along = (tokens.grad * tokens.detach()).sum(-1)
    assert tokens.grad.norm(dim=-1).min() > 1e-3
    assert along.abs().max() < 1e-5 * (tokens.grad.norm(dim=-1) * tokens.detach().norm(dim=-1)).max()


# -- moments ----------------------------------------------------------------------------------------


def moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    rows = tokens.detach().flatten(0, 1)
    return rows.mean(0), rows.T.cov(correction=0)


def test_the_tokens_get_the_moments_of_text(tokens, monkeypatch):
    monkeypatch.setattr(norm_control, "SHRINKAGE", 0.0)
    made = control("moments", tokens).eval()
    torch.manual_seed(1)
    mean, covariance = text_moments()
    found = moments(made(tokens))
    torch.testing.assert_close(found[0], mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], covariance, rtol=1e-3, atol=1e-3)
    assert not dict(made.named_parameters())


@pytest.mark.parametrize("rank", [3, WIDTH])
def test_the_total_variance_is_exact_for_every_rank(rank):
    """A linear adapter writes to D_v of the D_l directions at most."""
    torch.manual_seed(0)
    tokens = torch.randn(4, 16, rank) @ torch.randn(rank, WIDTH) + 1
    made = control("moments", tokens).eval()
    torch.manual_seed(1)
    mean, covariance = text_moments()
    assert (made(tokens) - mean).square().sum(-1).mean().item() == pytest.approx(
        covariance.trace().item(), rel=1e-4
    )


def test_tokens_that_are_like_text_stay(tokens):
    made = NormControl("moments", WIDTH)
    made.calibrate(3.2, *moments(tokens), tokens)
    torch.testing.assert_close(made.eval()(tokens), tokens, rtol=1e-3, atol=1e-2)


def test_the_gradient_is_that_of_the_batchs_own_mean_and_variance(tokens):
    made = control("moments", tokens)
    torch.manual_seed(1)
    mean, covariance = text_moments()
    weight = torch.randn(4, 16, WIDTH)
    found, expected = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    output = made(found)  # Its running moments are those of this batch.
    (output * weight).sum().backward()

    def root(matrix: Tensor) -> Tensor:
        a = norm_control.SHRINKAGE
        return torch.linalg.cholesky((1 - a) * matrix + a * matrix.trace() / WIDTH * torch.eye(WIDTH))

    centred = expected - expected.mean((0, 1))
    coloured = centred @ (root(covariance) @ torch.linalg.inv(root(moments(tokens)[1]))).T.double()
    scale = (covariance.trace() / coloured.square().sum(-1).mean()).sqrt()
    whole = mean + scale * coloured
    (whole * weight).sum().backward()
    torch.testing.assert_close(output.double(), whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-5)
    # Neither a shift nor a longer token is of use.
    gradient = found.grad.flatten(0, 1)
    assert gradient.sum(0).abs().max() < 1e-5 * gradient.abs().sum()
    along = (gradient * (tokens - tokens.mean((0, 1))).flatten(0, 1)).sum()
    assert along.abs() < 1e-5 * gradient.norm() * tokens.norm()


def test_batches_smaller_than_the_width_are_learned_from():
    """Through their covariance the gradient would turn round: the loss would rise."""
    torch.manual_seed(0)
    features = torch.randn(64, 1, WIDTH)
    target = torch.nn.Linear(WIDTH, WIDTH)(features).detach()
    adapter = torch.nn.Linear(WIDTH, WIDTH)
    made = NormControl("moments", WIDTH)
    made.calibrate(1.0, *moments(target), adapter(features).detach())

    def loss(rows: slice) -> Tensor:
        return (made(adapter(features[rows])) - target[rows]).square().mean()

    made.eval()
    before = loss(slice(None)).item()
    optimizer = torch.optim.SGD(adapter.parameters(), 0.05)
    made.train()
    for step in range(160):
        first = 4 * step % 64
        optimizer.zero_grad()
        loss(slice(first, first + 4)).backward()
        optimizer.step()
    made.eval()
    assert loss(slice(None)).item() < 0.3 * before


def test_running_moments(tokens):
    """Plain means at first, then a window; evaluation changes nothing."""
    made = control("moments", tokens)
    batches = [tokens, tokens + 1, 2 * tokens]
    for batch in batches[1:]:
        made(batch)
    rows = torch.cat(batches).flatten(0, 1).double()
    running = made.moments.running.double()
    torch.testing.assert_close(running[-1, :-1], rows.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(running[:-1, :-1], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-2)
    assert running[-1, -1] == 1
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.eval()(3 * tokens)
    made.train()(tokens[:0])  # A step without images.
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.moments.batches.fill_(1000)
    made(tokens)
    first = tokens.flatten(0, 1).double()
    expected = running[-1, :-1].lerp(first.mean(0), norm_control.MOMENTUM)
    torch.testing.assert_close(made.moments.running[-1, :-1].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one(count, tokens):
    """Text alone gives a gradient of zero, and so does one token, which is its own mean."""
    made, adapter = control("moments", tokens), torch.nn.Linear(WIDTH, WIDTH)
    (made(adapter(tokens[:1, :count])) * torch.randn(WIDTH)).sum().backward()
    for parameter in adapter.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "learned", "moments"])
def test_precision(kind, tokens):
    """What autocast makes of the tokens, and Lightning's 64-true."""
    made = control(kind, tokens)
    expected = made(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(tokens.bfloat16()), expected, rtol=0.05, atol=0.2)
    # Moments give rounding back as many times as large as the condition of S_, which is at most D / a.
    rtol = WIDTH / norm_control.SHRINKAGE * torch.finfo(torch.float32).eps if kind == "moments" else None
    found = control(kind, tokens).double()(tokens.double()).float()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", ["fixed", "learned", "moments"])
def test_state_goes_on_bit_equal(kind, tokens):
    made = control(kind, tokens)
    made(tokens + 1)
    again = NormControl(kind, WIDTH)
    again.load_state_dict(made.state_dict())
    for step in range(2):
        assert torch.equal(made(tokens + step), again(tokens + step))
    assert torch.equal(made.eval()(tokens), again.eval()(tokens))


def _share(rank: int, folder: str, world_size: int) -> None:
    """Value, gradient and state of one process' share of a batch of 4 images."""
    if world_size > 1:
        meet = f"file://{folder}/meet"
        torch.distributed.init_process_group("gloo", meet, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    images = torch.randn(4, 16, WIDTH) @ torch.randn(WIDTH, WIDTH)
    made = control("moments", images)
    weight = torch.randn(4, 16, WIDTH)
    # The first process has three of the images, then none.
    for step, cut in enumerate((3, 0)):
        share = slice(None) if world_size == 1 else (slice(0, cut) if rank == 0 else slice(cut, 4))
        batch = (images + step)[share].clone().requires_grad_()
        output = made(batch)
        (output * weight[share]).sum().backward()
        torch.save(
            [output.detach(), batch.grad, made.moments.running], f"{folder}/{world_size}.{rank}.{step}"
        )
    if world_size > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    _share(0, str(tmp_path), 1)
    torch.multiprocessing.spawn(_share, (str(tmp_path), 2), nprocs=2)
    for step in range(2):
        output, gradient, running = torch.load(tmp_path / f"1.0.{step}")
        first, second = (torch.load(tmp_path / f"2.{rank}.{step}") for rank in (0, 1))
        assert torch.equal(first[2], second[2])
        torch.testing.assert_close(first[2], running, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([first[0], second[0]]), output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([first[1], second[1]]), gradient, rtol=1e-3, atol=1e-4)
