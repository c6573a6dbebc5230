"""What may change when a run goes on: each change is refused, with the line that says why, or allowed.

docs/reproducibility.md has the same table.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from datasets_on_disk import write_karpathy
from PIL import Image
from process import run_here

REPO = Path(__file__).parents[1]
RUN = Path("runs/default/version_0")
ALLOWED = ""

# Change | flag | value before and now, or the line (nothing: allowed).
TABLE = """
batch size | --data.batch_size=2 | 4 -> 2
learning rate | --model.optimizer.lr=1 | 0.02 -> 1.0
warm-up | --model.optimizer.warmup_steps=1 | 2 -> 1
fewer steps | --trainer.max_steps=3 | trainer.max_steps: 3, but the checkpoint is of step 4
precision | --trainer.precision=bf16-mixed | '32-true' -> 'bf16-mixed'
accumulation | --trainer.accumulate_grad_batches=2 | 1 -> 2
gradient clipping | --trainer.gradient_clip_val=7 | 1.0 -> 7
limit of training batches | --trainer.limit_train_batches=2 | 1.0 -> 2
limit of validation batches | --trainer.limit_val_batches=1 | 1.0 -> 1
seed | --seed_everything=5 | '0' -> '5'
seed of the order | --data.seed=1 | 0 -> 1
prompt | --model.prompt={image}{caption} | '{bos}{image}{caption}{eos}' -> '{image}{caption}'
longest caption | --model.max_caption_tokens=3 | 64 -> 3
adapter class | --model.adapter=MLP | model.adapter.class_path:
vision features | --model.vision.layer=-2 | -1 -> -2
kept features | --model.cache_features=true | False -> True
compilation | --model.compile_llm=true | False -> True
SAE release | --probe.sae_release=other | 'models/saes' -> 'other'
SAE layers | --probe.layers=[0] | None -> [0]
probe metrics | --probe.metrics=[knn] | ['direction'] -> ['knn']
probe images | --probe.num_images=3 | 4 -> 3
caption images | --captions.num_images=3 | 4 -> 3
length of written captions | --captions.max_new_tokens=9 | 8 -> 9
more steps | --trainer.max_steps=9 |
epochs | --trainer.max_epochs=5 |
time | --trainer.max_time=00:00:09:00 |
loader processes | --data.num_workers=1 |
held-out batch size | --data.val_batch_size=2 |
share of bad records | --data.max_bad_share=0.5 |
kept held-out features | --model.held_out_features_gb=0 |
logging interval | --trainer.log_every_n_steps=3 |
memory of SAEs | --probe.sae_memory_gb=1 |
epochs between probes | --probe.every_n_epochs=2 |
drawn captions | --captions.num_shown=1 |
checkpoint interval | --checkpoint.every_n_steps=3 |
processes | --trainer.devices=2 |
"""


def settings() -> list[tuple[str, str, str]]:
    """Change, flag, and the line that refuses it."""
    rows = []
    for row in TABLE.strip().splitlines():
        change, flag, line = (part.strip() for part in row.split("|"))
        if "->" in line:
            name, (before, now) = flag[2:].partition("=")[0], line.split(" -> ")
            line = f"{name}: {before} in the checkpoint, {now} now"
        rows.append((change, flag, line))
    return rows


SETTINGS = settings()


def annotations(edit) -> None:
    path = Path("coco/dataset_coco.json")
    content = json.loads(path.read_text())
    edit(content["images"])
    path.write_text(json.dumps(content))


def rename(images: list) -> None:
    images[0]["filename"] = "other.png"
    Path("coco/val2014/0.png").rename("coco/val2014/other.png")


def change_weights(path: str, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights[name].view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})


BAD = "The data are not those that this run began with:\n  training: "
LLM, VISION = "models/llm/model.safetensors", "models/vision/model.safetensors"
SAE = "models/saes/layer_2/sae_weights.safetensors"
FILES = {
    "a record removed": (lambda: annotations(lambda images: images.pop(0)), BAD + "12 records in"),
    "a record renamed": (lambda: annotations(rename), BAD + "other names of records"),
    "order of records": (
        lambda: annotations(lambda images: images.insert(0, images.pop(1))),
        BAD + "other names of records, other captions",
    ),
    "a caption edited": (
        lambda: annotations(lambda images: images[0]["sentences"][0].update(raw="a cat")),
        BAD + "other captions",
    ),
    "a picture replaced": (
        lambda: Image.new("RGB", (90, 90)).save("coco/val2014/0.png"),
        BAD + "other picture files (by size)",
    ),
    "weights of the LLM": (lambda: change_weights(LLM, "model.norm.weight"), "weights.llm: "),
    "weights of the encoder": (lambda: change_weights(VISION, "layernorm.weight"), "weights.vision: "),
    "weights of an SAE": (lambda: change_weights(SAE, "b_enc"), "probe.saes.blocks.2.hook_resid_post: "),
    "nothing": (lambda: None, ALLOWED),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with models, pictures and a run of 4 steps on them, all by relative paths."""
    root = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        models = Path("models")
        tiny.write_llm(models / "llm")
        tiny.write_vision(models / "vision")
        tiny.write_saes(models / "saes")
        Path("coco").mkdir()
        write_karpathy(Path("coco"), 12)
        flags = [flag for flag in tiny.arguments(models) if not flag.startswith("--data.")]
        flags += ["--data=CocoCaptions", "--data.annotations=coco/dataset_coco.json", "--data.images=coco"]
        flags += ["--data.batch_size=4", "--data.val_batch_size=4", "--data.num_workers=0"]
        flags += ["--trainer.max_steps=4", "--probe.metrics=[direction]", "--probe.num_images=4"]
        run_here(patch, root, "fit", *flags)
    return root


@pytest.fixture
def copy(root) -> None:
    shutil.copytree(root, Path.cwd(), dirs_exist_ok=True)


class Loads(Exception):
    """The run would load its models now."""


@pytest.mark.parametrize(("flag", "line"), [row[1:] for row in SETTINGS], ids=[row[0] for row in SETTINGS])
def test_a_setting_is_refused_before_a_model_is_loaded_or_allowed(copy, fit, monkeypatch, flag, line):
    def loads(*args, **kwargs) -> None:
        raise Loads

    monkeypatch.setattr("lightning_limber.models.limber.build", loads)
    launcher = "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher"
    monkeypatch.setattr(f"{launcher}.launch", loads)
    before = {path: path.read_bytes() for path in RUN.rglob("*.csv")}
    with pytest.raises(Loads if line == ALLOWED else ValueError) as error:
        fit(f"--ckpt_path={RUN}", flag, base=False)
    if line:
        assert str(error.value).startswith("This checkpoint belongs to another run:\n  ")
        assert line in str(error.value)
        assert "--model.adapter_weights" in str(error.value)
        measured = line.startswith(("probe", "captions"))
        assert ("`validate --ckpt_path`" in str(error.value)) == measured
        assert {path: path.read_bytes() for path in RUN.rglob("*.csv")} == before


@pytest.mark.parametrize("change", FILES)
def test_changed_files_are_refused_and_named(copy, fit, change):
    act, line = FILES[change]
    act()
    if line == ALLOWED:
        assert fit(f"--ckpt_path={RUN}", base=False).trainer.global_step == 4
        return
    with pytest.raises(ValueError, match=re.escape(line)):
        fit(f"--ckpt_path={RUN}", base=False)


def test_the_table_of_the_docs_is_this_one():
    text = (REPO / "docs/reproducibility.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (refused|allowed) \|", text, re.M))
    expected = {change: line for change, _, line in SETTINGS}
    expected |= {change: line for change, (_, line) in FILES.items() if change != "nothing"}
    assert rows == {change: "refused" if line else "allowed" for change, line in expected.items()}


def test_validate_measures_otherwise_in_a_table_of_its_own(copy, fit, caplog):
    with caplog.at_level("INFO"):
        cli = fit(
            f"--ckpt_path={RUN}",
            "--probe.layers=[0]",
            "--captions.num_images=3",
            base=False,
            command="validate",
        )
    assert "probe.layers: None in the checkpoint, [0] now" in caplog.text
    for name in ("probe.csv", "captions.csv"):
        lines = (Path(cli.trainer.log_dir) / name).read_text().splitlines()[1:]
        assert {line.split(",")[1] for line in lines} == {"2"}


def test_a_newer_versions_checkpoint_is_refused(copy, fit):
    path = RUN / "checkpoints/last.ckpt"
    checkpoint = torch.load(path)
    checkpoint["lightning_limber"]["version"] = "99.1"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"was written by lightning_limber 99\.1, this is .*: install"):
        fit(f"--ckpt_path={RUN}", base=False)


def test_a_stream_is_known_by_its_files(tmp_path):
    """Its records are not: reading them all would be a pass over the data."""
    import datasets

    from lightning_limber.data import HuggingFaceCaptions
    from lightning_limber.data.fingerprint import data_differences, fingerprint

    def prints(caption: str) -> dict:
        path = tmp_path / "x.parquet"
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        rows = {"image": [{"bytes": b"x", "path": None}] * 4, "caption": [caption] * 4}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        files = {"train": str(path), "validation": str(path)}
        data = HuggingFaceCaptions("parquet", data_files=files, streaming=True, num_train=4)
        return {"training": fingerprint(data.datasets()[0])}

    first = prints("a cat")
    assert first["training"].keys() == {"records", "sources"}
    assert data_differences(first, prints("a cat")) == []
    assert data_differences(first, prints("a cat and some more words of it")) == [
        "training: other files or revision of the stream"
    ]
    assert data_differences({"training": {"records": "4"}}, first) == []  # As older versions knew it.
