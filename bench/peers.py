"""What one would train with instead, from the same frozen models: LLaVA, and a plain loop (train.py)."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from bench.measure import Clock
from bench.sizes import Setup, limber, pictures
from lightning_limber.data.collate import Batch
from lightning_limber.models.vision import VisionEncoder

READY_BATCHES = 2
"""Training batches that all contenders take turns through."""


def plain_loop(
    loss_of: Any,
    batches: list[Any],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: int,
    device: str,
    bf16: bool,
    schedule: Any = None,
) -> list[float]:
    """A plain training loop, with gradients clipped at 1."""
    clock = Clock(device)
    batches = [move_data_to_device(batch, device) for batch in batches]
    for i in range(steps + 1):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(batches[i % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        clock.mark()
    return clock.laps()


class _PooledTower(nn.Module):
    """A vision tower that gives `VisionEncoder`'s features, pooled."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(hidden_states={self.encoder.config.layer: self.encoder(pixel_values)})


class Peers:
    """The same frozen models, put together as LLaVA and as a plain loop."""

    def __init__(self, setup: Setup, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, LlavaConfig

        self.device, self.folder, self.dtype = setup.device, setup.folder, dtype
        self.batches = pictures(setup, READY_BATCHES, packed=False).ready
        self.encoder = VisionEncoder(limber(setup).vision.config).load().to(self.device, dtype)
        llm: Any = AutoModelForCausalLM.from_pretrained(self.folder / "llm", dtype=dtype)
        self.llm = llm.to(self.device).requires_grad_(False)
        self.config = LlavaConfig(
            # Copies: it would unset the attention kernel in the parts' own.
            vision_config=deepcopy(self.encoder.model.config),
            text_config=deepcopy(self.llm.config),
            vision_feature_layer=self.encoder.config.layer,
            vision_feature_select_strategy="full",
            image_token_index=self.llm.config.vocab_size - 1,
        )
        with torch.no_grad():
            features = self.encoder(self.batches[0].pixel_values[:1].to(self.device, dtype))  # [1, P, D_v]
        self.projector = nn.Linear(features.shape[2], self.llm.config.hidden_size, device=self.device)
        self.examples = [self._example(batch, features.shape[1]) for batch in self.batches]

    def llava(self) -> Any:
        """A fresh LLaVA around the frozen parts, with a new projector in float32."""
        from transformers import LlavaForConditionalGeneration

        with torch.device("meta"):
            llava = LlavaForConditionalGeneration(self.config)
        llava.model.vision_tower = _PooledTower(self.encoder)
        llava.model.language_model = self.llm.base_model
        llava.lm_head = self.llm.get_output_embeddings()
        projector = llava.model.multi_modal_projector.to_empty(device=self.device).float()
        for parameter in projector.parameters():
            nn.init.normal_(parameter, std=0.02)
        return llava

    def _example(self, batch: Batch, image_tokens: int) -> dict[str, Tensor]:
        """The batch, every sequence in a row of its own, as transformers takes it."""
        ids, labels = batch.input_ids.clone(), torch.full_like(batch.input_ids, -100)
        ids.view(-1)[batch.image_positions] = self.config.image_token_index
        labels.view(-1)[batch.label_positions + 1] = batch.labels
        column = torch.arange(ids.shape[1])
        # The end token is the last of each text.
        last = torch.where(labels >= 0, column, 0).amax(1, keepdim=True)
        return {
            "input_ids": ids,
            "attention_mask": (column <= last).long(),
            "labels": labels,
            "pixel_values": batch.pixel_values[batch.image_rows[::image_tokens] // image_tokens],
        }

    def trainer(self, bf16: bool, steps: int) -> list[float]:
        from accelerate.state import AcceleratorState
        from transformers import Trainer, TrainerCallback, TrainingArguments

        # Accelerate keeps the precision of a process' first Trainer, whatever a later one is told; and a
        # model that it has prepared it does not prepare again.
        AcceleratorState._reset_state(reset_partial_state=True)
        llava = self.llava()
        clock = Clock(self.device)

        class Marks(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                clock.mark()

        trainer = Trainer(
            model=llava,
            args=TrainingArguments(
                output_dir=str(self.folder / "llava"),
                max_steps=steps + 1,
                per_device_train_batch_size=1,  # An example is a whole batch.
                bf16=bf16,
                use_cpu=self.device == "cpu",
                dataloader_pin_memory=self.device == "cuda",
                remove_unused_columns=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=self.examples,  # type: ignore[arg-type]
            data_collator=lambda examples: examples[0],
            callbacks=[Marks()],
        )
        trainer.train()
        assert ("_original_forward" in vars(llava)) == bf16, "autocast is not what was asked for"
        return clock.laps()

    def plain(self, bf16: bool, steps: int) -> list[float]:
        before = int((self.examples[0]["input_ids"] == self.config.image_token_index).nonzero()[0, 1])

        def loss_of(example: dict[str, Tensor]) -> Tensor:
            image = self.projector(self.encoder(example["pixel_values"].to(self.dtype)))
            embeds = self.llm.get_input_embeddings()(example["input_ids"])
            after = before + image.shape[1]
            embeds = torch.cat([embeds[:, :before], image.to(embeds), embeds[:, after:]], dim=1)
            mask = example["attention_mask"]
            logits = self.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
            logits, labels = logits[:, :-1].flatten(0, 1), example["labels"][:, 1:].flatten()
            return nn.functional.cross_entropy(logits.float(), labels)

        parameters = list(self.projector.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        return plain_loop(loss_of, self.examples, parameters, optimizer, steps, self.device, bf16)
