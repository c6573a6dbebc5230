"""The bench runs, and its contenders do the same work. How fast is not tested."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from process import REPO


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO))


def run(tmp_path, *args: str, repeats: int = 2) -> dict:
    """A bench at tiny size, in this process; returns the JSON that it wrote."""
    from bench.__main__ import main

    path = tmp_path / "result.json"
    main([*args, "--size", "tiny", "--repeats", str(repeats), "--json", str(path)])
    result = json.loads(path.read_text())
    assert result["bench"] == args[0]
    assert result["hardware"]["cores"] > 0
    assert result["date"].startswith("20")
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    return result


def assert_positive(rows: list[dict], *names: str) -> None:
    for row in rows:
        for name in names:
            assert math.isfinite(row[name]), (row["name"], name)
            assert row[name] > 0, (row["name"], name)


@pytest.fixture
def tiny_setup(tmp_path):
    from bench.sizes import SIZES, Setup, write_models

    setup = Setup(SIZES["tiny"], tmp_path, "cpu", repeats=1, captions=1, only=None)
    write_models(setup)
    return setup


def test_scale(tmp_path):
    result = run(tmp_path, "scale", "--num_images", "1")
    sizes: dict[str, list[int]] = {axis: [] for axis in result["deviation"]}
    for row in result["results"]:
        sizes[row["axis"]].append(row["size"])
        memory = ["peak_bytes"] * (row["axis"] == "images")
        assert_positive([{"name": row["axis"], **row}], "probe_s", "cpu_s", *memory)
    assert sizes == {
        "images": [4, 16, 64],
        "tokens": [1, 4, 16],
        "layers": [1, 2, 3],
        "width": [64, 128, 256, 512],
    }


TRAIN_FIELDS = (
    "samples_per_s tokens_per_s step_s step_s_p10 step_s_p90 speedup flops_per_sample share_of_matmul "
    "share_of_matmul_4n built_bytes peak_bytes"
).split()


def test_designs_are_contenders(tiny_setup):
    from bench.train import DESIGNS, Contenders

    contenders = Contenders(tiny_setup)
    layers = tiny_setup.size.llm().num_hidden_layers
    for name in ("fixed", "hold", "inject", "enter-40", "fixed+cached+fp32"):
        assert len(contenders.build(f"limber-{name}")(1)) >= 1
    entered = contenders.ours(**contenders.design(DESIGNS["enter-40"])).model.entry.config
    assert entered.layer == layers * 40 // 100
    for wrong in ("limber-enter", "limber-fixed+enter", "llama-fixed"):
        with pytest.raises(ValueError, match=f"{re.escape(wrong)}: there is no such contender"):
            contenders.build(wrong)


@pytest.mark.slow
def test_train(tmp_path):
    names = ["limber", "llava-fp32"]
    result = run(tmp_path, "train", "--only", *names)
    assert [row["name"] for row in result["results"]] == names
    assert_positive(result["results"], *TRAIN_FIELDS)
    assert result["results"][0]["speedup"] == 1
    assert result["work"]["image_tokens"] == 4  # A 4x4 grid, pooled by 2.
    assert 0 < result["work"]["padding"] < 1
    assert result["matmul_flops_per_s"]["float32"] > 0


@pytest.mark.slow
def test_train_with_several_captions(tiny_setup):
    from bench import train

    size = tiny_setup.size.many_tokens()
    result = train.main(replace(tiny_setup, size=size, captions=5, only=["limber-shared"], in_process=True))
    assert_positive(result["results"], *(name for name in TRAIN_FIELDS if name != "built_bytes"))
    assert result["work"]["samples"] == 5 * result["work"]["images"]
    assert result["work"]["image_tokens"] == 16


@pytest.mark.slow
def test_probe(tmp_path):
    result = run(tmp_path, "probe", "--only", "limber")
    assert_positive(
        result["results"], "images_per_s", "step_s", "speedup", "peak_bytes_1n", "peak_bytes_4n"
    )
    assert result["work"]["layers"] == 3


@pytest.mark.slow
def test_probes_measure_the_same(tiny_setup):
    """On the same weights, tokens and SAEs all contenders find the same numbers."""
    from bench.probe import NAMES, Contenders

    contenders = Contenders(tiny_setup)
    batches = list(contenders.batches(6))
    ours, *peers = [contenders.run(name, batches)[1] for name in NAMES]
    assert {group for group, _ in ours} == {"image", "caption", "text"}
    for theirs in peers:
        assert set(theirs) == set(ours)
        for key, metrics in theirs.items():
            for name, value in metrics.items():
                # TransformerLens' weights are in bfloat16 throughout; ours keep norms in float32.
                assert value == pytest.approx(ours[key][name], rel=0.05), (key, name)
    assert contenders.bytes_on_disk > 0


@pytest.mark.slow
def test_data(tmp_path):
    result = run(tmp_path, "data")
    assert_positive(result["results"], "batches_per_s", "images_per_s", "step_s")
    padding = {
        (row["name"], row["length_window"]): row["padding"]
        for row in result["results"]
        if row["workers"] == 0
    }
    for kind in ("ImageFolder", "Shards"):
        assert padding[kind, 16] < padding[kind, 0]


def test_gpu_at_tiny_size(tmp_path, monkeypatch):
    """One command measures piece by piece, and says what fails."""
    from bench import gpu
    from bench.gpu import Piece

    pieces = {
        "train": Piece("train", 1, ["limber", "plain-fp32"]),
        "broken": Piece("train", 5, ["nobody"]),
        "probe": Piece("probe", 1, ["limber"]),
    }
    monkeypatch.setattr(gpu, "PIECES", pieces)
    result = run(tmp_path, "gpu", "--device", "cpu", "--steps", "1")
    assert [(row["piece"], row["name"]) for row in result["results"]] == [
        ("train", "limber"),
        ("train", "plain-fp32"),
        ("probe", "limber"),
    ]
    assert_positive(result["results"], "step_s", "speedup", "peak_bytes")
    assert result["failed"] == {"broken": "ValueError: --only nobody: there is no such contender."}
    assert result["left_out"] == []
    assert result["pieces"]["train"]["work"]["needed_flops_per_sample"] > 0


def test_what_there_is_no_time_for_is_left_out(tiny_setup):
    from bench import gpu

    assert gpu.main(replace(tiny_setup, until=0.0))["left_out"] == list(gpu.PIECES)


@pytest.mark.slow
def test_start(tmp_path):
    # Each repeat is two processes with their imports.
    result = run(tmp_path, "start", "--only", "help", "fit_to_first_step", repeats=1)
    assert_positive(result["results"], "seconds", "cpu_seconds")
    seconds = result["first_step_seconds"]
    total = seconds.pop("total")
    parts = "interpreter imports config models saes sanity_check probe first_batch first_step rest".split()
    assert set(seconds) == set(parts)
    assert min(seconds.values()) > 0
    assert max(seconds.values()) < total
    assert max(result["import_seconds"]["help"].values()) > 0


@pytest.mark.slow
def test_every_way_to_train_runs(tiny_setup, tmp_path, monkeypatch):
    from bench.train import Contenders

    contenders = Contenders(tiny_setup)
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    for name in [*contenders.names(), "limber-cached"]:
        laps = contenders.build(name)(2)
        assert len(laps) == 2, name
        assert min(laps) > 0, name


def test_peers_compute_our_loss(tiny_setup):
    """Given the same projection, LLaVA and the plain loop's sequences have the loss of ours."""
    from bench.peers import Peers
    from bench.sizes import limber

    model = limber(tiny_setup)
    model.configure_model()
    peers = Peers(replace(tiny_setup, captions=3), torch.float32)
    batches = peers.batches
    llava = peers.llava()
    llava.model.multi_modal_projector = model.adapter
    with torch.no_grad():
        theirs = llava(**peers.examples[0])
        _, losses, _ = model(batches[0])
    assert len(peers.examples[0]["pixel_values"]) == 3 * len(batches[0].pixel_values)
    assert theirs.loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    # Logits at every position: what the plain loop makes too.
    assert theirs.logits.shape[:2] == peers.examples[0]["input_ids"].shape


def test_trainers_in_turn_get_the_precision_they_ask_for(tiny_setup):
    """Accelerate would keep the first one's."""
    from bench.peers import Peers

    peers = Peers(tiny_setup, torch.float32)
    seen = []
    peers.llm.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    for bf16 in (False, True, False):
        assert len(peers.trainer(bf16, 1)) == 1
    f32, b16 = torch.float32, torch.bfloat16
    assert seen == [f32, f32, b16, b16, f32, f32]


@pytest.mark.parametrize("args", [["--size", "venhoff"], ["--size", "huge"]])
def test_impossible_settings_are_refused(args, capsys):
    from bench.__main__ import parse

    with pytest.raises(SystemExit):
        parse(["train", *args])
    assert args[1] in capsys.readouterr().err
