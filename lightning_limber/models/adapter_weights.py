"""Reads adapters that other projects published: a linear map or a two-layer MLP into an LLM.

A layout is recognised by the keys in the file, never by the file's name:

* LLaVA: ``mm_projector.weight`` (linear) or ``mm_projector.0.weight``, ``mm_projector.2.weight``
  (``mlp2x_gelu``), in ``mm_projector.bin`` with the prefix ``model.``, in full checkpoints among the
  rest (github.com/haotian-liu/LLaVA: multimodal_projector/builder.py, train/llava_trainer.py).
* transformers' ``LlavaForConditionalGeneration``: ``multi_modal_projector.linear_1`` and ``linear_2``;
  its ``state_dict()`` has ``model.`` before it, its hub files do not.
* LiMBeR: the released ``limber_weights/*/proj.ckpt`` are the state dict of one ``nn.Linear``
  (``weight``, ``bias``), loaded strictly into ``image_prefix.proj`` (github.com/jmerullo/limber:
  use_limber.py, image_prefix.py); a state dict of the whole model is read too, also below ``module.``.
* Any other ``nn.Linear`` alone in its file, with or without a prefix before ``weight`` and ``bias``.
* A checkpoint of this project, or a folder that its ``export`` wrote.

A projector is only the same map behind the same features and before the same LLM: the config must
name the encoder, layer, image size, crop and prompt that it was trained with, and the LLM. For
LLaVA 1.5's first stage that is ``openai/clip-vit-large-patch14-336``, layer -2, without CLS, 336
pixels, before the untouched Vicuna; a second-stage projector belongs to the LLM that was tuned with it.
Two things are not in the weights: an activation other than GELU, and Gemma's embedding scale
(transformers before version 5 multiplied ``inputs_embeds`` by sqrt(D_l); a projector trained under it
must be multiplied by sqrt(D_l) first).
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_limber.utils.checkpoints import EXPORTED, damage, newest_checkpoint, read_checkpoint
from lightning_limber.utils.files import damaged_file

# What stands before the projector's own keys in a file that may hold much else.
STEMS = ("mm_projector", "multi_modal_projector", "image_prefix.proj")
# The projector's layers by the name they have there, and in `Linear` and `MLP`.
LAYOUTS = (
    {"": "project."},
    {"0.": "project.0.", "2.": "project.2."},
    {"linear_1.": "project.0.", "linear_2.": "project.2."},
)


ENTRY = "entry."
"""Before the names of the weights of an `Entry`, beside the adapter's, which have nothing before them."""


def load_weights(adapter: nn.Module, entry: nn.Module, path: str) -> None:
    """Loads an adapter's weights for a new run, and those of its entry, if the file has them.

    Args:
        adapter: As the config builds it.
        entry: As the config builds it.
        path: See `read_projector`; or a folder of runs: the newest checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_projector`; or the weights there are of another adapter.
    """
    if Path(path).is_dir() and not (Path(path) / EXPORTED).is_file():
        try:
            path = str(newest_checkpoint(Path(path)))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"model.adapter_weights={path}: the folder holds no {EXPORTED} of an export and no run "
                "that has saved a checkpoint."
            ) from error
    state = read_projector(path)
    own = {key: value.shape for key, value in adapter.state_dict().items()}
    of_entry = {key.removeprefix(ENTRY): state.pop(key) for key in list(state) if key.startswith(ENTRY)}
    if of_entry:
        own |= {ENTRY + key: value.shape for key, value in entry.state_dict().items()}
    given = {key: value.shape for key, value in state.items()}
    given |= {ENTRY + key: value.shape for key, value in of_entry.items()}
    if own != given:
        raise ValueError(
            f"model.adapter_weights={path}: the adapter there is {given}, this config builds {own}. "
            "Set model.adapter, its input_norm (none for another project's adapter), model.entry, "
            "model.vision and model.llm to those it was trained with."
        )
    adapter.load_state_dict(state)
    if of_entry:
        entry.load_state_dict(of_entry)


def read_projector(path: str | Path) -> dict[str, Tensor]:
    """Reads an adapter's weights as a state dict of an `Adapter`.

    Args:
        path: A ``.safetensors`` file, one that ``torch.load`` reads (plain values and tensors only), or an
            exported folder.

    Returns:
        A checkpoint or export of this project: its adapter and, below ``entry.``, its entry, unchanged. Any
        other: float32 ``project.weight`` [D_l, D_v] and ``project.bias`` [D_l] (`Linear`), or the same
        under ``project.0.`` and ``project.2.`` (`MLP`); a missing bias is zero. ``calibrated`` is true,
        so that the published scale is kept; there is no input norm (``input_norm: none``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its keys are in none of the layouts above.
    """
    if (Path(path) / EXPORTED).is_file():
        if bad := damaged_file(Path(path)):
            raise ValueError(f"{Path(path) / bad} is damaged: export or fetch the adapter again.")
        path = Path(path) / EXPORTED
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No file at '{path}'. Give a checkpoint or projector file (of a model in several files, "
            "the one that holds the projector)."
        )
    if (Path(path).suffix == ".ckpt" or zipfile.is_zipfile(path)) and (reason := damage(path)):
        raise ValueError(f"model.adapter_weights={path} is damaged ({reason}).")
    try:
        if Path(path).suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"model.adapter_weights={path} is no file of weights, or damaged ({reason})."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(
            f"model.adapter_weights={path} holds no weights by name, but {type(weights).__name__}."
        )
    if "lightning_limber" in weights:
        return own_weights(read_checkpoint(path))
    if "calibrated" in weights:  # Only this project's adapters have it.
        return weights
    projector = _projector(weights)
    for layers in LAYOUTS:
        required = {f"{layer}weight" for layer in layers}
        if required <= projector.keys() <= required | {f"{layer}bias" for layer in layers}:
            return _rename(projector, layers)
    where = "" if len(projector) == len(weights) else f", the projector's {list(projector)[:8]}"
    raise ValueError(
        f"'{path}' holds no projector in a known layout: its first keys are {list(weights)[:8]}{where}. "
        "Allowed are a checkpoint of lightning_limber; [model.]mm_projector.{weight,bias} or "
        "[model.]mm_projector.{0,2}.{weight,bias} (LLaVA); [model.]multi_modal_projector.linear_{1,2}."
        "{weight,bias} (transformers); image_prefix.proj.{weight,bias} (LiMBeR); or {weight,bias} "
        "alone, also below one prefix (a Linear)."
    )


def own_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint of this project: adapter's without a prefix, entry's below `ENTRY`."""
    state = checkpoint["state_dict"]
    return {
        key.removeprefix("adapter."): value
        for key, value in state.items()
        if key.startswith(("adapter.", ENTRY))
    }


def _projector(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projector's part of a file, under its keys inside the projector."""
    for stem in STEMS:
        dotted = f".{stem}."
        part = {
            f".{key}".partition(dotted)[2]: value for key, value in weights.items() if dotted in f".{key}"
        }
        if part:
            return part
    # A layer alone in its file may have any name.
    alone = len({key.rpartition(".")[0] for key in weights}) == 1
    return {key.rpartition(".")[2] if alone else key: value for key, value in weights.items()}


def _rename(projector: dict[str, Tensor], layers: dict[str, str]) -> dict[str, Tensor]:
    state = {"calibrated": torch.tensor(True)}
    for layer, own in layers.items():
        weight = projector[f"{layer}weight"]
        state[f"{own}weight"] = weight.float()
        state[f"{own}bias"] = projector.get(f"{layer}bias", weight.new_zeros(len(weight))).float()
    return state
