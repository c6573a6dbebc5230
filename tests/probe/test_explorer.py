"""What the explorer sees of single tokens is what the probe measures of all, and its file gives it back."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from parts import probe_batches, sae_probe

from lightning_limber.models.limber import Limber
from lightning_limber.models.saes import load_saes
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.explorer import bank_of, explore, look, text_contexts
from lightning_limber.probe.explorer_file import (
    believed,
    decode,
    encode,
    in_context,
    keep_ends,
    pack,
    read_explorer,
    write_explorer,
)
from lightning_limber.probe.metrics.neighbours import read_places
from lightning_limber.probe.passes import Probe
from lightning_limber.probe.tables import Row


@pytest.fixture(scope="module")
def explored(probed):
    return explore(sae_probe(probed).probe, probe_batches(probed, 10))


def test_means_over_tokens_are_the_probes(probed, explored):
    """Of the same images: what is counted, active latents, the SAE's error and the norm."""
    probe = sae_probe(probed).probe
    rows = probe.run(probe_batches(probed, 10)).rows
    found = {(row.layer, row.group, row.metric): row.value for row in rows}
    for group in ("image", "words_long"):
        seen = explored.seen[group]
        for i, (hook, layer) in enumerate(probe.layers.items()):
            keep = seen["counted"][:, i]
            norm = seen["norm"][:, i] * probe.text[hook].median_norm
            means = {"l0": seen["l0"][:, i].double(), "fvu_text": seen["fvu_text"][:, i], "norm": norm}
            for metric, values in means.items():
                mean = float(values[keep].double().mean())
                assert mean == pytest.approx(found[layer, group, metric], rel=1e-4), (group, layer, metric)
            assert found[layer, group, "tokens"] == int(keep.sum())


def test_what_is_strongest(probed, explored):
    """Latents as `Probe.latents` has them, the lens as the whole vocabulary's softmax, and the first
    neighbour as the metric's.
    """
    cli, probe = probed, sae_probe(probed).probe
    [batch] = list(probe_batches(cli, 4))
    with torch.no_grad():
        tokens = cli.model.image_tokens(batch)
        latents, residuals = {}, {}
        probe.latents(tokens, latents.__setitem__)
        sequences = batch.without_captions
        probe.read_image(sequences, tokens, lambda name, residual, _: residuals.update({name: residual}))
        found = look(probe, sequences, tokens, bank_of(probe))
    for name, seen in found.items():
        for field in ("latent", "activation", "piece", "p", "place"):
            assert seen[field].shape[:2] == (4, 4)
        counted = seen["counted"]
        best = latents[name].nan_to_num().topk(5, dim=-1)
        assert torch.equal(seen["activation"][counted], best.values[counted])
        assert counted.logical_not().sum() == latents[name].isnan().any(-1).sum()
        with torch.no_grad():
            hidden = probe.model.llm.model.base_model.norm(residuals[name])
            p = (hidden @ probe.model.llm.embedding.weight.T).softmax(-1).topk(3)
        torch.testing.assert_close(seen["p"].flatten(0, 1), p.values)
        assert torch.equal(seen["piece"].flatten(0, 1), p.indices)
        assert torch.equal(seen["place"][..., 0].flatten(), bank_of(probe).nearest(residuals[name]))
        start = tokens.tokens.flatten(0, 1)
        cosine = torch.cosine_similarity(residuals[name], start).view(4, 4)
        torch.testing.assert_close(seen["cos_start"], cosine)


def test_the_file_gives_back_what_was_seen(probed, explored, tmp_path):
    callback = sae_probe(probed)
    probe, path = callback.probe, tmp_path / "explorer_epoch_1.gz"
    seen = {group: {f: v.clone() for f, v in of.items()} for group, of in explored.seen.items()}
    first = explored.names[0]
    write_explorer(path, probe, explored, callback.history[1], {first: "a blue star", "other": "a cat"})
    head, arrays = read_explorer(path)
    assert explored.control == head["control"] == "words_long"
    assert head["layers"] == [0, 2]
    assert tuple(head["grid"]) == (2, 2)
    assert [image["name"] for image in head["images"]] == explored.names
    bank, tokenizer, pieces = bank_of(probe), probe.model.llm.tokenizer, head["pieces"]["texts"]
    spots, layers = head["neighbours"]["spots"], head["neighbours"]["layers"]
    for group, of in seen.items():
        got = {field: arrays[f"{group}/{field}"] for field in of}
        for field in ("norm", "fvu_text", "p"):
            np.testing.assert_allclose(got[field], of[field], rtol=0.05)
        np.testing.assert_allclose(got["cosine"], of["cosine"], atol=1 / 250)
        for field in ("l0", "counted"):
            assert np.array_equal(got[field], of[field])
        for place in np.ndindex(*of["latent"].shape):
            if of["activation"][place] > 0:
                assert head["latents"][place[1]]["ids"][got["latent"][place]] == of["latent"][place]
            else:
                assert got["activation"][place] == 0
        for place in np.ndindex(*of["piece"].shape):
            assert pieces[got["piece"][place]] == tokenizer.decode([of["piece"][place]])
            layer, token = divmod(int(of["place"][place]), len(bank.contexts))
            number, spot = divmod(int(got["place"][place]), len(spots))
            assert layers[number] == bank.layers[layer]
            assert spots[spot][1].lower() == bank.vocabulary[bank.word_of[token]]
            assert spots[spot][1] in bank.contexts[token]
    words, images = head["words"], head["images"]
    assert [image["written"] and image["written"][0] for image in images] == ["a blue star"] + [None] * 9
    assert "blue" in words
    assert "cat" not in words
    for image, captions in zip(images, explored.captions, strict=True):
        for (text, places), caption in zip(image["captions"], captions, strict=True):
            assert text == caption
            assert all(text[end - len(words[w]) : end].lower() == words[w] for w, end in places)
    for name, of_layer in zip(probe.hooks_of(probe.groups["image"]), head["latents"], strict=True):
        for k, told in zip(of_layer["ids"], of_layer["contexts"], strict=True):
            assert [value for _, value in told] == pytest.approx(
                [context.activation for context in explored.contexts[name][k]], rel=0.01
            )
            for (place, _), context in zip(told, explored.contexts[name][k], strict=True):
                before, word, behind = head["contexts"][place]
                assert word.lower() == context.word
                assert (before + word + behind).strip("… ") in context.text
    red = words.index("red")
    assert [pieces[k].strip() for k in head["pieces"]["agree"][red]] in (["red"], [])


def test_contexts_are_where_a_latent_fires_most(probed, explored, tmp_path, monkeypatch):
    """Of latents whose activations are planted: 0 is the strongest on "red", 1 fires on nothing."""
    callback = sae_probe(probed)
    probe, bank = callback.probe, bank_of(callback.probe)
    assert {text for of in explored.contexts.values() for c in of.values() for text, *_ in c} <= set(
        bank.contexts
    )
    hook, red = next(iter(probe.layers)), []
    read = read_places

    def note(*args):
        order, found = read(*args)
        red[:] = [place.word == "red" for place in order]
        return order, found

    def encode(name, x):
        planted = torch.tensor(red).float()[:, None] * torch.arange(1, 1 + len(x))[:, None]
        return torch.cat([planted, torch.zeros(len(x), 1)], dim=1), x

    monkeypatch.setattr("lightning_limber.probe.explorer.read_places", note)
    monkeypatch.setattr(probe, "encode", encode)
    strongest, silent = text_contexts(probe, bank, {hook: [0, 1]})[hook]
    assert silent == []
    places = [i for i, is_red in enumerate(red) if is_red][-3:]
    assert places
    assert [context.activation for context in strongest] == [i + 1 for i in reversed(places)]
    assert all(c.text[c.end - 3 : c.end].lower() == c.word == "red" for c in strongest)


def test_objects_are_where_the_encoder_sees_them(probed, explored):
    """Some of their pixels differ from the background, which the corners show; none outside does."""
    assert [len(boxes) for boxes in explored.boxes] == [text.count(" a ") for [text] in explored.captions]
    for pixels, boxes, [caption] in zip(explored.pixels, explored.boxes, explored.captions, strict=True):
        background = pixels[:, 0, 0][:, None, None].int()
        differs = (pixels.int() - background).abs().sum(0) > 100  # [H, W]
        inside = torch.zeros_like(differs)
        for label, (left, top, right, bottom) in boxes:
            assert label in caption
            columns, rows = (slice(round(32 * a), round(32 * b)) for a, b in ((left, right), (top, bottom)))
            assert differs[rows, columns].any()
            inside[max(0, rows.start - 1) : rows.stop + 1, max(0, columns.start - 1) : columns.stop + 1] = (
                True
            )
        assert not differs[~inside].any()


def test_a_run_leaves_the_first_and_the_newest(fit, tmp_path, monkeypatch):
    """Of as many images as are asked for (0: none). The one before goes when the newest is there."""
    folder, there = tmp_path / "runs/default/version_0", []

    def note(path, *args):
        write_explorer(path, *args)
        there.append(epochs())

    def epochs() -> list[int]:
        return sorted(int(path.stem[-1]) for path in folder.glob("explorer_epoch_*"))

    monkeypatch.setattr("lightning_limber.callbacks.sae_probe.write_explorer", note)
    fit("--trainer.max_steps=8", "--probe.explorer_images=3", "--probe.metrics=[noise]", probe=True)
    assert there == [[0], [0, 1], [0, 1, 2]]
    assert epochs() == [0, 2]
    for epoch in epochs():
        head, arrays = read_explorer(folder / f"explorer_epoch_{epoch}.gz")
        assert len(head["images"]) == 3
        assert arrays["image/norm"].shape == (3, 2, 4)
        # Before training nothing is written.
        assert [bool(image["written"]) for image in head["images"]] == [epoch > 0] * 3
    again = fit(f"--ckpt_path={folder}", command="validate", base=False).trainer.log_dir
    head, _ = read_explorer(Path(again) / "explorer_epoch_2.gz")
    assert all(image["written"] for image in head["images"])
    none = fit("--trainer.max_steps=1", "--probe.explorer_images=0", probe=True).trainer.log_dir
    assert not list(Path(none).glob("explorer*"))


@pytest.mark.parametrize(
    ("there", "epochs", "left"),
    [
        ((0, 1, 2, 10), (0, 1, 2, 10), {0, 10}),
        ((0, 2, 7), (0, 1, 2, 3), {0, 2}),  # Went on from before epoch 7.
        ((4, 5, 6), (0, 4, 5, 6), {4, 6}),  # Of the first epochs there is none.
        ((3,), (0, 1, 2, 3), {3}),
    ],
)
def test_files_that_nobody_reads_go(tmp_path, there, epochs, left):
    for epoch in there:
        (tmp_path / f"explorer_epoch_{epoch}.gz").touch()
    keep_ends(tmp_path, epochs)
    assert {int(path.stem.rpartition("_")[2]) for path in tmp_path.iterdir()} == left


def test_behind_layer_0_and_without_places(fit, tmp_path):
    """Image tokens that enter at layer 2 have nothing below it; a resampler's have no grid."""
    flags = ["--model.entry.layer=1", "--model.adapter=Resampler", "--model.adapter.queries=3"]
    fit("--trainer.max_steps=1", "--probe.metrics=[noise]", *flags, probe=True)
    head, arrays = read_explorer(tmp_path / "runs/default/version_0/explorer_epoch_0.gz")
    assert head["grid"] is None
    assert head["control"] == "noise"
    assert head["layers"] == [0, 2]  # Behind layer 0 is where they enter.
    assert arrays["noise/norm"].shape == (10, 2, 3)
    assert "spots" not in head["neighbours"]
    np.testing.assert_allclose(arrays["image/cos_start"][:, 0], 1, atol=0.01)
    assert not any(head["believed"]["lens"] + head["believed"]["neighbours"])  # Neither is measured.


def test_it_asks_nothing_of_the_device(probed, models, monkeypatch):
    """As the passes (test_passes.py), on tensors without values."""
    monkeypatch.setattr(
        "transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None
    )
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_kwargs: nullcontext())
    [batch] = list(probe_batches(probed, 4))
    there = Limber(**probed.model.hparams)
    there.configure_model()
    saes = load_saes(str(models / "saes"), "layer_{layer}", None, there.llm)
    there.to("meta")
    saes = {name: sae.to("meta") for name, sae in saes.items()}
    texts = list(probed.datamodule.training_captions(4))
    probe = Probe(there, saes, sae_probe(probed).probe.text, ProbeConfig(), texts=lambda: texts)
    moved = apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.to("meta"))
    moved.held_out = False
    tokens = there.image_tokens(moved)
    found = look(probe, moved.without_captions, tokens, bank_of(probe))
    assert {field: tuple(v.shape) for field, v in found["blocks.2.hook_resid_post"].items()} == {
        **dict.fromkeys(("norm", "l0", "fvu_text", "cos_start", "counted"), (4, 4)),
        **dict.fromkeys(("latent", "activation"), (4, 4, 5)),
        **dict.fromkeys(("piece", "p", "place", "cosine"), (4, 4, 3)),
    }


def test_a_lens_is_believed_above_chance_and_its_control():
    def rows(low: float, chance: float, of_control: float) -> list[Row]:
        return [
            Row(3, "image", "lens_hit", low + 0.1, low, low + 0.2),
            Row(3, "image", "lens_hit_chance", chance, chance, chance),
            Row(3, "image", "neighbour_lift", low + 0.1, low, low + 0.2),
            Row(3, "words_long", "neighbour_lift", of_control, of_control, of_control),
        ]

    for found, lens, lift in (
        (rows(0.5, 0.4, 0.9), True, False),  # A lift's chance is 1.
        (rows(1.2, 1.3, 1.1), False, True),
        (rows(1.2, 1.1, 1.3), True, False),
        (rows(1.2, float("nan"), float("nan")), False, True),
    ):
        assert believed(found, [3], "lens_hit", "words_long") == [lens]
        assert believed(found, [3], "neighbour_lift", "words_long") == [lift]
    assert believed([], [3], "lens_hit", None) == [False]
    assert believed([Row(3, "image", "lens_hit", *[float("nan")] * 3)], [3], "lens_hit", None) == [False]


def test_codes():
    """Ratios of a hundred thousand within 2.5 %, and no number where there is none."""
    values = np.array([1e-3, 0.5, 2.0, 1e2, 0.0, np.nan, -1.0])
    coded, ends = encode(values, "log8")
    assert ends == {"low": 1e-3, "high": 1e2}
    got = decode(coded, {"kind": "log8", **ends})
    np.testing.assert_allclose(got[:4], values[:4], rtol=0.025)
    assert got[4:].tolist() == [0, 0, 0]
    for alone in ([3.0], [0.0]):
        coded, ends = encode(np.array(alone), "log8")
        assert decode(coded, {"kind": "log8", **ends}).tolist() == alone
    coded, _ = encode(np.array([-1.0, 0.0, 0.41, 1.0, np.nan]), "cos8")
    np.testing.assert_allclose(decode(coded, {"kind": "cos8"}), [-1, 0, 0.41, 1, 0], atol=1 / 254)
    assert pack({}, {"image/norm": values}) == pack({}, {"image/norm": values})


def test_a_word_in_its_context():
    assert in_context("A red circle", "red", 5) == ["A ", "red", " circle"]
    assert in_context("Red", "red", 3) == ["", "Red", ""]
    text = "one two three four five six RED. seven eight nine ten eleven"
    assert in_context(text, "red", 31) == ["… four five six ", "RED", ". seven eight nine ten …"]
