"""Dropped patches: whose they are, what they do to whose words, and a second computation."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from parts import sae_probe
from process import run_here

from lightning_limber.data.prompt import Prompt
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.image_tokens import embed_sequences
from lightning_limber.models.vision import ImageTransform
from lightning_limber.probe.metrics.object_patches import (
    ObjectPatches,
    patch_centres,
    plan,
    replacements,
    said_objects,
)

METRICS = ("object_drop_own", "object_drop_other", "patch_drop")


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """The CLI object of a run with a token for each of 4 x 4 patches."""
    flags = [*tiny.arguments(models), "--trainer.max_steps=4", "--model.vision.pool=1"]
    flags += ["--probe.metrics=[object_patches]", "--probe.intervention_images=10"]
    with pytest.MonkeyPatch.context() as patch:
        return run_here(patch, tmp_path_factory.mktemp("patches"), "fit", *flags)


@pytest.mark.parametrize(
    ("image_size", "left", "pixels"),
    [(32, 0, 32), (None, 2, 36)],  # Resized alone; resized to 36 pixels and cropped to 32 of them.
)
def test_centres_follow_what_the_transform_crops(tmp_path, image_size, left, pixels):
    transform = ImageTransform(tiny.write_vision(tmp_path, "dinov2"), image_size, False)
    found = patch_centres(transform, 112, (4, 4))
    along = [(left + 8 * (i + 0.5)) / pixels * 112 for i in range(4)]
    expected = torch.tensor([[x, y] for y in along for x in along])
    torch.testing.assert_close(found, expected, atol=0.6, rtol=0)


def test_an_objects_cells_are_replaced_by_cells_of_no_object():
    """A 4 x 4 grid of 10 pixels; two objects of 2 x 2 and of one cell."""
    centres = torch.tensor([[10 * x + 5.0, 10 * y + 5.0] for y in range(4) for x in range(4)])
    scene = {"objects": [{"box": [0, 0, 20, 20]}, {"box": [21, 31, 29, 39]}]}
    objects = {0: {0, 1, 4, 5}, 1: {14}}
    background = set(range(16)) - objects[0] - objects[1]
    for number, cells in objects.items():
        for seed in range(20):
            dropped, control = replacements(scene, number, centres, 0, random.Random(seed))
            assert set(dropped) == cells
            assert len(control) == len(cells)
            assert set(control) <= background
            for swaps in (dropped, control):
                assert set(swaps.values()) <= background - set(control)
    dropped, _ = replacements(scene, 0, centres, 1, random.Random(0))
    assert set(dropped) == {
        1,
        4,
        5,
    }  # The first cell's token is the sequence's first, and is never counted.
    everywhere = {"objects": [{"box": [0, 0, 40, 20]}]}
    assert replacements(everywhere, 0, centres, 0, random.Random(0)) is None  # As many as the background.
    nowhere = {"objects": [{"box": [6, 6, 14, 14]}]}
    assert replacements(nowhere, 0, centres, 0, random.Random(0)) is None


@pytest.mark.parametrize("before", ["", "one dog . "])
def test_labels_that_say_an_object(models, before):
    """Two objects alike but for the size: each has its own words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "llm")
    prompt = Prompt(f"{{bos}}{{image}}{before}{{caption}}{{eos}}", tokenizer, 64)
    caption = "a small red circle left of a large red circle above a small blue star on a pink background."
    pairs = (("red", "circle"), ("red", "circle"), ("blue", "star"))
    scene = {"objects": [{"colour": colour, "shape": shape} for colour, shape in pairs]}
    text = prompt.text(caption)
    labels = [token for token, is_it in zip(text.ids, text.is_target, strict=True) if is_it]
    said = said_objects(prompt, caption, scene, len(labels))
    words = [(number, tokenizer.decode(label)) for number, label in zip(said, labels, strict=True)]
    assert [pair for pair in words if pair[0] >= 0] == [
        *((0, "red"), (0, "circle"), (1, "red"), (1, "circle"), (2, "blue"), (2, "star")),
    ]
    assert said_objects(Prompt("{image}{caption}", tokenizer, 9), caption, scene, 9).tolist() == [
        *(-1, -1, 0, 0, -1, -1, -1, -1, 1),
    ]


class Reader:
    """In place of an `Intervention`: the loss of an object's words is the share of its tokens that is gone
    (1 nat), of other objects' words a tenth of that, and each background token that is gone costs 1e-3.
    """

    def __init__(self, probe, batch):
        self.probe, self.batch = probe, batch
        self.x = torch.arange(16.0 * len(batch.index))[:, None]
        self.clean_label_losses = torch.zeros(len(batch.labels))

    def image_tokens(self, hook):
        return self.x

    def keep(self, hook, x):
        return torch.ones(len(x), dtype=torch.bool)

    def label_losses(self, hook, new):
        gone = (new != self.x).view(-1, 16)
        assert torch.equal(new.view(-1, 16) // 16, self.x.view(-1, 16) // 16)  # Tokens of the same image.
        model = self.probe.model
        centres = patch_centres(model.vision.transform, 112, (4, 4))
        losses = []
        for i, (scene, [caption]) in enumerate(zip(self.batch.scenes, self.batch.captions, strict=True)):
            inside = [
                torch.tensor([x0 <= x < x1 and y0 <= y < y1 for x, y in centres.tolist()])
                for x0, y0, x1, y1 in (item["box"] for item in scene["objects"])
            ]
            shares = [float(gone[i][cells].float().mean()) if cells.any() else 0.0 for cells in inside]
            background = 1e-3 * int(gone[i][~torch.stack(inside).any(0)].sum())
            count = self.batch.label_counts[i]
            for number in said_objects(model.collator().prompt, caption, scene, count):
                own = shares[number] if number >= 0 else 0.0
                losses.append(own + 0.1 * (sum(shares) - own) + background)
        return torch.tensor(losses)


def test_a_reader_of_its_own_patches_is_told_from_one_of_any_patch(run):
    probe, metric = sae_probe(run).probe, ObjectPatches()
    sums = [metric.intervene(Reader(probe, batch), "hook") for batch in run.datamodule.probe_dataloader(10)]
    table = torch.cat(sums)
    own, other, control, owned, others = table.sum(0).tolist()
    scenes = [SceneSet("val", 10, 112, 0)[i].scene for i in range(10)]
    assert max(len(scene["objects"]) for scene in scenes) > 1
    centres = patch_centres(run.model.vision.transform, 112, (4, 4)).tolist()
    droppable = [
        any(x0 <= x < x1 and y0 <= y < y1 for x, y in centres for x0, y0, x1, y1 in boxes)
        for boxes in ([item["box"] for item in scene["objects"]] for scene in scenes)
    ]
    assert droppable.count(True) == 9  # One image has a small object between the centres.
    assert owned == 2 * 9  # Two words an object.
    assert others == 2 * sum(
        len(scene["objects"]) - 1 for scene, yes in zip(scenes, droppable, strict=True) if yes
    )
    assert own == pytest.approx(owned)
    assert other == pytest.approx(0.1 * others, rel=1e-4)
    assert 1e-3 * owned <= control <= 9e-3 * owned


def test_another_object_is_chosen_in_another_image(run):
    """Of scenes with several: not always the first; and the same one in whatever batch it comes."""
    scene = {
        "image_size": 112,
        "objects": [
            {"colour": "red", "shape": "circle", "box": [0, 0, 30, 30]},
            {"colour": "blue", "shape": "star", "box": [60, 0, 80, 30]},
        ],
    }
    captions = [["a small red circle left of a small blue star on a pink background."]] * 40
    count = len(run.model.collator().prompt.text(captions[0][0]).ids)
    many = SimpleNamespace(
        **{"index": list(range(40)), "labels": torch.zeros(40 * count), "label_counts": [count] * 40},
        **{"scenes": [scene] * 40, "captions": captions, "image_ids": [f"val/{i}" for i in range(40)]},
    )
    sources, said = plan(many, run.model, 40 * 16)
    of_images = said.reshape(2, 40, count)
    assert (of_images.sum(-1) == 2).all()
    first = of_images[0].argmax(-1) < of_images[1].argmax(-1)
    assert 10 < first.sum() < 30
    alone = SimpleNamespace(
        **{"index": [0], "labels": torch.zeros(count), "label_counts": [count], "scenes": [scene]},
        **{"captions": captions[:1], "image_ids": ["val/7"]},
    )
    sources_alone, said_alone = plan(alone, run.model, 16)
    assert (said_alone == of_images[:, 7]).all()
    assert (sources_alone == sources.reshape(2, 40, 16)[:, 7] - 7 * 16).all()


def test_rises_are_those_of_whole_forwards_with_tokens_replaced(run):
    """One image at a time, by a hook in a forward from the start; behind the last layer nothing is read."""
    probe, model = sae_probe(run).probe, run.model
    rows = {(row.layer, row.metric): row for row in sae_probe(run).history[1]}
    assert {(layer, name) for layer in (0, 2) for name in METRICS} <= rows.keys()
    totals = torch.zeros(5, dtype=torch.float64)
    data = run.datamodule
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(data, "val_batch_size", 1)
        for batch in data.probe_dataloader(10):
            embeds = embed_sequences(model.llm, batch, model.image_tokens(batch))

            def losses(hook):
                with model.llm.residual_hooks({"blocks.0.hook_resid_post": hook}):
                    hidden = model.llm.decode(embeds)  # noqa: B023
                return model.target_losses(batch, hidden)[0].double()  # noqa: B023

            clean = losses(lambda x: None)
            sources, said = (torch.from_numpy(table) for table in plan(batch, model, 16))

            def replaced(index):
                def hook(x):
                    keep = probe.keep("blocks.0.hook_resid_post", x[0, 1:17])[:, None]
                    x = x.clone()
                    x[0, 1:17] = torch.where(keep, x[0, 1:17][index], x[0, 1:17])
                    return x

                return losses(hook) - clean  # noqa: B023

            drop, control = map(replaced, sources)
            own, other = said
            totals += torch.stack(
                [drop[own].sum(), drop[other].sum(), control[own].sum(), own.sum(), other.sum()]
            )
    expected = (totals[:3] / totals[[3, 4, 3]]).tolist()
    for name, value in zip(METRICS, expected, strict=True):
        assert value != 0
        assert rows[0, name].value == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert rows[0, name].low < rows[0, name].value < rows[0, name].high
        assert rows[2, name].value == pytest.approx(0, abs=1e-6)


def test_what_it_cannot_measure_is_said(fit, monkeypatch):
    flags = ["--probe.metrics=[object_patches]", "--trainer.max_steps=1", "--captions.num_images=0"]
    monkeypatch.syspath_prepend(Path(tiny.__file__).parents[2] / "examples")
    with pytest.raises(ValueError, match="object_patches needs image tokens that are places in the image"):
        fit(*flags, "--model.adapter=my_parts.LearnedQueries", "--model.adapter.queries=4", probe=True)
    metric, notes = ObjectPatches(), []
    for scenes in ([None], []):
        batch, probe = SimpleNamespace(scenes=scenes), SimpleNamespace(model=None)
        assert metric.intervene(SimpleNamespace(batch=batch, probe=probe), "hook") is None
    assert not list(metric.compute(SimpleNamespace(notes=notes), SimpleNamespace(interventions={})))
    assert "these data know no boxes" in notes[0]
