"""Scores a suite on held-out text, by our definitions and by SAELens' own evals side by side.

Ours, over the tokens that count (text, not position 0, not an attention sink):

    explained_variance   1 - fvu, the probe's own metric (`lightning_limber.probe.metrics.geometry`)
    l0                   mean number of latents that fire on a token
    dead                 share of latents that never fire on the held-out text
    ce_recovered         (CE_ablated - CE_spliced) / (CE_ablated - CE_clean): the residual stream of
                         the tokens that count replaced by its reconstruction (spliced) or by its mean
                         over them (ablated); cross-entropy of the next token

SAELens' evals differ by design, and their numbers with them:

    * they leave out special tokens (BOS) and nothing else: an attention sink in the middle of a text
      adds its norm to their variance, and its reconstruction error;
    * they ablate to zero, at every position, BOS too: a heavier blow than the mean, so a larger
      denominator and a higher score for the same splice;
    * they take contexts of one length, so here only those of full length;
    * they run over a few batches, in which rare latents do not come up: "dead" by them is an upper
      bound that falls with the number of tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_limber.models import activations
from lightning_limber.models.llm import LLM
from lightning_limber.probe import sanity_check as gate
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.token_stats import TokenStats
from lightning_limber.sae_training.train import CARD


@torch.no_grad()
def reconstruction(
    llm: LLM,
    saes: dict[str, Any],
    median_norm: dict[str, float],
    contexts: list[activations.Context],
    batch_tokens: int = 4096,
) -> dict[str, dict[str, Any]]:
    """Explained variance, l0, dead and the rest of the probe's metrics, by hook name.

    Besides the metrics: `variance`, the mean of |x - mean|^2 of text at that layer, raw scale, which
    is the yardstick of `fvu_text`; and `mean`, the mean vector [D], for ablation.
    """
    metrics = {name: TokenStats() for name in saes}
    for ids, mask, _ in tqdm(
        list(activations.batches(contexts, batch_tokens)), desc="Reconstruction", unit=" batches"
    ):
        inner = mask.bool()
        inner[:, 0] = False
        for name, hidden in activations.residuals(llm, ids, list(saes)).items():
            keep = activations.counted(hidden, mask, median_norm[name])[inner]
            x = hidden[inner].float()
            latents = saes[name].encode(x)
            row = torch.zeros(len(x), dtype=torch.long)  # All text is one "image".
            metrics[name].update(x, saes[name].decode(latents), latents, row, [0], keep)
    scores = {}
    for name, metric in metrics.items():
        stats = metric.compute()
        found = reconstruction_metrics(stats)
        score = {key: float(value[0]) for key, value in found.items() if key != "fvu_text"}
        scores[name] = {
            "explained_variance": 1 - score["fvu"],
            "dead": 1 - score.pop("alive"),
            **score,
            "mean": (stats.total.sum(0) / score["tokens"]).float(),
        }
    return scores


@torch.no_grad()
def ce_recovered(
    llm: LLM,
    saes: dict[str, Any],
    median_norm: dict[str, float],
    means: dict[str, Tensor],
    contexts: list[activations.Context],
    batch_tokens: int = 2048,
) -> dict[str, dict[str, float]]:
    """Cross-entropy in nats with the residual stream clean, spliced and ablated, by hook name."""
    totals = {name: {"ce_clean": 0.0, "ce_spliced": 0.0, "ce_ablated": 0.0} for name in saes}
    n_targets = 0
    for ids, mask, _ in tqdm(
        list(activations.batches(contexts, batch_tokens)), desc="Loss recovered", unit=" batches"
    ):
        clean, n = _cross_entropy(llm, ids, mask)
        n_targets += n
        for name, sae in saes.items():

            def replaced(by, name: str = name, ids: Tensor = ids, mask: Tensor = mask) -> float:
                def hook(hidden: Tensor) -> Tensor:
                    keep = activations.counted(hidden, mask, median_norm[name])[..., None]
                    return torch.where(keep, by(hidden.float()).to(hidden), hidden)

                return _cross_entropy(llm, ids, mask, {name: hook})[0]

            totals[name]["ce_clean"] += clean
            totals[name]["ce_spliced"] += replaced(lambda x, sae=sae: sae.decode(sae.encode(x)))
            totals[name]["ce_ablated"] += replaced(lambda x, mean=means[name]: mean.expand_as(x))
    scores = {}
    for name, total in totals.items():
        clean, spliced, ablated = (v / n_targets for v in total.values())
        scores[name] = {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_ablated": ablated,
            "ce_recovered": (ablated - spliced) / (ablated - clean),
        }
    return scores


def _cross_entropy(
    llm: LLM, ids: Tensor, mask: Tensor, hooks: dict[str, Any] | None = None
) -> tuple[float, int]:
    """Summed next-token cross-entropy and its number of targets.

    What follows BOS is not a target, as in SAELens' evals: nothing could predict it.
    """
    with activations.autocast(llm), llm.residual_hooks(hooks or {}):
        hidden = llm.decode(llm.embed(ids))
    target = mask[:, 1:].bool()
    target[:, 0] = False
    total = 0.0
    # A slice at a time: logits are S x V floats.
    for states, wanted in zip(
        hidden[:, :-1][target].split(512), ids[:, 1:][target].split(512), strict=True
    ):
        with activations.autocast(llm):
            logits = llm.logits(states)
        total += torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum").item()
    return total, int(target.sum())


def saelens_evals(
    llm: LLM, sae: Any, hook_name: str, contexts: list[activations.Context], batch_size: int = 8
) -> dict[str, float]:
    """SAELens' own `run_evals` for one SAE, through SAELens' own hooks on the same weights.

    Args:
        llm: The loaded model.
        sae: The SAE.
        hook_name: Its hook, `blocks.{l}.hook_resid_post`.
        contexts: Contexts of one length.
        batch_size: Contexts in a batch.

    Returns:
        explained_variance, l0, ce_recovered (their ce_loss_score) and dead (share of latents that
        are silent on these contexts).
    """
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler

    layer = llm.layers[int(hook_name.split(".")[1])]
    module = next(name for name, found in llm.model.named_modules() if found is layer)
    before = set(layer._forward_hooks)
    model = HookedProxyLM(llm.model, llm.tokenizer, hook_names=[module])
    n_batches = len(contexts) // batch_size
    metadata = sae.cfg.metadata
    ours, metadata.hook_name = metadata.hook_name, module
    try:
        with activations.autocast(llm):
            scores, latents = run_evals(
                sae,
                _Store(contexts, batch_size),  # type: ignore[arg-type]
                model,
                ActivationScaler(),
                EvalConfig(
                    batch_size_prompts=batch_size,
                    n_eval_reconstruction_batches=n_batches,
                    n_eval_sparsity_variance_batches=n_batches,
                    compute_ce_loss=True,
                    compute_sparsity_metrics=True,
                    compute_variance_metrics=True,
                    compute_featurewise_density_statistics=True,
                ),
            )
    finally:
        metadata.hook_name = ours
        for key in set(layer._forward_hooks) - before:  # SAELens leaves its hook on the layer
            del layer._forward_hooks[key]
    density = latents["feature_density"]
    return {
        "explained_variance": scores["reconstruction_quality"]["explained_variance"],
        "l0": scores["sparsity"]["l0"],
        "ce_recovered": scores["model_performance_preservation"]["ce_loss_score"],
        "dead": sum(d == 0 for d in density) / len(density),
    }


class _Store:
    """What `run_evals` asks of an activation store: the same batches of tokens, over and over."""

    def __init__(self, contexts: list[activations.Context], batch_size: int) -> None:
        self.tokens = torch.tensor([context.tolist() for context in contexts])
        self.context_size = self.tokens.shape[1]
        self.store_batch_size_prompts = batch_size
        self.at = 0

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        batch = self.tokens[self.at : self.at + batch_size]
        self.at += batch_size
        return batch

    def reset_input_dataset(self) -> None:
        self.at = 0


def evaluate(
    llm: LLM,
    saes: dict[str, Any],
    card: dict[str, Any],
    contexts: list[activations.Context],
    ce_tokens: int = 8192,
    saelens_tokens: int = 2048,
) -> dict[str, dict[str, Any]]:
    """All scores of a suite, by hook name; `saelens` holds SAELens', `same_text` ours on their text.

    Args:
        llm: The loaded model.
        saes: SAEs by hook name.
        card: The suite's card, for the median norms.
        contexts: Held-out contexts.
        ce_tokens: Tokens for our loss recovered: two forwards a layer.
        saelens_tokens: Tokens for SAELens' evals: four forwards a layer, with all logits; 0 leaves
            them out.
    """
    medians = {name: card["layers"][name]["median_norm"] for name in saes}
    scores = reconstruction(llm, saes, medians, contexts)
    means = {name: score.pop("mean") for name, score in scores.items()}
    sample = activations.first_tokens(contexts, ce_tokens)
    for name, score in ce_recovered(llm, saes, medians, means, sample).items():
        scores[name] |= {**score, "ce_tokens": sum(map(len, sample))}
    if saelens_tokens:
        longest = max(map(len, contexts))
        same = activations.first_tokens([c for c in contexts if len(c) == longest], saelens_tokens)
        same = same[: max(8, len(same) // 8 * 8)]
        again = reconstruction(llm, saes, medians, same)
        recovered = ce_recovered(llm, saes, medians, {name: again[name]["mean"] for name in saes}, same)
        for name, sae in tqdm(saes.items(), desc="SAELens' evals", unit=" layers"):
            keys = ("explained_variance", "l0", "dead")
            scores[name]["same_text"] = {
                **{key: again[name][key] for key in keys},
                "ce_recovered": recovered[name]["ce_recovered"],
                "tokens": sum(map(len, same)),
            }
            scores[name]["saelens"] = saelens_evals(llm, sae, name, same)
    return scores


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Markdown table, a row a layer; in brackets ours on SAELens' contexts, then SAELens'."""
    keys = ("explained_variance", "l0", "ce_recovered", "dead")
    lines = ["| layer | " + " | ".join(keys) + " |", "|---" * 5 + "|"]
    for name, score in scores.items():
        cells = []
        for key in keys:
            digits = 1 if key == "l0" else 3
            cell = f"{score[key]:.{digits}f}"
            if "saelens" in score:
                cell += f" ({score['same_text'][key]:.{digits}f}, {score['saelens'][key]:.{digits}f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounded(scores: dict[str, Any]) -> dict[str, Any]:
    """Numbers to 5 significant digits, for the card."""
    return {
        key: rounded(value)
        if isinstance(value, dict)
        else float(f"{value:.5g}")
        if isinstance(value, float) and math.isfinite(value)
        else value
        for key, value in scores.items()
    }


def write_scores(folder: Path, scores: dict[str, dict[str, Any]], text: dict[str, gate.TextStats]) -> None:
    """Puts the scores of each layer, and what the text gate is to find again, into the suite's card."""
    path = folder / CARD
    card = json.loads(path.read_text())
    for name, score in scores.items():
        card["layers"][name]["scores"] = rounded(score)
        card["layers"][name]["gate"] = rounded(asdict(text[name]))
    path.write_text(json.dumps(card, indent=1) + "\n")
