"""Lightning's Trainer with a folder for each run, and what it leaves there for the next one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_limber.utils.files import new_folder, write_text

STUB = {"config.yaml", "hparams.yaml", "metrics.csv", "run.json", ".lock"}
"""Files beside those of TensorBoard that a run has before its first step."""


class Trainer(pl.Trainer):
    """Options of Lightning's Trainer."""

    runs = Path("runs/default")
    """Where a run whose logger has no folder for it gets one."""
    run_folder: str | None = None
    made: str | None = None
    """Folder that this process made for its run."""

    @property
    def log_dir(self) -> str | None:
        """The run's own folder, whatever the logger. Lightning's is shared by all runs where the logger is
        neither TensorBoard's nor CSV. Ask for it in all processes. `predict` has none.
        """
        if self.state.fn == "predict":
            return None
        for logger in self.loggers:
            if isinstance(logger, (TensorBoardLogger, CSVLogger)):
                self.run_folder = self.strategy.broadcast(logger.log_dir)
                return self.run_folder
        if self.run_folder is None:
            self.made = new_folder(self.runs) if self.is_global_zero else None
            self.run_folder = self.strategy.broadcast(self.made)
        return self.run_folder

    def make_folder(self, logger: TensorBoardLogger | CSVLogger) -> int:
        """Makes the folder of a logger's next version, and returns its number."""
        self.made = new_folder(Path(logger.root_dir))
        return int(self.made.rpartition("_")[2])

    def remove_stub(self) -> None:
        """Removes the folder that was made for a run in which nothing was trained or measured."""
        made = Path(self.made) if self.made else None
        if made is None or not made.is_dir() or (self.state.fn == "fit" and self.global_step):
            return
        if all(path.name in STUB or path.match("events.out.tfevents.*") for path in made.iterdir()):
            shutil.rmtree(made)

    def plan(self) -> None:
        """Says what a run will cost (FLOPs, memory, hours), without loading a weight."""

    def export(self, ckpt_path: str = "last", output: str = "export") -> None:
        """Writes a run's adapter as a folder for a hub: weights, config, model card.

        Args:
            ckpt_path: A checkpoint, a run's folder, or ``last``.
            output: The folder.
        """


def make_trainer(make: Callable[[], Any], accelerator: Any) -> Trainer:
    """Makes a Trainer of what the settings ask for.

    Raises:
        MisconfigurationException: this machine or this project does not have it.
    """
    try:
        trainer: Trainer = make()
    except (MisconfigurationException, ImportError) as error:
        if accelerator == "auto" or not re.search("accelerator|backend|Requirement", str(error)):
            raise
        raise MisconfigurationException(
            f"trainer.accelerator={accelerator} is not to be had on this machine "
            f"({str(error).rstrip('.')}). auto takes what there is."
        ) from error
    for logger in trainer.loggers:
        if isinstance(logger, (TensorBoardLogger, CSVLogger)) and trainer.is_global_zero:
            # Theirs looks which number is free, and another run may look before the folder is made.
            logger._get_next_version = partial(trainer.make_folder, logger)  # type: ignore[method-assign]
            if logger._version is not None and not Path(logger.log_dir).exists():
                trainer.made = logger.log_dir
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "trainer.callbacks: WeightAveraging copies the whole module, frozen models included, and is "
            "not supported. The cosine schedule (model.optimizer) ends at a low learning rate."
        )
    return trainer


def new_run_config(parser: Any, config: Any) -> str:
    """A command's settings as YAML, for a new run: it names no checkpoint and no version of this one's
    folder, and a schedule that follows trainer.max_steps still does.
    """
    config = config.clone()
    for key in ("config", "ckpt_path"):
        config.pop(key, None)
    loggers = config.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if "version" in (getattr(logger, "init_args", None) or {}):
            logger.init_args.version = None
            logger.pop("dict_kwargs", None)
    if config.model.optimizer.total_steps == config.trainer.max_steps:
        config.model.optimizer.total_steps = "${trainer.max_steps}"
    return parser.dump(config, skip_unset=False, skip_validation=True)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml``; see `new_run_config`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # Asks all processes.
        if self.already_saved or not trainer.is_global_zero or folder is None:
            return
        self.already_saved = True
        write_text(Path(folder) / self.config_filename, new_run_config(self.parser, self.config))
