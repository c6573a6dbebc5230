"""``predict``: images or folders in, JSON lines out, a line for each image.

    {"image": "cat.png", "caption": "a cat .", "log_probability": -3.2, "tokens": 5}
    {"image": "half.png", "error": "image file is truncated"}

With ``--latents true`` a line also has the grid of image tokens, [rows, columns] (null where they are no
places in the image), and by layer the latents
that the SAEs find strongest in the image (top_latents, max_text_density, outlier_factor: the probe's):

    "grid": [4, 4], "latents": {"18": [{"latent": 7, "description": "red", "density": 0.01,
    "strength": 31.5, "activations": [0.0, 2.5, null, ...]}]}

`activations` are those of the image tokens in their order: a kept CLS first, then the patches, row by row;
null where a token is never counted (probe/passes.py). `strength` is their sum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.data import CaptionData
from lightning_limber.data.collate import Batch
from lightning_limber.data.image_folder import SUFFIXES, find_pictures, open_image
from lightning_limber.data.records import Record, printable
from lightning_limber.models.generation import Caption
from lightning_limber.models.limber import Limber
from lightning_limber.models.saes import hook_layer
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.load import build_probe
from lightning_limber.probe.metrics.match import top_latents
from lightning_limber.probe.passes import Probe
from lightning_limber.utils.files import append_text


def find_images(paths: Sequence[str]) -> list[Path]:
    """The images among `paths`, and those in the folders among them and below, links to folders followed.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no image.
    """
    found: list[Path] = []
    for path in (Path(name).expanduser() for name in paths):
        if not path.exists():
            raise FileNotFoundError(f"--images: there is no '{path}'. Give images or folders.")
        inside = [path]
        if path.is_dir():
            inside = find_pictures(path)
        if not inside:
            known = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"--images: no image in '{path}' or below. Known: {known}.")
        found += inside
    return found


class ImageSet:
    """Map-style records of images without captions."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        return Record(self.name(index), open_image(self.paths[index]), [])

    def name(self, index: int) -> str:
        return printable(str(self.paths[index]))


class Images(CaptionData):
    """Images to be captioned.

    Args:
        paths: See `find_images`.
        val_batch_size: As in `CaptionData`.
        num_workers: As in `CaptionData`.
    """

    def __init__(self, paths: Sequence[str], val_batch_size: int, num_workers: int) -> None:
        # However many cannot be read, each has its line.
        super().__init__(val_batch_size=val_batch_size, num_workers=num_workers, max_bad_share=1.0)
        self.val_set = ImageSet(find_images(paths))

    def setup(self, stage: str | None = None) -> None:
        """Nothing is to be split."""


class CaptionWriter(pl.Callback):
    """Writes what `Limber.predict_step` returns, batch by batch, in the order of the images.

    Args:
        output: The file.
        probe: Settings of the probe, whose SAEs say which latents are strong; None leaves latents out.
    """

    def __init__(self, output: str, probe: ProbeConfig | None = None) -> None:
        self.output = Path(output)
        self.probe_config = probe
        self.written: int = 0
        self.errors: list[str] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Limber)
        if not pl_module.adapter.calibrated:
            raise ValueError(
                "This adapter is not trained: give --ckpt_path (last, or a .ckpt file) or "
                "--model.adapter_weights."
            )
        self._probe = None
        if self.probe_config is not None:
            context = trainer.precision_plugin.predict_step_context
            self._probe = build_probe(pl_module, self.probe_config, context)
        if trainer.is_global_zero:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text("")

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        extra = [{} for _ in batch.ids] if self._probe is None else image_latents(self._probe, batch)
        lines = [
            (index, _line(name, caption, references) | more)
            for index, name, caption, references, more in zip(
                batch.index, batch.ids, outputs, batch.captions, extra, strict=True
            )
        ]
        lines += [(place, {"image": name, "error": why}) for place, name, why in batch.skipped]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, lines)
            lines = [line for part in parts for line in part]
        if not trainer.is_global_zero:
            return
        in_order = [line for _, line in sorted(lines, key=lambda item: item[0])]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in in_order)
        append_text(self.output, text)
        self.written += len(lines)
        self.errors += [line["image"] for _, line in lines if "error" in line]

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        bad = f", {len(self.errors)} could not be read: {', '.join(self.errors)}" if self.errors else ""
        rank_zero_info(f"[predict] {self.written} images to {self.output}{bad}")


def _line(name: str, caption: Caption, references: list[str]) -> dict[str, Any]:
    line = {
        "image": name,
        "caption": caption.text,
        "log_probability": caption.log_probability,
        "tokens": caption.tokens,
    }
    return line | ({"references": references} if references else {})


def image_latents(probe: Probe, batch: Batch) -> list[dict[str, Any]]:
    """Of each image the strongest latents of every layer; see this file's head."""
    if not batch.ids:
        return []
    latents: list[dict[str, list[dict[str, Any]]]] = [{} for _ in batch.ids]

    def read(name: str, found: Tensor) -> None:
        for i, of_image in enumerate(found):
            latents[i][str(hook_layer(name))] = _strongest(probe, name, of_image)

    probe.latents(probe.model.image_tokens(batch), read)
    grid = probe.model.token_grid
    return [{"grid": grid and list(grid), "latents": of_image} for of_image in latents]


def _strongest(probe: Probe, name: str, found: Tensor) -> list[dict[str, Any]]:
    """The strongest latents of one image, [P, K] activations of one layer, as plain values."""
    config, known = probe.config, probe.descriptions.get(name)
    strength = found.nansum(0).cpu()  # [K]
    density = torch.zeros_like(strength) if known is None else known.density
    # One image says nothing about which latents are common among images.
    top = top_latents(
        strength[None],
        density,
        config.top_latents,
        max_image_share=1.0,
        max_text_density=config.max_text_density,
    )[0]
    rows = []
    for k in sorted(top.nonzero()[:, 0].tolist(), key=lambda k: -float(strength[k])):
        values = found[:, k].tolist()
        rows.append(
            {
                "latent": k,
                **({} if known is None else {"description": known.texts[k], "density": float(density[k])}),
                "strength": round(float(strength[k]), 4),
                "activations": [None if value != value else round(value, 4) for value in values],
            }
        )
    return rows
