"""``python -m lightning_limber fit|validate|test|predict|plan|export``: configs in, a running Trainer out.

Layers of configuration, later ones win: configs/default.yaml, each ``--config``, then flags. A run that
goes on from a checkpoint starts from the config that the checkpoint carries instead of the default.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lightning_limber.callbacks import CaptionSamples, Checkpoints, RunRecord, SAEProbe
from lightning_limber.data import CaptionData
from lightning_limber.models.frozen import cpu_multiplies_bfloat16
from lightning_limber.models.generation import Decoding
from lightning_limber.models.limber import Limber
from lightning_limber.tools.predict import CaptionWriter, Images
from lightning_limber.utils.adapter_config import adapter_args, adapter_in, upgrade_config
from lightning_limber.utils.checkpoints import newest_checkpoint, read_checkpoint, slurm_job
from lightning_limber.utils.trust import trusted_class

SUBCOMMANDS = ("fit", "validate", "test", "predict", "plan", "export")


def config_dir() -> Path:
    """The shipped configs: inside the installed package, or at the top of a clone."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_configs(args: list[str]) -> list[str]:
    """Lets ``--config configs/stamps.yaml`` name a shipped config from any working directory."""

    def find(name: str) -> str:
        if "\n" in name:  # The config itself, as a resumed run hands it to its other processes.
            return name
        shipped = config_dir() / name.removeprefix("configs/")
        return str(shipped) if not Path(name).exists() and shipped.is_file() else name

    found = []
    for previous, arg in zip(["", *args], args, strict=False):
        if previous in ("--config", "-c"):
            arg = find(arg)
        elif arg.startswith("--config="):
            arg = "--config=" + find(arg.removeprefix("--config="))
        found.append(arg)
    return found


def default_precision(accelerator: str) -> str:
    """bf16 autocast where the hardware multiplies bfloat16 faster than float32, else float32."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        return "bf16-mixed" if cpu_multiplies_bfloat16() else "32-true"
    return "32-true"


class Trainer(pl.Trainer):
    """Lightning's, and the names of two more subcommands; `LimberCLI` does what they say."""

    def plan(self) -> None:
        """Says what a run will cost (FLOPs, memory, hours), without loading a weight."""

    def export(self, ckpt_path: str = "last", output: str = "export") -> None:
        """Writes a run's adapter as a folder for a hub: weights, config, model card.

        Args:
            ckpt_path: A checkpoint, a run's folder, or ``last``.
            output: The folder.
        """


NOT_ACCEPTED = re.compile(
    r"unrecognized arguments: --([\w.]+)|(?:Group '([\w.]+)' does not accept o|O)ption '([\w.]+)'"
)


class Parser(LightningArgumentParser):
    """Names the nearest option where one is misspelt, on the command line or in a YAML file."""

    def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parses a command, with the adapter in it as `adapter_args` says."""
        args = list(sys.argv[1:] if args is None else args)
        if self._subcommands_action:  # Not again for what a subcommand or a class gets.
            try:
                args = adapter_args(args)
            except (ValueError, yaml.YAMLError) as error:
                self.error(str(error))
        return super().parse_args(args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        match = NOT_ACCEPTED.search(message)
        if match and "Did you mean" not in message:  # The parser of a class inside has said it.
            given = ".".join(filter(None, match.groups()))
            parsers = [
                self,
                *(self._subcommands_action.choices.values() if self._subcommands_action else ()),
            ]
            known = {action.dest for parser in parsers for action in parser._actions}
            # model.lr is model.optimizer.lr rather than model.llm.
            same = {name for name in known if name.rpartition(".")[2] == given.rpartition(".")[2]}
            if near := get_close_matches(given, same or known, n=1):
                message += f"\n'{given}' is not known. Did you mean '{near[0]}'?"
        super().error(message, ex)


class LimberCLI(LightningCLI):
    """LightningCLI with the probe, the caption samples and the checkpoints as config groups of their
    own (``probe``, ``captions``, ``checkpoint``), with a resume that never changes a setting
    silently, and with the subcommands ``plan`` and ``export``.
    """

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
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            add = parser.add_argument
            text = "Images and folders to caption; null takes the held-out images of the data."
            add("--images", nargs="+", type=str, default=None, help=text)
            add("--output", type=str, default="captions.jsonl", help="Written anew: a JSON object a line.")
            text = "Also write the strongest SAE latents of each image by layer, and where they fire."
            add("--latents", type=bool, default=False, help=text)
            parser.add_class_arguments(Decoding)
        if subcommand == "plan":
            add = parser.add_argument
            add(
                "--gpu",
                nargs="+",
                type=str,
                default=["H100"],
                help="Kinds; an unknown one lists those known.",
            )
            add("--gpus", nargs="+", type=int, default=[1, 8], help="Numbers of GPUs.")
            add("--utilisation", type=float, default=0.4, help="Share of the dense peak FLOP/s.")
            text = "Mean tokens of a caption; null is 32, or model.max_caption_tokens if lower."
            add("--caption_tokens", type=int | None, default=None, help=text)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # As a namespace: a default that is a class does not go together with a default config.
        default = Namespace(class_path="lightning_limber.models.adapters.Linear")
        parser.set_defaults({"model.adapter": default})
        parser.add_lightning_class_args(SAEProbe, "probe")
        parser.add_lightning_class_args(CaptionSamples, "captions")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        if "subcommand" not in self.config:
            return
        ckpt_path = self._settings.get("ckpt_path")
        requeued = None if ckpt_path else self._name_slurm_run()
        if not ckpt_path and requeued is None:
            return
        logger = self._settings.trainer.logger
        runs = Path(logger.init_args.save_dir) / logger.init_args.name
        path = requeued or (runs if ckpt_path == "last" else Path(ckpt_path))
        if path.is_dir() or ckpt_path == "last":
            path = newest_checkpoint(path)
        if self.config.subcommand == "export":
            self._settings.ckpt_path = str(path)
            return
        checkpoint = read_checkpoint(path)
        saved = checkpoint["lightning_limber"]["config"]
        if saved is not None:
            saved = upgrade_config(saved)
            stored = adapter_in(saved)["class_path"]
            trusted_class(stored, path, "model.adapter", [self._settings.model.adapter.class_path])
        # A requeued job's command line is the whole one.
        base = [] if saved is None or requeued else ["--config", saved]
        # Processes that are started for DDP read sys.argv too: all continue from the same file.
        sys.argv[2:] = [*base, *sys.argv[2:], "--ckpt_path", str(path)]
        super().parse_arguments(parser, args)
        if self.config.subcommand == "fit":
            self._continue_logs(path, checkpoint["global_step"])

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

    def _continue_logs(self, path: Path, step: int) -> None:
        """Logs go on in the run's own folder; what was logged after the checkpoint is replaced."""
        logger = self._settings.trainer.logger
        run = path.parent.parent
        if path.parent.name == "checkpoints" and logger.class_path.endswith("TensorBoardLogger"):
            logger.init_args.save_dir = str(run.parent.parent)
            logger.init_args.name = run.parent.name
            logger.init_args.version = run.name
            logger.dict_kwargs = {"purge_step": step + 1}
        rank_zero_info(f"[resume] continuing {path} from step {step}")

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
        if self._settings.model.optimizer.total_steps < 1:
            raise ValueError(
                f"model.optimizer.total_steps={self._settings.model.optimizer.total_steps}: it follows "
                "trainer.max_steps unless it is set. Set trainer.max_steps, or total_steps itself."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None for a plan or an export: they run nothing, and a plan's devices are elsewhere."""
        return None if self.subcommand in ("plan", "export") else super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "plan":
            self._plan()
        elif subcommand == "export":
            from lightning_limber.tools.export import export

            export(self._settings.ckpt_path, self._settings.output)
        else:
            super()._run_subcommand(subcommand)

    def _plan(self) -> None:
        from lightning_limber.tools import plan

        settings, probe = self._settings, self._get(self.config_init, "probe")
        made = plan.make_plan(
            self.model,
            self.datamodule,
            probe,
            settings.trainer,
            gpus=settings.gpu,
            counts=settings.gpus,
            utilisation=settings.utilisation,
            caption_tokens=settings.caption_tokens,
        )
        print(plan.table(made))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            settings = self._settings
            names = (field.name for field in fields(Decoding))
            self.model.decoding = Decoding(**{name: settings[name] for name in names})
            probe = self._get(self.config_init, "probe") if settings.latents else None
            writer = CaptionWriter(settings.output, probe)
            self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            kwargs["return_predictions"] = False
            if settings.images is not None:
                data = self.datamodule
                kwargs["datamodule"] = Images(settings.images, data.val_batch_size, data.num_workers)
        return kwargs

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        settings = self._settings.clone()
        for key in ("config", "ckpt_path"):
            settings.pop(key, None)
        self.model.run_config = self._parser(self.subcommand).dump(
            settings, skip_unset=False, skip_validation=True
        )


def main(args: list[str] | None = None) -> LimberCLI:
    """The command line. `args` replaces ``sys.argv[1:]``."""
    # Workers of torch's loader and of tokenizers do not mix otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv[1:] = find_configs(sys.argv[1:] if args is None else args)
    # ${trainer.max_steps} means the same in a config file and in the merged config of a subcommand.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    options = {
        "parser_mode": "omegaconf+",
        "default_config_files": [str(config_dir() / "default.yaml")],
    }
    try:
        return LimberCLI(
            Limber,
            CaptionData,
            trainer_class=Trainer,
            trainer_defaults={"callbacks": [RunRecord()]},
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "parser_mode": "omegaconf+",
                "epilog": "Also: 'report RUN [RUN ...]' makes an HTML file of runs; see 'report --help'.",
                **{name: dict(options) for name in SUBCOMMANDS},
            },
            auto_configure_optimizers=False,
        )
    except (FileNotFoundError, ValueError) as error:
        if os.environ.get("LIGHTNING_LIMBER_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
