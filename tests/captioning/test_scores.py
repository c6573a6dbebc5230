"""Caption scores against the COCO evaluation code's numbers, planted truths, and the real entry point."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from parts import callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_limber.captioning import scores
from lightning_limber.captioning.scores import caption_scores, scores_of_set, tokenize
from lightning_limber.data import CaptionData
from lightning_limber.data.held_out import spread
from lightning_limber.models.generation import Decoding
from lightning_limber.models.limber import Limber

WORDS = "a cat dog bird sits runs sleeps on under near the red green blue big small mat tree road".split()


@pytest.fixture(scope="module")
def example() -> dict:
    """The example of the COCO evaluation code: 1000 images, 5 references each, and scores of each image.

    Its README gives CIDEr 0.600, BLEU-4 0.191, ROUGE-L 0.396; the numbers in the file are those of
    pycocoevalcap 1.2 (which gives the same), made with its own tokenizer:

        gts, res = (PTBTokenizer().tokenize(captions) for captions in (references, candidates))
        for scorer in (Bleu(4), Rouge(), Cider()):
            print(scorer.compute_score(gts, res))

    where `references` and `candidates` are {image: [{"caption": text}, ...]}.
    """
    packed = Path(__file__).with_name("coco_caption_example.json.gz").read_bytes()
    return json.loads(gzip.decompress(packed))


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 9))) for _ in range(count)]


def values(candidates: list[str], references: list[list[str]]) -> dict[str, float]:
    return {name: score.value for name, score in caption_scores(candidates, references, samples=10).items()}


def test_equal_to_the_coco_evaluation_code_on_its_example(example):
    found = caption_scores(example["candidates"], example["references"])
    assert list(found) == ["cider_d", "bleu_4", "rouge_l"]
    assert found["cider_d"].value == pytest.approx(example["scores"]["cider_d"], abs=1e-6)
    assert found["bleu_4"].value == pytest.approx(example["scores"]["bleu"][3], abs=1e-6)
    assert found["rouge_l"].value == pytest.approx(example["scores"]["rouge_l"], abs=1e-6)
    # As published, to the digits that are published.
    assert [round(found[name].value, 3) for name in found] == [0.6, 0.191, 0.396]
    assert all(score.low < score.value < score.high for score in found.values())


def test_each_image_of_the_example_is_equal(example):
    """No error hides in the mean: the captions come out of the tokenizer as out of the PTBTokenizer."""
    written = [tokenize(caption) for caption in example["candidates"]]
    known = [[tokenize(caption) for caption in captions] for captions in example["references"]]
    cider, rouge = scores.cider_d(written, known), scores.rouge_l(written, known)
    torch.testing.assert_close(cider, torch.tensor(example["cider_d"]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(rouge, torch.tensor(example["rouge_l"]).double(), atol=1e-6, rtol=0)
    assert len({round(float(score), 6) for score in cider}) > 900


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [  # What PTBTokenizer 3.4.1 made of each, less the punctuation that the evaluation code drops.
        ("A tall, (old) clock-tower.", "a tall -lrb- old -rrb- clock-tower"),
        ("A man\u2019s dog doesn\u2019t sit on the \u201cred\u201d chair \u2013 it\u2019s old\u2026",
         "a man 's dog does n't sit on the red chair it 's old"),
        ("The sign says 'STOP' and \"Main St.\" twice.", "the sign says stop and main st. twice"),
        ("A cat-- a dog --- and a bird... then rest....", "a cat a dog and a bird then rest"),
        ("a_b and A/C unit #5 at 3.5 m, $20.", "a_b and a/c unit # 5 at 3.5 m $ 20"),
        ("woman in a t-shirt (with a logo) [blurred]",
         "woman in a t-shirt -lrb- with a logo -rrb- -lsb- blurred -rsb-"),
        ("A caf\u00e9 with na\u00efve d\u00e9cor and 100% cotton; 50% off!",
         "a caf\u00e9 with na\u00efve d\u00e9cor and 100 % cotton 50 % off"),
        ("One cannot watch t.v. at 10:07 p.m.", "one can not watch t.v. at 10:07 p.m."),
        ("getting ready to bat.,", "getting ready to bat."),
        ("", ""),
    ],
)  # fmt: skip
def test_tokens(caption, tokens):
    assert tokenize(caption) == tokens.split()


def test_the_right_caption_has_the_best_score():
    captions = sentences(20)
    found = values(captions, [[caption] for caption in captions])
    assert found == pytest.approx({"cider_d": 10, "bleu_4": 1, "rouge_l": 1})
    # A reference that says something else costs CIDEr-D, a mean over references, but not the others.
    found = values(captions, [[caption, "quite another thing"] for caption in captions])
    assert found == pytest.approx({"cider_d": 5, "bleu_4": 1, "rouge_l": 1})


def test_captions_that_share_nothing_score_0():
    assert values(["nothing of the kind here"] * 5, [["two cats sit there"]] * 5) == dict.fromkeys(
        ("cider_d", "bleu_4", "rouge_l"), 0
    )
    # The same n-grams in every image's references tell no image from another.
    assert values(["two cats sit there"] * 5, [["two cats sit there"]] * 5)["cider_d"] == 0


def test_small_sets_by_hand():
    """Hand-made: the longest common subsequence of 4 in 5 and 6 tokens, and BLEU's parts."""
    candidate, reference = "a cat sits on mats", "a big cat sits on it"
    precision, recall = 4 / 5, 4 / 6
    rouge = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert values([candidate], [[reference]])["rouge_l"] == pytest.approx(rouge, abs=1e-6)
    # 1- to 4-grams right: 4 of 5, 2 of 4, 1 of 3, 0 of 2; a second image supplies 4-grams: 4, 3, 2, 1.
    found = values([candidate, "the dog runs home"], [[reference], ["the dog runs home"]])
    bleu = (8 / 9 * 5 / 7 * 3 / 5 * 1 / 3) ** 0.25 * 2.718281828 ** (1 - 10 / 9)
    assert found["bleu_4"] == pytest.approx(bleu)


def test_of_two_reference_lengths_equally_near_the_shorter_counts():
    short, long = "a cat sits on", "a cat sits on the red"
    for references in ([short, long], [long, short]):
        counts = scores.bleu_counts([tokenize("a cat sits on the")], [[tokenize(r) for r in references]])
        assert counts[0].tolist() == [5, 4, 3, 2, 5, 4, 3, 2, 5, 4]


def test_order_and_duplicates_do_not_matter():
    written = sentences(30, 1)
    # Every n-gram of a caption is in some reference: then its weight is a share of the set.
    own = [" ".join(caption.split()[1:]) for caption in written]
    references = [
        list(three) for three in zip(own, sentences(30, 2), written[1:] + written[:1], strict=True)
    ]
    found = values(written, references)
    assert all(score > 0 for score in found.values())
    assert values(written[::-1], [captions[::-1] for captions in references[::-1]]) == pytest.approx(found)
    assert values(written * 2, references * 2) == pytest.approx(found)
    assert values(written, [captions * 2 for captions in references]) == pytest.approx(found)


def test_empty_captions_and_one_image():
    references = [[caption] for caption in sentences(4)]
    assert set(values([""] * 4, references).values()) == {0}
    whole = values([captions[0] for captions in references], references)
    some = values(["", *(captions[0] for captions in references[1:])], references)
    assert some["rouge_l"] == pytest.approx(0.75)
    assert 0 < some["bleu_4"] < whole["bleu_4"]
    one = caption_scores(["a cat sits on the mat"], [["a cat sits on the mat"]])
    assert one["bleu_4"] == one["rouge_l"] == (1, 1, 1)
    assert one["cider_d"] == (0, 0, 0)  # As in the evaluation code: log(1 image / 1 image).


def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match=r"without a reference caption cannot be scored: \[1\] of 2"):
        caption_scores(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="2 captions, references of 1 images"):
        caption_scores(["a", "b"], [["a"]])


def test_intervals_cover_the_truth():
    """In about 95 of 100 samples the interval holds the mean of what they are drawn from."""
    rng = random.Random(0)
    covered = 0
    for seed in range(100):
        written = [rng.choice(["a cat", "a dog"]) for _ in range(40)]
        score = caption_scores(written, [["a cat"]] * 40, samples=300, seed=seed)["rouge_l"]
        covered += score.low <= 0.75 <= score.high  # 1 for the cat, 0.5 for the dog.
    assert 0.88 <= covered / 100 <= 0.99


def test_the_most_frequent_caption():
    assert scores.most_frequent_caption(["a dog", "a cat", "a cat", "a dog", "a bird"]) == "a dog"
    captions = sentences(20)
    blind = [scores.most_frequent_caption(captions)] * 20
    assert values(blind, [[c] for c in captions])["cider_d"] == pytest.approx(10 / 20, abs=0.3)


# -- with a CLIP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny random CLIP with its processor."""
    from transformers import CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    tiny.write_vision(folder, "clip")
    config = tiny.vision_configs()["clip"]
    vocabulary = {"vocab_size": 4 + len(tiny.WORDS), "bos_token_id": 1, "eos_token_id": 2}
    config.text_config.update({**vocabulary, "max_position_embeddings": 12})
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():  # Larger than at initialisation: captions must differ.
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder, chat=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<eos>")
    tokenizer.save_pretrained(folder)
    return str(folder)


def clip_example() -> tuple[list[Image.Image], list[str], list[list[str]]]:
    rng = random.Random(0)
    images = [Image.new("RGB", (40 + 9 * i, 50), tuple(rng.choices(range(256), k=3))) for i in range(5)]
    said = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(3, 20))) for _ in range(20)]
    # Images with 1, 2, ... references: the nearest is looked for among an image's own.
    return images, said[:5], [said[5 + i : 6 + 2 * i] for i in range(5)]


@torch.no_grad()
def test_clip_score_is_that_of_torchmetrics(clip):
    """Image by image, with torchmetrics 1.9 given what it expects of a CLIP: features that are tensors."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import AutoProcessor, CLIPModel

    class OldCLIP(CLIPModel):
        def get_image_features(self, pixel_values):
            return super().get_image_features(pixel_values).pooler_output

        def get_text_features(self, input_ids, attention_mask):
            return super().get_text_features(input_ids, attention_mask).pooler_output

    parts = OldCLIP.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    images, written, references = clip_example()
    for batch_size in (2, 64):
        found = scores.clip_scores(images, written, references, clip, batch_size=batch_size)
        for i, image in enumerate(images):
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)
            said = f"A photo depicts {written[i]}"
            like_image = 2.5 / 100 * float(clip_score(pixels, said, lambda: parts))
            like_references = max(
                float(clip_score(said, f"A photo depicts {text}", lambda: parts)) / 100
                for text in references[i]
            )
            assert float(found["clip_score"][i]) == pytest.approx(like_image, abs=1e-5)
            harmonic = like_image and 2 / (1 / like_image + 1 / like_references)
            assert float(found["ref_clip_score"][i]) == pytest.approx(harmonic, abs=1e-5)
        assert found["clip_score"].max() > 0.01


def test_clip_scores_have_intervals_and_need_images(clip):
    images, written, references = clip_example()
    found = caption_scores(written, references, images, clip)
    assert list(found) == ["cider_d", "bleu_4", "rouge_l", "clip_score", "ref_clip_score"]
    mean = scores.clip_scores(images, written, references, clip)["clip_score"].mean()
    assert found["clip_score"].value == pytest.approx(float(mean))
    # A caption that is one of the references is as near to it as can be.
    same = scores.clip_scores(images, [captions[0] for captions in references], references, clip)
    score = same["clip_score"]
    torch.testing.assert_close(same["ref_clip_score"], 2 * score / (score + 1), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="5 captions, references of 5 images and 0 images"):
        caption_scores(written, references, clip=clip)


# -- on the real entry point ------------------------------------------------------------------------


def test_slots_have_intervals_over_images():
    """Two scenes of one object each and one of three, of which one caption gets one slot wrong."""
    from lightning_limber.callbacks.captions import slot_counts
    from lightning_limber.data import Scenes
    from lightning_limber.data.scenes import SceneSet

    data, records = Scenes(), [SceneSet("train", 50, 112, 0)[i] for i in range(50)]
    written, scenes = [r.captions[0] for r in records], [r.scene for r in records]
    whole = scores_of_set(slot_counts(data, written, scenes))
    kinds = ("background", "count", "size", "colour", "shape", "relation", "all")
    assert set(whole) == {f"slots/{kind}" for kind in kinds}
    assert set(whole.values()) == {(1, 1, 1)}
    some = scores_of_set(slot_counts(data, ["", *written[1:]], scenes))
    objects = sum(len(scene["objects"]) for scene in scenes)
    assert some["slots/count"].value == 49 / 50
    assert some["slots/colour"].value == 1 - len(scenes[0]["objects"]) / objects
    assert some["slots/colour"].low < some["slots/colour"].value < some["slots/colour"].high == 1
    assert slot_counts(CaptionData(), written, scenes) == {}


class BlindCalls:
    """How often a caption was asked for without an image."""

    def __init__(self, monkeypatch) -> None:
        self.count, original = 0, Limber.generate

        def spy(model, image_tokens, *args):
            self.count += image_tokens is None
            return original(model, image_tokens, *args)

        monkeypatch.setattr(Limber, "generate", spy)


def test_captions_stand_beside_two_that_do_not_look(fit, tmp_path, monkeypatch, capsys):
    from lightning_limber.callbacks.captions import slot_counts
    from lightning_limber.data.scenes import SceneSet

    calls = BlindCalls(monkeypatch)
    cli = fit("--trainer.max_steps=8", "--data.train_size=300", "--trainer.limit_train_batches=4")
    assert calls.count == 1  # At the first of two validations.
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[captions] step")]
    assert len(said) == 2
    assert all(re.search(r"right slots .* \((most frequent|no image) caption: ", line) for line in said)
    run = tmp_path / "runs/default/version_0"
    words = json.loads((run / "captions_baselines.json").read_text())
    train = Counter(SceneSet("train", 300, 112, 0)[i].captions[0] for i in range(300))
    assert words["most_frequent"] == train.most_common(1)[0][0]
    assert train[words["most_frequent"]] > 1
    assert words["no_image"] == cli.model.generate(None, Decoding(8))[0].text
    calls.count = 0
    records = [SceneSet("val", 10, 112, 0)[i] for i in spread(10, 4)]
    table = pd.read_csv(run / "captions.csv")
    assert table.groupby("epoch").writer.unique().map(list).tolist() == [["model", *words]] * 2
    for (_, writer, name), rows in table.groupby(["epoch", "writer", "metric"]):
        if writer != "model":
            said = [words[writer]] * 4
            expected = caption_scores(said, [record.captions for record in records])
            expected |= scores_of_set(
                slot_counts(cli.datamodule, said, [record.scene for record in records])
            )
            assert rows[["value", "low", "high"]].to_numpy().tolist() == [
                pytest.approx(expected[name], abs=1e-9)
            ]
    log = EventAccumulator(str(run)).Reload()
    for writer in words:
        logged = [event.value for event in log.Scalars(f"captions_{writer}/all")]
        share = table[(table.writer == writer) & (table.metric == "slots/all")].value
        assert logged == pytest.approx(share.tolist(), abs=1e-6)
    # A resumed run knows them; `validate` may be given other data, and makes them anew.
    fit("--ckpt_path=last", "--trainer.max_steps=12", base=False)
    assert calls.count == 0
    again = pd.read_csv(run / "captions.csv")
    assert again.epoch.unique().tolist() == [1, 2, 3]
    blind = again[again.writer != "model"].drop(columns=["run"])
    first, third = (blind[blind.epoch == n].drop(columns="epoch").to_numpy().tolist() for n in (1, 3))
    assert first == third
    fit("--ckpt_path=last", "--captions.num_images=6", command="validate", base=False)
    assert calls.count == 1


def test_fit_validate_and_test_score_captions(fit, clip, tmp_path):
    flags = ["--trainer.max_steps=8", f"--captions.clip={clip}"]
    fit(*flags)
    run = tmp_path / "runs/default/version_0"
    table = pd.read_csv(run / "captions.csv")
    assert list(table) == ["run", "epoch", "writer", "metric", "value", "low", "high"]
    assert table.epoch.unique().tolist() == [1, 2]
    names = ["cider_d", "bleu_4", "rouge_l", "clip_score", "ref_clip_score"]
    agreement = table[~table.metric.str.startswith("slots/")]
    assert agreement.metric.tolist() == names * 3 * 2
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()
    log = EventAccumulator(str(run)).Reload()
    for name in names:
        logged = [event.value for event in log.Scalars(f"captions/{name}")]
        own = table[(table.metric == name) & (table.writer == "model")]
        assert logged == pytest.approx(own.value.tolist(), abs=1e-6)
    assert {"captions/all", "captions_chance/all"} <= set(log.Tags()["scalars"])
    last = table[table.epoch == 2].drop(columns="run").reset_index(drop=True)
    fit("--ckpt_path=last", command="validate", base=False)
    again = pd.read_csv(tmp_path / "runs/default/version_1/captions.csv")
    assert again.epoch.unique().tolist() == [1, 2]
    again = again[again.epoch == 2].drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, last)
    # Scenes have no test part: `test` sees the same images, under its own name.
    fit("--ckpt_path=last", command="test", base=False)
    tested = pd.read_csv(tmp_path / "runs/default/version_2/captions_test.csv").drop(columns="run")
    pd.testing.assert_frame_equal(tested, last)


def test_test_scores_the_test_part_and_leaves_validation_alone(fit, models, tmp_path):
    from datasets_on_disk import write_karpathy

    (tmp_path / "coco").mkdir()
    write_karpathy(tmp_path / "coco", 12)
    data = [f"--data.annotations={tmp_path}/coco/dataset_coco.json", f"--data.images={tmp_path}/coco"]
    flags = [flag for flag in tiny.arguments(models, probe=False) if "_size=1" not in flag]  # Of Scenes.
    cli = fit("--data=CocoCaptions", *data, *flags, "--trainer.max_steps=6", base=False)
    run = tmp_path / "runs/default/version_0"
    files = {path: path.read_bytes() for path in run.glob("captions*")}
    assert {path.name for path in files} == {
        "captions.csv",
        "captions_baselines.json",
        *(f"captions_epoch_{n}.jsonl" for n in (1, 2)),
    }
    history = dict(callback(cli, "CaptionSamples").history)
    # In the same folder, from Python.
    found = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    names = ("loss", "loss_shuffled", "perplexity", "accuracy")
    ends = {f"interval/test/loss/{end}" for end in ("low", "high")}
    assert set(found) == {f"test/{name}" for name in names} | ends
    assert {path: path.read_bytes() for path in files} == files
    assert callback(cli, "CaptionSamples").history == history
    test_set = cli.datamodule.test_dataset()
    records = [test_set[i] for i in spread(len(test_set), 4)]
    assert records[0].captions != cli.datamodule.val_set[0].captions
    pixels = torch.stack([cli.model.vision.transform(record.image) for record in records])
    with torch.no_grad():
        written = cli.model.generate(cli.model.made_of(cli.model.vision(pixels)), Decoding(8))
    expected = caption_scores(
        [caption.text for caption in written], [record.captions for record in records]
    )
    table = pd.read_csv(run / "captions_test.csv")
    assert table.epoch.unique().tolist() == [2]
    own = table[table.writer == "model"].set_index("metric")
    for name, score in expected.items():
        assert own.loc[name, ["value", "low", "high"]].tolist() == pytest.approx(list(score))
    shown = [json.loads(line) for line in (run / "captions_test_epoch_2.jsonl").read_text().splitlines()]
    assert [line["references"] for line in shown] == [record.captions for record in records]
    log = EventAccumulator(str(run)).Reload()
    assert [event.step for event in log.Scalars("captions/cider_d")] == [3, 6]
    assert log.Scalars("captions_test/cider_d")[-1].value == pytest.approx(own.value["cider_d"], abs=1e-6)
