"""The penalty on image tokens: against a second computation, in any layout, and in a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from crash import Crash
from runs import assert_equal, crash_flags, final, scalars

from lightning_limber import load
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.entry import EntryConfig
from lightning_limber.models.limber import Limber
from lightning_limber.models.regularise import RegulariseConfig
from lightning_limber.models.text_moments import text_moments
from lightning_limber.models.vision import VisionConfig
from lightning_limber.utils.checkpoints import read_checkpoint

TEXTS = ["a red circle left of a blue square .", "a small green star above a large cross ."]


def made(models, kind: str, **entry) -> Limber:
    config = RegulariseConfig(0.5, kind, [0, 2], str(models / "saes"), "layer_{layer}")
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    torch.manual_seed(0)
    model = Limber(vision, str(models / "llm"), entry=EntryConfig(**entry), regularise=config)
    model.configure_model()
    model.regulariser.calibrate(model.llm, TEXTS)
    return model


def batch_of(model: Limber, captions: int = 1, **options):
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(3)]
    chosen = [[record.captions[0], "a red cat ."][:captions] for record in records]
    return model.collator()(records, chosen, **options)


def penalty(model: Limber, batch) -> torch.Tensor:
    with model.regulariser.reading(model.llm, batch):
        model(batch)
    return model.regulariser.penalty(batch, model.num_image_tokens)


@pytest.mark.parametrize("kind", ["error", "direction", "norm"])
def test_the_penalty_against_a_second_computation(models, kind):
    """In numpy, an image at a time."""
    model = made(models, kind)
    batch = batch_of(model)
    text = text_moments(model.llm, TEXTS, model.regulariser.hooks)
    total = 0.0
    for image in range(3):
        one = model.collator()([SceneSet("train", 100, 112, 0)[image]], [batch.captions[image]])
        kept: dict[str, torch.Tensor] = {}
        hooks = {hook: partial(kept.__setitem__, hook) for hook in text}
        with torch.no_grad(), model.llm.residual_hooks(hooks):
            model(one)
        of_layers = []
        for hook, sae in zip(text, model.regulariser.saes, strict=True):
            x = kept[hook][0, 1:5].double().numpy()
            tau, variance = float(text[hook].norm), float(text[hook].variance)
            if kind == "norm":
                of_layers.append((np.linalg.norm(x, axis=1) ** 2 / tau**2).mean())
                continue
            if kind == "direction":
                x = tau * x / np.linalg.norm(x, axis=1, keepdims=True)
            weight, bias = sae.W_enc.double().numpy(), sae.b_enc.double().numpy()
            latents = np.maximum((x - sae.b_dec.double().numpy()) @ weight + bias, 0)
            again = latents @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
            of_layers.append((((x - again) ** 2).sum(1) / variance).mean())
        total += batch.label_counts[image] * np.mean(of_layers)
    assert penalty(model, batch).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_rows_do_not_matter(models, share_prefix):
    """Packed, shared or a row each: the same loss and the same gradient."""
    model = made(models, "error")
    gradients, values = [], []
    for options in ({"for_probe": True}, {"share_prefix": share_prefix}):
        model.zero_grad()
        value = penalty(model, batch_of(model, captions=2, **options))
        value.backward()
        values.append(value.item())
        gradients.append(model.adapter.project.weight.grad.clone())
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


def test_text_alone_and_layers_behind(models):
    model = made(models, "norm")
    record = SceneSet("train", 100, 112, 0)[0]
    record.image = None
    batch = model.collator()([record], [["a red cat ."]])
    assert penalty(model, batch).item() == 0
    with pytest.raises(ValueError, match="enter at layer 2 .*not before blocks.0.hook_resid_post"):
        made(models, "norm", layer=2)


def flags(models, weight: float, kind: str = "direction") -> list[str]:
    chosen = {"weight": weight, "kind": kind, "layers": [0, 2], "sae_release": models / "saes"}
    chosen["sae_id"] = "layer_{layer}"
    return [f"--model.regularise.{name}={value}" for name, value in chosen.items()]


def test_weight_0_is_the_baseline_to_the_bit(fit, models):
    fit()
    fit(*flags(models, 0.0))
    assert_equal(*(final(Path(f"runs/default/version_{i}")) for i in (0, 1)))


def test_a_run_learns_it_resumes_and_loads(fit, models):
    options = [*flags(models, 3.0), "--model.adapter.dropout=0.3"]
    fit(*options, *crash_flags("whole"))
    with pytest.raises(Crash):
        fit(*options, *crash_flags("cut", "batch_start", 6))
    fit("--ckpt_path=runs/default/version_1", *crash_flags("cut"), base=False)
    runs = [Path(f"runs/default/version_{i}") for i in (0, 1)]
    assert_equal(*map(final, runs))
    penalties = [value for _, value in scalars(runs[0], "train/penalty")]
    assert penalties[-1] < penalties[0]
    # SAEs are in no checkpoint, and nothing that loads an adapter wants them.
    stored = read_checkpoint(runs[0] / "checkpoints/last.ckpt")["state_dict"]
    assert {name for name in stored if not name.startswith("adapter.")} == {
        f"regulariser.{name}" for name in ("norm", "variance", "calibrated")
    }
    loaded = load(runs[0])
    assert loaded.model.regulariser is None
    assert loaded.config["model"]["regularise"]["weight"] == 3.0
    fit(f"--model.adapter_weights={runs[0]}", "--trainer.max_steps=1")


@pytest.mark.parametrize("kind", ["error", "norm"])
def test_accumulation_weighs_as_one_batch(fit, models, kind):
    """The step of four batches of 4 is that of one of 16."""
    fit(*flags(models, 1.0, kind), "--data.batch_size=16", "--trainer.max_steps=1")
    fit(*flags(models, 1.0, kind), "--trainer.accumulate_grad_batches=4", "--trainer.max_steps=1")
    norms = [scalars(Path(f"runs/default/version_{i}"), "train/grad_norm")[0][1] for i in (0, 1)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
