"""Every setting that can be meaningless is refused in a line, before a model is loaded."""

from __future__ import annotations

import re
import sys

import pytest
import yaml
from process import REPO

from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import VisionEncoder
from lightning_limber.utils.ranges import RANGES, RANGES_OF_CLASSES, check_ranges

FOLDER = "--data=ImageFolder --data.root=. "
COCO = "--data=CocoCaptions --data.annotations=a --data.images=b "
SHARDS = "--data=Shards --data.shards=a.tar "
HUB = "--data=HuggingFaceCaptions --data.path=a "

# Arguments of which the last is meaningless, and how the range is put into words.
MEANINGLESS = [
    ("--data.batch_size=-4", "1 or more."),
    ("--data.batch_size=0", "1 or more."),
    ("--data.val_batch_size=0", "1 or more."),
    ("--data.captions_per_image=0", "1 or more."),
    ("--data.captions_per_image=-1", "1 or more."),
    ("--data.num_workers=-1", "0 or more (0 loads in the main process)."),
    ("--data.seed=-1", "0 or more."),
    ("--data.length_window=-1", "0 or more (0 switches it off)."),
    ("--data.max_bad_share=-1", "0 to 1."),
    ("--data.max_bad_share=1.5", "0 to 1."),
    ("--data.train_size=0", "1 or more."),
    ("--data.train_size=-5", "1 or more."),
    ("--data.val_size=0", "1 or more."),
    ("--data.val_size=-1", "1 or more."),
    ("--data.image_size=0", "1 or more."),
    (FOLDER + "--data.val_share=0", "any number above 0 and below 1."),
    (FOLDER + "--data.val_share=1", "any number above 0 and below 1."),
    (FOLDER + "--data.val_share=-0.1", "any number above 0 and below 1."),
    (FOLDER + "--data.batch_size=0", "1 or more."),
    (COCO + "--data.val_share=2", "any number above 0 and below 1."),
    (SHARDS + "--data.val_shards=0", "1 or more."),
    (HUB + "--data.num_train=0", "1 or more."),
    ("--trainer.gradient_clip_val=-1", "0 or more (0 or null does not clip)."),
    ("--trainer.log_every_n_steps=0", "1 or more."),
    ("--trainer.limit_train_batches=0", "a whole number, 1 or more, or a share such as 0.5, up to 1.0."),
    ("--trainer.limit_train_batches=0.0", "a whole number, 1 or more, or a share such as 0.5, up to 1.0."),
    ("--trainer.limit_train_batches=1.5", "a whole number, 1 or more, or a share such as 0.5, up to 1.0."),
    ("--trainer.limit_val_batches=-1", "a whole number, 0 or more, or a share such as 0.5, up to 1.0"),
    ("--trainer.val_check_interval=0", "a share such as 0.5, up to 1.0, or a time such as"),
    ("--trainer.check_val_every_n_epoch=0", "1 or more."),
    ("--trainer.accumulate_grad_batches=0", "1 or more."),
    ("--trainer.accumulate_grad_batches=-2", "1 or more."),
    ("--trainer.max_steps=-2", "-1 or more (-1 is no limit)."),
    ("--trainer.max_epochs=-2", "-1 or more (-1 is no limit)."),
    ("--trainer.num_nodes=0", "1 or more."),
    ("--trainer.num_sanity_val_steps=-2", "-1 or more (-1 takes all)."),
    ("--seed_everything=-1", "0 to 4294967295."),
    ("--model.vision.pool=0", "1 or more (1 does not pool)."),
    ("--model.vision.pool=-1", "1 or more (1 does not pool)."),
    ("--model.vision.image_size=0", "1 or more, or null for the encoder's own."),
    ("--model.max_caption_tokens=0", "1 or more."),
    ("--model.held_out_features_gb=-1", "0 or more (0 keeps none)."),
    ("--model.optimizer.lr=1000000.0", "0 to 10."),
    ("--model.optimizer.lr=-0.1", "0 to 10."),
    ("--model.optimizer.lr=.nan", "0 to 10."),
    ("--model.optimizer.min_lr_ratio=5", "0 to 1."),
    ("--model.optimizer.min_lr_ratio=-0.5", "0 to 1."),
    ("--model.optimizer.warmup_steps=-3", "0 or more."),
    ("--model.optimizer.weight_decay=-0.1", "0 or more."),
    ("--model.optimizer.betas=[0.9,1.0]", "0 up to any number below 1."),
    ("--model.optimizer.betas=[-0.1,0.9]", "0 up to any number below 1."),
    ("--model.adapter.dropout=1", "0 up to any number below 1."),
    ("--model.adapter.dropout=-0.1", "0 up to any number below 1."),
    ("--model.adapter=PixelShuffle --model.adapter.shuffle=0", "1 or more."),
    ("--model.adapter=Resampler --model.adapter.queries=0", "1 or more."),
    ("--model.adapter=Resampler --model.adapter.heads=0", "1 or more."),
    ("--model.adapter=Vocabulary --model.adapter.perplexity=1", "any number above 1."),
    ("--probe.layers=[]", "0 or more, at least one layer, or null for every layer that has an SAE."),
    ("--probe.layers=[2,-1]", "0 or more, at least one layer, or null for every layer that has an SAE."),
    ("--probe.num_images=-1", "1 or more (probe.every_n_epochs 0 switches the probe off)."),
    ("--probe.num_images=0", "1 or more (probe.every_n_epochs 0 switches the probe off)."),
    ("--probe.explorer_images=-1", "0 or more (0 switches the explorer off)."),
    ("--probe.intervention_images=-1", "1 or more."),
    ("--probe.costly_images=-1", "1 or more."),
    ("--probe.every_n_epochs=-1", "0 or more (0 switches the probe off)."),
    ("--probe.knn=0", "1 or more."),
    ("--probe.knn=-1", "1 or more."),
    ("--probe.top_latents=0", "1 or more."),
    ("--probe.lens_top_k=0", "1 or more."),
    ("--probe.outlier_factor=0", "any number above 0, or null for none."),
    ("--probe.detector_auroc=2", "0.5 to 1."),
    ("--probe.detector_auroc=0.4", "0.5 to 1."),
    ("--probe.max_image_share=-1", "any number above 0 up to 1."),
    ("--probe.max_text_density=-1", "any number above 0 up to 1."),
    ("--probe.bootstrap_samples=0", "1 or more."),
    ("--probe.sae_memory_gb=0", "any number above 0, or null for no limit."),
    ("--probe.sae_memory_gb=-2", "any number above 0, or null for no limit."),
    ("--probe.seed=-1", "0 or more."),
    ("--captions.num_images=-1", "0 or more (0 switches captions off)."),
    ("--captions.num_shown=-1", "0 or more."),
    ("--captions.max_new_tokens=0", "1 or more."),
    ("--checkpoint.every_n_steps=-1", "0 or more (0 saves around validations and epochs only)."),
    ("predict --max_new_tokens=0", "1 or more."),
    ("predict --top_p=0", "any number above 0 up to 1."),
    ("plan --gpus 0", "1 or more."),
    ("plan --utilisation=0", "any number above 0 up to 1."),
    ("plan --caption_tokens=0", "1 or more."),
]


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for kind in (LLM, VisionEncoder):
        monkeypatch.setattr(kind, "load", fail)
    monkeypatch.delenv("LIGHTNING_LIMBER_TRACEBACK")


@pytest.mark.parametrize(("args", "allowed"), MEANINGLESS, ids=lambda text: text.split(" ")[-1])
def test_a_meaningless_value_is_refused(args, allowed, parse, unloaded):
    words = args.split()
    command = words.pop(0) if not words[0].startswith("--") else "fit"
    code, output = parse(command, *words)
    key = args.removesuffix(" 0").split("--")[-1].partition("=")[0].strip()
    assert code == 2
    assert output.startswith(f"error: {key}: ")
    assert " is given, allowed is " in output
    assert allowed in output
    assert output.count("\n") == 1


PROMPTS = [
    ("{image}{capiton}", "model.prompt: '{capiton}' is given, known are {bos} {image} {caption} "),
    ("{image}{caption}{end}", "model.prompt: '{end}' is given, known are "),
    ("{bos}{caption}", "model.prompt needs {image} exactly once, given: "),
    ("{bos}{image}", "model.prompt needs {caption} exactly once, given: "),
    ("{image}{caption}{caption}", "model.prompt needs {caption} exactly once, given: "),
    ("{caption}{image}", "model.prompt: {caption} must follow {image}, given: "),
    ('[{"role": "user", "content": "{picture}"}]', "model.prompt: '{picture}' is given, known are "),
    ('[{"role": "user", "content": "{image}"}]', "model.prompt needs {caption} exactly once, given: "),
]


@pytest.mark.parametrize(("prompt", "message"), PROMPTS)
def test_a_prompt_is_checked_too(prompt, message, parse, unloaded):
    code, output = parse("fit", f"--model.prompt={prompt}")
    assert (code, output.count("\n")) == (2, 1)
    assert output.startswith(f"error: {message}")


def test_the_file_that_sets_it_is_named(tmp_path, parse, unloaded):
    (tmp_path / "a.yaml").write_text("data: {init_args: {batch_size: 0}}\ntrainer: {max_steps: 3}\n")
    code, output = parse("fit", "--config=a.yaml")
    assert (code, output) == (2, "error: a.yaml: data.batch_size: 0 is given, allowed is 1 or more.\n")


BORDERS = {
    "data.num_workers": 0,
    "data.length_window": 0,
    "data.max_bad_share": 0.0,
    "data.batch_size": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.limit_val_batches": 0,
    "trainer.limit_train_batches": 1.0,
    "trainer.max_epochs": -1,
    "model.held_out_features_gb": 0,
    "model.optimizer.lr": 0.0,
    "model.optimizer.min_lr_ratio": 1.0,
    "model.optimizer.warmup_steps": 0,
    "model.optimizer.betas": [0.0, 0.0],
    "model.adapter.dropout": 0.0,
    "probe.every_n_epochs": 0,
    "probe.explorer_images": 0,
    "probe.layers": [0],
    "probe.detector_auroc": 0.5,
    "probe.max_image_share": 1.0,
    "captions.num_images": 0,
    "captions.num_shown": 0,
    "checkpoint.every_n_steps": 0,
}


def test_what_lies_on_a_border_is_allowed(monkeypatch):
    """A plan reads everything up to the models, which it needs without their weights."""
    from lightning_limber.cli import main

    class Reached(Exception):
        pass

    def stop(*args, **kwargs):
        raise Reached

    monkeypatch.setattr("lightning_limber.tools.plan.make_plan", stop)
    monkeypatch.setattr(sys, "argv", ["lightning_limber"])
    with pytest.raises(Reached):
        main(["plan", *(f"--{key}={value}" for key, value in BORDERS.items())])


CONFIGS = sorted({*(REPO / "configs").rglob("*.yaml")} - {*(REPO / "configs/lab").glob("*")})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_allowed(path):
    text = re.sub(r"\$\{.*\}", "1", path.read_text(encoding="utf-8"))
    config = yaml.safe_load(text)
    optimizer = config.get("model", {}).get("optimizer", {})
    optimizer.pop("total_steps", None)
    config.get("model", {}).pop("adapter", None)  # Named without its module.
    check_ranges(config)


def test_every_range_is_of_a_setting(parse):
    """A renamed setting takes its range along."""
    import lightning_limber.data as data
    from lightning_limber.models import adapters

    found = "".join(parse(command, "--help")[1] for command in ("fit", "predict", "plan"))
    shown = {word.lstrip("-").rstrip(",") for word in found.split() if word.startswith("--")}
    assert {key for key in RANGES if key not in shown} == {"probe.costly_images"}
    for name, ranges in RANGES_OF_CLASSES.items():
        parameters = getattr(data, name, None) or getattr(adapters, name)
        assert ranges.keys() <= set(parameters.__init__.__code__.co_varnames)


OWN = """
from lightning_limber.data import CaptionData
from lightning_limber.utils.ranges import at_least

class MyData(CaptionData):
    ranges = {"num_scenes": at_least(3)}

    def __init__(self, num_scenes: int = 3, train_size: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
"""


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.num_scenes=2", "error: data.num_scenes: 2 is given, allowed is 3 or more.\n"),
        ("--data.batch_size=0", "error: data.batch_size: 0 is given, allowed is 1 or more.\n"),
    ],
)
def test_a_class_of_ones_own_has_ranges(flag, message, parse, unloaded, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_ranges.py").write_text(OWN)
    code, output = parse("fit", "--data=own_ranges.MyData", flag)
    assert (code, output) == (2, message)


def test_more_tokens_of_the_lens_than_there_are(fit):
    with pytest.raises(
        ValueError, match=r"probe.lens_top_k: 100000 is given, allowed is 1 to \d+, the tok"
    ):
        fit("--probe.lens_top_k=100000", probe=True)
