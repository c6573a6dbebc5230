"""Runs that are stopped, and what is left of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lightning_limber.utils.checkpoints import read_checkpoint


def crash_flags(log: str, hook: str = "", step: int = -1, kill: bool = False) -> list[str]:
    """Replaces the callbacks of the config: a resumed run must not crash again."""
    init_args = {"log": log, "hook": hook, "step": step, "kill": kill}
    return [f"--trainer.callbacks={json.dumps([{'class_path': 'crash.CrashAt', 'init_args': init_args}])}"]


def batches(path: Path) -> list[str]:
    """Lines "step ids"; a step that was lost and done again must have had the same batch."""
    return list(dict.fromkeys(path.read_text().splitlines()))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of all points of every curve in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of all points of a curve in TensorBoard."""
    return curves(folder)[tag]


def final(root: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(root / "checkpoints/last.ckpt")["state_dict"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
