"""More than one process: the LLM's layers split over them, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
from conftest import run_cli

TESTS = {"PYTHONPATH": str(Path(__file__).parent)}
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def local_bytes(llm) -> int:
    """Bytes of the decoder layers' weights that this process holds."""
    weights = (p.to_local() if hasattr(p, "to_local") else p for p in llm.layers.parameters())
    return sum(weight.nbytes for weight in weights)


class LayerBytes(pl.Callback):
    """Writes them down at the end of a run."""

    def on_fit_end(self, trainer, pl_module) -> None:
        Path(f"bytes.{trainer.global_rank}").write_text(str(local_bytes(pl_module.llm)))


def callbacks(hook: str = "", step: int = -1) -> str:
    crash = {"log": "batches", "hook": hook, "step": step, "kill": True}
    chosen = [
        {"class_path": "crash.CrashAt", "init_args": crash},
        {"class_path": "test_scale.LayerBytes"},
    ]
    return f"--trainer.callbacks={json.dumps(chosen)}"


def scalars(root: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(root / "runs/default/version_0"))
    log.Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def assert_same_scalars(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Every number in the event files: losses, held-out scores, captions, probe."""
    first, second = scalars(a), scalars(b)
    assert first.keys() == second.keys()
    assert {"train/loss", "val/loss", "fvu/image/layer_02", "loss_recovered/image/layer_00"} <= first.keys()
    for tag, events in first.items():
        assert [step for step, _ in second[tag]] == [step for step, _ in events], tag
        values = [value for _, value in events]
        expected = pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True)
        assert [value for _, value in second[tag]] == expected, tag


def checkpoint(root: Path) -> Path:
    return root / "runs/default/version_0/checkpoints/last.ckpt"


def assert_same_adapter(a: Path, b: Path) -> None:
    first, second = (torch.load(checkpoint(root), weights_only=True)["state_dict"] for root in (a, b))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, Path]:
    """The same two epochs by one process, by two, and by two that share the LLM."""
    roots = {}
    for name, flags in {"one": [], "ddp": DDP, "sharded": [*DDP, "--model.shard_llm=true"]}.items():
        roots[name] = tmp_path_factory.mktemp(name)
        flags = [*tiny.arguments(models), "--trainer.max_steps=8", *flags, callbacks()]
        done = run_cli("fit", *flags, cwd=roots[name], env=TESTS)
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
    flags = [*tiny.arguments(models), "--trainer.max_steps=8", *DDP, "--model.shard_llm=true"]
    killed = run_cli("fit", *flags, callbacks("batch_start", 6), env=TESTS)
    assert killed.returncode != 0, killed.stdout
    assert torch.load(checkpoint(tmp_path), weights_only=True)["global_step"] == 6
    resumed = run_cli("fit", "--ckpt_path=last", callbacks(), env=TESTS)
    assert resumed.returncode == 0, resumed.stdout
    for rank in (0, 1):
        expected = (runs["sharded"] / f"batches.{rank}").read_text().splitlines()
        assert list(dict.fromkeys((tmp_path / f"batches.{rank}").read_text().splitlines())) == expected
    assert_same_adapter(runs["sharded"], tmp_path)


def everything(llm) -> list[torch.Tensor]:
    """What the project asks of an LLM, under bf16 autocast."""
    embeds = llm.embed(torch.arange(4, 16).view(2, 6)).requires_grad_()
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        llm.decode(embeds.detach(), first_layer=3)  # The logit lens.
        # One process' share of a batch has no image, so nothing to train.
        alone = torch.distributed.get_rank() == 0
        hidden = llm.decode(embeds.detach() if alone else embeds)
        if llm.sharded or not alone:
            hidden.sum().backward()
        hidden = llm.decode(embeds)
        llm.logits(hidden.flatten(0, 1)).float().logsumexp(-1).sum().backward()
        found += [hidden.detach(), embeds.grad]
        with torch.inference_mode(), llm.residual_hooks({"blocks.1.hook_resid_post": found.append}):
            found.append(llm.decode(embeds, first_layer=1))
        with torch.no_grad(), llm.residual_hooks({"blocks.1.hook_resid_pre": lambda x: 2 * x}):
            found.append(llm.decode(embeds))
        # The processes write different numbers of tokens.
        length = 3 + torch.distributed.get_rank()
        mask = torch.ones(2, 6, dtype=torch.long)
        options = {"max_new_tokens": length, "do_sample": False, "synced_gpus": llm.sharded}
        found.append(llm.model.generate(inputs_embeds=embeds.detach(), attention_mask=mask, **options))
    return found


def compare_with_its_parts(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_limber.backbones import LLM

    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for architecture in tiny.llm_configs():
        llm = LLM(f"{folder}/{architecture}").load()
        llm.prepare_autocast(torch.bfloat16)  # Matrices in bfloat16, norms in float32.
        whole, expected = local_bytes(llm), everything(llm)
        llm.shard(init_device_mesh("cpu", (2,)))
        llm._apply(lambda t: t.to("cpu"))  # As Lightning moves the module.
        assert local_bytes(llm) == pytest.approx(whole / 2, rel=0.01), architecture
        for got, wanted in zip(everything(llm), expected, strict=True):
            assert torch.equal(got, wanted), architecture
        assert local_bytes(llm) == pytest.approx(whole / 2, rel=0.01), architecture  # Let go again.
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_llm_computes_what_the_whole_one_does(tmp_path):
    for architecture in tiny.llm_configs():
        tiny.write_llm(tmp_path / architecture, architecture)
    torch.multiprocessing.spawn(compare_with_its_parts, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("flags", [[], ["--trainer.strategy=ddp"]])
def test_sharding_needs_processes(fit, flags):
    with pytest.raises(ValueError, match=r"this is 1 process\(es\) with \w+Strategy. Set trainer.strategy"):
        fit("--model.shard_llm=true", *flags)
