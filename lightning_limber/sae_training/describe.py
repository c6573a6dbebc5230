"""Describes what each latent of a release fires on, in words, and scores every description.

No language model writes here: a description is counted from held-out text and checked on other
held-out text. For each latent, four kinds of evidence compete:

    on      the token's word, or its form (below)       "on: red, crimson, scarlet"
    after   the word before it                          "after: of, in"
    before  the word that the next token belongs to     "before: left, right"
    near    any of the eight words up to it             "near: ship, captain, crew"

What is described is clear firing: an activation of at least a third of the latent's strongest on the
describing half. Weak firing is often about something else, and counts as not firing here.

Each kind lists the words that make it likelier, and predicts p(fire | word) for a new token; the kind
with the best average precision on the describing half is kept. The `score` is its AUROC on the other
half of the documents, which took no part in any choice: 0.5 is chance. The words that the decoder's
direction promotes (logit lens) follow after "promotes:", as a reader's second clue; no score rests on
them.

Shapes: n tokens that count, W words, K latents, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from lightning_limber.models import activations
from lightning_limber.models.llm import LLM
from lightning_limber.probe.explanations import Explanation, write_explanations
from lightning_limber.sae_training.evaluate import load_release
from lightning_limber.sae_training.train import CARD
from lightning_limber.utils.files import write_text

EXPLAINER = "lightning_limber-token-statistics-2"
KINDS = ("on", "after", "before", "near")
WINDOW = 8
N_WORDS = 6
ENDINGS = ("ing", "ed", "ly", "tion", "s")
PRIOR = 4.0
"""Tokens of prior belief that a word changes nothing: keeps words seen once or twice out."""
CLEAR = 1 / 3
"""Clear firing is from this share of the latent's strongest activation on."""


@dataclass
class Firings:
    """Held-out tokens that count, their words, and what fires on them at one or more layers.

    Attributes:
        words: Distinct words, lower case; W of them.
        of_kind: For each kind, bool [n, W] sparse: the words that are evidence for a token.
        tokens: Text of every token, position by position, contexts one after the other.
        spans: int [n, 3]: index of a token in `tokens`, and start and end of its context there.
        half: bool [n]: True for the describing half.
        fires: For each hook, float16 activations [n, K], sparse.
    """

    words: list[str]
    of_kind: dict[str, sparse.csr_matrix]
    tokens: list[str]
    spans: np.ndarray
    half: np.ndarray
    fires: dict[str, sparse.csr_matrix]

    def context(self, token: int, width: int = 10) -> str:
        """The text around a token, which is marked, for a reader."""
        at, start, end = self.spans[token].tolist()
        before, after = self.tokens[max(start, at - width) : at], self.tokens[at + 1 : min(end, at + width)]
        return "".join([*before, f"[[{self.tokens[at]}]]", *after]).replace("\n", " / ").strip()


def describe_release(
    release: str,
    text: str,
    bf16: bool = True,
    context_size: int = 128,
    max_tokens: int = 150_000,
    write: bool = False,
    show: int = 20,
    seed: int = 0,
) -> None:
    """Describes every latent of a release from held-out text, and prints some with their contexts.

    Args:
        release: Folder of a release, or the name of one that ships (`shipped:NAME`).
        text: The corpus; its held-out documents are used.
        bf16: bf16 matrix products in the LLM.
        context_size: Longest context in tokens.
        max_tokens: Held-out tokens to read.
        write: Put the descriptions beside the SAEs (`descriptions/`) and a summary into the card.
        show: How many latents to print, drawn at random.
        seed: Random seed of that draw.
    """
    folder, card, llm, saes, texts = load_release(release, text, bf16, max_tokens)
    medians = {name: card["layers"][name]["median_norm"] for name in saes}
    firings = collect(llm, saes, medians, texts, context_size, max_tokens)
    every: list[tuple[str, Explanation]] = []
    for name, sae in saes.items():
        found = list(describe(firings, name, sae, llm, card["model_id"]))
        every += [(name, row) for row in found]
        scores = sorted(row.score for row in found if row.score is not None)
        card["layers"][name]["descriptions"] = summary = {
            "described": len(found),
            "scored": len(scores),
            "median_score": scores[len(scores) // 2] if scores else None,
            "score_0.8_or_more": sum(score >= 0.8 for score in scores),
        }
        print(name, summary)
        if write:
            write_explanations(found, folder / "descriptions" / name / "batch-0.jsonl.gz")
    if write:
        write_text(folder / CARD, json.dumps(card, indent=1) + "\n")
    for name, row in random.Random(seed).sample(every, min(show, len(every))):
        print(f"\n{name} latent {row.index}, density {row.density}, score {row.score}\n  {row.description}")
        for context in top_contexts(firings, name, row.index):
            print(f"    {context}")


@torch.no_grad()
def collect(
    llm: LLM,
    saes: dict[str, Any],
    median_norm: dict[str, float],
    texts: list[str],
    context_size: int = 128,
    max_tokens: int = 150_000,
    batch_tokens: int = 4096,
) -> Firings:
    """Runs held-out text through the LLM once and keeps what fires, sparsely.

    Args:
        llm: The loaded model.
        saes: SAEs by hook name.
        median_norm: The card's, by hook name: sets the bar for attention sinks.
        texts: Documents; a hash of each decides its half.
        context_size: Longest context in tokens.
        max_tokens: Tokens to read at most.
        batch_tokens: Tokens of a forward.
    """
    contexts: list[activations.Context] = []
    half_of: list[bool] = []
    for text in texts:
        contexts += activations.contexts([text], llm.tokenizer, context_size)
        first_half = hashlib.sha256(b"half" + text.encode()).digest()[0] < 128
        half_of += [first_half] * (len(contexts) - len(half_of))
    contexts = activations.first_tokens(contexts, max_tokens)
    pieces = llm.tokenizer.convert_ids_to_tokens(range(len(llm.tokenizer)))
    token_text = [llm.tokenizer.convert_tokens_to_string([piece]) for piece in pieces]

    tokens: list[str] = []
    spans: list[tuple[int, int, int]] = []
    half: list[bool] = []
    seen: list[dict[str, list[str]]] = []
    rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    batches = list(activations.batches(contexts, batch_tokens))
    for ids, mask, chosen in tqdm(batches, desc="Reading held-out text", unit=" batches"):
        hidden = activations.residuals(llm, ids, list(saes))
        # One set of tokens for all layers: the statistics of the words are then counted once.
        keep = activations.counted_at_all(hidden, mask, median_norm)
        for name, sae in saes.items():
            latents = sae.encode(hidden[name][keep].float())
            token, latent = latents.nonzero(as_tuple=True)
            rows[name].append((token + len(seen), latent, latents[token, latent].half()))
        for row, context in enumerate(chosen):
            texts_here = [token_text[i] for i in contexts[context]]
            words_here = _words(texts_here)
            for position in keep[row].nonzero()[:, 0].tolist():
                # BOS is not shown.
                spans.append((len(tokens) + position, len(tokens) + 1, len(tokens) + len(texts_here)))
                half.append(half_of[context])
                seen.append(_evidence(texts_here, words_here, position))
            tokens += texts_here
    words, of_kind = _matrices(seen)
    fires = {}
    for name, sae in saes.items():
        token, latent, value = (torch.cat(part).numpy() for part in zip(*rows[name], strict=True))
        values = value.astype(np.float32)
        fires[name] = sparse.csr_matrix((values, (token, latent)), shape=(len(seen), sae.cfg.d_sae))
    return Firings(words, of_kind, tokens, np.array(spans), np.array(half), fires)


def describe(firings: Firings, hook: str, sae: Any, llm: LLM, model_id: str) -> Iterator[Explanation]:
    """One row for every latent that fires at all, in the latents' order.

    A latent that fires only on the scoring half is described by what it promotes alone.
    """
    fires, half = firings.fires[hook], firings.half
    density = np.asarray((fires > 0).mean(0))[0]
    active = _clear(fires, half)
    learn, test = active[half].tocsc(), active[~half].tocsc()
    seen = {kind: matrix[half].tocsc() for kind, matrix in firings.of_kind.items()}
    unseen = {kind: matrix[~half].tocsc() for kind, matrix in firings.of_kind.items()}
    chosen = {kind: _choose(active[half], matrix) for kind, matrix in seen.items()}
    promoted = _promoted(sae, llm, set(firings.words))
    for latent in np.flatnonzero(density).tolist():
        learned, tested = _column(learn, latent), _column(test, latent)
        precision = {kind: _predicts(seen[kind], *chosen[kind][latent], learned)[1] for kind in KINDS}
        best = max(KINDS, key=precision.__getitem__)
        words, weight = chosen[best][latent]
        auroc, _ = _predicts(unseen[best], words, weight, tested)
        named = ", ".join(firings.words[word] for word in words) or "no word in particular"
        yield Explanation(
            model_id=model_id,
            layer=f"{hook.split('.')[1]}-res-limber",
            index=latent,
            description=f"{best}: {named} | promotes: {', '.join(promoted[latent]) or '-'}",
            explainer=EXPLAINER,
            density=float(f"{density[latent]:.3g}"),
            score=round(auroc, 3) if len(tested) >= 5 else None,
        )


def top_contexts(firings: Firings, hook: str, latent: int, count: int = 5) -> list[str]:
    """The contexts in which a latent fires most, strongest first, each from another place."""
    column = firings.fires[hook][:, latent].tocoo()
    order = column.row[np.argsort(-column.data, kind="stable")]
    found: dict[str, None] = {}
    for token in order:
        found[firings.context(int(token))] = None
        if len(found) == count:
            break
    return list(found)


# --- words ------------------------------------------------------------------------------------


def _words(tokens: list[str]) -> list[tuple[int, str]]:
    """For each token, its word's number in the context and the word itself, lower case.

    A word is a run of tokens of letters or digits; a space or any other mark ends it, and a mark is a
    word of its own.
    """
    starts = [
        not (b[:1].isalnum() and a[-1:].isalnum()) for a, b in zip(["", *tokens], tokens, strict=False)
    ]
    numbers = np.cumsum(starts).tolist()
    words: dict[int, str] = defaultdict(str)
    for number, token in zip(numbers, tokens, strict=True):
        words[number] += token
    return [(number, words[number].strip().lower() or "⏎") for number in numbers]


def _evidence(tokens: list[str], words: list[tuple[int, str]], position: int) -> dict[str, list[str]]:
    """What a reader sees at one position of a context, a list of words a kind; forms are in brackets."""
    number, word = words[position]
    past = [w for _, w in dict.fromkeys(words[max(1, position - 3 * WINDOW) : position + 1])]
    token = tokens[position].strip()
    forms = ["(number)"] if token.isdigit() else []
    forms += ["(capital letter)"] if token[:1].isupper() else []
    forms += ["(inside a word)"] if words[position - 1][0] == number else []
    forms += [f"(-{e})" for e in ENDINGS if len(word) > len(e) + 2 and word.endswith(e)]
    return {
        "on": [word, *forms],
        "after": past[-2:-1],
        "before": [w for _, w in words[position + 1 :][:1]],
        "near": sorted(set(past[-WINDOW:])),
    }


def _matrices(seen: list[dict[str, list[str]]]) -> tuple[list[str], dict[str, sparse.csr_matrix]]:
    """Evidence of n tokens -> the W distinct words and, a kind each, bool [n, W]."""
    cells = [
        (kind, token, word)
        for token, evidence in enumerate(seen)
        for kind, found in evidence.items()
        for word in found
    ]
    table = pd.DataFrame(cells, columns=["kind", "token", "word"])
    table["column"], words = pd.factorize(table["word"])
    of_kind = {}
    for kind in KINDS:
        part = table[table["kind"] == kind]
        values = np.ones(len(part), np.float32)
        cells_of_kind = values, (part["token"], part["column"])
        of_kind[kind] = sparse.csr_matrix(cells_of_kind, shape=(len(seen), len(words)))
    return list(words), of_kind


def _choose(active: sparse.csr_matrix, seen: sparse.csc_matrix) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each latent the words that best announce it, and p(fire | word) of each.

    A word's worth is the firings it accounts for beyond the latent's base rate, in nats:
    count x log(p(fire | word) / p(fire)). Words that announce it once only, or do not double its
    rate, or are worth less than a twentieth of the best, are left out.

    Args:
        active: bool [n, K].
        seen: bool [n, W].
    """
    n_tokens = active.shape[0]
    n_word = np.asarray(seen.sum(0))[0]  # [W]
    base = np.asarray(active.sum(0))[0] / n_tokens  # [K]
    together = (seen.T @ active).tocsc()  # [W, K] tokens with the word on which the latent fires
    chosen = []
    for latent in range(active.shape[1]):
        start, end = together.indptr[latent], together.indptr[latent + 1]
        words, count = together.indices[start:end], together.data[start:end]
        rate = (count + PRIOR * base[latent]) / (n_word[words] + PRIOR)
        worth = count * np.log(rate / base[latent])
        top = np.argsort(-worth, kind="stable")[:N_WORDS]
        clear = (count[top] > 1) & (rate[top] >= 2 * base[latent])
        top = top[clear & (worth[top] >= worth[top[:1]].sum() / 20)]
        chosen.append((words[top], rate[top]))
    return chosen


def _clear(fires: sparse.csr_matrix, half: np.ndarray) -> sparse.csr_matrix:
    """Bool [n, K]: where activations reach `CLEAR` of the latent's strongest one on `half`."""
    strongest = fires[half].max(0).toarray()[0]
    clear = fires.copy()
    clear.data = (fires.data >= CLEAR * strongest[fires.indices]).astype(np.float32)
    clear.data[strongest[fires.indices] == 0] = 0
    clear.eliminate_zeros()
    return clear


def _column(matrix: sparse.csc_matrix, column: int) -> np.ndarray:
    return matrix.indices[matrix.indptr[column] : matrix.indptr[column + 1]]


def _predicts(
    seen: sparse.csc_matrix, words: np.ndarray, weight: np.ndarray, fired: np.ndarray
) -> tuple[float, float]:
    """How well `max weight of the words seen` predicts firing: AUROC and average precision.

    Args:
        seen: bool [n, W].
        words: The description's words.
        weight: p(fire | word) of each.
        fired: Tokens on which the latent fires.

    Returns:
        AUROC, where ties count half, and average precision over the levels of the prediction;
        0.5 and 0 where the latent fires on no token or on all.
    """
    n_tokens = seen.shape[0]
    if len(fired) in (0, n_tokens):
        return 0.5, 0.0
    rank = np.zeros(n_tokens, np.int64)
    for level, i in enumerate(np.argsort(weight, kind="stable"), start=1):
        rank[_column(seen, words[i])] = level  # the strongest word is written last, and stays
    positive = np.bincount(rank[fired], minlength=len(words) + 1)
    negative = np.bincount(rank, minlength=len(words) + 1) - positive
    below = np.concatenate([[0], np.cumsum(negative)[:-1]])
    auroc = (positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum())
    hits, alarms = np.cumsum(positive[::-1]), np.cumsum(negative[::-1])
    precision = hits / np.maximum(hits + alarms, 1)
    return float(auroc), float((positive[::-1] * precision).sum() / positive.sum())


@torch.no_grad()
def _promoted(sae: Any, llm: LLM, known: set[str], count: int = 3) -> list[list[str]]:
    """Per latent the words that its decoder direction points to most (logit lens).

    The direction goes through the final norm's gain to the output matrix. What all latents, or all
    tokens, have in common is taken off, and tokens are compared by cosine: else rare tokens, whose
    vectors are long, would answer for everything.

    Args:
        sae: The SAE.
        llm: Its model.
        known: Words to choose among, lower case: tokens that begin other words say little.
        count: Words a latent.
    """
    norm = [m for name, m in llm.model.base_model.named_children() if "norm" in name or name == "ln_f"]
    direction = sae.W_dec.float() - sae.W_dec.float().mean(0)
    if norm:
        direction = direction * norm[-1].weight
    texts = [llm.tokenizer.decode([i]) for i in range(len(llm.tokenizer))]
    ids = [i for i, t in enumerate(texts) if t[:1] == " " and len(t) > 3 and t[1:].isalpha()]
    ids = [i for i in ids if texts[i][1:].lower() in known]
    if not ids:
        return [[] for _ in direction]
    head = llm.model.get_output_embeddings().weight.float()
    head = torch.nn.functional.normalize(head[ids] - head.mean(0), dim=-1)
    promoted = []
    for places in (direction @ head.T).topk(min(2 * count, len(ids))).indices.tolist():
        words = dict.fromkeys(texts[ids[place]][1:].lower() for place in places)
        promoted.append(list(words)[:count])
    return promoted
