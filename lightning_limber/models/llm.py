"""The frozen causal language model, with named access to its residual stream.

Shape legend, used in the whole package:
    B images in a batch    N sequences in a batch (a caption each; N >= B)
    P image tokens         T0, T prefix and text tokens     S = T0 + P + T
    D_v, D_l widths of the encoder and the LLM   V vocabulary   L layers   K latents (d_sae)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_limber.data.layout import RowMask
from lightning_limber.models.attention import block_mask, can_flex, flex_attention, whole_mask
from lightning_limber.models.frozen import freeze, store_matrices
from lightning_limber.models.head_loss import FrozenHeadLoss
from lightning_limber.models.layers import (
    ResidualHook,
    Skipped,
    check_compiler,
    compiled,
    hook_post,
    hook_pre,
)
from lightning_limber.utils.hub import from_hub

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HOOK_NAME = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


class LLM(nn.Module):
    """Frozen causal language model with named access to its residual stream.

    `embed`, `decode` and `logits` are the model's own forward in three steps, so that image tokens can
    be put among the embeddings and the vocabulary projection can be spent on caption tokens only.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.model: Any = None
        self.layers = nn.ModuleList()
        self._head_weight: Tensor | None
        self.register_buffer("_head_weight", None, persistent=False)
        self.sharded = False
        self.uses_flex = False
        """Whether training steps use FlexAttention; `compile_layers` decides."""

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with from_hub(self.name) as path:
            return AutoTokenizer.from_pretrained(path)

    def load(self, weights: bool = True) -> LLM:
        """Reads the weights (float32), freezes them, and checks that the three steps are the model.

        Args:
            weights: False reads ``config.json`` alone and leaves the weights on the meta device, where
                nothing can be checked and `decode` starts at the first layer only.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        with from_hub(self.name) as path:
            whole = AutoConfig.from_pretrained(path)
            config = whole.get_text_config(decoder=True)
            if weights:
                self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            if config is not whole or not weights:
                with torch.device("meta"):
                    text = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                self.model = _text_model(self.model, text) if weights else text
        freeze(self)
        self.hidden_size: int = config.hidden_size
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.longest_row: int | None = getattr(config, "sliding_window", None) or sys.maxsize
        """Longest packed sequence that an attention mask can separate; None if the model ignores masks."""
        self.layers = self._find_layers(config.num_hidden_layers)
        self._look_at_a_layer()
        if weights:
            try:
                self._check_steps()
            except Exception as error:
                kind, reason = type(self.model).__name__, str(error).strip().partition("\n")[0]
                raise ValueError(
                    f"model.llm={self.name} ({kind}) is not supported, because {reason or repr(error)}"
                ) from error
        return self

    def _find_layers(self, count: int) -> nn.ModuleList:
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and "vision" not in name
        ]
        if len(found) != 1:
            raise ValueError(
                f"{self.name}: expected one list of {count} decoder layers, found "
                f"{[name for name, _ in found]}. This architecture is not supported."
            )
        return found[0][1]

    @torch.no_grad()
    def _look_at_a_layer(self) -> None:
        """Some architectures' layers return a bare tensor, others a tuple that starts with it."""
        kept: list[Any] = []
        handle = self.layers[0].register_forward_hook(lambda _m, _a, output: kept.append(output))
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.embedding.weight.device)
        # With a mask: transformers looks at the values of anything else.
        self.decode(self.embed(ids), mask=RowMask(ids, ids), positions=ids)
        handle.remove()
        self._layers_return_tuples = isinstance(kept[0], tuple)

    @torch.no_grad()
    def _check_steps(self) -> None:
        ids = torch.arange(1, 5)[None] % self.vocab_size
        expected = self.model(input_ids=ids).logits[0]
        middle = len(self.layers) // 2
        kept: list[Tensor] = []
        with self.residual_hooks({f"blocks.{middle}.hook_resid_post": kept.append}):
            whole = self.decode(self.embed(ids))[0]
        [residual] = kept
        part = self.decode(residual, first_layer=middle + 1)[0]
        got = self.logits(whole)
        if not (
            torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
            and torch.allclose(part, whole, rtol=1e-3, atol=1e-3)
        ):
            raise ValueError(
                "embeddings, decoder and output head do not add up to the model's own logits. Its head "
                "does something this project does not know about (a scale, a soft cap)."
            )
        # Twice in one row, kept apart by a mask: recurrent architectures ignore it.
        length = ids.shape[1]
        number = torch.arange(2).repeat_interleave(length)[None]  # [1, 2 * S]
        apart = RowMask(number, torch.zeros_like(number))
        positions = torch.arange(length).repeat(2)[None]
        if self.longest_row and 2 * length <= self.longest_row:
            both = self.decode(self.embed(ids.repeat(1, 2)), mask=apart, positions=positions)[0]
            if not torch.allclose(both[length:], whole, rtol=1e-3, atol=1e-3):
                self.longest_row = None
        self.model.generate(
            inputs_embeds=self.embed(ids),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def vocab_size(self) -> int:
        return self.embedding.num_embeddings

    @torch.no_grad()
    def token_norm(self) -> Tensor:
        """Mean L2 norm of the token embeddings as the first layer receives them, a scalar."""
        chunks = torch.arange(self.vocab_size, device=self.embedding.weight.device).split(8192)
        total = torch.stack([self.embed(ids).float().norm(dim=-1).sum() for ids in chunks]).sum()
        return total / self.vocab_size

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [N, T] -> embeddings [N, T, D_l], scaled as the model scales them."""
        return self.embedding(input_ids)

    def decode(
        self,
        inputs_embeds: Tensor,
        first_layer: int = 0,
        mask: RowMask | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [N, S, D_l] -> last hidden states after the final norm.

        Sequences are padded on the right only: a causal model needs no mask for that.

        Args:
            inputs_embeds: Or, where `first_layer` is not 0, the residual stream entering that layer.
            first_layer: Where to begin; the number of layers leaves the final norm alone (the logit
                lens).
            mask: Of the N rows; None: each token sees all before it.
            positions: [N, S] position ids; None counts from 0.
        """
        extra: dict[str, Any] = {}
        length = inputs_embeds.shape[1]
        if mask is not None and positions is not None:
            self._check_row(length)
            extra["position_ids"] = positions
        flex = self._takes_flex(length)
        if flex:
            extra["attention_mask"] = block_mask(mask, length, inputs_embeds.device)
        elif mask is not None:
            extra["attention_mask"] = whole_mask(mask)
        if self.sharded and torch.is_grad_enabled() and not inputs_embeds.requires_grad:
            # A share of a batch that has no image: its backward pass gathers weights with the others'.
            inputs_embeds = inputs_embeds.detach().requires_grad_()
        # Whatever the model does to its input before the layers (positions, scales) is passed by.
        with (
            flex_attention(self.model.config) if flex else nullcontext(),
            self._skipping(range(first_layer), inputs_embeds),
        ):
            output = self.model.base_model(inputs_embeds=inputs_embeds, use_cache=False, **extra)
        return output.last_hidden_state

    def _takes_flex(self, length: int) -> bool:
        """Whether this forward of rows of `length` tokens is masked in blocks (attention.py).

        It is if it is a training step's, no layer's window is shorter, and nothing counts FLOPs: torch
        compiles nothing there.
        """
        in_training = self.uses_flex and torch.is_grad_enabled() and _get_current_dispatch_mode() is None
        return in_training and length <= (self.longest_row or 0)

    @torch.no_grad()
    def residual_entering(
        self, layer: int, inputs_embeds: Tensor, mask: RowMask, positions: Tensor
    ) -> Tensor:
        """The residual stream [N, S, D_l] that enters a layer behind the first, which does not run.

        Args:
            layer: From 1 on.
            inputs_embeds: As in `decode`; so are the others.
        """
        kept: list[Tensor] = []
        with (
            self._skipping(range(layer, len(self.layers)), inputs_embeds),
            self.residual_hooks({f"blocks.{layer - 1}.hook_resid_post": kept.append}),
        ):
            self.decode(inputs_embeds, mask=mask, positions=positions)
        return kept[0]

    @contextmanager
    def _skipping(self, numbers: range, residual: Tensor) -> Iterator[None]:
        """Leaves layers out: `residual` is what they hand on."""
        skipped = {number: self.layers[number] for number in numbers}
        output = (residual,) if skipped and self._layers_return_tuples else residual
        try:
            for number, layer in skipped.items():
                self.layers[number] = Skipped(layer, output)
            yield
        finally:
            for number, layer in skipped.items():
                self.layers[number] = layer

    def _check_row(self, length: int) -> None:
        if self.longest_row is None or length > self.longest_row:
            why = f"longer than the sliding window of {self.name}, {self.longest_row}"
            if self.longest_row is None:
                why = f"and {self.name} ignores attention masks"
            raise ValueError(
                f"Captions that share an image make sequences of {length} tokens, {why}: set "
                "data.share_prefix to false."
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states [n, D_l] -> logits [n, V]; contiguous rows multiply fastest on a CPU."""
        weight, bias = self._head()
        logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        if self._softcap is not None:  # Gemma 2
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def token_logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits [n, k] of some token ids [n, k], from final hidden states [n, D_l], in float32.

        Differences of a row are differences of log-probability. Those of logits in bfloat16, in which the
        head multiplies under autocast, are in steps of a tenth of a nat.
        """
        head = self.model.get_output_embeddings()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = (head.weight[tokens].float() @ hidden.float()[:, :, None])[..., 0]  # [n, k]
        if head.bias is not None:
            logits = logits + head.bias[tokens]
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    def token_losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats [n] and correctness [n] of final hidden states [n, D_l] (head_loss.py)."""
        return FrozenHeadLoss.apply(hidden, *self._head(), targets, self._softcap)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D_l] and bias [V] of the output head, in the dtype in which it multiplies."""
        head = self.model.get_output_embeddings()
        weight = head.weight if self._head_weight is None else self._head_weight
        return weight, None if head.bias is None else head.bias.to(weight.dtype)

    def prepare_autocast(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Makes forwards under autocast to `dtype` cheap, without changing what is computed.

        The decoder layers' matrices are stored in `dtype`, and of the head's a copy (norms and embeddings
        stay): autocast would round the same weights at every call. On the CPU attention is written out
        in matrix products: the backward of torch's fused kernel is several times slower there at these
        lengths, and was a third of the training step.

        Args:
            dtype: Data type that autocast multiplies in.
            device: Where the forwards will run; None is where the weights are.
        """
        store_matrices(self.layers, dtype)
        self._head_weight = self.model.get_output_embeddings().weight.detach().to(dtype)
        if (device or self.embedding.weight.device).type == "cpu":
            self.model.set_attn_implementation("eager")

    def shard(self, mesh: DeviceMesh) -> None:
        """Splits the decoder layers' weights over the processes of `mesh`, on its device (FSDP2).

        A layer's weights are gathered for its forward, freed, and gathered again for the backward
        pass, which the adapter's gradient needs. Embeddings, final norm and head stay whole. From now
        on all processes must run the same number of forwards.
        """
        from torch.distributed.fsdp import fully_shard

        for layer in self.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The root, with nothing of its own: from it FSDP knows the layers' order, and gathers ahead.
        ours = set(self.layers.parameters())
        whole = {parameter for parameter in self.model.parameters() if parameter not in ours}
        fully_shard(self.model.base_model, mesh=mesh, ignored_params=whole)
        self.sharded = True

    def compile_layers(self, dtype: torch.dtype | None = None) -> None:
        """Compiles the decoder layers' forward where a gradient is wanted; hooks see what they saw.

        On a GPU attention is FlexAttention there, if that serves the model (attention.py).

        Args:
            dtype: Data type that autocast multiplies in; None: there is no autocast, nor FlexAttention.

        Raises:
            ValueError: torch cannot compile here.
        """
        check_compiler(self.embedding.weight.device)  # Now, and not at the first step.
        if dtype is not None and self.embedding.weight.is_cuda:
            self.uses_flex = can_flex(self, dtype)
        for layer in self.layers:
            layer.forward = compiled(layer.forward)  # type: ignore[method-assign]

    @contextmanager
    def residual_hooks(self, hooks: dict[str, ResidualHook], first: bool = False) -> Iterator[None]:
        """Calls ``fn(residual [N, S, D_l])`` at each named place of every forward inside the context
        (in layers that `decode` does not skip).

        Names follow TransformerLens: ``blocks.{l}.hook_resid_pre`` is the residual stream entering
        layer l, ``blocks.{l}.hook_resid_post`` the one leaving it (for the last layer: before the
        final norm). A tensor returned by `fn` replaces the residual stream from there on. With
        `first`, hooks that are there already see what it returned.

        Raises:
            ValueError: a name is not of that form, or names a layer that the model does not have.
        """
        handles = []
        try:
            for name, fn in hooks.items():
                match = HOOK_NAME.fullmatch(name)
                if match is None or int(match[1]) >= len(self.layers):
                    raise ValueError(
                        f"Hook '{name}' does not fit {self.name}: allowed are "
                        f"blocks.0 ... blocks.{len(self.layers) - 1} with .hook_resid_pre or "
                        ".hook_resid_post."
                    )
                number = int(match[1])
                register = hook_pre if match[2] == "pre" else hook_post
                handles.append(register(self.layers[number], fn, first))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _text_model(whole: Any, text: Any) -> Any:
    """The language model of a multimodal one, in the architecture of `text`, whose weights are replaced."""
    if type(whole) is type(text):
        return whole
    setattr(text, text.base_model_prefix, whole.get_decoder())
    text.set_output_embeddings(whole.get_output_embeddings())
    text.generation_config = whole.generation_config
    return text.eval()
