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


def final(root: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(root / "checkpoints/last.ckpt")["state_dict"]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
