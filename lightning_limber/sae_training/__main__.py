"""`python -m lightning_limber.sae_training train|evaluate|describe`: makes and checks an SAE suite."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

SAE_ID = "blocks.{layer}.hook_resid_post"


def evaluate(
    suite: str,
    text: str,
    bf16: bool = True,
    context_size: int = 128,
    max_tokens: int = 150_000,
    ce_tokens: int = 8192,
    saelens_tokens: int = 2048,
    write: bool = False,
) -> None:
    """Scores a suite on held-out text by our definitions and by SAELens' evals.

    Args:
        suite: `suite:NAME` for one that ships, or a folder.
        text: The corpus; its held-out documents are used.
        bf16: bf16 matrix products in the LLM.
        context_size: Longest context in tokens.
        max_tokens: Held-out tokens for explained variance, l0 and dead latents.
        ce_tokens: Tokens for loss recovered.
        saelens_tokens: Tokens for SAELens' evals; 0 leaves them out.
        write: Put the scores into the suite's card.
    """
    from lightning_limber.models import activations
    from lightning_limber.probe import sanity_check as gate
    from lightning_limber.sae_training import evaluate as ev

    folder, card, llm, saes, texts = _load(suite, text, bf16, max_tokens)
    pieces = list(activations.contexts(texts, llm.tokenizer, context_size))
    pieces = activations.first_tokens(pieces, max_tokens)
    print(f"{len(pieces):,} held-out contexts, {sum(map(len, pieces)):,} tokens")
    scores = ev.evaluate(llm, saes, card, pieces, ce_tokens, saelens_tokens)
    print(ev.table(scores))
    if write:
        bos = llm.tokenizer.bos_token_id
        text_stats = gate.measure(
            llm, saes, [] if bos is None else [bos], context=lambda: activations.autocast(llm)
        )
        ev.write_scores(folder, scores, text_stats)


def describe(
    suite: str,
    text: str,
    bf16: bool = True,
    context_size: int = 128,
    max_tokens: int = 150_000,
    write: bool = False,
    show: int = 20,
    seed: int = 0,
) -> None:
    """Describes every latent of a suite from held-out text, and prints some with their contexts.

    Args:
        suite: `suite:NAME` for one that ships, or a folder.
        text: The corpus; its held-out documents are used.
        bf16: bf16 matrix products in the LLM.
        context_size: Longest context in tokens.
        max_tokens: Held-out tokens to read.
        write: Put the descriptions beside the SAEs (`descriptions/`) and a summary into the card.
        show: How many latents to print, drawn at random.
        seed: Which ones.
    """
    from lightning_limber.probe.explanations import write_explanations
    from lightning_limber.sae_training import describe as de
    from lightning_limber.sae_training.train import CARD

    folder, card, llm, saes, texts = _load(suite, text, bf16, max_tokens)
    medians = {name: card["layers"][name]["median_norm"] for name in saes}
    firings = de.collect(llm, saes, medians, texts, context_size, max_tokens)
    rows = {
        name: list(de.describe(firings, name, sae, llm, card["model_id"])) for name, sae in saes.items()
    }
    for name, found in rows.items():
        scores = sorted(row.score for row in found if row.score is not None)
        summary = {
            "described": len(found),
            "scored": len(scores),
            "median_score": scores[len(scores) // 2] if scores else None,
            "score_0.8_or_more": sum(score >= 0.8 for score in scores),
        }
        print(name, summary)
        if write:
            write_explanations(found, folder / "descriptions" / name / "batch-0.jsonl.gz")
            card["layers"][name]["descriptions"] = summary
    if write:
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
    every = [(name, row) for name, found in rows.items() for row in found]
    for name, row in random.Random(seed).sample(every, min(show, len(every))):
        print(f"\n{name} latent {row.index}, density {row.density}, score {row.score}\n  {row.description}")
        for context in de.top_contexts(firings, name, row.index):
            print(f"    {context}")


def _load(suite: str, text: str, bf16: bool, max_tokens: int):
    import torch

    from lightning_limber.models.llm import LLM
    from lightning_limber.probe.saes import load_saes, suite_folder
    from lightning_limber.sae_training.corpus import read_texts
    from lightning_limber.sae_training.train import CARD

    folder = suite_folder(suite)
    if folder is None or not (folder / CARD).exists():
        raise FileNotFoundError(f"{suite} is no folder with a suite in it ({CARD})")
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


def main(args: list[str] | None = None) -> None:
    """Entry point: one sub-command a step."""
    from lightning_limber.sae_training.train import TrainConfig, train

    parser = ArgumentParser(prog="python -m lightning_limber.sae_training", description=__doc__)
    commands = parser.add_subcommands()
    steps: dict[str, Callable[..., Any]] = {
        "train": lambda **options: print(train(TrainConfig(**options))),
        "evaluate": evaluate,
        "describe": describe,
    }
    for name, step in steps.items():
        command = ArgumentParser()
        if name == "train":
            command.add_argument("--config", action="config")
            command.add_class_arguments(TrainConfig)
        else:
            command.add_function_arguments(step)
        commands.add_subcommand(name, command)
    chosen = parser.parse_args(args)
    options = chosen[chosen.subcommand].as_dict()
    options.pop("config", None)
    steps[chosen.subcommand](**options)


if __name__ == "__main__":
    main()
