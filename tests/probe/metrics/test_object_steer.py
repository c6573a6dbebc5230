"""Steered patches: which latents mean colours, what is read where, and a second computation."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from parts import probe_batches, sae_probe, without_values
from process import run_here

from lightning_limber.data.prompt import Prompt
from lightning_limber.data.scenes import COLOURS
from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.probe.intervention import Intervention
from lightning_limber.probe.metrics.object_steer import (
    METRICS,
    ObjectSteer,
    changed_label,
    choose_latents,
    plan_steering,
    steering_vectors,
)

HOOK = "blocks.0.hook_resid_post"
FLAGS = ["--trainer.max_steps=4", "--model.vision.pool=1", "--probe.intervention_images=10"]


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """The CLI object of a run with a token for each of 4 x 4 patches."""
    flags = [*tiny.arguments(models), *FLAGS, "--probe.metrics=[object_steer]"]
    with pytest.MonkeyPatch.context() as patch:
        cli = run_here(patch, tmp_path_factory.mktemp("steer"), "fit", *flags)
        cli.folder = Path(cli.trainer.log_dir).resolve()
        return cli


def steer_of(run) -> ObjectSteer:
    [found] = [metric for metric in sae_probe(run).probe.metrics if metric.name == "object_steer"]
    return found


def test_a_planted_latent_is_found():
    """Latent 5 + c means colour c; one more tells colour 1 as well, but by less."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.arange(60) % 3
    activations = torch.rand(60, 20, generator=generator)
    for colour in range(3):
        activations[:, 5 + colour] = (colours == colour) * (2.0 + activations[:, 5 + colour])
    activations[:, 2] = (colours == 1) * 0.5
    found = choose_latents(activations, colours, torch.tensor(1.0))
    assert found.latents.tolist() == [5, 6, 7]
    assert found.auroc.tolist() == [1, 1, 1]
    expected = [float(activations[colours == c, 5 + c].mean()) for c in range(3)]
    assert found.levels.tolist() == pytest.approx(expected)


def test_the_choice_is_of_the_highest_auroc():
    """Against AUROC counted pair by pair, of latents that are silent on most tokens."""
    rng = np.random.default_rng(0)
    activations = np.where(rng.random((30, 12)) < 0.5, 0.0, rng.random((30, 12)).round(1))
    colours = np.arange(30) % 4
    found = choose_latents(
        torch.from_numpy(activations).float(), torch.from_numpy(colours), torch.tensor(1)
    )
    for colour in range(4):
        own, rest = activations[colours == colour], activations[colours != colour]
        auroc = (np.sign(own[:, None] - rest[None]).mean((0, 1)) + 1) / 2
        assert float(found.auroc[colour]) == pytest.approx(auroc.max())
        assert auroc[found.latents[colour]] == pytest.approx(auroc.max())


@pytest.mark.parametrize("before", ["", "one dog . "])
def test_the_label_that_says_the_colour(models, before):
    """Of two objects alike but for the size, too: each has its own word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    prompt = Prompt(f"{{bos}}{{image}}{before}{{caption}}{{eos}}", tokenizer, 64)
    caption = "a small red circle left of a large red circle above a small blue star on a pink background ."
    pairs = (("red", "circle"), ("red", "circle"), ("blue", "star"))
    scene = {"objects": [{"colour": colour, "shape": shape} for colour, shape in pairs]}
    words = caption.split()
    for number, place in enumerate((2, 8, 13)):
        label, own, new = changed_label(prompt, caption, scene, number, "cyan")
        assert (label, *tokenizer.convert_ids_to_tokens([own, new])) == (place, words[place], "cyan")
    assert changed_label(prompt, caption, scene, 0, "red") is None
    cut = Prompt("{image}{caption}", tokenizer, 9)
    assert changed_label(cut, caption, scene, 1, "cyan")[0] == 8
    assert changed_label(cut, caption, scene, 2, "cyan") is None


def test_words_of_several_tokens_differ_where_they_part():
    """A tokenizer of letters: "green" and "gray" part at their third."""
    letters = {"eos_token_id": 0, "bos_token": None, "eos_token": None}
    letters |= {"is_fast": True, "added_tokens_decoder": {}}

    def encode(text, **_):
        return {
            "input_ids": [ord(c) for c in text],
            "offset_mapping": [(i, i + 1) for i in range(len(text))],
        }

    class Letters(SimpleNamespace):
        def __call__(self, text, **settings):
            return encode(text)

    prompt = Prompt("{image}{caption}", Letters(**letters), 64)
    scene = {"objects": [{"colour": "green", "shape": "star"}]}
    found = changed_label(prompt, "a small green star", scene, 0, "gray")
    assert found == (len("a small gr"), ord("e"), ord("a"))


def test_colours_are_drawn_by_the_images_name(run):
    """Targets are no colour of the scene; an image has the same one in whatever batch it comes."""
    data, colours = run.datamodule, sorted(COLOURS)
    found = {}
    for size in (10, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "val_batch_size", size)
            for batch in data.probe_dataloader(10):
                plan = plan_steering(batch, run.model, 16 * len(batch.index), colours)
                if plan is None:
                    continue
                for image, scene in enumerate(batch.scenes):
                    of_image = plan.cells // 16 == image
                    assert torch.equal(plan.background // 16 == image, of_image)
                    here = batch.label_images[plan.labels] == image
                    drawn = [column[of_image].tolist() for column in (plan.own, plan.target, plan.chance)]
                    drawn += [plan.tokens[here].tolist(), plan.is_own[here].tolist()]
                    drawn += [(plan.cells[of_image] % 16).tolist()]
                    assert found.setdefault(batch.image_ids[image], drawn) == drawn
                    if not drawn[0]:
                        continue
                    in_scene = [item["colour"] for item in scene["objects"]]
                    own, target = colours[drawn[0][0]], colours[drawn[1][0]]
                    words = [run.model.llm.tokenizer.decode(ids).split() for ids in drawn[3]]
                    assert words[0][:2] == [own, target]
                    assert len({*words[0]}) == 3
                    assert not {*words[0][1:]} & {*in_scene}
                    assert sorted(said[0] for said in words) == sorted(in_scene)
                    assert all(said[1] == target for said in words)
    assert len({drawn[1][0] for drawn in found.values() if drawn[1]}) > 2


def test_objects_are_changed_without_asking_the_device(run, models, monkeypatch):
    """Of patches too; as the passes (test_passes.py)."""
    batch = next(
        batch
        for batch in probe_batches(run, 10, interventions=True)
        if plan_steering(batch, run.model, 16 * len(batch.index), steer_of(run).colours) is not None
    )
    metrics = ["object_patches", {"class_path": "object_steer", "init_args": {"relative": True}}]
    probe, moved = without_values(run, models / "saes", monkeypatch, batch, 16, metrics=metrics)
    kept = defaultdict(list)
    with torch.no_grad():
        probe._intervention_pass(moved, list(probe.saes), kept)
    found = [(probe.metrics[number].name, items[0][1]) for (number, _, _), items in kept.items()]
    shapes = [(name, tuple((item[0] if isinstance(item, tuple) else item).shape)) for name, item in found]
    count = len(batch.index)
    assert shapes == [*[("object_patches", (count, 5))] * 2, *[("object_steer", (count, 8))] * 2]


def test_rises_are_those_of_whole_forwards(run):
    """One image at a time, by a hook in a forward from the start, with the SAE's matrices written out."""
    probe, model, metric = sae_probe(run).probe, run.model, steer_of(run)
    rows = {(row.layer, row.group, row.metric): row for row in sae_probe(run).history[1]}
    sae, colours = probe.saes[HOOK], metric.colours
    known, sums, counts = metric.chosen[HOOK], {name: [] for name in METRICS}, {True: 0, False: 0}
    assert colours == sorted(COLOURS)
    meant = set(known.latents.tolist())
    others = [latent for latent in range(sae.cfg.d_sae) if latent not in meant]
    data = run.datamodule
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(data, "val_batch_size", 1)
        for batch in data.probe_dataloader(10):
            plan = plan_steering(batch, model, 16, colours)
            if plan is None:
                continue
            embeds = embed_sequences(model.llm, batch, model.image_tokens(batch))

            def odds(hook):
                with model.llm.residual_hooks({HOOK: hook}):
                    hidden = model.llm.decode(embeds)  # noqa: B023
                logits = model.llm.logits(hidden.flatten(0, 1)[batch.label_positions])  # noqa: B023
                return logits.double().log_softmax(-1)

            clean = odds(lambda x: None)
            own, target = (int(known.latents[number[0]]) for number in (plan.own, plan.target))
            level = known.levels[plan.target[0]]
            chance = others[int(plan.chance[0] * len(others))]

            def steered(places, latent):
                def hook(x):
                    x, before = x.clone(), x.clone()
                    kept = probe.keep(HOOK, x[0, 1:17])
                    for cell, place in zip(plan.cells.tolist(), places.tolist(), strict=True):  # noqa: B023
                        activation = sae.encode(before[0, 1 + cell][None])[0, own]  # noqa: B023
                        vector = level * sae.W_dec[target] - activation * sae.W_dec[own]  # noqa: B023
                        if latent != target:  # noqa: B023
                            vector = sae.W_dec[latent] / sae.W_dec[latent].norm() * vector.norm()
                        x[0, 1 + place] += vector * kept[place]
                    return x

                return odds(hook) - clean  # noqa: B023

            at_cells, at_background = steered(plan.cells, target), steered(plan.background, target)
            by_chance = steered(plan.cells, chance)
            for label, (said, new, third), is_own in zip(
                plan.labels.tolist(), plan.tokens.tolist(), plan.is_own.tolist(), strict=True
            ):
                assert said == int(batch.labels[label])
                counts[is_own] += 1
                rise = at_cells[label, new] - at_cells[label, said]
                if not is_own:
                    sums["steer_other"].append(float(rise))
                    continue
                sums["steer_gap"].append(float(clean[label, said] - clean[label, new]))
                sums["steer_own"].append(float(rise))
                sums["steer_third"].append(float(at_cells[label, third] - at_cells[label, said]))
                sums["steer_target"].append(float(at_cells[label, new] - at_cells[label, third]))
                sums["steer_background"].append(
                    float(at_background[label, new] - at_background[label, said])
                )
                sums["steer_random"].append(float(by_chance[label, new] - by_chance[label, said]))
    assert min(counts.values()) > 2
    for name in METRICS:
        row, expected = rows[0, "image", name], float(np.mean(sums[name]))
        assert abs(expected) > 1e-6
        assert row.value == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert row.low < row.value < row.high
        after = expected if name == "steer_gap" else 0.0  # Nothing is read after the last layer.
        assert rows[2, "image", name].value == pytest.approx(after, rel=2e-3, abs=1e-6)
    assert rows[0, "text", "steer_auroc"].value == pytest.approx(float(known.auroc.mean()))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_steering_vectors_are_decoder_rows_on_the_tokens_scale(architecture):
    """With an SAE that normalises its input, a latent's share of the token is on the token's scale."""
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    from lightning_limber.probe.screened_encoder import make_encoder

    settings = {"d_in": 8, "d_sae": 24, "dtype": "float32", "device": "cpu"}
    settings["normalize_activations"] = "layer_norm"
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(**settings))
    if architecture == "topk":
        sae = TopKSAE(TopKSAEConfig(**settings, k=5))
    probe = SimpleNamespace(saes={"hook": sae}, encoders={"hook": make_encoder(sae, torch.device("cpu"))})
    x = 3 * torch.randn(6, 8) + 1
    on, off, levels = torch.arange(6) + 3, torch.arange(6), torch.linspace(1, 2, 6)
    with torch.no_grad():
        activations = sae.encode(x)
        activations = activations.to_dense() if activations.is_sparse else activations
        found = steering_vectors(probe, "hook", x, on, levels, off)
        own = activations.gather(1, off[:, None])
        scale = x.std(-1, keepdim=True)
        expected = scale * (levels[:, None] * sae.W_dec[on] - own * sae.W_dec[off])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        # Set to what it is, a latent changes nothing: what the probe's encoder says, to the bit.
        found = probe.encoders["hook"](x)
        own = (found.to_dense() if found.is_sparse else found).gather(1, off[:, None])
        same = steering_vectors(probe, "hook", x, off, own[:, 0], off)
    assert torch.equal(same, torch.zeros_like(same))


def test_nothing_steered_is_no_rise(run, monkeypatch):
    """The own colour's latent set to the activation that it has: every difference is exactly 0."""
    probe, metric = sae_probe(run).probe, steer_of(run)

    def present(probe, hook, x, on, levels, off=None):
        latents = probe.encode(hook, x)[0].to_dense()
        return steering_vectors(probe, hook, x, on, latents.gather(1, on[:, None])[:, 0], on)

    monkeypatch.setattr("lightning_limber.probe.metrics.object_steer.steering_vectors", present)
    with torch.no_grad():
        for batch in run.datamodule.probe_dataloader(10, True):
            sums, _ = metric.intervene(Intervention(probe, batch), HOOK)
            assert torch.equal(sums[:, :5], torch.zeros_like(sums[:, :5]))
            assert sums[:, 6].sum() > 0


def test_relative_levels_are_shares_of_a_tokens_length(run):
    probe, metric, found = sae_probe(run).probe, steer_of(run), []
    relative = ObjectSteer(relative=True)
    relative.colours, relative.chosen = metric.colours, metric.chosen
    batch = next(iter(run.datamodule.probe_dataloader(10, True)))
    plan = plan_steering(batch, run.model, 16 * len(batch.index), metric.colours)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        name = "lightning_limber.probe.metrics.object_steer.steering_vectors"
        patch.setattr(name, lambda *args: found.append(args) or steering_vectors(*args))
        for one in (metric, relative):
            one.intervene(Intervention(probe, batch), HOOK)
    (_, _, x, _, plain, _), (_, _, _, _, long, _) = found[0], found[2]
    known = metric.chosen[HOOK]
    torch.testing.assert_close(plain, known.levels[plan.target])
    torch.testing.assert_close(long, plain * x.norm(dim=-1) / known.length)


def test_text_alone_chooses(run):
    """Tokens of colour words in training captions, read without an image, one caption at a time."""
    probe, model, metric = sae_probe(run).probe, run.model, steer_of(run)
    tokenizer, sae = model.llm.tokenizer, probe.saes[HOOK]
    found, seen = [], dict.fromkeys(metric.colours, 0)
    with torch.no_grad():
        for text in probe.texts():
            ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            kept = []
            with model.llm.residual_hooks({HOOK: kept.append}):
                model.llm.decode(model.llm.embed(torch.tensor([ids])))
            for token, word in enumerate(tokenizer.convert_ids_to_tokens(ids)):
                if word in seen:
                    seen[word] += 1
                    found.append((metric.colours.index(word), kept[0][0, token]))
    assert 0 < max(seen.values()) <= 20
    numbers, x = (torch.stack([torch.as_tensor(v) for v in column]) for column in zip(*found, strict=True))
    with torch.no_grad():
        expected = choose_latents(sae.encode(x), numbers, x.norm(dim=-1).mean())
    assert metric.chosen[HOOK].latents.tolist() == expected.latents.tolist()
    torch.testing.assert_close(metric.chosen[HOOK].levels, expected.levels)
    torch.testing.assert_close(metric.chosen[HOOK].length, expected.length)


def test_the_table_names_the_latents(run):
    import pandas as pd

    table = pd.read_csv(run.folder / "object_steer_epoch_1.csv")
    assert list(table.layer) == [0] * 8 + [2] * 8
    assert list(table.colour) == sorted(COLOURS) * 2
    assert list(table.latent[:8]) == steer_of(run).chosen[HOOK].latents.tolist()


def test_saes_that_wait_in_host_memory_give_the_same(run, fit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--probe.metrics=[object_steer]", "--probe.sae_memory_gb=2.0e-5"]
    found = [sae_probe(cli).history[1] for cli in (run, fit(*flags, probe=True))]
    values = [[row.value for row in rows if row.metric.startswith("steer")] for rows in found]
    assert len(values[0]) == 2 * 8
    assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-7)


def test_what_it_cannot_measure_is_said(fit, monkeypatch):
    flags = ["--probe.metrics=[object_steer]", "--trainer.max_steps=1", "--captions.num_images=0"]
    monkeypatch.syspath_prepend(Path(tiny.__file__).parents[2] / "examples")
    with pytest.raises(ValueError, match="object_steer needs image tokens that are places in the image"):
        fit(*flags, "--model.adapter=my_parts.LearnedQueries", "--model.adapter.queries=4", probe=True)
    metric, notes = ObjectSteer(), []
    batch = SimpleNamespace(scenes=[{"image_size": 112}])
    assert metric.intervene(SimpleNamespace(batch=batch, probe=None), "hook") is None  # No text is known.
    metric.colours = ["blue", "red"]
    for scenes in ([None], []):
        batch = SimpleNamespace(scenes=scenes)
        assert metric.intervene(SimpleNamespace(batch=batch, probe=None), "hook") is None
    assert not list(metric.compute(SimpleNamespace(notes=notes), SimpleNamespace(interventions={})))
    assert "these data know no boxes" in notes[0]
