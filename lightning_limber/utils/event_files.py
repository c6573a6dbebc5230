"""TensorBoard's event files in a checkpoint: where they ended, so that a resumed run writes on from there.

`purge_step` of TensorBoard's writer cannot do that: what is logged at one step is in part of before the
checkpoint (validation, probe) and in part of after it (the next batch).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

FILES = "events.out.tfevents.*"


def written(trainer: Any) -> dict[str, Any]:
    """Sizes of the run's event files by name, and the points that Lightning logs after the hook that saves.

    Call it in all processes.
    """
    step, points = _points_to_come(trainer)
    sizes: dict[str, int] = {}
    for logger in _loggers(trainer):
        logger.experiment.flush()
        sizes |= {path.name: path.stat().st_size for path in Path(logger.log_dir).glob(FILES)}
    return {"sizes": sizes, "step": step, "points": points}


def go_on(trainer: Any, saved: dict[str, Any]) -> None:
    """Cuts the run's event files to what `written` found, and logs the points that were to come.

    In a folder of another run nothing is cut.
    """
    loggers, sizes = _loggers(trainer), saved["sizes"]
    loggers = [
        logger for logger in loggers if any((Path(logger.log_dir) / name).is_file() for name in sizes)
    ]
    for logger in loggers:
        logger.experiment.close()  # It begins another file when it is used again.
    for path in {path for logger in loggers for path in Path(logger.log_dir).glob(FILES)}:
        if path.name not in sizes:
            path.unlink()
        elif path.stat().st_size > sizes[path.name]:
            os.truncate(path, sizes[path.name])
    for logger in loggers:
        if saved["points"]:
            logger.log_metrics(saved["points"], step=saved["step"])


def _loggers(trainer: Any) -> list[TensorBoardLogger]:
    """Those that write, in the one process that does."""
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return found if trainer.is_global_zero else []


def _points_to_come(trainer: Any) -> tuple[int, dict[str, float]]:
    """Step and values of what Lightning logs behind the hooks of a batch's or an epoch's end."""
    loop, connector = trainer.fit_loop, trainer._logger_connector
    batch, epoch = loop.epoch_loop.batch_progress.current, loop.epoch_progress.current
    ends_epoch = epoch.completed < epoch.processed
    ends_batch = batch.completed < batch.processed and not loop._should_accumulate()
    step = loop.epoch_loop._batches_that_stepped - ends_epoch
    if not trainer.training or not (ends_epoch or (ends_batch and connector.should_update_logs)):
        return step, {}
    points = {name: float(value) for name, value in connector.metrics["log"].items()}
    return step, points and points | {"epoch": float(trainer.current_epoch)}
