"""A trained adapter in Python, without a Trainer.

from lightning_limber import load

model = load("runs/default")
model.caption("cat.png")
model.probe(images, captions)
model.features("cat.png", layer=18)
model.tokens("cat.png").lens
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_limber.data.collate import Batch
from lightning_limber.data.held_out import spread, stand_in
from lightning_limber.data.image_folder import open_image
from lightning_limber.data.prompt import CAPTION_QUESTION
from lightning_limber.data.records import Record, Turns
from lightning_limber.models.adapter_weights import ENTRY, own_weights, read_projector
from lightning_limber.models.generation import Decoding
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.limber import Limber
from lightning_limber.probe.config import ProbeConfig, in_present_form
from lightning_limber.probe.explorer import TokenTables, look, token_tables
from lightning_limber.probe.load import build_probe
from lightning_limber.probe.metrics.neighbours import make_bank
from lightning_limber.probe.passes import Probe
from lightning_limber.probe.tables import frame
from lightning_limber.utils.adapter_config import upgrade_adapter
from lightning_limber.utils.checkpoints import EXPORTED, newest_checkpoint, read_checkpoint
from lightning_limber.utils.trust import class_paths, trusted_class

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Trained:
    """What a checkpoint or an exported folder says.

    Attributes:
        config: The run's config; `model` at least.
        backbones: Fingerprints of the frozen models.
        trainer: The Trainer's settings that enter the arithmetic.
        weights: State dict of the adapter.
    """

    config: dict[str, Any]
    backbones: dict[str, str]
    trainer: dict[str, Any]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """Reads a checkpoint, a run's folder (its ``last.ckpt``), a folder of runs (the newest) or an
        exported folder.

        Raises:
            FileNotFoundError: there is none of them.
            ValueError: the file is no checkpoint of this project.
        """
        path = Path(path).expanduser()
        if (path / EXPORTED).is_file():
            from safetensors import safe_open

            weights = read_projector(path)
            with safe_open(path / EXPORTED, "pt") as file:
                notes = {key: json.loads(text) for key, text in file.metadata().items() if key != "format"}
            config = yaml.safe_load((path / "config.yaml").read_text())
            return cls(config, notes["backbones"], notes["trainer"], weights)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no '{path}'. Give a checkpoint (.ckpt), a run's folder, or an exported one."
            )
        return cls.of_checkpoint(read_checkpoint(newest_checkpoint(path) if path.is_dir() else path))

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any]) -> Trained:
        saved = checkpoint["lightning_limber"]
        weights = own_weights(checkpoint)
        # Tuples, which YAML lacks, become lists.
        settings = json.loads(json.dumps(checkpoint["hyper_parameters"]))
        # The adapter that it started from, and how the run was made faster, are history.
        settings |= {"adapter_weights": None, "shard_llm": False}
        settings |= {"cache_features": False, "compile_llm": False}
        settings["adapter"] = upgrade_adapter(settings["adapter"])
        config = yaml.safe_load(saved["config"] or "{}") | {"model": settings}
        return cls(config, saved["backbones"], saved["trainer"], weights)


def load(path: str | Path, device: str | torch.device | None = None) -> TrainedModel:
    """Loads a trained adapter with the two frozen models that it stands between.

    Where the adapter's class is your own, import its module first: a file's word is not enough to do so.

    Args:
        path: A checkpoint, a run's folder (its ``last.ckpt``), a folder of runs (the newest), or a folder
            that ``export`` wrote.
        device: null takes the GPU where there is one.

    Raises:
        FileNotFoundError: nothing is there, or a frozen model is not to be had.
        ValueError: a frozen model is another than it was trained with, or the adapter's class is not of
            this package and not imported.
    """
    trained = Trained.read(path)
    model = Limber(**trained.config["model"] | {"regularise": {}})  # That is for training.
    model.configure_model()
    model.on_load_checkpoint({"lightning_limber": {"backbones": trained.backbones}})
    model.load_state_dict(
        {key if key.startswith(ENTRY) else f"adapter.{key}": w for key, w in trained.weights.items()}
    )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainedModel(model.to(device).eval().requires_grad_(False), trained)


class TrainedModel:
    """Captions, probe and SAE features of one trained adapter, computed in the precision of its run.

    Attributes:
        model: The module: encoder, adapter and LLM.
        config: The run's config.
    """

    def __init__(self, model: Limber, trained: Trained) -> None:
        self.model, self.config = model, trained.config
        self._dtype = AUTOCAST.get(trained.trainer["precision"])
        if self._dtype is not None:
            model.llm.prepare_autocast(self._dtype)
            model.vision.prepare_autocast(self._dtype)

    def _context(self) -> AbstractContextManager:
        kind = self.model.device.type
        return nullcontext() if self._dtype is None else torch.autocast(kind, self._dtype)

    def caption(self, image: Image | str | Path, **generation: Any) -> str:
        """Writes a caption.

        Args:
            image: A picture or its path.
            generation: See `Decoding`: max_new_tokens, num_beams, temperature, top_p, seed.
        """
        with self._context():
            return self.model.generate(self._image_tokens(image), Decoding(**generation))[0].text

    def probe(
        self,
        images: Sequence[Image | str | Path],
        captions: Sequence[str | list[str]],
        batch_size: int = 32,
    ) -> pd.DataFrame:
        """Runs the SAEs over images, as the run's own probe does over the held-out ones.

        Args:
            images: Pictures or their paths.
            captions: Of each image, one or several.
            batch_size: Changes no number.

        Returns:
            A row for each number: layer (none for numbers about all layers), group, metric, value, and
            low and high of its 95 % bootstrap interval over images (probe/metrics/).

        Raises:
            ValueError: the run had a metric of a module that this program has not imported.
        """
        if len(images) != len(captions) or not len(images):
            raise ValueError(
                f"{len(images)} images and {len(captions)} captions: each image needs its own."
            )
        texts = [[text] if isinstance(text, str) else list(text) for text in captions]
        batches = partial(_Batches, self.model, images, texts, batch_size)
        intervention_images = min(self._probe.config.intervention_images, len(images))
        found = self._probe.run(batches(len(images)), batches(intervention_images, interventions=True))
        return frame(found.rows)

    def features(self, image: Image | str | Path, layer: int, top: int = 3) -> pd.DataFrame:
        """The SAE latents that are strongest at each image token, at one layer.

        Args:
            image: A picture or its path.
            layer: One that has an SAE.
            top: Latents of a token.

        Returns:
            A row for each active latent of each image token: token (place among the image tokens), row and
            column of its patch (none for CLS, and where tokens are no places in the image), latent,
            activation, and the latent's description and density on text where they are known. Tokens
            that are never counted (passes.py) have no rows.
        """
        import pandas as pd

        names = {at: name for name, at in self._probe.layers.items()}
        if layer not in names:
            raise ValueError(f"layer={layer} has no SAE; there are {sorted(names)}.")
        found: list[Tensor] = []
        self._probe.latents(
            self._image_tokens(image), lambda _, latents: found.append(latents[0]), [names[layer]]
        )
        values, index = found[0].nan_to_num(0.0).topk(top, dim=-1)  # [P, top]
        known = self._probe.descriptions.get(names[layer])
        height, width = self.model.token_grid or (0, 0)
        before = len(values) - height * width
        rows = []
        for token, latent in (values > 0).nonzero().tolist():
            k = int(index[token, latent])
            place = divmod(token - before, width) if token >= before else (None, None)
            text = (None, None) if known is None else (known.texts[k], float(known.density[k]))
            rows.append((token, *place, k, float(values[token, latent]), *text))
        columns = ["token", "row", "column", "latent", "activation", "description", "density"]
        return pd.DataFrame(rows, columns=columns).astype({"row": "Int64", "column": "Int64"})

    def tokens(self, image: Image | str | Path, texts: Sequence[str] = ()) -> TokenTables:
        """What each layer makes of each image token: norms, latents, logit lens and nearest text.

        Args:
            image: A picture or its path.
            texts: Captions among whose words the nearest are sought; without any there are no neighbours.

        Returns:
            Four tidy data frames, `tokens`, `latents`, `lens` and `neighbours` (probe/explorer.py).
        """
        bank = make_bank(self._probe, texts) if texts else None
        found = look(self._probe, self.model.opening(1), self._image_tokens(image), bank)
        return token_tables(self._probe, found, bank)

    @property
    def layers(self) -> list[int]:
        """Layers that have an SAE."""
        return list(self._probe.layers.values())

    @cached_property
    def _probe(self) -> Probe:
        if "probe" not in self.config:
            raise ValueError("This adapter's run had no config of a probe: it was not made by the CLI.")
        settings = in_present_form({"probe": self.config["probe"]})["probe"]
        for path in class_paths(settings.get("metrics")):
            # A file's word is not enough to import it.
            if path.rpartition(".")[0] not in sys.modules:
                trusted_class(path, "this adapter", "probe.metrics")
        return build_probe(self.model, ProbeConfig.of(settings), self._context)

    def _image_tokens(self, image: Image | str | Path) -> ImageTokens:
        pixels = self.model.vision.transform(_picture(image))[None].to(self.model.device)  # [1, 3, H, W]
        with self._context():
            return self.model.made_of(self.model.vision(pixels))


@dataclass
class _Batches:
    """`count` of the images with their captions (`held_out.spread`), as often as they are iterated."""

    model: Limber
    images: Sequence[Image | str | Path]
    captions: list[list[str]]
    size: int
    count: int
    interventions: bool = False

    def __iter__(self) -> Iterator[Batch]:
        collate = self.model.collator()
        chosen = spread(len(self.images), self.count)
        for start in range(0, self.count, self.size):
            places = chosen[start : start + self.size]
            records = [self._read(i) for i in places]
            others = []
            if self.interventions:
                count = len(self.images)
                others = [
                    stand_in(record, i, count, self._read)
                    for i, record in zip(places, records, strict=True)
                ]
            # Read after the first caption; all of an image's captions are its words.
            texts: list[list[str | Turns]] = [[record.captions[0]] for record in records]
            if collate.prompt.is_conversation:
                texts = [[[(CAPTION_QUESTION, record.captions[0])]] for record in records]
            batch = collate(records, texts, places, others=others, for_probe=True)
            yield apply_to_collection(batch, Tensor, lambda tensor: tensor.to(self.model.device))

    def _read(self, index: int) -> Record:
        return Record(str(index), _picture(self.images[index]), self.captions[index])


def _picture(image: Image | str | Path) -> Image:
    return open_image(Path(image).expanduser()) if isinstance(image, (str, Path)) else image
