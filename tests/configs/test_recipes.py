"""Every recipe, unchanged but for sizes and paths, on tiny models and SAEs under the names it gives."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import hub
import pytest
import tiny
import torch
import yaml
from crash import Crash
from process import REPO
from runs import assert_equal, crash_flags, final

from lightning_limber.data.prompt import Prompt
from lightning_limber.models.llm import LLM
from lightning_limber.models.saes import find_saes, load_saes, registry_entry
from lightning_limber.models.vision import VisionConfig, VisionEncoder
from lightning_limber.probe import sanity_check as gate
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.explanations import Explanation, neuronpedia_id, write_explanations
from lightning_limber.probe.metrics import DEFAULT_METRICS

CONFIGS = REPO / "configs"
COCO = ["gemma3_270m", "qwen3_1.7b", "llama3.1_8b", "gpt2"]
VENHOFF = ["venhoff2025/pretrain", "venhoff2025/finetune"]
LIMBER = ["limber/beit_l", "limber/clip_rn50x16", "limber/nf_resnet50"]
RECIPES = [*COCO, *VENHOFF, *LIMBER]
RESUMED = set(RECIPES) - {"llama3.1_8b", "gpt2"}
"""Those two train as ``qwen3_1.7b`` does, with another LLM and other SAEs."""
NO_PROBE = "--probe.every_n_epochs=0"
LAYERS = {"gemma3_270m": 18, "qwen3_1.7b": 28, "llama3.1_8b": 32, "gpt2": 12} | dict.fromkeys(VENHOFF, 26)


def settings(recipe: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> Path:
    """The hub: what the recipes name and no more, each written once."""
    root = tmp_path_factory.mktemp("hub")
    for recipe in RECIPES:
        model = settings(recipe)["model"]
        for name in (model["llm"], model["vision"]["name"]):
            if name in hub.MODELS and not any(hub.snapshot(root, name).iterdir()):
                hub.MODELS[name](hub.snapshot(root, name))
    if importlib.util.find_spec("timm"):
        for name, write in hub.TIMM.items():
            write(hub.snapshot(root, name))
    for probe in {settings(r)["probe"].get("sae_release"): settings(r)["probe"] for r in LAYERS}.values():
        hub.write_release(root, probe["sae_release"], probe["sae_id"])
    return root


@pytest.fixture
def on_hub(repositories, monkeypatch) -> Path:
    hub.use(repositories, monkeypatch)
    return repositories


def write_images(folder: Path, names: list[str]) -> None:
    from PIL import Image

    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 32), 20 + 2 * i).convert("RGB").save(folder / name)


def caption(rng: random.Random) -> str:
    return " ".join(rng.choices(tiny.WORDS, k=5))


def write_data(kind: str, folder: Path) -> list[str]:
    """Data of the kind, and the flags that name it."""
    rng = random.Random(0)
    if kind == "CocoCaptions":
        splits = ["train"] * 30 + ["restval"] * 4 + ["val"] * 6
        images = [{"filepath": "val2014", "filename": f"{i}.jpg", "split": s} for i, s in enumerate(splits)]
        for image in images:
            image["sentences"] = [{"raw": caption(rng)} for _ in range(5)]
        write_images(folder / "val2014", [image["filename"] for image in images])
        (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
        return [f"--data.annotations={folder}/dataset_coco.json", f"--data.images={folder}"]
    if kind == "LLaVAConversations":
        records = []
        for i in range(48):
            turns = [("<image>\n" if i % 6 and not n else "") + caption(rng) for n in range(1 + i % 3)]
            said = [({"from": "human", "value": t}, {"from": "gpt", "value": caption(rng)}) for t in turns]
            record = {"id": str(i), "conversations": [turn for pair in said for turn in pair]}
            records.append(
                record | ({"image": f"coco/{i}.jpg"} if i % 6 else {})
            )  # Every sixth: text alone.
        write_images(folder, [record["image"] for record in records if "image" in record])
        (folder / "llava.json").write_text(json.dumps(records))
        paths = [f"--data.annotations={folder}/llava.json", f"--data.images={folder}"]
        return [*paths, "--data.val_share=0.2"]
    write_images(folder / "raw", [f"{i}.jpg" for i in range(54)])
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(18 * shard, 18 * shard + 18):
                tar.add(folder / f"raw/{i}.jpg", f"{i:09d}.jpg")
                text = caption(rng).encode()
                info = tarfile.TarInfo(f"{i:09d}.txt")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return [f"--data.shards={folder}/{{00000..00002}}.tar"]


def flags(recipe: str, folder: Path) -> list[str]:
    """The recipe, and what makes it small: nothing here changes what is computed for one image."""
    kind = settings(recipe)["data"]["class_path"].rpartition(".")[2]
    folder.mkdir(exist_ok=True)
    small = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_steps": 4,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "model.optimizer.warmup_steps": 1,
        "data.batch_size": 4,
        "data.val_batch_size": 4,
        "data.num_workers": 0,
        "probe.num_images": 4,
        "probe.intervention_images": 2,
        "probe.bootstrap_samples": 20,
        "captions.num_images": 2,
        "captions.max_new_tokens": 4,
        "checkpoint.every_n_steps": 1,
    }
    if "accumulate_grad_batches" in settings(recipe)["trainer"]:
        small["trainer.accumulate_grad_batches"] = 2
    if "descriptions" in settings(recipe).get("probe", {}):  # There is no network here.
        for layer in range(LAYERS[recipe]):
            rows = [Explanation("m", str(layer), k, "red cats", "x") for k in range(hub.D_SAE)]
            write_explanations(rows, folder / f"latents/{layer}/batch-0.jsonl.gz")
        small["probe.descriptions"] = folder / "latents/{layer}"
    if recipe in LAYERS:
        # These SAEs were never trained: the gate measures, complains and lets them pass.
        small["probe.sanity_check"] = "warn"
    return [
        f"--config={CONFIGS}/{recipe}.yaml",
        *(f"--{name}={value}" for name, value in small.items()),
        *write_data(kind, folder),
    ]


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_recipe_trains_probes_and_resumes(recipe, on_hub, fit, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    if settings(recipe)["model"]["vision"]["name"] in hub.TIMM:
        pytest.importorskip("timm", reason="the optional extra timm")
    args = flags(recipe, tmp_path / "data")
    if recipe == "venhoff2025/finetune":  # Stage 2 starts from stage 1.
        first = fit(*flags("venhoff2025/pretrain", tmp_path / "data"), NO_PROBE, base=False)
    capsys.readouterr()
    cli = fit(*args, *crash_flags("batches"), base=False)
    printed = capsys.readouterr().out
    run = Path(cli.trainer.log_dir)
    assert cli.trainer.global_step == 4
    assert all(tensor.isfinite().all() for tensor in final(run).values())
    if recipe == "venhoff2025/finetune":
        assert "runs/venhoff2025-pretrain" in str(first.trainer.log_dir)
        assert cli.model.hparams["adapter_weights"] == "runs/venhoff2025-pretrain"
    probed(recipe, run, printed)
    if recipe not in RESUMED:
        return
    # Without the probe: it changes nothing of what is learnt.
    with pytest.raises(Crash):
        fit(*args, NO_PROBE, *crash_flags("again", "batch_start", 3), base=False)
    resumed = run.with_name("version_1")
    fit(f"--ckpt_path={resumed}/checkpoints/last.ckpt", *crash_flags("again"), base=False)
    assert_equal(final(resumed), final(run))


def probed(recipe: str, run: Path, printed: str) -> None:
    """The probe saw every layer that the recipe names, before and after training."""
    probe = settings(recipe)["probe"]
    if recipe not in LAYERS:
        assert probe == {"every_n_epochs": 0}
        return
    import pandas as pd

    assert "The sanity check: these SAEs do not behave" in printed
    table = pd.read_csv(run / "probe.csv")
    layers = probe.get("layers", list(range(LAYERS[recipe])))
    for _, rows in table[(table.metric == "fvu") & (table.group == "image")].groupby("epoch"):
        assert sorted(rows.layer) == layers
    assert len(table.epoch.unique()) > 1


# -- what the recipes name --------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(LAYERS.keys() - {VENHOFF[1]}))
def test_sae_formats(recipe, on_hub):
    """Every format as its authors define it, computed a second time from the weights that were written."""
    probe, name = settings(recipe)["probe"], settings(recipe)["model"]["llm"]
    llm = LLM(name).load()
    saes = load_saes(probe["sae_release"], probe["sae_id"], [4], llm)
    ((hook, sae),) = saes.items()
    assert hook == ("blocks.4.hook_resid_pre" if recipe == "gpt2" else "blocks.4.hook_resid_post")
    x = 3 * torch.randn(50, hub.D_MODEL, generator=torch.Generator().manual_seed(0)) + 1
    given, mean, scale = hub.weights(4), torch.zeros(()), 1.0
    if recipe == "gpt2":  # Trained on the stream without its mean; what is put in, comes out with it.
        mean = x.mean(-1, keepdim=True)
        pre = (x - mean - given["b_dec"]) @ given["W_enc"] + given["b_enc"]
        latents = pre.relu()
    elif recipe == "llama3.1_8b":  # Stored in bfloat16; reads activations that are scaled to norm sqrt(d).
        given = {key: tensor.bfloat16().float() for key, tensor in given.items()}
        entry = registry_entry("llama_scope_lxr_8x")
        scale = entry.norm_scaling_factor["l4r_8x"]
        pre = scale * x @ given["W_enc"] + given["b_enc"]
        latents = torch.where(pre > hub.THRESHOLD * hub.D_MODEL**0.5 / hub.AVERAGE_NORM, pre, 0)
    elif recipe == "qwen3_1.7b":  # The 50 largest.
        pre = (x @ given["W_enc"] + given["b_enc"]).relu()
        latents = torch.where(pre >= pre.topk(50).values[:, -1:], pre, 0)
    else:
        pre = x @ given["W_enc"] + given["b_enc"]
        latents = torch.where(pre > hub.THRESHOLD, pre, 0)
    torch.testing.assert_close(sae.encode(x), latents, rtol=1e-4, atol=1e-4)
    expected = (latents @ given["W_dec"] + given["b_dec"]) / scale + mean
    torch.testing.assert_close(sae.decode(latents), expected, rtol=1e-4, atol=1e-4)


def test_the_published_l0_of_every_recipe_is_known(on_hub):
    for recipe in LAYERS:
        probe = settings(recipe)["probe"]
        _, ids = find_saes(probe["sae_release"], probe["sae_id"], None)
        known = gate.expected(probe["sae_release"], None, {name: name for name in ids})
        published = [of["published_l0"] for of in known.values()]
        if recipe in VENHOFF:
            assert published[:3] == [105, 102, 141]
        assert len(published) == LAYERS[recipe]
        assert all(published)


@pytest.mark.parametrize("recipe", VENHOFF)
def test_descriptions_are_those_of_the_saes(recipe):
    """Where Neuronpedia has each layer's SAE, as SAELens lists them."""
    probe = settings(recipe)["probe"]
    for layer in range(LAYERS[recipe]):
        place = neuronpedia_id(probe["sae_release"], probe["sae_id"].format(layer=layer))
        folder = f"https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/v1/{place}/explanations"
        assert probe["descriptions"].format(layer=layer) == folder


@pytest.mark.parametrize("recipe", VENHOFF)
def test_the_papers_match(recipe, parse):
    code, output = parse("fit", f"--config={CONFIGS}/{recipe}.yaml", "--print_config")
    assert code == 0
    probe = yaml.safe_load(output)["probe"]
    assert probe["text_tokens"] == "prompt"
    config = ProbeConfig.of(probe)
    assert [metric.strength for metric in config.make_metrics() if metric.name == "match"] == ["max"]
    # What its data cannot tell is left out of the default.
    expected = {*DEFAULT_METRICS} - {"detectors", "linear_probe"}
    assert {metric.name for metric in config.make_metrics()} >= expected


LAYOUTS = {
    "gemma3_270m": (
        "<bos><start_of_turn>user\n",
        "Describe the picture.<end_of_turn>\n<start_of_turn>model\n[a cat<end_of_turn>]\n",
    ),
    "qwen3_1.7b": ("", "[a cat<|endoftext|>]"),
    "llama3.1_8b": ("<|begin_of_text|>", "[a cat<|end_of_text|>]"),
    "gpt2": ("<|endoftext|>", "[a cat<|endoftext|>]"),
    **dict.fromkeys(LIMBER, ("", "[a cat<|endoftext|>]")),
    **dict.fromkeys(
        VENHOFF,
        (
            "<bos>",
            "<start_of_turn>user\nwhat ?<end_of_turn>\n<start_of_turn>model\n[a cat<end_of_turn>]\n"
            "<start_of_turn>user\nwhere ?<end_of_turn>\n<start_of_turn>model\n[left<end_of_turn>]\n",
        ),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_layout(recipe, on_hub):
    """Tokens before the image, and behind it with those in [] that the loss is taken on."""
    model = settings(recipe)["model"]
    prompt = Prompt(model["prompt"], LLM(model["llm"]).tokenizer, 512)
    what = [("what ?", "a cat"), ("where ?", "left")] if recipe in VENHOFF else "a cat"
    ids, _, is_target, cut = prompt.text(what)
    text, before = "", False
    for token, target in zip(ids, is_target, strict=True):
        text += "[" if target and not before else "]" if before and not target else ""
        text += prompt.tokenizer.decode([token])
        before = target
    assert not cut
    assert (prompt.tokenizer.decode(prompt.prefix_ids), text + "]" * before) == LAYOUTS[recipe]


@pytest.mark.parametrize(
    ("name", "size", "pool", "shape"),
    [
        ("timm/resnet50x16_clip.openai", None, 1, (144, 128)),
        ("timm/nf_resnet50.ra2_in1k", 384, 12, (1, 48)),
        ("timm/vit_tiny_patch16_224.augreg_in21k", None, 2, (49, 192)),
        ("timm/vit_tiny_patch16_224.augreg_in21k", None, 1, (196, 192)),
    ],
)
def test_encoders_of_timm(name, size, pool, shape, on_hub):
    timm = pytest.importorskip("timm", reason="the optional extra timm")
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    encoder = VisionEncoder(VisionConfig(name, image_size=size, pool=pool)).load()
    image = Image.effect_noise((500, 420), 60).convert("RGB")
    pixels = encoder.transform(image)
    config = resolve_data_config(
        {"input_size": (3, size, size)} if size else {},
        pretrained_cfg=timm.get_pretrained_cfg(name.removeprefix("timm/")).to_dict(),
    )
    torch.testing.assert_close(pixels, create_transform(**config)(image))
    features = encoder(pixels[None])
    assert features.shape == (1, *shape)
    whole = encoder.model.timm_model.forward_features(pixels[None])
    if whole.ndim == 4:
        expected = torch.nn.functional.avg_pool2d(whole, pool).flatten(2).mT
    else:
        expected = whole[:, 1:]
        if pool > 1:
            grid = expected.mT.unflatten(2, (14, 14))
            expected = torch.nn.functional.avg_pool2d(grid, pool).flatten(2).mT
    torch.testing.assert_close(features, expected)
    colours = encoder.transform.undo(pixels)
    assert 0.2 < colours.mean() < 0.8
    assert colours.std() < 0.4


# -- mistakes ---------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """A hub that answers every request with one status and error code; null: there is none."""
    import huggingface_hub.constants as constants

    servers = []

    def start(status: int | None, code: str = "") -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status or 500)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *args) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", status is None)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated: accept its licence on https://huggingface.co/{name}, then `hf auth"),
        (401, "RepoNotFound", "The hub has no '{name}', or it is private"),
        (None, "", "'{name}' is no folder, not in the hub's cache"),
    ],
)
def test_what_the_hub_refuses(status, code, message, answers, models):
    answers(status, code)
    name = "google/gemma-2-2b-it"
    for load in (
        LLM(name).load,
        lambda: LLM(name).tokenizer,
        VisionEncoder(VisionConfig(name)).load,
        lambda: VisionEncoder(VisionConfig(name)).transform,
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(message.format(name=name))):
            load()
    llm = LLM(str(models / "llm")).load()
    expected = re.escape(message.format(name="google/gemma-scope-2b-pt-res"))
    with pytest.raises(FileNotFoundError, match=expected):
        load_saes("gemma-scope-2b-pt-res-canonical", "layer_{layer}/width_16k/canonical", [0], llm)


def test_a_model_of_timm_without_timm(on_hub, monkeypatch):
    import transformers.models.timm_wrapper.configuration_timm_wrapper as wrapper

    folder = hub.snapshot(on_hub, "timm/absent")
    (folder / "config.json").write_text(json.dumps({"architecture": "nf_resnet50", "pretrained_cfg": {}}))

    def requires(obj, backends) -> None:
        raise ImportError(f"{obj} requires the timm library but it was not found")

    monkeypatch.setattr(wrapper, "requires_backends", requires)
    with pytest.raises(ValueError, match=re.escape("pip install 'lightning-limber[timm]'")):
        VisionEncoder(VisionConfig("timm/absent")).load()


def test_saes_of_another_model_are_named(on_hub, caplog):
    """The widths fit; the names do not."""
    caplog.set_level("INFO")
    probe = settings("llama3.1_8b")["probe"]
    load_saes(probe["sae_release"], probe["sae_id"], [0], LLM("meta-llama/Llama-3.1-8B").load())
    load_saes(
        "gpt2-small-res-jb", "blocks.{layer}.hook_resid_pre", [0], LLM("openai-community/gpt2").load()
    )
    assert "was trained on" not in caplog.text
    load_saes(probe["sae_release"], probe["sae_id"], [0], LLM("google/gemma-2-2b-it").load())
    assert "was trained on meta-llama/Llama-3.1-8B, model.llm is google/gemma-2-2b-it" in caplog.text
