"""What a checkpoint says about the run that wrote it, and what may not change when it goes on.

A resumed run is bit-equal to an uninterrupted one only if nothing that enters the arithmetic has
changed. So every checkpoint carries the settings of its run and the fingerprints of both frozen
models, and resuming compares them before the first step.
"""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from packaging.version import Version

from lightning_limber import __version__
from lightning_limber.utils.adapter_config import upgrade_adapter

EXPORTED = "adapter.safetensors"
"""Weights in a folder that ``export`` wrote."""
NEEDED = ("state_dict", "hyper_parameters", "loops", "global_step")
OWN = ("backbones", "trainer", "config")
"""What every checkpoint has, and its part of this project."""
# Settings that change speed or logging, never a number of the run; and how many bad records it allows.
FREE = {
    *("num_workers", "max_bad_share", "val_batch_size", "_instantiator", "_class_path"),
    *("adapter_weights", "shard_llm", "held_out_features_gb"),
    *("sae_memory_gb", "sanity_check"),
}


def training_settings(trainer: Any) -> dict[str, Any]:
    """The Trainer's settings that enter the arithmetic, as plain values."""
    names = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
    limits = ("limit_train_batches", "limit_val_batches")
    settings = {name: getattr(trainer, name) for name in (*names, *limits)}
    return {key: value for key, value in settings.items() if value is not None} | {
        "seed_everything": os.environ.get("PL_GLOBAL_SEED", "")
    }


def differences(saved: Any, now: Any, name: str) -> list[str]:
    """One line for each leaf in which two nested settings differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [key for key in {**saved, **now} if key not in FREE]
        return [
            line
            for key in keys
            for line in differences(saved.get(key, "unset"), now.get(key, "unset"), f"{name}.{key}")
        ]
    if isinstance(saved, (list, tuple)) and isinstance(now, (list, tuple)):
        saved, now = list(saved), list(now)
    # One batch (1) is not all batches (1.0).
    is_same = saved == now and ("limit_" not in name or type(saved) is type(now))
    # A setting that a run of an older version did not have, at null.
    if is_same or (saved == "unset" and now is None):
        return []
    return [f"{name}: {saved!r} in the checkpoint, {now!r} now"]


def setting_differences(checkpoint: dict[str, Any], module: Any, trainer: Any, data: Any) -> list[str]:
    """One line for each setting that may not change where training goes on; a longer schedule may.

    Needs no loaded model.

    Raises:
        ValueError: training cannot go on from this checkpoint at all.
    """
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            "This checkpoint holds weights only (save_weights_only): start a new run from its adapter "
            "with --model.adapter_weights PATH (and no --ckpt_path)."
        )
    model, hparams = checkpoint["hyper_parameters"], dict(module.hparams)
    model = {**module.added_settings, **model, "adapter": upgrade_adapter(model["adapter"])}
    steps, now = model["optimizer"]["total_steps"], hparams["optimizer"]["total_steps"]
    if now > steps:  # A run that is made longer; the model says what that changes.
        model["optimizer"] = {**model["optimizer"], "total_steps": now}
    lines = differences(model, hparams, "model")
    if now < steps:
        lines[-1] += f"; --model.optimizer.total_steps={steps} keeps the schedule"
    step = checkpoint["global_step"]
    if -1 < trainer.max_steps < step:
        lines.append(f"trainer.max_steps: {trainer.max_steps}, but the checkpoint is of step {step}")
    lines += differences(checkpoint.get("datamodule_hyper_parameters", {}), dict(data.hparams), "data")
    now_set = training_settings(trainer)
    # Older checkpoints do not hold the limit of validation.
    saved = {"limit_val_batches": now_set["limit_val_batches"], **checkpoint["lightning_limber"]["trainer"]}
    lines += differences(saved, now_set, "trainer")
    for callback in trainer.callbacks:
        lines += measurement_differences(checkpoint["callbacks"], callback)
    return lines


def measurement_differences(states: dict[str, Any], callback: Any) -> list[str]:
    """One line for each setting in which a callback's new rows would differ from those of its table.

    Args:
        states: State of each callback in a checkpoint.
        callback: One with ``settings`` that enter its numbers, or any other.
    """
    saved = states.get(callback.state_key, {}).get("settings")  # Older checkpoints have none.
    if not saved or not hasattr(callback, "settings"):
        return []
    name = {"SAEProbe": "probe", "CaptionSamples": "captions"}[callback.state_key]
    return differences(saved, callback.settings, name)


def refuse(lines: list[str]) -> None:
    """Stops a run that is another than the checkpoint's.

    Raises:
        ValueError: there is a difference.
    """
    if not lines:
        return
    ways = ["or start a new run from its adapter with --model.adapter_weights PATH (and no --ckpt_path)."]
    if any(line.startswith(("probe.", "captions.")) for line in lines):
        ways.append("`validate --ckpt_path` measures it with other settings, into a folder of its own.")
    raise ValueError(
        "This checkpoint belongs to another run:\n  "
        + "\n  ".join(lines)
        + "\n"
        + " ".join(["Use the checkpoint's settings to continue it,", *ways])
    )


def check_same_run(checkpoint: dict[str, Any], module: Any, trainer: Any) -> None:
    """Compares the run that wrote a checkpoint with the one that loads it.

    Args:
        checkpoint: As it was read.
        module: Of this run (`Limber`), with its frozen models and its adapter.
        trainer: Lightning's; None outside a run. Settings are compared only where training goes on.

    Raises:
        ValueError: the frozen models or the adapter's shapes differ, or (when training goes on) any setting
            does.
    """
    lines = differences(checkpoint["lightning_limber"]["backbones"], module.backbones, "weights")
    theirs, ours = (
        {name: list(value.shape) for name, value in state.items()}
        for state in (checkpoint.get("state_dict", {}), module.state_dict())
    )
    if theirs:  # An export's weights are read by themselves.
        lines += differences(theirs, ours, "shape")
    if trainer is not None and trainer.state.fn == "fit":
        lines += setting_differences(checkpoint, module, trainer, trainer.datamodule)
    refuse(lines)


def slurm_job() -> str | None:
    """The SLURM batch job of this process, as scontrol names it; a requeued job keeps its name."""
    if SLURMEnvironment.job_id() is None:
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def newest_checkpoint(folder: Path, given: str = "") -> Path:
    """The most recently written ``last.ckpt`` of the runs in `folder`, or of the run or its ``checkpoints``
    that it is.

    Args:
        folder: The folder.
        given: What stood for it, for the message.

    Raises:
        FileNotFoundError: no run there has saved anything.
    """
    places = ("*/checkpoints/last.ckpt", "checkpoints/last.ckpt", "last.ckpt")
    runs = [path for place in places for path in folder.glob(place)]
    found = sorted(runs, key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path {given or folder}: no run in '{folder}' has saved a checkpoint yet. Start one "
            "with `fit` without --ckpt_path, or give the path of a .ckpt file."
        )
    return found[-1]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of this project (plain values and tensors only, on the CPU).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint at '{path}'. Give an existing .ckpt file, or 'last'.")
    reason = damage(path)
    try:
        checkpoint: Any = None if reason else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"'{path}' was not written by lightning_limber: {first}") from error
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
    if reason:
        beside = sorted(other for other in Path(path).parent.glob("*.ckpt") if other != Path(path))
        whole = [other.name for other in beside if not damage(other)]
        advice = f"Whole beside it: {', '.join(whole)}." if whole else "No whole one is beside it."
        raise ValueError(f"'{path}' is damaged ({reason}). {advice}")
    own = checkpoint.get("lightning_limber") if isinstance(checkpoint, dict) else None
    if not isinstance(own, dict):
        keys = list(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"'{path}' was not written by lightning_limber (keys: {keys}).")
    missing = [name for name in NEEDED if name not in checkpoint] + [
        name for name in OWN if name not in own
    ]
    version = own.get("version", "unknown")
    if missing:
        raise ValueError(
            f"'{path}' has no {', '.join(missing)}: it was written by another version of lightning_limber "
            f"({version}) or changed since. Use that version."
        )
    if version != "unknown" and Version(version) > Version(__version__):
        raise ValueError(
            f"'{path}' was written by lightning_limber {version}, this is {__version__}: install that "
            "version or a newer one."
        )
    return checkpoint


def damage(path: str | Path) -> str:
    """What is wrong with a checkpoint's file; empty if it is whole.

    torch.save writes a zip archive, whose checksums (CRC-32) torch.load does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        size = Path(path).stat().st_size if Path(path).exists() else 0
        return f"{size:,} bytes, {error}"
    return f"the checksum of {member} is wrong" if member else ""
