"""A grid of runs: what its file may say, that it goes on where it stopped, and what its page says."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from process import REPO
from scipy import stats

from lightning_limber.__main__ import read_settings
from lightning_limber.models.limber import Limber
from lightning_limber.tools import grid, grid_file, grid_page, intervals
from lightning_limber.tools.grid_file import with_newer
from lightning_limber.tools.grid_page import FIGURE, figure, markdown, measure, sentences
from lightning_limber.utils.by_image import add_arrays, images_file

LR = "model.optimizer.lr"
ENDPOINTS = ["held_out/loss", "probe/neighbour_lift@2", "probe/knn@2"]


def write_grid(models: Path, **changes) -> Path:
    """The file of a grid of tiny runs: two arms, two seeds, a learning rate of two."""
    common = {
        name: value if isinstance(value, str) and value == "off" else yaml.safe_load(value)
        for name, _, value in (flag[2:].partition("=") for flag in tiny.arguments(models))
    }
    del common[LR]
    common |= {"trainer.max_steps": 4, "probe.metrics": ["noise", "neighbours", "knn"]}
    found = {
        "set": common,
        "arms": {"linear": None, "late": {"model.entry.layer": 1}},
        "seeds": [0, 1],
        "choose": {LR: [0.02, "2e-3"], "records": 4, "set": {"trainer.max_steps": 2}},
        "endpoints": ENDPOINTS,
    }
    found |= changes
    file = Path("tiny.yaml")
    file.write_text(
        yaml.safe_dump({name: of for name, of in found.items() if of is not None}, sort_keys=False)
    )
    return file


@pytest.fixture
def run_grid(fit, monkeypatch):
    """Runs a grid's file in this process, and its runs too; their commands."""
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(Path("cache").resolve()))
    done: list[list[str]] = []

    class InProcess:
        def __init__(self, command: list[str], **options) -> None:
            done.append(command[3:])
            try:
                fit(*command[4:], base=False)
                self.code = 0
            except RuntimeError:
                self.code = 1

        def wait(self) -> int:
            return self.code

    def run(*args: str) -> list[list[str]]:
        done.clear()
        monkeypatch.setattr(grid, "Popen", InProcess)
        grid.main([str(arg) for arg in args], read_settings)
        return list(done)

    return run


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def last_loss(folder: Path) -> float:
    return float(
        [row for row in read_csv(folder / "validation.csv") if row["metric"] == "loss"][-1]["value"]
    )


@pytest.mark.slow
def test_a_grid_from_start_to_end(models, run_grid, capsys):
    file = write_grid(models)
    root = Path("runs/tiny")
    assert len(run_grid(file)) == 8
    # The value of each arm, chosen by training records alone.
    for arm in ("linear", "late"):
        losses = {}
        for value in (0.02, 0.002):
            folder = root / arm / f"lr_{value}"
            losses[value] = last_loss(folder)
            names = np.load(folder / "images_epoch_1.npz")["held_out/names"]
            assert len(names) == 4
            assert all(name.startswith("train/") for name in names)
            assert not list(folder.glob("probe*"))
            assert not list(folder.glob("captions*"))
        best = min(losses, key=losses.__getitem__)
        choice = json.loads((root / "choice.json").read_text())[LR][arm]
        assert choice == {
            "chosen": best,
            "at the edge": True,
            "losses": {str(value): loss for value, loss in losses.items()},
        }
        for seed in (0, 1):
            config = yaml.safe_load((root / arm / f"seed_{seed}/config.yaml").read_text())
            assert config["model"]["optimizer"]["lr"] == best
            assert config["seed_everything"] == seed
            names = np.load(root / arm / f"seed_{seed}/images_epoch_1.npz")["held_out/names"]
            assert all(name.startswith("val/") for name in names)
    # Arms share the encoder's features: one file for the search, one for the runs.
    assert len(list(Path("cache/features").glob("*.rows"))) == 2
    # The table is made of compare.py's numbers.
    rows = {(row["endpoint"], row["arm"]): row for row in read_csv(root / "grid.csv")}
    assert set(rows) == {(endpoint, arm) for endpoint in ENDPOINTS for arm in ("linear", "late")}
    sums = {
        arm: np.stack(
            [np.load(root / arm / f"seed_{seed}/images_epoch_1.npz")["held_out/loss"] for seed in (0, 1)]
        )
        for arm in ("linear", "late")
    }
    row = rows["held_out/loss", "late"]
    found = [float(row[name]) for name in ("minus_base", "minus_base_low", "minus_base_high")]
    assert found == pytest.approx(intervals.two_level(sums["late"], sums["linear"]), rel=1e-4)
    assert row["over"] == "images and seeds"
    assert rows["probe/knn@2", "late"]["over"] == "seeds"
    page = (root / "README.md").read_text()
    assert page.count("| late | 2 |") == 3
    assert "**at the edge of the values**" in page
    assert (root / FIGURE).stat().st_size > 1000
    assert "try some beyond" in capsys.readouterr().out
    # What is there is left.
    assert run_grid(file) == []
    assert (root / "README.md").read_text() == page
    run_grid(file, "--dry_run")
    assert capsys.readouterr().out.count("done: ") == 8
    # A run of a version that lacked a setting is still the grid's, unless the grid sets it.
    kept = root / "linear/seed_0/config.yaml"
    config = yaml.safe_load(kept.read_text())
    assert config["probe"].pop("knn") == 10
    kept.write_text(yaml.safe_dump(config))
    assert run_grid(file) == []
    assert with_newer({}, {"knn": 9}, {"knn": 10}) == {}
    # An endpoint may change afterwards, and what was asked wrongly is named.
    with pytest.raises(
        ValueError, match="no run has probe/nieghbour_lift@2. Measured are .*neighbour_lift"
    ):
        run_grid(write_grid(models, endpoints=["probe/nieghbour_lift@2"]))
    # Runs of other settings are not taken for these.
    with pytest.raises(
        ValueError, match=r"linear/lr_0.02 was made with other settings:\n  data.*val_size: 10"
    ):
        run_grid(write_grid(models, set=yaml.safe_load(file.read_text())["set"] | {"data.val_size": 11}))


@pytest.mark.slow
def test_a_run_that_is_cut_is_gone_on_with(models, run_grid, monkeypatch, tmp_path):
    """The same numbers as without the cut, and what does not depend on it is done."""
    changes = {"choose": None, "endpoints": ENDPOINTS[:2]}
    run_grid(write_grid(models, **changes))
    whole = Path("runs/tiny/grid.csv").read_text()
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    step, cuts = Limber.training_step, []

    def cut_once(self, batch, batch_idx):
        if self.global_step == 2 and len(cuts) < 3:
            cuts.append(1)
            if len(cuts) == 2:  # Of the second run.
                raise RuntimeError("cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Limber, "training_step", cut_once)
    with pytest.raises(
        ValueError, match=r"1 run\(s\) failed: runs/tiny/late/seed_0. What does not need them"
    ):
        run_grid(write_grid(models, **changes))
    found = {row["arm"]: row["seeds"] for row in read_csv(Path("runs/tiny/grid.csv"))}
    assert found == {"linear": "2", "late": "1"}
    assert run_grid("tiny.yaml") == [["fit", "--ckpt_path", "runs/tiny/late/seed_0"]]
    starts = json.loads(Path("runs/tiny/late/seed_0/run.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 2]
    assert [start.get("ended_at_step") for start in starts] == [None, 4]
    assert Path("runs/tiny/grid.csv").read_text() == whole


@pytest.mark.slow
def test_a_signal_reaches_the_run_and_ends_the_grid(models, run_grid):
    changes = {"choose": None, "seeds": [0], "endpoints": ENDPOINTS[:1]}
    common = yaml.safe_load(write_grid(models).read_text())["set"]
    # Long enough to be cut, with one validation, at its end.
    common |= {"trainer.max_steps": 80, "trainer.check_val_every_n_epoch": 20}
    common |= {"probe.every_n_epochs": 0, "captions.num_images": 0}
    file = write_grid(models, set=common, **changes)
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "lightning_limber", "grid", str(file)], env=env)
    saved = Path("runs/tiny/linear/seed_0/checkpoints/last.ckpt")
    while not saved.is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM
    [start] = json.loads(Path("runs/tiny/linear/seed_0/run.json").read_text())
    assert "ended_at_step" not in start
    assert not Path("runs/tiny/late").exists()
    again = run_grid(file)
    assert again[0] == ["fit", "--ckpt_path", "runs/tiny/linear/seed_0"]
    assert len(again) == 2
    starts = json.loads(Path("runs/tiny/linear/seed_0/run.json").read_text())
    assert len(starts) == 2
    assert starts[1]["from_step"] > 0
    assert starts[1]["ended_at_step"] == 80
    assert [row["arm"] for row in read_csv(Path("runs/tiny/grid.csv"))] == ["linear", "late"]


@pytest.mark.slow
def test_processes_share_a_grid_and_none_takes_a_run_that_another_has(models, run_grid, monkeypatch):
    """A run that outlives its grid is another's too."""
    code = "from pathlib import Path; from lightning_limber.utils.run_lock import hold_run; "
    code += "hold_run(Path('runs/tiny/linear/seed_0')); print('held', flush=True); input()"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    )
    assert other.stdout.readline() == b"held\n"
    monkeypatch.setattr(grid.time, "sleep", lambda _: other.poll() is None and other.communicate(b"\n"))
    commands = run_grid(write_grid(models, choose=None, seeds=[0], endpoints=ENDPOINTS[:1]))
    assert [command[-1].rpartition("=")[2] for command in commands] == ["seed_0"] * 2
    assert [Path(command[-2].rpartition("=")[2]).name for command in commands] == ["late", "linear"]
    rows = read_csv(Path("runs/tiny/grid.csv"))
    assert [row["arm"] for row in rows] == ["linear", "late"]


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ((5, 4, 3, 2, 3), (3, 2, 4, 5)),
        ((3, 2, 3, 4, 5), (3, 2, 1)),
        ((4, 3, 2, 3, 4), (3, 2, 4)),
        ((5, 4, 3, 2, 1), (3, 2, 4, 5)),
    ],
    ids=["above", "below", "middle", "edge"],
)
def test_a_value_is_sought_where_the_loss_falls(monkeypatch, losses, tried):
    values = dict(zip((1, 2, 3, 4, 5), losses, strict=True))
    choose = grid_file.Choose(LR, [3, 1, 2, 5, 4], 4, {})
    work = grid.Work(
        grid_file.Grid(Path("a.yaml"), None, {}, {"a": {}}, "a", [0], choose, ["held_out/loss"]), None
    )
    found: dict[int, float] = {}
    monkeypatch.setattr(work, "losses", lambda arm: found)
    while left := work.pending("a"):
        assert work.choice("a") is None
        value = left[0].settings[LR]
        found[value] = values[value]
    assert tuple(found) == tried
    assert work.choice("a") == min(values, key=values.__getitem__)


# -- the file -----------------------------------------------------------------------------------------

FAULTS = {
    "typo in the last arm": (
        {"arms": {"a": {}, "b": {}, "late": {"model.entry.layr": 1}}},
        "tiny.yaml: arms.late: 'model.entry.layr' is not known. Did you mean 'model.entry.layer'?",
    ),
    "a value out of range": (
        {"choose": {LR: [0.1, -3], "records": 4}},
        "tiny.yaml: choose: -3: model.optimizer.lr: -3.0 is given, allowed is 0 to 10",
    ),
    "typo in choose.set": (
        {"choose": {LR: [0.1, 0.2], "records": 4, "set": {"trainer.max_stps": 3}}},
        "tiny.yaml: choose: 0.1: 'trainer.max_stps' is not known. Did you mean 'trainer.max_steps'",
    ),
    "unknown key": ({"seed": [0]}, "tiny.yaml: 'seed' is not known. Did you mean 'seeds'?"),
    "unknown key of choose": (
        {"choose": {LR: [0.1, 0.2], "record": 3, "records": 4}},
        "choose: 'record' is not known. Did you mean 'records'?",
    ),
    "no list of values": (
        {"choose": {LR: 0.1, "records": 4}},
        "allowed is one setting with a list of values",
    ),
    "no records": ({"choose": {LR: [0.1, 0.2]}}, "allowed is a setting, `records` and `set`"),
    "arms": ({"arms": ["linear"]}, r"arms: \['linear'\] is given, allowed is a mapping of names"),
    "arm's name": ({"arms": {"a/b": {}}}, "letters, digits and"),
    "seeds": (
        {"seeds": [0, 0]},
        r"seeds: \[0, 0\] is given, allowed is a list of whole numbers, each once",
    ),
    "base": ({"base": "mlp"}, "base: 'mlp' is given, allowed is one of the arms: linear, late"),
    "endpoints": ({"endpoints": ["probe/l0"]}, "allowed is a list of .*probe/METRIC@LAYER"),
    "the grid's own": (
        {"arms": {"a": {"seed_everything": 3}}},
        "arms.a: 'seed_everything' is the grid's own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_before_the_first_run(models, run_grid, fault, monkeypatch):
    changes, message = FAULTS[fault]
    monkeypatch.delenv("LIGHTNING_LIMBER_TRACEBACK")
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with pytest.raises(SystemExit) as stop:
        run_grid(write_grid(models, **changes))
    assert stop.value.code == 2
    assert not Path("runs").exists()
    assert re.search(message, said.getvalue()), said.getvalue()
    assert said.getvalue().count("\n") <= 2


def test_the_documented_grid_is_one(run_grid, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    [page] = re.findall(r"```yaml\n(.*?)```", (REPO / "docs/lab.md").read_text(), re.S)
    head = grid.__doc__.partition("\n\n")[2].partition("\n\nA run is")[0]
    for text in (page, head):
        file = Path(os.environ["LIGHTNING_LIMBER_CACHE"]).with_name("documented.yaml")
        file.write_text(textwrap.dedent(text))
        run_grid(file, "--dry_run")
        assert "python -m lightning_limber fit --config configs/default.yaml" in capsys.readouterr().out


LAB = sorted((REPO / "configs/lab").glob("*.yaml"))


@pytest.mark.skipif(not LAB, reason="No grid is shipped.")
@pytest.mark.parametrize("file", LAB, ids=lambda file: file.stem)
def test_every_shipped_grid_is_one(run_grid, file, capsys):
    run_grid(file, "--dry_run")
    assert "python -m lightning_limber fit" in capsys.readouterr().out


def test_a_file_that_is_not_there(run_grid):
    with pytest.raises(FileNotFoundError, match="no such file"):
        run_grid("configs/lab/nothing.yaml")


def test_help_loads_no_torch():
    code = (
        "import sys; sys.argv[1:] = ['grid', '--help']\n"
        "from lightning_limber.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    assert not {'torch', 'scipy'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--dry_run" in done.stdout


# -- the page -----------------------------------------------------------------------------------------


def draw_runs(
    root: Path, shifts: dict[str, float], seeds: int = 3, images: int = 60
) -> dict[str, list[dict]]:
    """Runs by arm: a loss by image, shifted by so much; a lift that is the loss; and `knn` without images.

    The last arm has no rows at layer 3.
    """
    random = np.random.default_rng(0)
    level, runs = random.normal(3, 1, images), {}
    for arm, shift in shifts.items():
        for seed in range(seeds):
            folder = root / arm / f"seed_{seed}"
            loss = level + shift + random.normal(0, 0.2, images) + random.normal(0, 0.02)
            sums = np.stack([loss, np.ones(images)], axis=-1)
            names = [f"val/{i}" for i in range(images)]
            add_arrays(images_file(folder, 1), "held_out", {"names": names, "loss": sums})
            arrays = {"names": names, "groups": ["image"], "layers": [3], "lift": sums[None, None]}
            add_arrays(images_file(folder, 1), "probe", arrays)
            mean = (loss.mean(), 0.0, 9.0)
            is_last = arm == list(shifts)[-1]
            at_layer = [None if is_last else mean]
            runs.setdefault(arm, []).append(
                {
                    "folder": folder,
                    "layers": [3],
                    "epochs": [0, 1],
                    "curves": {
                        "lift": {"image": {0: at_layer, 1: at_layer}, "noise": {1: [(2.5, 2, 3)]}},
                        "knn": {"image": {1: [(shift + seed, 0.0, 9.0)]}},
                    },
                    "held_out": {1: {"loss": mean, "loss_shuffled": (99.0, 98.0, 100.0)}},
                    "scores": {},
                }
            )
    return runs


SHIFTS = {"base": 0.0, "better": -0.5, "same": 0.0, "worse": 0.5}


def test_sentences_follow_from_the_numbers(tmp_path):
    runs = draw_runs(tmp_path, SHIFTS)
    names = ("held_out/loss", "probe/lift@3")
    tables = {name: measure(runs, "base", grid_page.key_of(name)) for name in names}
    assert list(sentences(tables, "base")) == [
        "- **held_out/loss** against base: lower: better; higher: worse; no difference shown: same.",
        "- **probe/lift@3** against base: lower: better; higher: none; no difference shown: same; "
        "not tested: worse.",
        "- Lower held_out/loss and higher probe/lift@3 than base: none.",
    ]
    by_arm = {row.arm: row for row in tables["held_out/loss"]}
    p = [by_arm[arm].p for arm in ("better", "same", "worse")]
    assert [by_arm[arm].p_holm for arm in ("better", "same", "worse")] == intervals.holm(p)
    last = list(markdown(tables["probe/lift@3"], "base"))[-1]
    assert last == "| worse | 3 | - | - | - | - | - |"


def test_numbers_without_images_are_students_over_seeds(tmp_path):
    runs = draw_runs(tmp_path, SHIFTS)
    found = measure(runs, "base", ("probe", "knn", 3))[1]
    values = [[run["curves"]["knn"]["image"][1][0][0] for run in runs[arm]] for arm in ("better", "base")]
    welch = stats.ttest_ind(*values, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert found.minus_base == pytest.approx((welch.statistic * 0 - 0.5, interval.low, interval.high))
    assert found.p == pytest.approx(welch.pvalue, abs=1e-5)
    assert found.over == "seeds"
    one = {arm: of_arm[:1] for arm, of_arm in runs.items()}
    found = measure(one, "base", ("probe", "knn", 3))[1]
    assert np.isnan([*found.minus_base[1:], found.p]).all()
    assert found.over == ""
    assert measure(one, "base", ("held_out", "loss", None))[1].over == "images"


def test_the_figure_has_a_dot_a_run(tmp_path):
    runs = draw_runs(tmp_path, {**SHIFTS, "late": 0.0})
    picture = figure(runs, "base", "held_out/loss", ["probe/lift@3"])
    [axis] = picture.axes
    dots = {of_arm.get_label(): len(of_arm.get_offsets()) for of_arm in axis.collections}
    assert dots == dict.fromkeys(SHIFTS, 3)  # The last has no lift.
    first = axis.collections[0].get_offsets()[0]
    assert first.tolist() == pytest.approx([runs["base"][0]["held_out"][1]["loss"][0]] * 2)
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert labels == [*SHIFTS, "noise", "untrained"]
    # A line that lies far off would make one dot of all.
    assert axis.get_xlabel() == "held_out/loss\nanother image's caption: 99"
    assert axis.lines[0].get_ydata()[0] == 2.5


def test_the_figure_has_a_panel_an_endpoint_and_stretches_no_axis(tmp_path):
    runs = draw_runs(tmp_path, {"base": 0.0, "far": 20.0, "late": 0.0})
    picture = figure(runs, "base", "held_out/loss", ["probe/lift@3", "held_out/loss", "probe/lift@3"])
    assert [axis.get_visible() for axis in picture.axes] == [True, True, True, False]
    assert {axis.get_xscale() for axis in picture.axes[:3]} == {"log"}
