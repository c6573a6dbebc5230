"""What is measured carries the epoch and step of the adapter that it was measured on."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from runs import crash_flags, scalars

from lightning_limber.tools.export import export

RUN = Path("runs/default/version_0")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_ends_inside_an_epoch(fit, capsys, caplog):
    """It ends with validation, captions and probe all the same; and they say that it is no whole epoch."""
    with caplog.at_level("INFO"):
        fit("--trainer.max_steps=6", probe=True)
    assert "[probe] epoch 2 (unfinished, step 6): " in capsys.readouterr().out
    assert "[val] step 6: " in caplog.text
    assert {row["epoch"] for row in rows(RUN / "probe.csv")} == {"0", "1", "2"}
    for name in ("captions.csv", "validation.csv"):
        assert {row["epoch"] for row in rows(RUN / name)} == {"1", "2"}
    assert {row["step"] for row in rows(RUN / "validation.csv")} == {"4", "6"}
    assert [step for step, _ in scalars(RUN, "val/loss")] == [3, 5]
    assert sorted(path.name for path in (RUN / "checkpoints").iterdir()) == ["epoch_1.ckpt", "last.ckpt"]
    before = [row for row in rows(RUN / "probe.csv") if row["epoch"] in "01"]
    caplog.clear()
    with caplog.at_level("INFO"):
        cli = fit(f"--ckpt_path={RUN}", command="validate", base=False)
    again = Path(cli.trainer.log_dir)
    assert "[probe] epoch 2 (unfinished, step 6): " in capsys.readouterr().out
    assert "[val] step 6: " in caplog.text
    assert {row["step"] for row in rows(again / "validation.csv")} == {"4", "6"}
    kept = [row for row in rows(again / "probe.csv") if row["epoch"] in "01"]
    assert [row["value"] for row in kept] == [row["value"] for row in before]
    assert scalars(again, "val/loss") == scalars(RUN, "val/loss")[-1:]
    card = (export(RUN, "out") / "README.md").read_text()
    assert "The weights are those within epoch 2." in card
    assert "## Held-out images, after 6 steps" in card
    assert "## SAE probe after epoch 2" in card


def test_validate_of_a_run_that_was_never_probed(straight, fit, capsys):
    """A trained adapter is no "before training"."""
    shutil.copytree(straight / "runs", "runs")
    flags = ["--probe.every_n_epochs=1", *crash_flags("batches")]
    cli = fit(f"--ckpt_path={RUN / 'checkpoints/epoch_2.ckpt'}", *flags, command="validate", base=False)
    assert "[probe] epoch 2: " in capsys.readouterr().out
    folder = Path(cli.trainer.log_dir)
    assert {row["epoch"] for row in rows(folder / "probe.csv")} == {"2"}
    assert {row["epoch"] for row in rows(folder / "captions.csv")} == {"1", "2"}
