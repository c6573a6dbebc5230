"""Wherever a run was killed, every point stands once in the event files and the tables are whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from crash import Crash
from runs import assert_equal, curves, final

from lightning_limber.callbacks import Checkpoints, sae_probe

RUN = Path("runs/default/version_0")
EXTRA = ["--model.adapter.dropout=0.3", "--trainer.val_check_interval=2", "--trainer.max_steps=8"]
EXTRA += ["--probe.metrics=[direction]", "--captions.num_shown=0"]


def points(folder: Path) -> dict[str, list]:
    """All points (as text: NaN is NaN); of those that depend on the machine, the steps alone."""
    found = curves(folder)
    for tag in found:
        if tag.startswith(("memory/", "probe_seconds/")):
            found[tag] = [(step, 0.0) for step, _ in found[tag]]
    return {tag: list(map(repr, points)) for tag, points in found.items()}


@pytest.fixture
def kill_at_save(monkeypatch):
    """Ends the run before or after it saves for the n-th time."""
    save = Checkpoints._save

    def arm(number: int, before: bool) -> None:
        saved = iter(range(1, 1000))

        def crash(*args) -> None:
            now = next(saved)
            if now != number or not before:
                save(*args)
            if now == number:
                raise Crash

        monkeypatch.setattr(Checkpoints, "_save", crash)

    yield arm
    monkeypatch.undo()


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """The run that nobody killed: 2 epochs of 4 steps, validated after every second."""
    from lightning_limber.cli import main

    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("sys.argv", ["lightning_limber"])
        for name in (name for name in vars(sae_probe) if name.endswith("_figure")):
            patch.setattr(sae_probe, name, lambda *args: None)
        main(["fit", *tiny.arguments(models), *EXTRA])
    return root / RUN


# A run saves: step 1, step 2, validation, step 3, step 4, validation, epoch_1.ckpt, last.ckpt, step 5, ...
@pytest.mark.parametrize(
    ("number", "before"),
    [
        pytest.param(1, False, id="between save and log of a step"),
        pytest.param(4, True, id="validated in mid-epoch, a step logged and not saved"),
        pytest.param(4, False, id="after a step behind a validation"),
        pytest.param(5, False, id="between save and log of an epoch's last step"),
        pytest.param(6, True, id="validated, not saved"),
        pytest.param(6, False, id="before the end of an epoch"),
        pytest.param(7, True, id="probed, not saved"),
        pytest.param(8, False, id="after an epoch's end"),
        pytest.param(10, True, id="a step after an epoch's end"),
    ],
)
def test_every_point_stands_once(whole, fit, kill_at_save, number, before):
    kill_at_save(number, before)
    with pytest.raises(Crash):
        fit(*EXTRA, probe=True)
    kill_at_save(0, False)
    fit("--ckpt_path=last", base=False)
    assert points(RUN) == points(whole)
    assert_equal(final(RUN), final(whole))
