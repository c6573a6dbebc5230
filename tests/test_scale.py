"""Beyond one process: the LLM's layers split over several, SLURM jobs that are requeued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from process import HELPERS, free_port, run_cli
from sharding import compare_with_its_parts

DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def callbacks(hook: str = "", step: int = -1) -> str:
    crash = {"log": "batches", "hook": hook, "step": step, "kill": True}
    chosen = [
        {"class_path": "crash.CrashAt", "init_args": crash},
        {"class_path": "sharding.LayerBytes"},
    ]
    return f"--trainer.callbacks={json.dumps(chosen)}"


def the_run(root: Path) -> Path:
    (folder,) = (root / "runs/default").iterdir()
    return folder


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run))
    log.Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def assert_same_scalars(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Every number in the event files: losses, held-out scores, captions, probe."""
    first, second = events(the_run(a)), events(the_run(b))
    assert first.keys() == second.keys()
    assert {"train/loss", "val/loss", "fvu/image/layer_02", "loss_recovered/image/layer_00"} <= first.keys()
    for tag, found in first.items():
        # Each process pads its own share.
        if tolerance and tag in ("train/padding", "flops/step", "flops/image", "flops/probe"):
            continue
        if tag.startswith(("probe_seconds/", "memory/")):
            continue
        assert [step for step, _ in second[tag]] == [step for step, _ in found], tag
        values = [value for _, value in found]
        expected = pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True)
        assert [value for _, value in second[tag]] == expected, tag


def checkpoint(root: Path) -> Path:
    return the_run(root) / "checkpoints/last.ckpt"


def assert_same_adapter(a: Path, b: Path) -> None:
    first, second = (torch.load(checkpoint(root), weights_only=True)["state_dict"] for root in (a, b))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_same_batches(a: Path, b: Path, processes: int) -> None:
    """A step that was lost and done again must have had the same batch."""
    for rank in range(processes):
        first, second = ((root / f"batches.{rank}").read_text().splitlines() for root in (a, b))
        assert list(dict.fromkeys(second)) == first


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, Path]:
    """The same two epochs by one process, by two, and by two that share the LLM."""
    roots = {}
    for name, flags in {"one": [], "ddp": DDP, "sharded": [*DDP, "--model.shard_llm=true"]}.items():
        roots[name] = tmp_path_factory.mktemp(name)
        processes = 2 if flags else 1
        flags = [*tiny.arguments(models), "--probe.log=all", "--trainer.max_steps=8", *flags, callbacks()]
        done = run_cli("fit", *flags, cwd=roots[name], env=HELPERS, processes=processes)
        assert done.returncode == 0, done.stdout
    return roots


@pytest.mark.slow
def test_a_sharded_run_is_the_same_run(runs):
    """To the bit that of two processes; and that of one but for the rounding of a split sum."""
    assert_same_scalars(runs["ddp"], runs["sharded"])
    assert_same_adapter(runs["ddp"], runs["sharded"])
    assert_same_scalars(runs["one"], runs["sharded"], tolerance=1e-3)


@pytest.mark.slow
def test_each_process_holds_its_part_and_the_checkpoint_stays_small(runs):
    whole, first, second = (
        int((runs[name] / f"bytes.{rank}").read_text())
        for name, rank in (("ddp", 0), ("sharded", 0), ("sharded", 1))
    )
    assert first + second == whole
    assert first == pytest.approx(whole / 2, rel=0.01)
    sizes = [checkpoint(runs[name]).stat().st_size for name in ("ddp", "sharded")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly(runs, models, tmp_path):
    flags = [
        *tiny.arguments(models),
        "--probe.log=all",
        "--trainer.max_steps=8",
        *DDP,
        "--model.shard_llm=true",
    ]
    ranks = {"env": HELPERS, "processes": 2}
    killed = run_cli("fit", *flags, callbacks("batch_start", 6), **ranks)
    assert killed.returncode != 0, killed.stdout
    assert torch.load(checkpoint(tmp_path), weights_only=True)["global_step"] == 6
    resumed = run_cli("fit", "--ckpt_path=last", callbacks(), **ranks)
    assert resumed.returncode == 0, resumed.stdout
    assert_same_batches(runs["sharded"], tmp_path, 2)
    assert_same_adapter(runs["sharded"], tmp_path)


@pytest.mark.slow
def test_a_sharded_llm_computes_what_the_whole_one_does(tmp_path):
    for architecture in tiny.llm_configs():
        tiny.write_llm(tmp_path / architecture, architecture)
    torch.multiprocessing.spawn(compare_with_its_parts, (str(tmp_path),), nprocs=2)


def test_sharding_needs_processes(fit):
    with pytest.raises(ValueError, match=r"this is 1 process\(es\) with SingleDeviceStrategy. Set trainer"):
        fit("--model.shard_llm=true")


@pytest.mark.slow
def test_sharding_needs_more_than_one_process(models):
    flags = [*tiny.arguments(models), "--model.shard_llm=true", "--trainer.strategy=ddp"]
    done = run_cli("fit", *flags)
    assert done.returncode != 0
    assert "this is 1 process(es) with DDPStrategy. Set trainer.strategy" in done.stdout


# -- SLURM ------------------------------------------------------------------------------------------


def slurm_job(root: Path, flags: list[str], tasks: int = 1, **env: str) -> list[str]:
    """What `srun` does: the same command line for each task. Returns what scontrol was told, ever."""
    tools = root / "bin"
    tools.mkdir(exist_ok=True)
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {root}/scontrol.log\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "limber", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    job |= {"SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks)}
    job |= {"PATH": f"{tools}:{os.environ['PATH']}", **HELPERS, **env}
    job |= {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}"}
    done = run_cli("fit", *flags, cwd=root, env=job, processes=tasks)
    assert done.returncode == 0, done.stdout
    log = root / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


def preempted(step: int, rank: int = 0) -> str:
    chosen = [
        {"class_path": "crash.CrashAt", "init_args": {"log": "batches"}},
        {"class_path": "crash.Preempt", "init_args": {"step": step, "rank": rank}},
    ]
    return f"--trainer.callbacks={json.dumps(chosen)}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "saved"),
    [pytest.param(5, 6, id="mid epoch"), pytest.param(3, 4, id="last batch of an epoch")],
)
def test_a_requeued_job_is_the_uninterrupted_run(runs, models, tmp_path, step, saved):
    """The same command line twice; nothing is saved but for the signal and at the end of epochs."""
    flags = [
        *tiny.arguments(models),
        "--probe.log=all",
        "--trainer.max_steps=8",
        "--checkpoint.every_n_steps=0",
    ]
    flags += [preempted(step)]
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"} if step == 3 else {}
    name = "70_4" if array else "77"
    assert slurm_job(tmp_path, flags, **array) == [f"requeue {name}"]
    assert the_run(tmp_path).name == f"job_{name}"
    assert torch.load(checkpoint(tmp_path), weights_only=True)["global_step"] == saved
    assert slurm_job(tmp_path, flags, **array) == [f"requeue {name}"]  # Not again.
    assert_same_batches(runs["one"], tmp_path, 1)
    assert_same_adapter(runs["one"], tmp_path)
    assert_same_scalars(runs["one"], tmp_path)


@pytest.mark.slow
def test_a_requeued_job_of_two_processes(runs, models, tmp_path):
    """The signal reaches only one of them: both stop after the same step."""
    flags = [
        *tiny.arguments(models),
        "--probe.log=all",
        "--trainer.max_steps=8",
        "--checkpoint.every_n_steps=0",
        *DDP,
    ]
    flags += [preempted(5, rank=1)]
    assert slurm_job(tmp_path, flags, tasks=2) == ["requeue 77"]
    assert torch.load(checkpoint(tmp_path), weights_only=True)["global_step"] == 6
    assert slurm_job(tmp_path, flags, tasks=2) == ["requeue 77"]
    assert_same_batches(runs["ddp"], tmp_path, 2)
    assert_same_adapter(runs["ddp"], tmp_path)
    assert_same_scalars(runs["ddp"], tmp_path)


# -- torchrun and overlays ---------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun(runs, models, tmp_path):
    """Two nodes that meet by address are the two processes of one launcher."""
    flags = [
        *tiny.arguments(models),
        "--config=configs/overlays/ddp.yaml",
        "--probe.log=all",
        "--trainer.max_steps=8",
    ]
    flags += ["--trainer.num_nodes=2", "--trainer.devices=1", callbacks()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    launches = [
        subprocess.Popen(
            [*torchrun, f"--node_rank={node}", "-m", "lightning_limber", "fit", *flags],
            cwd=tmp_path,
            env={**os.environ, **HELPERS, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    for launch in launches:
        output, _ = launch.communicate(timeout=500)
        assert launch.returncode == 0, output
    assert_same_batches(runs["ddp"], tmp_path, 2)
    assert_same_adapter(runs["ddp"], tmp_path)
    assert_same_scalars(runs["ddp"], tmp_path)


def test_debug_overlay_runs_every_part(fit):
    cli = fit("--config=configs/overlays/debug.yaml", "--probe.every_n_epochs=1")
    folder = Path(cli.trainer.log_dir)
    assert folder.parent.name == "debug"
    assert cli.trainer.global_step == 8
    assert (folder / "probe.csv").exists()
    assert (folder / "checkpoints/last.ckpt").exists()
    assert any("captions" in tag for tag in events(folder))
