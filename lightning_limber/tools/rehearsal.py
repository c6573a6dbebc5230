"""A training step on fake tensors: its FLOPs and its memory, counted as torch executes it.

There is no formula for a model here. `Rehearsal` builds the models that a config names from their
``config.json`` alone and runs the project's own training step on fake tensors, which have shapes and
dtypes but no values: FLOPs are counted (flops.py) and bytes are followed, seconds even for large models.
Causal attention counts whole squares, and what a fused attention kernel computes twice counts twice.

Attention is the implementation that transformers picks for the model, with torch's fused kernel where it
picks SDPA. The GPUs' rules of autocast hold, see `GPUAutocast`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_limber.data.collate import Batch
from lightning_limber.data.records import Record
from lightning_limber.models.limber import Limber, _blank_image
from lightning_limber.utils.flops import FlopCounter

PRECISIONS: dict[str, torch.dtype | None] = {
    "32-true": None,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}


class Meter(TorchDispatchMode):
    """Bytes of the tensors that live, by the phase that made them, and the peak of their sum.

    Args:
        known: Tensors that are there already and do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.phase = ""
        self.live: Counter[str] = Counter()
        self.peak = 0
        # Held, so that no new storage can take an old one's address.
        self._known = {storage._cdata: storage for storage in (t.untyped_storage() for t in known)}
        self._made: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.live.total())
        return output

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known and key not in self._made:
            self._made[key] = self.phase, storage.nbytes()
            self.live[self.phase] += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        phase, size = self._made.pop(key)
        self.live[phase] -= size


class GPUAutocast(TorchFunctionMode):
    """Takes in float32 what a GPU's autocast does and a CPU's does not: GPT-2's and GPT-J's GELU, which is
    written out with a power, keeps seven times the bytes that a fused one does.
    """

    FLOAT32 = {
        *(torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, torch.exp, torch.log, torch.reciprocal),
        *(torch.softmax, Tensor.softmax, F.softmax, F.layer_norm, F.group_norm, F.softplus),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FLOAT32 and args and args[0].dtype in (torch.bfloat16, torch.float16):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@dataclass
class Step:
    """One training step of one process."""

    flops: dict[str, int]
    """By part and direction."""
    kept_bytes: int
    """What adapter and LLM keep for the backward, and the step's inputs."""
    head_bytes: int
    """What the output head and the loss keep: logits, and the matrix where autocast rounds it."""
    peak_bytes: int
    """Most that is alive at any moment, beside weights, gradients and optimiser."""


class Rehearsal:
    """A `Limber` on fake tensors, with its own forward.

    Args:
        model: Its parts not loaded; they are given shapes here, and never values.
        precision: Of the Trainer.
        caption_tokens: Tokens of each caption, beside those that the prompt adds.
        captions_per_image: Sequences for each image.

    Raises:
        FileNotFoundError: the small files of a model are not to be had.
        ValueError: an unknown precision, or parts that do not fit.
    """

    def __init__(
        self, model: Limber, precision: str, caption_tokens: int, captions_per_image: int = 1
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"trainer.precision={precision!r}: `plan` knows {', '.join(PRECISIONS)}.")
        self.model, self.dtype = model, PRECISIONS[precision]
        self.caption_tokens = caption_tokens
        model.vision.load(weights=False)
        model.vision.drop_unused_layers()
        model.llm.load(weights=False)
        collate = model.collator()
        # Of a conversation one turn, with a question of one word.
        talks = collate.prompt.is_conversation
        captions = [[("picture", "picture")]] if talks else ["picture"] * captions_per_image
        captions_per_image = len(captions)
        self._one = collate([Record("", _blank_image(), [])], [captions])
        self.captions_per_image = captions_per_image
        self._more_tokens = captions_per_image * caption_tokens - int(self._one.is_caption.sum())
        with torch.device("meta"):
            features = model.vision(self._one.pixel_values.to("meta"))
            model.adapter = model.make_adapter(features.shape[-1], model.llm.hidden_size)
            self.image_tokens = model.adapter.count_tokens(features)
        model._check_length(self.image_tokens)
        self.parameters = {name: _count(part) for name, part in self.parts.items()}
        self.fake = FakeTensorMode()
        with self.fake:
            for part in self.parts.values():
                _make_fake(part)
            if self.dtype == torch.bfloat16:
                attention = model.llm.model.config._attn_implementation
                model.vision.prepare_autocast(self.dtype)
                model.llm.prepare_autocast(self.dtype)
                model.llm.model.set_attn_implementation(attention)  # Not as on a CPU.

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"vision": self.model.vision, "llm": self.model.llm, "adapter": self.model.adapter}

    @property
    def prefix_tokens(self) -> int:
        return len(self._one.prefix_ids)

    @property
    def text_tokens(self) -> int:
        """Tokens behind the image."""
        return self._one.text_ids.shape[1] + self._more_tokens

    @property
    def target_tokens(self) -> int:
        """Tokens of a sequence that the loss is taken on."""
        return len(self._one.target_index) + self._more_tokens

    def weight_bytes(self) -> dict[str, int]:
        """Of each part, buffers with it, as the precision stores them."""
        return {
            name: tensor_bytes([*part.parameters(), *part.buffers()]) for name, part in self.parts.items()
        }

    def checkpoint_bytes(self) -> int:
        """Tensors of a checkpoint: the adapter, AdamW's two moments and step counts."""
        parameters = list(self.model.adapter.parameters())
        state = list(self.model.adapter.state_dict().values())
        return tensor_bytes(state) + 2 * tensor_bytes(parameters) + 4 * len(parameters)

    def step(self, images: int) -> Step:
        """Runs forward and backward of a batch."""
        model, flops = self.model, {}
        known = [t for part in self.parts.values() for t in (*part.parameters(), *part.buffers())]
        with self.fake, FlopCounter() as counter, Meter(known) as meter:
            done = 0

            def mark(name: str) -> None:
                nonlocal done
                flops[name], done = counter.total - done, counter.total

            def after_decoder(_module: nn.Module, _args: Any, output: Any) -> None:
                mark("LLM forward")
                meter.phase = "head"
                output.last_hidden_state.register_hook(lambda _gradient: mark("head"))

            def after_adapter(_module: nn.Module, _args: Any, output: Tensor) -> None:
                mark("adapter forward")
                output.register_hook(lambda _gradient: mark("LLM backward"))

            meter.phase = "body"
            handles = [
                model.vision.register_forward_hook(lambda *_: mark("vision forward")),
                model.adapter.register_forward_hook(after_adapter),
                model.llm.model.base_model.register_forward_hook(after_decoder),
            ]
            with self._autocast():
                losses = model(self._batch(images))[1]
            kept = dict(meter.live)
            losses.sum().backward()
            mark("adapter backward")
            for handle in handles:
                handle.remove()
        for parameter in model.adapter.parameters():
            parameter.grad = None
        return Step(flops, kept["body"], kept["head"], meter.peak)

    def text_flops(self) -> int:
        """Forward of the LLM over one image's sequences without the image."""
        with self.fake, torch.no_grad(), self._autocast():
            sequences = self.model.sequences(self._batch(1), None)
            with FlopCounter() as counter:
                self.model.llm.decode(sequences.embeds)
        return counter.total

    def _batch(self, images: int) -> Batch:
        one, texts = self._one, (images, self.text_tokens)
        shared = one.caption_number is not None
        return replace(
            one,
            ids=one.ids * images,
            pixel_values=torch.empty(images, *one.pixel_values.shape[1:]),
            image_index=torch.empty(images, dtype=torch.long),
            prefix_ids=torch.empty(self.prefix_tokens, dtype=torch.long),
            text_ids=torch.empty(texts, dtype=torch.long),
            is_caption=np.zeros(texts, dtype=bool),
            target_index=torch.empty(images * self.target_tokens, 2, dtype=torch.long),
            lengths=[self.prefix_tokens + self.text_tokens] * images,  # None is shorter: none shares a row.
            image_of=list(range(images)),
            caption_number=torch.empty(texts, dtype=torch.long) if shared else None,
        )

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.dtype is None:
            yield
        else:
            with torch.autocast("cpu", dtype=self.dtype), GPUAutocast():
                yield


def _make_fake(module: nn.Module) -> None:
    """Replaces meta tensors by fake ones, as of a CPU; tied weights stay tied."""
    fakes: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            setattr(owner, name, fakes.setdefault(tensor, fake))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; those that share a storage count once."""
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors}.values())
