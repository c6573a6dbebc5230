"""Callbacks and checks of an LLM whose layers are split over processes."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch


def local_bytes(llm) -> int:
    """Bytes of the decoder layers' weights that this process holds."""
    weights = (p.to_local() if hasattr(p, "to_local") else p for p in llm.layers.parameters())
    return sum(weight.nbytes for weight in weights)


class LayerBytes(pl.Callback):
    """Writes them down at the end of a run."""

    def on_fit_end(self, trainer, pl_module) -> None:
        Path(f"bytes.{trainer.global_rank}").write_text(str(local_bytes(pl_module.llm)))


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

    from lightning_limber.models.llm import LLM

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
