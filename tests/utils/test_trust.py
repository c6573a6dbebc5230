"""Checkpoints, exports and SAE folders from elsewhere run nothing and choose no folder."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import sys
import tarfile
from contextlib import nullcontext, suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from crash import CrashAt
from process import HELPERS, run_cli
from runs import crash_flags

from lightning_limber import load
from lightning_limber.data.records import UnreadableRecord
from lightning_limber.data.shards import Shards
from lightning_limber.tools.report import main as report


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> Path:
    """A run of one step without a probe."""
    import tiny

    root = tmp_path_factory.mktemp("run")
    flags = [*tiny.arguments(models, probe=False), "--trainer.max_steps=1", "--captions.num_images=0"]
    done = run_cli("fit", *flags, "--trainer.logger.init_args.name=mine", cwd=root, env=HELPERS)
    assert done.returncode == 0, done.stdout
    return root / "runs/mine/version_0"


@pytest.fixture
def marker(tmp_path) -> Path:
    """What each hostile file tries to write."""
    return tmp_path / "ran"


@pytest.fixture
def hostile(run, tmp_path):
    """A copy of the run's checkpoint in which `change` has edited the stored config."""

    def make(change) -> Path:
        checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        config = yaml.safe_load(checkpoint["lightning_limber"]["config"])
        changed = change(config)
        text = changed if isinstance(changed, str) else yaml.safe_dump(config)
        checkpoint["lightning_limber"]["config"] = text
        torch.save(checkpoint, tmp_path / "hostile.ckpt")
        return tmp_path / "hostile.ckpt"

    return make


def popen(marker: Path) -> dict:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}


def setting(key: str, value):
    """A change of one setting of a config."""

    def change(config: dict) -> None:
        *groups, last = key.split("/")
        for group in groups:
            config = config[group]
        config[last] = value

    return change


DDP = "lightning.pytorch.strategies.DDPStrategy"
TOUCH = {"class_path": "subprocess.Popen", "init_args": {"args": "MARK"}}
OWN_WRITER = "lightning_limber.tools.predict.CaptionWriter"
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


def ddp(**init_args) -> dict:
    return {"class_path": DDP, "init_args": init_args}


# Each a setting and what a hostile file puts there.
SHAPES = {
    "callback": ("trainer/callbacks", [TOUCH]),
    "callback_by_name": ("trainer/callbacks", "subprocess.Popen"),
    "callback_of_lightning": (
        "trainer/callbacks",
        [{"class_path": LAMBDA, "init_args": {"on_validation_start": "os.system"}}],
    ),
    "callback_that_writes": (
        "trainer/callbacks",
        [{"class_path": OWN_WRITER, "init_args": {"output": "MARK"}}],
    ),
    "logger": ("trainer/logger", {"class_path": "os.system", "init_args": {"command": "touch MARK"}}),
    "logger_as_text": ("trainer/logger", "{class_path: os.system, init_args: {command: touch MARK}}"),
    "strategy_at_depth": ("trainer/strategy", ddp(ddp_comm_state=TOUCH)),
    "strategy_at_depth_as_text": (
        "trainer/strategy",
        ddp(ddp_comm_state=r'{"class\x5fpath": subprocess.Popen, init_args: {args: [touch, MARK]}}'),
    ),
    "strategy_at_depth_in_a_list": ("trainer/strategy", ddp(ddp_comm_state=[TOUCH])),
    "strategy_at_depth_by_dotted_keys": (
        "trainer/strategy",
        ddp(checkpoint_io={"x.class_path": "subprocess.Popen", "x.init_args.args": "MARK"}),
    ),
    "dotted_callable": ("trainer/strategy", ddp(ddp_comm_hook="subprocess.call")),
    "precision_plugin": ("trainer/plugins", [TOUCH]),
    "precision_plugin_of_lightning": (
        "trainer/plugins",
        {
            "class_path": "lightning.pytorch.plugins.precision.MixedPrecision",
            "init_args": {"scaler": TOUCH},
        },
    ),
    "appended_callback": ("trainer/callbacks+", [TOUCH]),
    "dotted_key": ("trainer/logger.class_path", "subprocess.Popen"),
    "adapter": ("model/adapter", TOUCH),
    "adapter_by_name": ("model/adapter", "subprocess.call"),
    "adapter_with_settings": (
        "model/adapter",
        {"class_path": "lightning_limber.models.adapters.Linear", "init_args": {"dropout": TOUCH}},
    ),
    "metric": ("probe/metrics", [TOUCH]),
    "metric_by_name": ("probe/metrics", ["subprocess.Popen"]),
    "data": ("data", TOUCH),
    "data_through_a_module_of_ours": (
        "data",
        {"class_path": "lightning_limber.data.shards.os.system", "init_args": {"command": "touch MARK"}},
    ),
    "data_by_a_file": ("data", "MARK.yaml"),
    "model_by_a_file": ("model", "MARK.yaml"),
    "layers_of_a_file": ("probe/layers", "MARK.yaml"),
    "environment": ("model/prompt", "{bos}{image}${oc.env:HOME}{caption}{eos}"),
    "resolver": ("trainer/max_steps", "${oc.decode:${oc.env:HOME}}"),
    "reference_at_depth": ("data/init_args/seed", "${trainer.max_steps}"),
}


def filled(value, marker: Path):
    """The shape with the marker's path in it."""
    if isinstance(value, dict):
        return {key: filled(item, marker) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, marker) for item in value]
    if value == "MARK":
        return ["touch", str(marker)]
    return value.replace("MARK", str(marker)) if isinstance(value, str) else value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_stored_config_runs_nothing(shape, command, hostile, fit, marker):
    key, value = SHAPES[shape]
    included = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
    Path(f"{marker}.yaml").write_text(yaml.safe_dump(included))
    path = hostile(setting(key, filled(value, marker)))
    with pytest.raises(ValueError, match=r"^\S*hostile\.ckpt: .*\n?$") as error:
        fit(f"--ckpt_path={path}", command=command, base=False)
    assert not marker.exists()
    assert len(str(error.value).splitlines()) == 1
    assert key.replace("/", ".").replace("init_args.", "").removesuffix("+") in str(error.value)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['touch MARK']", "- 1", "a: [", 7])
def test_a_stored_config_that_is_no_mapping(text, hostile, fit, marker, run):
    filled_in = text.replace("MARK", str(marker)) if isinstance(text, str) else text
    path = hostile(lambda config: "")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_limber"]["config"] = filled_in
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"hostile.ckpt: its config is no"):
        fit(f"--ckpt_path={path}", command="validate", base=False)
    assert not marker.exists()


def test_an_error_names_no_content_of_a_file(hostile, fit):
    Path("secret").write_text("the password\n")
    for key in ("probe/layers", "trainer/devices", "model/prompt", "probe/extras"):
        path = hostile(setting(key, "secret"))
        with pytest.raises(ValueError) as error:  # noqa: PT011
            fit(f"--ckpt_path={path}", command="validate", base=False)
        assert "password" not in str(error.value)


def test_the_command_line_says_what_is_refused_and_how_to_allow_it(hostile, marker):
    path = hostile(setting("trainer/callbacks", [popen(marker)]))
    done = run_cli("validate", "--ckpt_path", path, env={"LIGHTNING_LIMBER_TRACEBACK": ""})
    assert done.returncode != 0
    assert not marker.exists()
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error")]
    assert "hostile.ckpt: its config names 'subprocess.Popen' for trainer.callbacks" in line
    assert "repeat the run's --config FILE, or give the flag --trainer.callbacks" in line
    assert "Traceback" not in done.stdout


def test_a_pickle_is_no_checkpoint(marker, fit):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (marker,))

    Path("hostile.ckpt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"lightning_limber": Hostile()}, "zipped.ckpt")
    for name in ("hostile.ckpt", "zipped.ckpt"):
        for command in ("validate", "export"):
            with pytest.raises(Exception):  # noqa: B017, PT011
                fit(f"--ckpt_path={name}", command=command, base=False)
        with pytest.raises(Exception):  # noqa: B017, PT011
            load(name)
    assert not marker.exists()


def test_it_may_not_ask_for_pickles(hostile, fit, monkeypatch):
    """weights_only and ckpt_path are arguments of the commands, and stand in stored configs too."""
    seen = []
    monkeypatch.setattr(pl.Trainer, "_validate_impl", lambda self, *given: seen.extend(given))

    def change(config):
        config.update(weights_only=False, ckpt_path="elsewhere.ckpt", output="elsewhere")

    path = hostile(change)
    fit(f"--ckpt_path={path}", command="validate", base=False)
    _, _, ckpt_path, _, _, weights_only = seen
    assert weights_only is None
    assert str(ckpt_path) == str(path)


# -- by every command ---------------------------------------------------------------------------------


EVENTS: list[tuple[str, str]] = []
"""What the interpreter opens, starts and connects to, while `watched` is in use."""
WATCHED = ("open", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "exec")


def _note(event: str, args: tuple) -> None:
    if _NOTING and event in WATCHED:
        EVENTS.append((event, repr(args)))


_NOTING: list[bool] = []
sys.addaudithook(_note)


@pytest.fixture
def watched():
    EVENTS.clear()
    _NOTING.append(True)
    yield EVENTS
    _NOTING.clear()


KINDS = (
    *("callback", "callback_that_writes", "logger", "strategy_at_depth", "dotted_callable", "adapter"),
    *("metric_by_name", "data", "data_by_a_file", "environment"),
)
"""One of each kind of those above."""
ELSEWHERE = {kind: SHAPES[kind] for kind in KINDS} | {
    "adapter_weights": ("model/adapter_weights", "SECRET"),
    "log_folder": ("trainer/default_root_dir", "MARK"),
    "log_folder_of_a_logger": (
        "trainer/logger",
        {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "MARK", "name": "MARK"},
        },
    ),
    "parent_folder": (
        "trainer/logger",
        {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "../..", "name": "../MARK"},
        },
    ),
    "ckpt_path": ("ckpt_path", "SECRET"),
    "output": ("output", "MARK"),
    "images": ("images", ["SECRET"]),
    "config": ("config", ["SECRET"]),
}


def run_command(command: str, path: Path, fit) -> None:
    """`load` stands for what Python does; `report` reads the config as a run's."""
    if command == "load":
        load(path).caption(torch_image())
    elif command == "report":
        report([str(path.parent)])
    else:
        flags = ["--trainer.limit_predict_batches=1"] if command == "predict" else []
        fit(f"--ckpt_path={path}", *flags, command=command, base=False)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "load", "export", "report"])
def test_no_command_runs_or_reads_anything_else(command, run, hostile, fit, marker, watched, tmp_path):
    """Each shape is refused or done without; nobody opens the secret, starts a process or connects."""
    secret = tmp_path / "secret.pt"
    torch.save({"weight": torch.zeros(3)}, secret)
    config = yaml.safe_dump(
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(marker)]}}
    )
    Path(f"{marker}.yaml").write_text(config)
    refused = []
    for shape, (key, value) in ELSEWHERE.items():
        given = json.loads(json.dumps(filled(value, marker)).replace("SECRET", str(secret)))
        path = hostile(setting(key, given))
        if command == "report":
            shutil.copytree(run, "run", dirs_exist_ok=True)
            stored = torch.load(path, weights_only=True)["lightning_limber"]["config"]
            Path("run/config.yaml").write_text(stored)
            Path("run/probe.csv").write_text(
                "run,epoch,layer,group,metric,value,low,high\na,0,0,image,l0,1,1,1\n"
            )
            path = Path("run/last.ckpt")
        EVENTS.clear()
        try:
            run_command(command, path, fit)
        except (ValueError, SystemExit):
            refused.append(shape)
        assert not marker.exists(), shape
        bad = [event for event in EVENTS if str(secret) in event[1] or str(marker) in event[1]]
        assert not bad, (shape, bad)
        assert not [event for event in EVENTS if event[0] == "socket.connect"], shape
    if command == "predict":
        assert set(KINDS) <= set(refused)


def test_members_of_a_hostile_tar_are_not_unpacked(tmp_path, watched, monkeypatch):
    """Links and names that lead outside are no samples; only the tar itself is opened."""
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "secret.txt").write_text("the password")
    picture = io.BytesIO()
    torch_image().save(picture, "PNG")
    for name in ("a.tar", "b.tar"):
        with tarfile.open(name, "w") as tar:
            for member, kind in (
                ("1.png", b"0"),
                ("1.txt", tarfile.SYMTYPE),
                ("../2.png", b"0"),
                ("../2.txt", b"0"),
                ("/3.png", b"0"),
                ("/3.txt", tarfile.LNKTYPE),
            ):
                info = tarfile.TarInfo(member)
                content = picture.getvalue() if member.endswith("png") else b"a cat"
                info.type, info.linkname = kind, str(tmp_path / "secret.txt")
                info.size = len(content) if kind == b"0" else 0
                tar.addfile(info, io.BytesIO(content))
    before = everything(tmp_path)
    EVENTS.clear()
    train, _ = Shards("{a,b}.tar").datasets()
    captions = []
    for i in range(len(train)):
        with suppress(UnreadableRecord):
            captions += train[i].captions
    assert captions == ["a cat"]
    assert not [event for event in EVENTS if "secret" in event[1]]
    new = {
        path for path in everything(tmp_path) - before if (tmp_path / "cache") not in (path, *path.parents)
    }
    assert not new


# -- where it writes ---------------------------------------------------------------------------------


def everything(root: Path) -> set[Path]:
    return set(root.rglob("*"))


@pytest.mark.parametrize(
    "change",
    [
        {"save_dir": "../elsewhere"},
        {"save_dir": "{outside}"},
        {"name": "../../elsewhere", "version": "../../.."},
        {"version": "{outside}", "sub_dir": "../../../elsewhere"},
        {"filename_suffix": "/../../../elsewhere"},
    ],
)
def test_a_stored_config_chooses_no_folder(change, hostile, fit, tmp_path, monkeypatch):
    work, outside = tmp_path / "a/b/work", tmp_path / "outside"
    work.mkdir(parents=True)

    def edit(config):
        changed = {key: value.format(outside=outside) for key, value in change.items()}
        config["trainer"]["logger"]["init_args"].update(changed)
        config["trainer"]["default_root_dir"] = str(outside)
        config["trainer"]["enable_checkpointing"] = True

    path = hostile(edit)
    before = everything(tmp_path)
    monkeypatch.chdir(work)
    fit(f"--ckpt_path={path}", command="validate", base=False)
    new = everything(tmp_path) - before
    assert new
    assert all(work in (file, *file.parents) for file in new), sorted(new)
    assert {file.relative_to(work).parts[:2] for file in new if file.is_file()} == {("runs", "default")}


def test_other_loggers_write_there_too(hostile, fit, tmp_path):
    path = hostile(
        setting(
            "trainer/logger",
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "/dev/null/x"}},
        )
    )
    cli = fit(f"--ckpt_path={path}", "--captions.num_images=2", command="validate", base=False)
    assert cli.trainer.log_dir.startswith("runs/default/")


def test_a_run_is_validated_in_its_own_folder(run, fit, tmp_path):
    """As its checkpoint lies, wherever the command is given."""
    shutil.copytree(run.parents[1], tmp_path / "moved")
    path = tmp_path / "moved/mine/version_0/checkpoints/last.ckpt"
    cli = fit(f"--ckpt_path={path}", "--captions.num_images=2", command="validate", base=False)
    assert cli.trainer.log_dir == str(tmp_path / "moved/mine/version_1")


# -- what the user names -----------------------------------------------------------------------------


def test_a_run_with_a_class_of_ones_own_goes_on(hostile, fit, monkeypatch):
    """Once the command names the class, by its config or by a flag."""
    [flag] = crash_flags("batches")
    callbacks = json.loads(flag.partition("=")[2])
    path = hostile(setting("trainer/callbacks", copy.deepcopy(callbacks)))
    with pytest.raises(ValueError, match="its config names 'crash.CrashAt' for trainer.callbacks"):
        fit(f"--ckpt_path={path}", "--trainer.max_steps=2", base=False)
    cli = fit(f"--ckpt_path={path}", flag, "--trainer.max_steps=2", base=False)
    assert any(isinstance(callback, CrashAt) for callback in cli.trainer.callbacks)
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    cli = fit(f"--ckpt_path={path}", "--config=own.yaml", "--trainer.max_steps=2", base=False)
    assert any(isinstance(callback, CrashAt) for callback in cli.trainer.callbacks)


def test_naming_one_class_allows_no_other(hostile, fit, marker):
    [flag] = crash_flags("batches")
    path = hostile(setting("data", popen(marker)))
    with pytest.raises(ValueError, match="names 'subprocess.Popen' for data"):
        fit(f"--ckpt_path={path}", flag, base=False)
    assert not marker.exists()


# -- exports and SAEs --------------------------------------------------------------------------------


def test_an_export_is_read_as_values(run, fit, marker):
    fit(f"--ckpt_path={run}", "--output=exported", command="export", base=False)
    config = yaml.safe_load(Path("exported/config.yaml").read_text())
    flags = ["--config=exported/config.yaml", "--model.adapter_weights=exported"]
    # As exported, with the command that its card gives.
    fit(*flags, command="predict", base=False)
    assert Path("captions.jsonl").read_text().count("\n") == 10
    for key, value in {"data": popen(marker), "trainer": {"callbacks": [popen(marker)]}}.items():
        Path("exported/config.yaml").write_text(yaml.safe_dump({**config, key: value}))
        with pytest.raises(ValueError, match="exported/config.yaml: its config names 'subprocess.Popen'"):
            fit(*flags, command="predict", base=False)
        load("exported").caption(torch_image())
    Path("exported/config.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    with pytest.raises(Exception, match="python/object"):
        load("exported")
    assert not marker.exists()


def torch_image():
    from PIL import Image

    return Image.new("RGB", (32, 32), (200, 30, 30))


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "subprocess.Popen", "args": ["touch", "ran"]},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}},
        {"activation_fn": "os.system", "activation_fn_kwargs": {"command": "touch ran"}},
    ],
)
def test_a_folder_of_saes_runs_nothing(change, models, fit, marker):
    shutil.copytree(models / "saes", "saes")
    path = Path("saes/layer_0/cfg.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    unknown = pytest.raises(Exception, match="Popen") if "architecture" in change else nullcontext()
    with unknown:
        fit("--probe.sae_release=saes", "--trainer.max_steps=1", "--captions.num_images=0", probe=True)
    assert not marker.exists()


def test_weights_of_saes_are_no_pickles(models, fit, marker):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (marker,))

    shutil.copytree(models / "saes", "saes")
    torch.save(Hostile(), "saes/layer_0/sae_weights.safetensors")
    with pytest.raises(Exception):  # noqa: B017, PT011
        fit("--probe.sae_release=saes", "--trainer.max_steps=1", probe=True)
    assert not marker.exists()
