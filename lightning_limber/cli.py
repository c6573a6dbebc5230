"""``python -m lightning_limber fit|validate|test|predict|plan|export``: configs in, a running Trainer out.

Layers of configuration, later ones win: configs/base.yaml, the experiment (configs/default.yaml, unless a
``--config`` names its data), each ``--config``, then flags. For a run that goes on from a checkpoint, the
experiment is the config that the checkpoint carries.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_limber.callbacks import CaptionSamples, Checkpoints, Ending, Progress, RunRecord, SAEProbe
from lightning_limber.data import CaptionData
from lightning_limber.data.prompt import check_template
from lightning_limber.models.frozen import cpu_multiplies_bfloat16
from lightning_limber.models.generation import Decoding
from lightning_limber.models.limber import Limber
from lightning_limber.probe.config import in_present_form
from lightning_limber.tools.predict import CaptionWriter, Images
from lightning_limber.utils.adapter_config import upgrade_config
from lightning_limber.utils.checkpoints import (
    newest_checkpoint,
    read_checkpoint,
    refuse,
    setting_differences,
    slurm_job,
)
from lightning_limber.utils.commands import ADDED, COMMANDS, LAYERS, METAVARS, OPTIONS, program
from lightning_limber.utils.config_files import (
    config_dir,
    config_with,
    default_experiment,
    default_logger,
    find_configs,
    split_exports,
)
from lightning_limber.utils.files import FULL, in_words, on_thread_error
from lightning_limber.utils.parser import Parser
from lightning_limber.utils.quiet import keep_quiet
from lightning_limber.utils.ranges import check_ranges
from lightning_limber.utils.run_lock import hold_run
from lightning_limber.utils.trainer import SaveConfig, Trainer, make_trainer
from lightning_limber.utils.trust import class_paths, read_config

SUBCOMMANDS = ("fit", "validate", "test", "predict", "plan", "export")


def default_precision(accelerator: str) -> str:
    """bf16 autocast where the hardware multiplies bfloat16 faster than float32, else float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        return "bf16-mixed" if cpu_multiplies_bfloat16() else "32-true"
    return "32-true"


class LimberCLI(LightningCLI):
    """LightningCLI with the probe, the caption samples and the checkpoints as config groups of their
    own (``probe``, ``captions``, ``checkpoint``), with a resume that never changes a setting
    silently, and with the subcommands ``plan`` and ``export``.
    """

    _run_folder: Path | None = None  # Of a run that goes on.
    _checkpoint: dict[str, Any] | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        # `predict` writes each batch and keeps none.
        return {
            **known,
            "predict": known["predict"] | {"return_predictions"},
            "plan": set(),
            "export": set(),
        }

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        if subcommand not in sys.argv[1:]:  # Its options take a tenth of a second, and nobody asks.
            return self.init_parser()
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"{program()} {subcommand} [--config FILE ...] [--OPTION VALUE ...]"
        parser.description = f"{COMMANDS[subcommand]} {LAYERS}"
        for action in parser._actions:
            action.help = OPTIONS.get(action.dest, action.help)
            action.metavar = METAVARS.get(action.dest, action.metavar)
        for group in parser._action_groups:
            if any(action.dest == "ckpt_path" for action in group._group_actions):
                group.title = "where to start"
        for name, option in ADDED.get(subcommand, {}).items():
            parser.add_argument(f"--{name}", **option)
        if subcommand == "predict":
            parser.add_class_arguments(Decoding)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # A table of numbers that are said before.
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # As a namespace: a default that is a class does not go together with a default config.
        default = Namespace(class_path="lightning_limber.models.adapters.Linear")
        parser.set_defaults({"model.adapter": default})
        parser.add_lightning_class_args(SAEProbe, "probe")
        parser.add_lightning_class_args(CaptionSamples, "captions")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command twice where a file carries the config of its run: what the command says by
        itself decides which classes the file may name (trust.py); then the file's config goes below it.
        """
        command, given = sys.argv[1:2], sys.argv[2:]
        own, exports = split_exports(given)
        carried = exports or any(arg.startswith("--ckpt_path") for arg in own)
        alone = [*default_experiment(own), *own] if command and command[0] in SUBCOMMANDS else own
        first = [arg for arg in alone if not (carried and arg.startswith("--print_config"))]
        self.config = parser.parse_args([*command, *first])
        if "subcommand" not in self.config:
            return
        self._check_values()
        path, requeued = self._find_checkpoint()
        if path is None and not exports:
            return
        if self.config.subcommand == "export":
            self._settings.ckpt_path = str(path)
            return
        stored = [(file, file.read_text(encoding="utf-8")) for file in exports]
        if path is not None:
            checkpoint = read_checkpoint(path)
            # Processes that are started for DDP read sys.argv too: all continue from the same file.
            own += ["--ckpt_path", str(path)]
            sys.argv[2:] = [*given, "--ckpt_path", str(path)]
            saved = checkpoint["lightning_limber"]["config"]
            if saved is not None and not requeued:  # A requeued job's command line is the whole one.
                stored.append((path, saved))
        options = self._parser(self.config.subcommand)
        named = class_paths(_upgrade(self._settings.as_dict()))
        layers = []
        for file, text in stored:
            layers += [
                "--config",
                read_config(text, options, file, named, *self._log_folder(path), _as_given),
            ]
        self.config = parser.parse_args([*command, *(layers or default_experiment(own)), *own])
        self._check_values()
        self._checkpoint = checkpoint if path is not None else None
        if path is None:
            self._name_slurm_run()
        elif self.config.subcommand == "fit":
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            step = checkpoint["global_step"]
            # A batch is logged at the number of steps before it, the end of an epoch at that of all.
            purge_step = None if "event_files" in checkpoint else step + (not progress["ready"])
            self._continue_logs(path, step, purge_step)

    def _check_values(self) -> None:
        """What can be said of the settings before a model is loaded."""
        if self._settings.trainer.logger is True:  # Lightning's own would not find its folder again.
            self._settings.trainer.logger = default_logger()
        check_ranges(self._settings.as_dict(), lambda key: config_with(key, sys.argv[2:]) or "")
        check_template(self._settings.model.prompt)

    def _find_checkpoint(self) -> tuple[Path | None, bool]:
        """The checkpoint to start from, and whether it is that of a requeued SLURM job."""
        given = self._settings.get("ckpt_path")
        if given is None:
            path = self._name_slurm_run()
            return path, path is not None
        path = Path(*self._log_folder(None)) if given == "last" else Path(given)
        if path.is_dir() or given == "last":
            path = newest_checkpoint(path, given)
        # A link to a checkpoint, or one named from within its folder: the run's folder tells where to log.
        real = path.resolve()
        return (real if path.parent.name != real.parent.name == "checkpoints" else path), False

    def _log_folder(self, checkpoint: Path | None) -> tuple[str, str]:
        """Where runs are logged and the run's name: as the checkpoint lies, else as the command says."""
        if checkpoint is not None and checkpoint.parent.name == "checkpoints":
            run = checkpoint.parent.parent
            return str(run.parent.parent), run.parent.name
        loggers = self._loggers() or self._loggers(("",))
        options = loggers[0].init_args if loggers else {}
        return options.get("save_dir") or "runs", options.get("name") or "default"

    def _loggers(self, kinds: tuple[str, ...] = ("TensorBoardLogger", "CSVLogger")) -> list[Any]:
        """Settings of the loggers of these classes, by default of those that have a folder for each run."""
        loggers = self._settings.trainer.logger
        specs = loggers if isinstance(loggers, list) else [loggers]
        specs = [spec for spec in specs if isinstance(spec, Namespace) and "init_args" in spec]
        return [spec for spec in specs if spec.class_path.endswith(kinds)]

    def _name_slurm_run(self) -> Path | None:
        """Names a batch job's run after the job; the checkpoint to go on from when the job was requeued."""
        job, logger = slurm_job(), self._settings.trainer.logger
        if job is None or self.config.subcommand != "fit":
            return None
        if not getattr(logger, "class_path", "").endswith("TensorBoardLogger"):
            return None
        if logger.init_args.get("version") is None:
            logger.init_args.version = f"job_{job}"
        options = logger.init_args
        path = Path(options.save_dir) / options.name / str(options.version) / "checkpoints/last.ckpt"
        return path if path.is_file() else None

    def _continue_logs(self, path: Path, step: int, purge_step: int | None) -> None:
        """Logs go on in the run's own folder; what was logged after the checkpoint is replaced (of a
        checkpoint that knows where the event files ended, by `event_files.go_on`).
        """
        if path.parent.name == "checkpoints":
            self._run_folder = path.parent.parent
            hold_run(self._run_folder)
            for logger in self._loggers():
                logger.init_args.save_dir, logger.init_args.name = self._log_folder(path)
                logger.init_args.version = self._run_folder.name
                if logger.class_path.endswith("TensorBoardLogger") and purge_step is not None:
                    logger.dict_kwargs = {"purge_step": purge_step}
            # CSVLogger begins its file anew.
            table = self._run_folder / "metrics.csv"
            if table.is_file():
                rank_zero_only(table.replace)(table.with_name(f"metrics_to_step_{step}.csv"))
        rank_zero_info(f"[resume] continuing {path} from step {step}")
        if step == self._settings.trainer.max_steps:
            rank_zero_info(
                f"[resume] it has all its steps: a trainer.max_steps above {step} makes the run longer, "
                "and `validate` measures it again"
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning's own would put the checkpoint's settings over the flags without a word."""

    @property
    def _settings(self) -> Any:
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        trainer = self._settings.trainer
        if trainer.precision is None:
            planned = self.subcommand == "plan"  # For a GPU, on whatever machine.
            trainer.precision = "bf16-mixed" if planned else default_precision(trainer.accelerator)
        if self.subcommand == "predict":  # It leaves its output and nothing else.
            trainer.logger = False
        if self._settings.model.optimizer.total_steps < 1:
            raise ValueError(
                f"model.optimizer.total_steps={self._settings.model.optimizer.total_steps}: it follows "
                "trainer.max_steps unless it is set. Set trainer.max_steps, or total_steps itself."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None for a plan or an export: they run nothing, and a plan's devices are elsewhere."""
        if self.subcommand in ("plan", "export"):
            return None
        make = partial(super().instantiate_trainer, **kwargs)
        trainer = make_trainer(make, self._settings.trainer.accelerator)
        trainer.runs = Path(*self._log_folder(None))
        trainer.run_folder = str(self._run_folder) if self._run_folder else None
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        own = config["callbacks"] if isinstance(config["callbacks"], list) else [config["callbacks"]]
        has_bar = any(isinstance(callback, ProgressBar) for callback in own)
        if config["enable_progress_bar"] is not False and not has_bar:
            callbacks = [*callbacks, Progress()]
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Refuses settings that are not the checkpoint's before a model is loaded."""
        if self._checkpoint is not None:
            refuse(setting_differences(self._checkpoint, self.model, self.trainer, self.datamodule))
            self._checkpoint = None

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "plan":
            self._plan()
        elif subcommand == "export":
            from lightning_limber.tools.export import export

            export(self._settings.ckpt_path, self._settings.output)
        else:
            try:
                super()._run_subcommand(subcommand)
            except BaseException as error:
                self.trainer.remove_stub()  # type: ignore[attr-defined]
                if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
                    error.filename = str(self.trainer.runs)  # type: ignore[attr-defined] # Of loggers.
                raise

    def _plan(self) -> None:
        from lightning_limber.tools.plan import make_plan

        settings, probe = self._settings, self._get(self.config_init, "probe")
        table = make_plan(
            self.model,
            self.datamodule,
            probe,
            settings.trainer,
            gpus=settings.gpu,
            counts=settings.gpus,
            utilisation=settings.utilisation,
            caption_tokens=settings.caption_tokens,
        )
        print(table)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            settings = self._settings
            names = (field.name for field in fields(Decoding))
            self.model.decoding = Decoding(**{name: settings[name] for name in names})
            probe = self._get(self.config_init, "probe").config if settings.latents else None
            writer = CaptionWriter(settings.output, probe)
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            kwargs["return_predictions"] = False
            if settings.images is not None:
                data = self.datamodule
                kwargs["datamodule"] = Images(settings.images, data.val_batch_size, data.num_workers)
        return kwargs

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.model.has_checkpoint = self._settings.get("ckpt_path") is not None
        settings = self._settings.clone()
        for key in ("config", "ckpt_path"):
            settings.pop(key, None)
        self.model.run_config = self._parser(self.subcommand).dump(
            settings, skip_unset=False, skip_validation=True
        )


def _upgrade(config: dict[str, Any]) -> dict[str, Any]:
    """What older versions wrote, as this one does."""
    return upgrade_config(in_present_form(config))


def _as_given(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config of an older version as this one's, with a schedule that still follows max_steps."""
    config = _upgrade(config)
    trainer, model = (config.get(name) for name in ("trainer", "model"))
    optimizer = model.get("optimizer") if isinstance(model, dict) else None
    follows = isinstance(trainer, dict) and isinstance(optimizer, dict)
    if follows and optimizer.get("total_steps") == trainer.get("max_steps"):  # type: ignore[union-attr]
        optimizer.pop("total_steps", None)  # type: ignore[union-attr]
    return config


def main(args: list[str] | None = None, kind: type[LimberCLI] = LimberCLI) -> LimberCLI:
    """The command line. `args` replaces ``sys.argv[1:]``."""
    # Workers of torch's loader and of tokenizers do not mix otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv[1:] = sys.argv[1:] if args is None else args
    threading.excepthook = on_thread_error
    keep_quiet()
    # ${trainer.max_steps} means the same in a config file and in the merged config of a subcommand.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    options = {
        "parser_mode": "omegaconf+",
        "default_config_files": [str(config_dir() / "base.yaml")],
    }
    try:
        sys.argv[1:] = find_configs(sys.argv[1:])
        return kind(
            Limber,
            CaptionData,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [RunRecord(), Ending()]},
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            parser_kwargs={
                "prog": program(),
                "parser_mode": "omegaconf+",
                **{name: dict(options) for name in SUBCOMMANDS},
            },
            auto_configure_optimizers=False,
        )
    except KeyboardInterrupt:  # Before or after the run, which saves first: callbacks/signals.py.
        sys.exit(130)
    except (OSError, ValueError, FloatingPointError, MisconfigurationException) as error:
        if os.environ.get("LIGHTNING_LIMBER_TRACEBACK"):
            raise
        print(f"error: {in_words(error)}", file=sys.stderr)
        sys.exit(2)
