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
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_limber.data.collate import Batch
from lightning_limber.data.layout import Parts, Sequences, lay_out
from lightning_limber.data.prompt import Prompt, Text
from lightning_limber.models.build import BLANK_IMAGE, check_length, make_entry
from lightning_limber.models.image_tokens import ImageTokens
from lightning_limber.models.limber import Limber
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


class Step(NamedTuple):
    """One training step of one process."""

    flops: dict[str, int]
    """FLOPs by part and direction."""
    kept_bytes: int
    """What adapter and LLM keep for the backward, and the step's inputs."""
    head_bytes: int
    """What the output head and the loss keep: logits, and the matrix where autocast rounds it."""
    peak_bytes: int
    """Most that is alive at any moment, beside weights, gradients and optimiser."""


class Rehearsal:
    """A `Limber` on fake tensors, with its own forward.

    Args:
        model: A model that is not loaded; its parts are given shapes here, and never values.
        precision: The Trainer's.
        caption_tokens: Tokens of each caption, beside those that the prompt adds.
        captions_per_image: Captions of each image; they share a sequence.

    Raises:
        FileNotFoundError: the small files of a model are not to be had.
        ValueError: an unknown precision, or parts that do not fit.
    """

    def __init__(
        self, model: Limber, precision: str, caption_tokens: int, captions_per_image: int = 1
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"trainer.precision={precision!r}: `plan` knows {', '.join(PRECISIONS)}.")
        self.model, self.dtype, self.caption_tokens = model, PRECISIONS[precision], caption_tokens
        model.vision.load(weights=False)
        model.vision.drop_unused_layers()
        model.llm.load(weights=False)
        prompt = Prompt(model.hparams["prompt"], model.llm.tokenizer, model.hparams["max_caption_tokens"])
        # Of a conversation one turn, with a question of one word.
        text = prompt.text([("picture", "picture")] if prompt.is_conversation else "picture")
        self.captions_per_image = 1 if prompt.is_conversation else captions_per_image
        self._texts = [_stretched(text, caption_tokens)] * self.captions_per_image
        self._prefix_ids = prompt.prefix_ids
        self._pixels = model.vision.transform(BLANK_IMAGE)  # [3, H, W]
        with torch.device("meta"):
            features = model.vision(self._pixels[None].to("meta"))
            vision_size = features.shape[-1]
            model.adapter = model.make_adapter(vision_size, model.llm.hidden_size)
            model.adapter.bind(model.llm)
            model.entry = make_entry(
                model.entry_config, model.adapter, model.make_adapter, vision_size, model.llm
            )
            self.image_tokens = model.adapter.count_tokens(features)
        check_length(model.llm, self.image_tokens, model.hparams["max_caption_tokens"])
        self.prefix_tokens = len(self._prefix_ids)
        self.text_tokens = sum(len(text.ids) for text in self._texts)
        """Tokens behind the image."""
        trained = nn.ModuleList([model.adapter, model.entry])
        self.parts = {"vision": model.vision, "llm": model.llm, "adapter": trained}
        self.parameters = {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in self.parts.items()
        }
        self.fake = FakeTensorMode()
        with self.fake:
            for part in self.parts.values():
                _make_fake(part)
            if self.dtype == torch.bfloat16:
                attention = model.llm.model.config._attn_implementation
                model.vision.prepare_autocast(self.dtype)
                model.llm.prepare_autocast(self.dtype)
                model.llm.model.set_attn_implementation(attention)  # Not as on a CPU.

    def _weights(self, part: nn.Module) -> list[Tensor]:
        return [*part.parameters(), *part.buffers()]

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of each part, with its buffers, as the precision stores them."""
        return {name: tensor_bytes(self._weights(part)) for name, part in self.parts.items()}

    def checkpoint_bytes(self) -> int:
        """Tensors of a checkpoint: the adapter, AdamW's two moments and step counts."""
        trained = self.parts["adapter"]
        parameters, state = list(trained.parameters()), list(trained.state_dict().values())
        return tensor_bytes(state) + 2 * tensor_bytes(parameters) + 4 * len(parameters)

    def step(self, images: int) -> Step:
        """Runs forward and backward of a batch."""
        model, flops = self.model, {}
        known = [tensor for part in self.parts.values() for tensor in self._weights(part)]
        with self.fake, FlopCounter() as counter, Meter(known) as meter:
            done = 0

            def mark(name: str) -> None:
                nonlocal done
                flops[name], done = counter.total - done, counter.total

            def after_decoder(_module: nn.Module, _args: Any, output: Any) -> None:
                if not output.last_hidden_state.requires_grad:  # Layers below the image tokens'.
                    return
                mark("LLM forward")
                meter.phase = "head"
                output.last_hidden_state.register_hook(lambda _gradient: mark("head"))

            def after_entry(_module: nn.Module, _args: Any, output: ImageTokens) -> None:
                mark("adapter forward")
                output.tokens.register_hook(lambda _gradient: mark("LLM backward"))

            meter.phase = "body"
            handles = [
                model.vision.register_forward_hook(lambda *_: mark("vision forward")),
                model.entry.register_forward_hook(after_entry),
                model.llm.model.base_model.register_forward_hook(after_decoder),
            ]
            with self._autocast():
                losses = model(self._batch(images))[1]
            kept = dict(meter.live)
            losses.sum().backward()
            mark("adapter backward")
            for handle in handles:
                handle.remove()
        self.parts["adapter"].zero_grad()
        return Step(flops, kept["body"], kept["head"], meter.peak)

    def text_flops(self) -> int:
        """Forward of the LLM over one image's captions without the image."""
        return self._decode_flops(lay_out([Parts(-1, self._texts)], self._prefix_ids, 0))

    def opening_flops(self) -> int:
        """Forward of the LLM over one image without its captions."""
        return self._decode_flops(lay_out([Parts(0, [])], self._prefix_ids, self.image_tokens))

    def _decode_flops(self, laid: Sequences) -> int:
        with self.fake, torch.no_grad(), self._autocast():
            embeds = self.model.llm.embed(_made_fake(laid).input_ids)
            with FlopCounter() as counter:
                self.model.llm.decode(embeds)
        return counter.total

    def _batch(self, images: int) -> Batch:
        parts = [Parts(i, self._texts) for i in range(images)]
        keys = ("ids", "image_ids", "index", "captions", "scenes", "truncated")
        lists: dict[str, Any] = dict.fromkeys(keys, [""] * images)
        batch = Batch(
            **vars(lay_out(parts, self._prefix_ids, self.image_tokens)),
            pixel_values=torch.empty(images, *self._pixels.shape),
            **lists,
            own_labels=0,
        )
        return _made_fake(batch)

    def _autocast(self) -> AbstractContextManager:
        context = ExitStack()
        if self.dtype is not None:
            context.enter_context(torch.autocast("cpu", dtype=self.dtype))
            context.enter_context(GPUAutocast())
        return context


def _stretched(text: Text, caption_tokens: int) -> Text:
    """The text with a caption of so many tokens."""
    first = text.is_caption.index(True)
    last = first + sum(text.is_caption)
    places = [*range(first), *[first] * caption_tokens, *range(last, len(text.ids))]
    return Text(*([values[place] for place in places] for values in text[:3]))  # type: ignore[arg-type]


def _made_fake(sequences: Any) -> Any:
    """The same with new tensors; called where new tensors are fake."""
    return apply_to_collection(sequences, Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype))


def _make_fake(module: nn.Module) -> None:
    """Replaces meta tensors by fake ones, as of a CPU; tied weights stay tied."""
    fakes: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
            setattr(owner, name, fakes.setdefault(tensor, fake))


def tensor_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; those that share a storage count once."""
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors}.values())
