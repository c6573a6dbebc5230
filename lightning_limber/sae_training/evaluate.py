"""Scores SAEs on held-out text, by our definitions and by SAELens' own evals side by side.

Ours, over the tokens that count (text, not position 0, not an attention sink):

    explained_variance   1 - fvu, the probe's own metric (`lightning_limber.probe.metrics.geometry`)
    l0                   mean number of latents that fire on a token
    dead                 share of latents that never fire on the held-out text
    ce_recovered         (CE_ablated - CE_spliced) / (CE_ablated - CE_clean): the residual stream of
                         the tokens that count replaced by its reconstruction (spliced) or by its mean
                         over them (ablated); cross-entropy of the next token

SAELens' evals differ by design, and their numbers with them: they count attention sinks, which add to
variance and error; they ablate to zero at every position, BOS too, so the same splice recovers more; they
take contexts of one length; and over their few batches more latents look dead.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_limber.models import activations
from lightning_limber.models.llm import LLM
from lightning_limber.models.saes import load_saes, release_folder
from lightning_limber.probe import sanity_check
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.token_stats import TokenStats
from lightning_limber.sae_training.corpus import read_texts
from lightning_limber.sae_training.train import CARD
from lightning_limber.utils.files import write_text

SAE_ID = "blocks.{layer}.hook_resid_post"
SCORES = ("explained_variance", "l0", "ce_recovered", "dead")


def evaluate_release(
    release: str,
    text: str,
    bf16: bool = True,
    context_size: int = 128,
    max_tokens: int = 150_000,
    ce_tokens: int = 8192,
    saelens_tokens: int = 2048,
    write: bool = False,
) -> None:
    """Scores a release on held-out text by our definitions and by SAELens' evals.

    Args:
        release: Folder of a release, or the name of one that ships (`shipped:NAME`).
        text: The corpus; its held-out documents are used.
        bf16: bf16 matrix products in the LLM.
        context_size: Longest context in tokens.
        max_tokens: Held-out tokens for explained variance, l0 and dead latents.
        ce_tokens: Tokens for loss recovered.
        saelens_tokens: Tokens for SAELens' evals; 0 leaves them out.
        write: Put the scores into the release's card.
    """
    folder, card, llm, saes, texts = load_release(release, text, bf16, max_tokens)
    pieces = list(activations.contexts(texts, llm.tokenizer, context_size))
    pieces = activations.first_tokens(pieces, max_tokens)
    print(f"{len(pieces):,} held-out contexts, {sum(map(len, pieces)):,} tokens")
    scores = evaluate(llm, saes, card, pieces, ce_tokens, saelens_tokens)
    print(table(scores))
    if write:
        bos = llm.tokenizer.bos_token_id
        prefix = [] if bos is None else [bos]
        stats = sanity_check.measure(llm, saes, prefix, context=lambda: activations.autocast(llm))
        for name, score in scores.items():
            # What the sanity check is to find again.
            card["layers"][name] |= {"scores": _rounded(score), "gate": _rounded(stats[name].for_card())}
        write_text(folder / CARD, json.dumps(card, indent=1) + "\n")


def load_release(release: str, text: str, bf16: bool, max_tokens: int) -> tuple[Path, Any, LLM, Any, list]:
    """Folder, card, LLM and SAEs by hook name of a release, and enough held-out documents of a corpus."""
    folder = release_folder(release)
    if folder is None or not (folder / CARD).exists():
        raise FileNotFoundError(f"{release} is no folder with a release of SAEs in it ({CARD})")
    card = json.loads((folder / CARD).read_text())
    llm = LLM(card["llm"]).load()
    if bf16:
        llm.prepare_autocast(torch.bfloat16)
    saes = load_saes(str(folder), SAE_ID, None, llm)
    texts, n_chars = [], 0
    for document in read_texts(text, "heldout"):
        texts.append(document)
        n_chars += len(document)
        if n_chars > 8 * max_tokens:  # English has four or five characters a token
            break
    return folder, card, llm, saes, texts


def evaluate(
    llm: LLM,
    saes: dict[str, Any],
    card: dict[str, Any],
    contexts: list[activations.Context],
    ce_tokens: int = 8192,
    saelens_tokens: int = 2048,
) -> dict[str, dict[str, Any]]:
    """All scores of a release, by hook name; `saelens` holds SAELens', `same_text` ours on their text.

    Args:
        llm: The loaded model.
        saes: SAEs by hook name.
        card: The release's card, for the median norms.
        contexts: Held-out contexts.
        ce_tokens: Tokens for our loss recovered: two forwards a layer.
        saelens_tokens: Tokens for SAELens' evals: four forwards a layer, with all logits; 0 leaves
            them out.
    """
    medians = {name: card["layers"][name]["median_norm"] for name in saes}

    def ours(contexts: list[activations.Context], ce_contexts: list[activations.Context]) -> dict:
        scores = reconstruction(llm, saes, medians, contexts)
        means = {name: score.pop("mean") for name, score in scores.items()}
        for name, score in ce_recovered(llm, saes, medians, means, ce_contexts).items():
            scores[name] |= score
        return scores

    sample = activations.first_tokens(contexts, ce_tokens)
    scores = ours(contexts, sample)
    for score in scores.values():
        score["ce_tokens"] = sum(map(len, sample))
    if saelens_tokens:
        longest = max(map(len, contexts))
        same = activations.first_tokens([c for c in contexts if len(c) == longest], saelens_tokens)
        same = same[: max(8, len(same) // 8 * 8)]
        again, tokens = ours(same, same), sum(map(len, same))
        for name, sae in tqdm(saes.items(), desc="SAELens' evals", unit=" layers"):
            scores[name]["same_text"] = {key: again[name][key] for key in SCORES} | {"tokens": tokens}
            scores[name]["saelens"] = saelens_evals(llm, sae, name, same)
    return scores


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
    totals = {name: dict.fromkeys(("ce_clean", "ce_spliced", "ce_ablated"), 0.0) for name in saes}
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
    scores = {name: {key: v / n_targets for key, v in total.items()} for name, total in totals.items()}
    for score in scores.values():
        clean, spliced, ablated = score.values()
        score["ce_recovered"] = (ablated - spliced) / (ablated - clean)
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
    losses, _ = llm.token_losses(hidden[:, :-1][target], ids[:, 1:][target])
    return losses.double().sum().item(), int(target.sum())


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
    batches = torch.tensor([context.tolist() for context in contexts]).split(batch_size)
    # What `run_evals` asks of an activation store: the same batches of tokens, from the start.
    store: Any = SimpleNamespace(context_size=batches[0].shape[1], store_batch_size_prompts=batch_size)

    def reset() -> None:
        left = iter(batches)
        store.get_batch_tokens = lambda _size: next(left)

    store.reset_input_dataset = reset
    reset()
    config = EvalConfig(
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=len(contexts) // batch_size,
        n_eval_sparsity_variance_batches=len(contexts) // batch_size,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    sae.cfg.metadata.hook_name = module
    try:
        with activations.autocast(llm):
            scores, latents = run_evals(sae, store, model, ActivationScaler(), config)
    finally:
        sae.cfg.metadata.hook_name = hook_name
        for key in set(layer._forward_hooks) - before:  # SAELens leaves its hook on the layer
            del layer._forward_hooks[key]
    density = latents["feature_density"]
    return {
        "explained_variance": scores["reconstruction_quality"]["explained_variance"],
        "l0": scores["sparsity"]["l0"],
        "ce_recovered": scores["model_performance_preservation"]["ce_loss_score"],
        "dead": sum(d == 0 for d in density) / len(density),
    }


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Markdown table, a row a layer; in brackets ours on SAELens' contexts, then SAELens'."""
    lines = ["| layer | " + " | ".join(SCORES) + " |", "|---" * 5 + "|"]
    for name, score in scores.items():
        cells = [name]
        for key in SCORES:
            kinds = [score, *(score[kind] for kind in ("same_text", "saelens") if kind in score)]
            own, *others = [f"{of[key]:.{1 if key == 'l0' else 3}f}" for of in kinds]
            cells.append(f"{own} ({', '.join(others)})" if others else own)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rounded(scores: dict[str, Any]) -> dict[str, Any]:
    """Numbers to 5 significant digits, for the card."""
    return json.loads(json.dumps(scores), parse_float=lambda number: float(f"{float(number):.5g}"))
