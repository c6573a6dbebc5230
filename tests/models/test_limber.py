"""The module: its loss against the LLM's own, what is frozen, what learns, what is never counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from runs import scalars
from scenes import mixed_records

from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.adapters.spec import adapter_spec
from lightning_limber.models.generation import Decoding
from lightning_limber.models.limber import Limber
from lightning_limber.models.optimizer import OptimizerConfig, lr_factor
from lightning_limber.models.vision import VisionConfig, VisionEncoder


@pytest.fixture
def model(models) -> Limber:
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    module = Limber(vision=vision, llm=str(models / "llm"), max_caption_tokens=20)
    module.configure_model()
    return module


def batch_of(model: Limber, count: int = 4, captions: int = 1):
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(count)]
    chosen = [[record.captions[0], "a red cat ."][:captions] for record in records]
    return model.collator()(records, chosen)


def sequence_of_labels(batch) -> torch.Tensor:
    """[n] which sequence each label is of."""
    return torch.arange(len(batch.label_counts)).repeat_interleave(torch.tensor(batch.label_counts))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_loss_is_the_llms_own_on_the_caption(models, tmp_path, architecture):
    """Against transformers' full forward and loss, a sequence at a time, without padding."""
    name = tiny.write_llm(tmp_path, architecture)
    model = Limber(vision=VisionConfig(str(models / "vision"), image_size=32, pool=2), llm=name)
    model.configure_model()
    batch = batch_of(model)
    image_tokens, losses, correct = model(batch)
    assert len(losses) == len(correct) == len(batch.labels) == sum(batch.label_counts)
    expected, prompt = [], model.collator().prompt
    for row in range(4):
        ids, _, is_target, _ = prompt.text(batch.captions[row][0])
        prefix, text = (model.llm.embed(torch.tensor(ids)) for ids in (prompt.prefix_ids, ids))
        embeds = torch.cat([prefix, image_tokens.tokens[row], text])
        labels = torch.full((len(embeds),), -100)
        labels[-len(ids) :] = torch.tensor(ids).where(torch.tensor(is_target), torch.tensor(-100))
        output = model.llm.model(inputs_embeds=embeds[None], labels=labels[None])
        expected.append(output.loss * batch.label_counts[row])
    torch.testing.assert_close(losses.sum(), torch.stack(expected).sum(), rtol=1e-5, atol=1e-5)


def test_several_captions_of_an_image_are_sequences_of_their_own(model):
    whole = batch_of(model, 3, captions=2)
    rows = sequence_of_labels(whole)
    assert whole.label_images.tolist() == (rows // 2).tolist()
    _, losses, _ = model(whole)
    _, single, _ = model(batch_of(model, 3))
    torch.testing.assert_close(losses[rows % 2 == 0], single, rtol=1e-5, atol=1e-5)


def test_padding_does_not_change_a_sequence(model):
    batch = batch_of(model, 4)
    _, losses, _ = model(batch)
    for row in range(4):
        alone = model.collator()([SceneSet("train", 100, 112, 0)[row]], [batch.captions[row]])
        _, expected, _ = model(alone)
        mine = losses[sequence_of_labels(batch) == row]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_groups_hold_image_and_caption_tokens_only(model):
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(2)]
    batch = model.collator()(records, [record.captions for record in records], for_probe=True)
    width = batch.input_ids.shape[1]
    (image, of_image), (caption, of_caption) = batch.groups["image"], batch.groups["caption"]
    assert image.tolist() == [1, 2, 3, 4, *(width + i for i in (1, 2, 3, 4))]  # After BOS; a 2x2 grid.
    assert of_image.tolist() == [0] * 4 + [1] * 4
    words = len(batch.captions[0][0].replace(".", " .").split())
    # Without its first token, which is no datum where there is no image, and without the end token.
    assert caption[of_caption == 0].tolist() == list(range(6, 5 + words))
    text = batch.without_image
    assert len(text.groups["image"][0]) == 0
    assert text.groups["caption"][1].tolist() == of_caption.tolist()
    assert text.groups["caption"][0][: words - 1].tolist() == list(range(2, 1 + words))
    assert text.groups["prompt"][0][: words + 1].tolist() == list(range(1, 2 + words))  # With EOS.
    opening = batch.without_captions
    assert opening.input_ids.tolist() == batch.input_ids[:, :5].tolist()
    assert opening.groups["image"][0].tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert opening.groups["image"][1].tolist() == of_image.tolist()
    assert opening.image_rows.tolist() == batch.image_rows.tolist()
    assert not len(opening.labels)


def test_an_image_with_several_captions_counts_once(model):
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(2)]
    chosen = [["a red cat .", "two"], ["one"]]
    batch = model.collator()(records, chosen, for_probe=True)
    assert batch.groups["image"][1].tolist() == [0] * 4 + [1] * 4
    assert batch.groups["image_copies"][1].tolist() == [0] * 8 + [1] * 4
    assert batch.groups["caption"][1].tolist() == [0] * 3  # Of each caption all but the first word.
    assert batch.without_captions.input_ids.shape == (2, 5)


def test_the_first_position_is_never_counted(models):
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    model = Limber(vision=vision, llm=str(models / "llm"), prompt="{image}{caption}{eos}")
    model.configure_model()
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(2)]
    batch = model.collator()(records, [record.captions for record in records], for_probe=True)
    width = batch.input_ids.shape[1]
    assert batch.groups["image"][0].tolist() == [1, 2, 3, *(width + i for i in (1, 2, 3))]
    text = batch.without_image
    positions = text.position_ids.flatten()[text.groups["caption"][0]]
    assert positions[0] == 1
    assert (positions > 0).all()


def test_validation_reads_both_captions_and_encodes_the_image_once(model):
    records = [SceneSet("train", 100, 112, 0)[i] for i in range(3)]
    own, other = [record.captions for record in records], [["two"], ["a red cat ."], ["dog"]]
    batch = model.collator()(records, own, other_captions=other)
    assert len(batch.pixel_values) == 3
    assert batch.own_labels == sum(batch.label_counts[:3])
    assert batch.label_counts[3:] == [2, 5, 2]  # With their end tokens.
    _, losses, _ = model(batch)
    for captions, found in ((own, losses[: batch.own_labels]), (other, losses[batch.own_labels :])):
        _, expected, _ = model(model.collator()(records, captions))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_frozen_parts_are_outside_the_module_tree(model):
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"adapter"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"adapter"}
    model.train()
    assert not model.vision.training
    assert not model.llm.model.training
    optimizer = model.configure_optimizers()["optimizer"]
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model.adapter.parameters()}
    model.double()  # But they move with the module.
    assert next(model.llm.parameters()).dtype == torch.float64


def test_gradient_reaches_the_adapter_only(model):
    _, losses, _ = model(batch_of(model))
    losses.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter.parameters())
    assert all(p.grad is None for part in (model.vision, model.llm) for p in part.parameters())


def weights_hash(*modules: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_frozen_weights_are_bit_identical_after_training(fit, models):
    fresh = Limber(vision=VisionConfig(str(models / "vision"), image_size=32), llm=str(models / "llm"))
    fresh.configure_model()
    before = weights_hash(fresh.vision, fresh.llm)
    cli = fit()
    assert weights_hash(cli.model.vision, cli.model.llm) == before


def test_adapter_does_not_depend_on_what_loading_draws(models, monkeypatch):
    def built(draws: int) -> torch.Tensor:
        torch.manual_seed(7)
        module = Limber(vision=VisionConfig(str(models / "vision"), image_size=32), llm=str(models / "llm"))
        load = module.llm.load
        monkeypatch.setattr(module.llm, "load", lambda: (torch.rand(draws), load())[1])
        module.configure_model()
        return module.adapter.project.weight

    assert torch.equal(built(1), built(5))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_gradients_are_clipped_and_their_norm_is_logged(fit, monkeypatch, precision, algorithm):
    """As Lightning would, had the optimiser not been fused; and with the norm from before the clipping."""
    seen = []
    clip = Limber.configure_gradient_clipping

    def spy(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        grads = [p.grad.clone() for p in self.adapter.parameters()]
        clip(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        seen.append((grads, [p.grad.clone() for p in self.adapter.parameters()]))

    monkeypatch.setattr(Limber, "configure_gradient_clipping", spy)
    flags = [f"--trainer.precision={precision}", "--trainer.max_steps=1"]
    if algorithm is None:
        cli = fit(*flags, "--trainer.gradient_clip_val=null")
    else:
        cli = fit(
            *flags, "--trainer.gradient_clip_val=0.001", f"--trainer.gradient_clip_algorithm={algorithm}"
        )
    assert all(group["fused"] for group in cli.trainer.optimizers[0].param_groups)
    [(before, after)] = seen
    total = torch.cat([grad.flatten() for grad in before]).norm()
    assert cli.trainer.callback_metrics["train/grad_norm"] == pytest.approx(float(total), rel=1e-6)
    assert total > 0.01
    for a, b in zip(before, after, strict=True):
        expected = {"norm": a * 0.001 / (total + 1e-6), "value": a.clamp(-0.001, 0.001), None: a}[algorithm]
        torch.testing.assert_close(b, expected, rtol=1e-5, atol=0)


def test_learning_rate_schedule():
    config = OptimizerConfig(warmup_steps=4, total_steps=12, min_lr_ratio=0.1)
    factors = [lr_factor(step, config) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.55)
    assert factors[12:] == pytest.approx([0.1, 0.1])


def test_image_must_fit_the_context(models, tmp_path):
    vision = VisionConfig(str(models / "vision"), image_size=96)
    model = Limber(vision=vision, llm=str(models / "llm"))  # 144 image tokens, 128 positions.
    with pytest.raises(ValueError, match="144 image tokens and captions of 64 do not fit the 128"):
        model.configure_model()


def test_generation_is_the_llms_own_greedy_continuation(model):
    batch = batch_of(model, 2)
    image_tokens = model.image_tokens(batch)
    written = [caption.text for caption in model.generate(image_tokens, Decoding(max_new_tokens=5))]
    prefix = model.llm.embed(torch.tensor(model.collator().prompt.prefix_ids))
    embeds = torch.cat([prefix.expand(2, -1, -1), image_tokens.tokens], dim=1)
    for row in range(2):
        sequence, ids = embeds[row : row + 1], []
        for _ in range(5):
            token = model.llm.model(inputs_embeds=sequence).logits[0, -1].argmax()
            if token == model.llm.tokenizer.eos_token_id:
                break
            ids.append(int(token))
            sequence = torch.cat([sequence, model.llm.embed(token[None, None])], dim=1)
        assert written[row] == model.llm.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_the_adapter_survives_the_hyper_parameters(model):
    again = Limber(**model.hparams)
    assert adapter_spec(again.make_adapter) == adapter_spec(model.make_adapter) == model.hparams["adapter"]
    assert again.vision.config == model.vision.config


# -- text without an image --------------------------------------------------------------------------


def test_text_alone_in_a_batch_is_the_llms_own_loss(model):
    """Rows without an image are [prefix | text], and leave the others as they are."""
    records, captions = mixed_records()
    batch = model.collator()(records, captions)
    of_sequence = torch.tensor([0, -1, -1, 1])
    assert batch.label_images.tolist() == of_sequence[sequence_of_labels(batch)].tolist()
    assert len(batch.pixel_values) == len(batch.captions) == 2
    assert len(batch.image_positions) == len(batch.image_rows) == 8
    _, losses, _ = model(batch)
    for row in range(4):
        alone = model.collator()([records[row]], [captions[row]])
        _, expected, _ = model(alone)
        mine = losses[sequence_of_labels(batch) == row]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
        if row in (1, 2):
            ids = alone.input_ids
            labels = ids.clone()
            labels[:, : len(model.collator().prompt.prefix_ids)] = -100
            output = model.llm.model(input_ids=ids, labels=labels)
            torch.testing.assert_close(mine.mean(), output.loss, rtol=1e-5, atol=1e-5)


def test_text_alone_gives_the_adapter_a_gradient_of_zero(model):
    """DDP waits for every parameter's gradient, also in a process whose share has no image."""
    records, captions = mixed_records()
    batch = model.collator()(records[1:3], captions[1:3])
    image_tokens, losses, _ = model(batch)
    (losses.sum() + image_tokens.nothing()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.adapter.parameters())


def test_all_captions_cut_stops_the_run(fit):
    with pytest.raises(ValueError, match="model.max_caption_tokens=2 cuts all of the first 16 captions"):
        fit("--model.max_caption_tokens=2")


# -- captions that share their image ----------------------------------------------------------------


@pytest.mark.parametrize("architecture", list(tiny.llm_configs()))
@pytest.mark.parametrize("template", ["{bos}{image}{caption}{eos}", "{image}describe {caption}{eos}"])
def test_captions_that_share_an_image_lose_what_they_lose_alone(models, tmp_path, architecture, template):
    """Every token's loss and the adapter's gradient, with records of 1, 2 and 3 captions, and no image."""
    name = tiny.write_llm(tmp_path, architecture)
    vision = VisionConfig(str(models / "vision"), image_size=32, pool=2)
    model = Limber(vision=vision, llm=name, prompt=template)
    model.configure_model()
    records, _ = mixed_records()
    captions = [[r.captions[0], "a red cat .", "a dog ."][: 1 + i % 3] for i, r in enumerate(records)]
    found = []
    for share in (True, False):
        batch = model.collator()(records, captions, share_prefix=share)
        assert len(batch.label_counts) == (4 if share else 7)
        model.zero_grad()
        _, losses, correct = model(batch)
        losses.mean().backward()
        # Both in order of records and captions.
        found.append([losses.detach(), correct, *(p.grad.clone() for p in model.adapter.parameters())])
    for shared, apart in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)


def test_shared_sequences_are_masked_and_numbered(model):
    records, _ = mixed_records()
    batch = model.collator()(records[:1], [["a red cat .", "two"]], share_prefix=True)
    # BOS, 4 image tokens, 5 + 2 caption and end tokens.
    assert batch.position_ids[0].tolist() == [*range(10), 5, 6]
    assert batch.caption_ids[0].tolist() == [0] * 5 + [1] * 5 + [2] * 2
    # Position t predicts token t + 1; the first of each caption is predicted from the last image token.
    assert batch.label_positions.tolist() == [4, 5, 6, 7, 8, 4, 10]
    sees = [row.nonzero()[:, 0].tolist() for row in batch.row_mask().dense()[0, 0]]
    assert sees[9] == list(range(10))
    assert sees[10] == [0, 1, 2, 3, 4, 10]
    assert sees[11] == [0, 1, 2, 3, 4, 10, 11]


def test_a_sliding_window_that_is_too_short_is_named(models, tmp_path):
    name = tiny.write_llm(tmp_path, "gemma3")
    model = Limber(vision=VisionConfig(str(models / "vision"), image_size=32, pool=2), llm=name)
    model.configure_model()
    model.llm.longest_row = 8
    records, _ = mixed_records()
    batch = model.collator()(records[:1], [["a red cat .", "two"]], share_prefix=True)
    with pytest.raises(ValueError, match="window of .*, 8: set data.share_prefix to false"):
        model(batch)


# -- speed that changes no number -------------------------------------------------------------------


def test_cached_features_spare_the_encoder_and_change_no_number(fit, monkeypatch, tmp_path):
    from lightning_limber.models.vision import VisionEncoder

    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    forward, calls = VisionEncoder.forward, []

    def counted(self, pixels):
        calls.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(VisionEncoder, "forward", counted)
    weights, seen = [], []
    for cached in ("false", "true", "true"):
        calls.clear()
        cli = fit(f"--model.cache_features={cached}", "--trainer.limit_val_batches=0")
        weights.append(cli.model.adapter.project.weight.detach().clone())
        seen.append(sum(calls) - 1 - 16)  # The blank image of building, and calibration.
    # 12 steps of 4 images; 16 images; the third run finds them all.
    assert seen == [48, 16, 0]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[2], weights[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_layers_change_no_number(fit, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # Others would import torch anew.
    weights = [
        fit(
            f"--model.compile_llm={compiled}", "--trainer.max_steps=3", "--captions.num_images=0"
        ).model.adapter.project.weight.detach()
        for compiled in ("false", "true")
    ]
    assert not torch.equal(*weights)  # It did something.
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_no_compiler(fit, monkeypatch):
    def compile_nothing(_function):
        raise RuntimeError("no C++ compiler was found\n\nmuch more")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(ValueError, match=r"cannot compile here \(no C\+\+ compiler was found\)\. On a CPU"):
        fit("--model.compile_llm=true")


@pytest.mark.parametrize("encoder", ["dinov2", "resnet"])
def test_bf16_autocast_runs_the_same_experiment(fit, tmp_path, encoder):
    flags = [f"--model.vision.name={tiny.write_vision(tmp_path, encoder)}", "--model.vision.pool=1"]
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        cli = fit(f"--trainer.precision={precision}", "--trainer.max_steps=4", *flags, probe=True)
        losses.append(float(cli.trainer.callback_metrics["val/loss"]))
    assert cli.model.llm.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# -- features of held-out images --------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_a_held_out_image_is_encoded_once_in_a_run(fit, monkeypatch, budget):
    """Two validations with their control, three probes of two passes and the captions share it."""
    seen: Counter[bytes] = Counter()
    encode = VisionEncoder.forward

    def counted(self, pixels):
        seen.update(image.numpy().tobytes() for image in pixels)
        return encode(self, pixels)

    monkeypatch.setattr(VisionEncoder, "forward", counted)
    flags = ["--trainer.max_steps=8", f"--model.held_out_features_gb={budget}", "--captions.num_images=10"]
    cli = fit(*flags, probe=True)
    held_out = cli.datamodule.val_set
    pixels = [cli.model.vision.transform(held_out[i].image) for i in range(len(held_out))]
    times = [seen[image.numpy().tobytes()] for image in pixels]
    assert set(times) == {1} if budget else min(times) >= 7  # Some stand in for others besides.


def test_accumulated_batches_weigh_by_their_tokens(fit):
    """With a learning rate of 0 the gradient of 4 batches of 4 images is that of one batch of 16; and where
    the end of an epoch cuts a step short, that of the batches that it has.
    """
    norms = []
    for size, parts in ((16, 1), (4, 4), (4, 1), (4, 3)):
        flags = [f"--data.batch_size={size}", f"--trainer.accumulate_grad_batches={parts}"]
        cli = fit(*flags, "--model.optimizer.lr=0", "--trainer.max_steps=4", "--captions.num_images=0")
        norms.append([value for _, value in scalars(Path(cli.trainer.log_dir), "train/grad_norm")])
    whole, four, each, three = norms
    assert four == pytest.approx(whole, rel=1e-5)
    assert three[1] == pytest.approx(each[3], rel=1e-5)  # The epoch's fourth batch alone.
    assert three[0] != pytest.approx(each[0], rel=1e-3)
