"""Which values of a setting mean something; checked before a model is loaded.

A data set or an adapter of one's own says so itself, by parameter::

    class MyData(CaptionData):
        ranges = {"num_scenes": at_least(1)}
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Values that are allowed, in words and as a test."""

    words: str
    allows: Callable[[Any], bool]


def at_least(low: float, hint: str = "") -> Range:
    return Range(f"{low} or more{hint}", lambda value: value >= low)


def above(low: float, hint: str = "") -> Range:
    return Range(f"any number above {low}{hint}", lambda value: value > low)


def between(low: float, high: float) -> Range:
    return Range(f"{low} to {high}", lambda value: low <= value <= high)


def above_up_to(low: float, high: float) -> Range:
    return Range(f"any number above {low} up to {high}", lambda value: low < value <= high)


def from_below(low: float, high: float) -> Range:
    return Range(f"{low} up to any number below {high}", lambda value: low <= value < high)


def inside(low: float, high: float) -> Range:
    return Range(f"any number above {low} and below {high}", lambda value: low < value < high)


def count_or_share(low: int, hint: str = "") -> Range:
    """Of Lightning's limits: a whole number counts batches, any other number is a share."""
    return Range(
        f"a whole number, {low} or more, or a share such as 0.5, up to 1.0{hint}",
        lambda value: (
            (0 < value <= 1 or value == low)
            if isinstance(value, float)
            else isinstance(value, str) or value >= low
        ),
    )


RANGES: dict[str, Range] = {
    "seed_everything": between(0, 2**32 - 1),
    "trainer.num_nodes": at_least(1),
    "trainer.devices": Range(
        "auto, a number, or a list such as 0,1",
        lambda value: re.fullmatch(r"auto|-1|\d+(,\d*)*", str(value)) is not None,
    ),
    "trainer.max_epochs": at_least(-1, " (-1 is no limit)"),
    "trainer.min_epochs": at_least(0),
    "trainer.max_steps": at_least(-1, " (-1 is no limit)"),
    "trainer.min_steps": at_least(0),
    "trainer.limit_train_batches": count_or_share(1),
    "trainer.limit_val_batches": count_or_share(0, " (0 skips validation)"),
    "trainer.limit_test_batches": count_or_share(0),
    "trainer.limit_predict_batches": count_or_share(0),
    "trainer.overfit_batches": count_or_share(0),
    "trainer.val_check_interval": count_or_share(1, ", or a time such as 00:01:00:00"),
    "trainer.precision": Range(
        "32-true, bf16-mixed, 16-mixed or 64-true: the adapter is float32 at least",
        lambda value: value not in ("bf16-true", "16-true") and "transformer" not in str(value),
    ),
    "trainer.enable_checkpointing": Range(
        "true (checkpoint.every_n_steps 0 and checkpoint.keep_epochs false save least)", bool
    ),
    "trainer.check_val_every_n_epoch": at_least(1),
    "trainer.num_sanity_val_steps": at_least(-1, " (-1 takes all)"),
    "trainer.log_every_n_steps": at_least(1),
    "trainer.accumulate_grad_batches": at_least(1),
    "trainer.gradient_clip_val": at_least(0, " (0 or null does not clip)"),
    "trainer.reload_dataloaders_every_n_epochs": at_least(0),
    "model.vision.image_size": at_least(1, ", or null for the encoder's own"),
    "model.vision.pool": at_least(1, " (1 does not pool)"),
    "model.max_caption_tokens": at_least(1),
    "model.held_out_features_gb": at_least(0, " (0 keeps none)"),
    "model.entry.layer": at_least(0),
    "model.regularise.weight": at_least(0, " (0 asks nothing)"),
    "model.regularise.layers": at_least(0, ", at least one layer"),
    "model.optimizer.lr": between(0, 10),
    "model.optimizer.min_lr_ratio": between(0, 1),
    "model.optimizer.warmup_steps": at_least(0),
    "model.optimizer.weight_decay": at_least(0),
    "model.optimizer.betas": from_below(0, 1),
    "probe.layers": at_least(0, ", at least one layer, or null for every layer that has an SAE"),
    "probe.num_images": at_least(1, " (probe.every_n_epochs 0 switches the probe off)"),
    "probe.explorer_images": at_least(0, " (0 switches the explorer off)"),
    "probe.every_n_epochs": at_least(0, " (0 switches the probe off)"),
    "probe.sae_memory_gb": above(0, ", or null for no limit"),
    "probe.intervention_images": at_least(1),
    "probe.costly_images": at_least(1),
    "probe.outlier_factor": above(0, ", or null for none"),
    "probe.bootstrap_samples": at_least(1),
    "probe.top_latents": at_least(1),
    "probe.max_image_share": above_up_to(0, 1),
    "probe.max_text_density": above_up_to(0, 1),
    "probe.lens_top_k": at_least(1),
    "probe.knn": at_least(1),
    "probe.detector_auroc": between(0.5, 1),
    "probe.seed": at_least(0),
    "captions.num_images": at_least(0, " (0 switches captions off)"),
    "captions.num_shown": at_least(0),
    "captions.max_new_tokens": at_least(1),
    "checkpoint.every_n_steps": at_least(0, " (0 saves around validations and epochs only)"),
    # Of `predict` and `plan`.
    "max_new_tokens": at_least(1),
    "num_beams": at_least(1),
    "temperature": at_least(0),
    "top_p": above_up_to(0, 1),
    "seed": at_least(0),
    "gpus": at_least(1),
    "utilisation": above_up_to(0, 1),
    "caption_tokens": at_least(1),
}
"""By setting."""

RANGES_OF_CLASSES: dict[str, dict[str, Range]] = {
    "CaptionData": {
        "batch_size": at_least(1),
        "val_batch_size": at_least(1),
        "captions_per_image": at_least(1),
        "num_workers": at_least(0, " (0 loads in the main process)"),
        "seed": at_least(0),
        "length_window": at_least(0, " (0 switches it off)"),
        "max_bad_share": between(0, 1),
        "choose_on": at_least(1, ", or null for the held-out set"),
    },
    "Scenes": {"train_size": at_least(1), "val_size": at_least(1), "image_size": at_least(1)},
    "ImageFolder": {"val_share": inside(0, 1)},
    "CocoCaptions": {"val_share": inside(0, 1)},
    "LLaVAConversations": {"val_share": inside(0, 1)},
    "HuggingFaceCaptions": {"num_train": at_least(1)},
    "Shards": {"val_shards": at_least(1)},
    "Adapter": {"dropout": from_below(0, 1)},
    "PixelShuffle": {"shuffle": at_least(1)},
    "Resampler": {"queries": at_least(1), "layers": at_least(1), "heads": at_least(1)},
    "Vocabulary": {"perplexity": above(1)},
}
"""By class of this package and parameter; subclasses have them too."""


def ranges_of(found: type) -> dict[str, Range]:
    """What a class, and those above it, say of their parameters."""
    ranges: dict[str, Range] = {}
    for kind in reversed(inspect.getmro(found)):
        if kind.__module__.startswith("lightning_limber."):
            ranges |= RANGES_OF_CLASSES.get(kind.__name__, {})
        ranges |= vars(kind).get("ranges", {})
    return ranges


def check_ranges(config: Mapping[str, Any], named: Callable[[str], str] = lambda key: "") -> None:
    """Checks all settings of a config.

    Args:
        config: Nested settings of a command.
        named: Setting -> the file that sets it, for the message; empty for a flag.

    Raises:
        ValueError: one of them is outside of its range.
    """
    for key, value, wanted in _settings(config, "", {}):
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items or not all(map(wanted.allows, items)):
            raise ValueError(
                ": ".join(
                    filter(None, [named(key), key, f"{value!r} is given, allowed is {wanted.words}."])
                )
            )


def _settings(
    config: Mapping[str, Any], within: str, ranges: Mapping[str, Range]
) -> Iterator[tuple[str, Any, Range]]:
    """Every setting that is given and has a range: name, value and range."""
    for name, value in config.items():
        key = f"{within}{name}"
        if isinstance(value, Mapping):
            own = {}
            if isinstance(value.get("class_path"), str):
                own = ranges_of(_class(value["class_path"]))
                # Flags leave init_args out: --data.batch_size.
                value = value.get("init_args") or {}
            yield from _settings(value, f"{key}.", own)
        else:
            wanted = ranges.get(name, RANGES.get(key))
            if wanted is not None and value is not None:
                yield key, value, wanted


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
