"""How well written captions agree with people's: CIDEr-D, BLEU-4, ROUGE-L and, with a CLIP, CLIPScore.

As the COCO evaluation code defines them (Chen et al., arXiv 1504.00325; pycocoevalcap), without its Java:

    cider_d         10 x the mean over references and n = 1..4 of the cosine of the n-grams' tf-idf vectors,
                    clipped, with a penalty on the length (Vedantam et al., arXiv 1411.5726)    0..10
    bleu_4          geometric mean of the clipped n-gram precisions of the whole set, n = 1..4, times the
                    brevity penalty (Papineni et al., ACL 2002); the nearest reference length    0..1
    rouge_l         F measure of the longest common subsequence, recall weighing 1.2^2 times as much as
                    precision, each the best over the references (Lin, 2004)                     0..1
    clip_score      2.5 x max(cos(image, caption), 0) (Hessel et al., arXiv 2104.08718)          0..2.5
    ref_clip_score  harmonic mean of clip_score and max(cos(caption, nearest reference), 0)      0..1.43

METEOR 1.5, the fourth of the COCO scores, exists in Java only. nltk has the METEOR of 2005, with other
weights and no paraphrases; its numbers are not those that papers report, so it is not here.

Shapes: I images, R rows of bootstrap weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore

from lightning_limber.probe.statistics import bootstrap_weights, interval
from lightning_limber.utils.hub import from_hub

if TYPE_CHECKING:
    from PIL.Image import Image

Words = list[str]


class Score(NamedTuple):
    """A score of a set of images with its 95 % bootstrap interval over them."""

    value: float
    low: float
    high: float


def scores_by_image(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    images: Sequence[Image] = (),
    clip: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Scores one written caption of each image against the image's own captions.

    CIDEr-D depends on the set: the weight of an n-gram falls with the share of these I images that have
    it in a reference, so numbers of different sets do not compare, and with one image it is 0.

    Args:
        candidates: I written captions.
        references: I lists of reference captions, of any lengths.
        images: I images; needed with `clip` only.
        clip: Name or folder of a CLIP model of transformers; None leaves out the scores that need one.
        device: Where the CLIP runs.

    Returns:
        Scores [I, 2] by name: numerator and denominator, which is 1; of ``bleu_4`` `bleu_counts` [I, 10].

    Raises:
        ValueError: an image has no reference, or the numbers of captions and images differ.
    """
    if len(candidates) != len(references) or (clip and len(images) != len(candidates)):
        raise ValueError(
            f"{len(candidates)} captions, references of {len(references)} images and {len(images)} images: "
            "give one of each per image."
        )
    without = [i for i, captions in enumerate(references) if not captions]
    if without or not candidates:
        raise ValueError(
            f"Images without a reference caption cannot be scored: {without} of {len(references)}."
        )
    written = [tokenize(caption) for caption in candidates]
    known = [[tokenize(caption) for caption in captions] for captions in references]
    found = {"cider_d": cider_d(written, known), "rouge_l": rouge_l(written, known)}
    if clip:
        found |= clip_scores(images, candidates, references, clip, device)
    by_image = {name: torch.stack([score, torch.ones_like(score)], dim=-1) for name, score in found.items()}
    by_image["bleu_4"] = bleu_counts(written, known)
    order = ("cider_d", "bleu_4", "rouge_l", "clip_score", "ref_clip_score")
    return {name: by_image[name] for name in order if name in by_image}


def scores_of_set(by_image: dict[str, Tensor], samples: int = 1000, seed: int = 0) -> dict[str, Score]:
    """Scores of a set of images, of their `scores_by_image` or slots [I, 2] (right, and all).

    The intervals keep the weights that CIDEr-D gives to n-grams.

    Args:
        by_image: By name.
        samples: Bootstrap samples over images.
        seed: Seed of the bootstrap.
    """
    found = {}
    for name, values in by_image.items():
        sums = bootstrap_weights(len(values), samples, seed) @ values  # [1 + R, 2] or [1 + R, 10]
        found[name] = Score(*interval(bleu(sums) if name == "bleu_4" else sums[:, 0] / sums[:, 1]))
    return found


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    images: Sequence[Image] = (),
    clip: str | None = None,
    device: torch.device | str = "cpu",
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """`scores_of_set` of the `scores_by_image` of these captions.

    Example:
        >>> references = [["a red cat sits", "a cat"], ["two dogs run on grass"]]
        >>> scores = caption_scores(["A cat.", "Two dogs run on grass!"], references)
        >>> {name: round(score.value, 3) for name, score in scores.items()}
        {'cider_d': 6.668, 'bleu_4': 1.0, 'rouge_l': 1.0}
    """
    return scores_of_set(scores_by_image(candidates, references, images, clip, device), samples, seed)


def most_frequent_caption(captions: Iterable[str]) -> str:
    """The baseline that does not look: of all training captions the most frequent, the first of equals."""
    return Counter(captions).most_common(1)[0][0]


# -- tokens -----------------------------------------------------------------------------------------

_ABBREVIATIONS = "ave blvd co ct dr etc ft inc jr mr mrs ms mt no oz penn prof rd sr st vs".replace(
    " ", "|"
)
_CLITIC = r"'(?:s|m|d|re|ve|ll)\b"
_WORD = r"(?:(?!n't\b)\w)+"  # "don't" is "do", "n't".
_TOKEN = re.compile(
    rf"""
    n't\b | {_CLITIC}
  | can(?=not\b)                            # "can", "not"
  | (?:{_ABBREVIATIONS})\.(?!\w)
  | {_WORD}\.(?=[,;])                       # PTBTokenizer takes it for an abbreviation.
  | (?:[^\W\d_]\.)+(?!\w)                   # "t.v.", "s."
  | \d+(?:[.,:]\d+)+                        # "10:07"
  | {_WORD}(?:(?:[-/.&](?=\w)|(?!{_CLITIC}|'t\b)'(?=\w)){_WORD})*
  | [!?]{{2,}}
  | [&/\#$@%+=<>*~()\[\]{{}}]
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(caption: str) -> Words:
    """Lower-case words without punctuation, as the COCO evaluation code makes them.

    That runs Stanford's PTBTokenizer 3.4.1 and drops punctuation. Brackets stay, since it looks for their
    names in capitals after lowering them. Of the 203,654 captions of COCO val2014 and of the code's example
    20 come out otherwise here, none of them in the example.

    Example:
        >>> tokenize("A man's TV (off) doesn't show 10:07 on St. Mark's side-by-side clocks.")
        ... # doctest: +NORMALIZE_WHITESPACE
        ['a', 'man', "'s", 'tv', '-lrb-', 'off', '-rrb-', 'does', "n't", 'show', '10:07', 'on', 'st.',
         'mark', "'s", 'side-by-side', 'clocks']
    """
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(caption.lower().replace("\u2019", "'"))]


# -- scores of tokenised captions -------------------------------------------------------------------

MAX_N = 4
CIDER_SIGMA = 6.0
"""Standard deviation of CIDEr-D's length penalty, in tokens."""
ROUGE_BETA = 1.2


def ngrams(words: Words) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram stands in a caption, for n = 1..4."""
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, MAX_N + 1)
    ]


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Tensor:
    """CIDEr-D of each image: [I] float64. Document frequencies are those of `references`."""
    known = [[ngrams(words) for words in captions] for captions in references]
    documents = Counter(
        gram for captions in known for gram in {gram for counts in captions for n in counts for gram in n}
    )
    log_images = math.log(len(known))

    def vectors(counts: list[Counter[tuple[str, ...]]]) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (log_images - math.log(max(1, documents[gram]))) for gram, count in n.items()}
            for n in counts
        ]

    def similarity(candidate: list[Counter], reference: list[Counter]) -> float:
        total = 0.0
        for a, b in zip(vectors(candidate), vectors(reference), strict=True):
            norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
            if norms:
                total += sum(min(a[gram], b[gram]) * b[gram] for gram in a if gram in b) / norms
        # Their length is the number of bigrams.
        longer = candidate[1].total() - reference[1].total()
        return total / MAX_N * math.exp(-(longer**2) / (2 * CIDER_SIGMA**2))

    scores = [
        10 * sum(similarity(candidate, reference) for reference in captions) / len(captions)
        for candidate, captions in zip(map(ngrams, candidates), known, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Tensor:
    """ROUGE-L of each image: [I] float64."""

    def score(candidate: Words, reference: Words) -> tuple[float, float]:
        texts = " ".join(candidate), " ".join(reference)
        found = rouge_score(*texts, rouge_keys="rougeL", normalizer=str, tokenizer=str.split)
        return float(found["rougeL_precision"]), float(found["rougeL_recall"])

    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        precisions, recalls = zip(*(score(candidate, reference) for reference in captions), strict=True)
        precision, recall = max(precisions), max(recalls)
        both = (1 + ROUGE_BETA**2) * precision * recall
        scores.append(both / (recall + ROUGE_BETA**2 * precision) if both else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def bleu_counts(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> Tensor:
    """What BLEU adds up over images: [I, 10] float64.

    Columns: n-grams that are in a reference (n = 1..4), n-grams (n = 1..4), tokens, and tokens of the
    reference of the nearest length.
    """
    rows, metric = [], BLEUScore(MAX_N)
    for candidate, captions in zip(candidates, references, strict=True):
        # Of two lengths that are equally near torchmetrics takes the first, the COCO code the shorter.
        by_length = [" ".join(words) for words in sorted(captions, key=len)]
        metric.reset()
        metric.update([" ".join(candidate)], [by_length])
        states = (metric.numerator, metric.denominator, metric.preds_len[None], metric.target_len[None])
        rows.append(torch.cat(states).double())
    return torch.stack(rows)


def bleu(sums: Tensor) -> Tensor:
    """BLEU-4 of sums of `bleu_counts`, [R, 10] -> [R]; 0 where no 4-gram is right."""
    right, count, length, reference_length = sums.split([MAX_N, MAX_N, 1, 1], dim=-1)
    precision = (right / count.clamp_min(1)).log().mean(-1).exp()
    brevity = (1 - reference_length / length).clamp_max(0).exp()[:, 0]
    return precision * brevity


# -- scores by a CLIP -------------------------------------------------------------------------------

CLIP_PROMPT = "A photo depicts "
CLIP_WEIGHT = 2.5


@torch.no_grad()
def clip_scores(
    images: Sequence[Image],
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    clip: str,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """CLIPScore and RefCLIPScore of each image, [I] float64 each.

    torchmetrics' own `clip_score` averages over images, and 1.9 does not run with transformers 5.
    """
    model, processor = _load_clip(clip)
    model.to(device)

    def embed(kind: str, items: Sequence[Any], **options: Any) -> Tensor:
        features = []
        for start in range(0, len(items), batch_size):
            chunk = list(items[start : start + batch_size])
            inputs = processor(**{kind: chunk}, return_tensors="pt", **options).to(device)
            encode = model.get_image_features if kind == "images" else model.get_text_features
            features.append(encode(**inputs).pooler_output.double().cpu())
        return nn.functional.normalize(torch.cat(features), dim=-1)  # [n, D]

    def embed_text(texts: Sequence[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        prompted = [CLIP_PROMPT + text for text in texts]
        return embed("text", prompted, padding=True, truncation=True, max_length=length)

    image = embed("images", [image.convert("RGB") for image in images])
    written = embed_text(candidates)
    known = embed_text([text for captions in references for text in captions])
    nearest = torch.stack(
        [
            (own @ caption).max()
            for own, caption in zip(known.split([len(c) for c in references]), written, strict=True)
        ]
    ).clamp_min(0)
    score = CLIP_WEIGHT * (image * written).sum(-1).clamp_min(0)
    harmonic = 2 * score * nearest / (score + nearest).clamp_min(1e-12)
    return {"clip_score": score, "ref_clip_score": harmonic}


@lru_cache(maxsize=1)
def _load_clip(name: str) -> tuple[Any, Any]:
    from transformers import AutoProcessor, CLIPModel

    with from_hub(name) as path:
        return CLIPModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
