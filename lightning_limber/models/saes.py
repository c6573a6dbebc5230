"""Pretrained sparse autoencoders, a layer each, from SAELens' registry or from folders on disk.

Importing sae-lens takes about ten seconds of CPU: it happens here, when SAEs are loaded, and nowhere
at start-up.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.assets import ASSETS
from lightning_limber.models.llm import HOOK_NAME, LLM
from lightning_limber.utils.files import CHECKSUMS, damaged_file
from lightning_limber.utils.hub import from_hub

warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta")


SHIPPED = ASSETS / "saes"
SHIPPED_PREFIXES = ("shipped:", "suite:")
"""Before the name of a release that ships with this package; the second is the former one."""


def find_saes(release: str, sae_id: str, layers: list[int] | None) -> tuple[Path | None, list[str]]:
    """The release's folder (None: SAELens' registry) and the id of each layer's SAE, in order of layers.

    Args:
        release: A SAELens release, a folder of SAELens folders, or ``shipped:NAME`` for one that ships
            with this package.
        sae_id: Id (or folder) of each SAE with ``{layer}`` in it: ``layer_{layer}/width_16k/canonical``.
        layers: Which layers; null takes every layer that has an SAE.

    Raises:
        FileNotFoundError: the folder does not exist, or no such release ships.
        ValueError: no such release or id.
    """
    if "{layer}" not in sae_id:
        raise ValueError(f"probe.sae_id={sae_id!r} needs {{layer}} in it.")
    folder = release_folder(release)
    ids = folder_ids(folder) if folder else list(registry_entry(release).saes_map)
    pattern = re.compile(re.escape(sae_id).replace(re.escape("{layer}"), r"(\d+)"))
    matches = {int(match[1]): name for name in ids if (match := pattern.fullmatch(name))}
    wanted = sorted(matches) if layers is None else layers
    missing = [layer for layer in wanted if layer not in matches]
    if not ids:
        raise ValueError(
            f"probe.sae_release: '{release}' holds no SAEs: none of the folders in it has a cfg.json."
        )
    if missing or not matches:
        raise ValueError(
            f"probe.sae_id={sae_id!r} of {release!r} has no SAE for layers {missing or 'at all'}. "
            f"There are: {', '.join(sorted(ids)[:20])}{' ...' if len(ids) > 20 else ''}."
        )
    return folder, [matches[layer] for layer in wanted]


def load_saes(release: str, sae_id: str, layers: list[int] | None, llm: LLM) -> dict[str, Any]:
    """Loads what `find_saes` finds, by hook name (``blocks.3.hook_resid_post``), float32 and frozen.

    Their ids are noted as ``cfg.metadata.sae_id``.

    Raises:
        FileNotFoundError: see `find_saes`.
        ValueError: see `find_saes`; or the SAEs do not fit `llm`, the loaded LLM they will run on.
    """
    from sae_lens import SAE

    folder, ids = find_saes(release, sae_id, layers)
    saes = {}
    for name in ids:
        if folder:
            sae: Any = _read_folder(SAE, folder / name)
        else:
            with from_hub(registry_entry(release).repo_id):
                sae = SAE.from_pretrained(release, name, device="cpu")
        metadata = sae.cfg.metadata
        if folder and not metadata.hook_name:
            found = HOOK_NAME.search(name)
            if found is None:
                raise ValueError(
                    f"{folder / name / 'cfg.json'} has no metadata.hook_name, the place that the SAE "
                    "reads: add it, such as blocks.3.hook_resid_post."
                )
            metadata.hook_name = found[0]
        _check_fit(sae, metadata.hook_name, f"{release} {name}", llm)
        if (metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
            _pass_mean_by(sae)
        metadata.sae_id = name
        saes[metadata.hook_name] = sae.to(torch.float32).eval().requires_grad_(False)
    _say_of_which_llm(metadata.model_name, release, llm)
    return saes


def _read_folder(kind: Any, folder: Path) -> Any:
    if bad := damaged_file(folder):
        raise ValueError(
            f"probe.sae_release: '{folder / bad}' is damaged: its checksum is not that in {CHECKSUMS}. "
            "Copy or train the SAE again."
        )
    try:
        return kind.load_from_disk(folder, device="cpu")
    except Exception as error:  # Of whatever library reads a damaged file.
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0].rstrip(" .:")
        raise ValueError(
            f"probe.sae_release: the SAE in '{folder}' cannot be read ({reason}). A folder must hold, "
            "whole, the cfg.json and sae_weights.safetensors that SAELens writes."
        ) from error


def _pass_mean_by(sae: Any) -> None:
    """Fits an SAE of centred residual streams to a model that does not centre them.

    TransformerLens' ``center_writing_weights`` takes the mean over channels out of all that is written
    to the residual stream. No layer sees it, since each starts with a LayerNorm; but an SAE does. Here the
    mean is taken off before `encode` and put back after `decode`, as SAELens does where it normalises.
    """

    def take_off(x: Tensor) -> Tensor:
        sae.mean_over_channels = x.mean(dim=-1, keepdim=True)
        return x - sae.mean_over_channels

    sae.run_time_activation_norm_fn_in = take_off
    sae.run_time_activation_norm_fn_out = lambda x: x + sae.mean_over_channels


def _say_of_which_llm(trained_on: str | None, release: str, llm: LLM) -> None:
    """Warns where SAEs of one model are used on another: a base model's on the tuned one, mostly."""
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    known = make_model_alias_map()
    theirs, ours = (
        known.get(name.lower(), name).rstrip("/").rpartition("/")[2].lower()
        for name in (trained_on or llm.name, llm.name)
    )
    if theirs != ours and not Path(llm.name).expanduser().is_dir():
        rank_zero_info(
            f"[warning] probe.sae_release={release} was trained on {trained_on}, model.llm is {llm.name}: "
            "the sanity check says how well it fits."
        )


def chunks_on_device(
    saes: dict[str, Any], device: torch.device, memory_gb: float | None
) -> Iterator[dict[str, Any]]:
    """The SAEs in chunks of consecutive layers, each on `device` for its turn and on the CPU otherwise.

    Args:
        saes: By hook name, in order.
        device: Where they are used.
        memory_gb: Most that a chunk's weights may take, in 1e9 bytes; None: one chunk of all, which is on
            the device already.

    Raises:
        ValueError: one SAE alone takes more.
    """
    if memory_gb is None:
        yield saes
        return
    chunks: list[dict[str, Any]] = [{}]
    used = 0
    for name, sae in saes.items():
        size = sum(tensor.nbytes for tensor in (*sae.parameters(), *sae.buffers()))
        if size > memory_gb * 1e9:
            raise ValueError(
                f"probe.sae_memory_gb={memory_gb}: the SAE at {name} alone takes {size / 1e9:.4g} GB. "
                "Give at least that, or choose narrower SAEs."
            )
        if used + size > memory_gb * 1e9:
            chunks.append({})
            used = 0
        chunks[-1][name] = sae
        used += size
    for chunk in chunks:
        for sae in chunk.values():
            sae.to(device)
        yield chunk
        for sae in chunk.values():
            sae.to("cpu")


def release_folder(release: str) -> Path | None:
    """The folder that a release names, or None when SAELens knows it by name."""
    if release.startswith(SHIPPED_PREFIXES):
        folder = SHIPPED / release.partition(":")[2]
        if not folder.is_dir():
            known = [f"shipped:{path.name}" for path in SHIPPED.iterdir() if path.is_dir()]
            raise FileNotFoundError(
                f"probe.sae_release: '{release}' does not ship. Known: {', '.join(known)}."
            )
        return folder
    folder = Path(release).expanduser()
    if folder.is_dir():
        return folder
    if release.startswith((".", "/", "~")):
        raise FileNotFoundError(f"probe.sae_release: there is no folder '{release}'.")
    return None


def folder_ids(folder: Path) -> list[str]:
    """Folders of SAELens' on-disk layout (``cfg.json`` beside the weights), relative to `folder`."""
    return [path.parent.relative_to(folder).as_posix() for path in folder.rglob("cfg.json")]


def registry_entry(release: str) -> Any:
    """What SAELens' registry knows of a release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        near = get_close_matches(release, directory, 5)
        raise ValueError(
            f"probe.sae_release={release!r} is no SAELens release and no folder. "
            + (f"Near: {', '.join(near)}." if near else "See SAELens' table of pretrained SAEs.")
        )
    return directory[release]


def _check_fit(sae: Any, hook_name: str | None, name: str, llm: LLM) -> None:
    match = HOOK_NAME.fullmatch(hook_name or "")
    if match is None:
        raise ValueError(f"SAE {name} reads '{hook_name}'; probed are hook_resid_pre and hook_resid_post.")
    if sae.cfg.d_in != llm.hidden_size or int(match[1]) >= len(llm.layers):
        raise ValueError(
            f"SAE {name} reads {hook_name} of width {sae.cfg.d_in}, but {llm.name} has "
            f"{len(llm.layers)} layers of width {llm.hidden_size}. Choose a release trained on this LLM."
        )


def hook_layer(hook_name: str) -> int:
    """``blocks.3.hook_resid_post`` -> 3."""
    match = HOOK_NAME.fullmatch(hook_name)
    assert match is not None
    return int(match[1])


def next_layer(hook: str) -> int:
    """The layer that the residual stream at this hook enters."""
    return hook_layer(hook) + hook.endswith("post")
