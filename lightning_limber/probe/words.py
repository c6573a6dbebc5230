"""Whether a latent's description and a caption speak of the same thing, offline and without a judge.

Two English words agree where they are forms of one word ("run", "running"; "man", "men") or share a
meaning in WordNet 3.0 ("bicycle", "bike"). Sharing a meaning does not carry over: "bike" is also a
motorcycle, yet "bicycle" and "motorcycle" do not agree. Doubtful pairs do not agree: missing a match
costs the metric less than a match by chance.

The synonyms are in `synonyms.txt.gz`, made by `dev.shipped_saes.synonyms`; its head holds
WordNet's licence.

Shapes: D descriptions, W words.
"""

from __future__ import annotations

import gzip
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_limber.assets import ASSETS

SYNONYMS = ASSETS / "synonyms.txt.gz"

STOP_WORDS = frozenset(
    # Articles, determiners, quantities without a number. "two", "three" and on are content.
    """
    a an the this that these those some any no none every each either neither both all another other
    others such same own one ones many much more most few less least lot lots several enough
    """
    # Pronouns.
    """
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we
    us our ours ourselves they them their theirs themselves who whom whose which what someone something
    anyone anything everyone everything nobody nothing there here
    """
    # Prepositions; "left", "right", "above" and "below" say where things are, and are content.
    """
    of in on at by with without within for from to into onto upon off out over under underneath beneath
    up down through throughout across along around about against among amongst between beside besides
    behind before after during since until till toward towards near next inside outside beyond past per
    via than like unlike except despite
    """
    # Conjunctions and adverbs of no picture.
    """
    and or but nor so yet if then else because although though while whilst whereas when where why how
    whether as not very too also just only even still again ever never always often quite rather almost
    already now away together etc
    """
    # Auxiliaries, and what a tokenizer leaves of their contractions.
    """
    be am is are was were been being do does did done doing have has had having can could may might must
    shall should will would cannot aren couldn didn doesn don hadn hasn haven isn mustn shouldn wasn
    weren won wouldn ain ll ve re
    """
    # What captions say of themselves. "background" ends every drawn scene's caption.
    """
    photo photos photograph photographs picture pictures pic pics image images closeup view background
    show shows showing shown see seen depict depicts depicting depicted
    """.split()
)

EXPLAINER_WORDS = frozenset(
    """
    reference references referring refers refer mention mentions mentioned mentioning word words phrase
    phrases term terms terminology terminologies text texts textual sentence sentences statement
    statements expression expressions expressing instance instances occurrence occurrences example
    examples context contexts content concept concepts topic topics theme themes aspect aspects element
    elements description descriptions describing described discussion discussions discussing keyword
    keywords token tokens noun nouns verb verbs adjective adjectives adverb adverbs pronoun pronouns
    preposition prepositions article articles suffix suffixes prefix prefixes punctuation usage presence
    related relating relates relation associated indicating indicate indicates indicated denoting
    signifying conveying pertaining involving including includes include specific specifically particular
    particularly certain various different especially typically often common commonly kind kinds type
    types form forms category categories
    """.split()
)
"""What plain descriptions of latents say of themselves ("references to words related to ...")."""

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
_COMPOUND_PREPOSITION = re.compile(r"\b(?:in front of|on top of|close[- ]up of)\b", re.IGNORECASE)
_OWN_FORM = re.compile(r"(?:on|after|before|near): (.*) \| promotes: (.*)", re.DOTALL)
"""As `lightning_limber.sae_training.describe` writes a description."""


def content_words(text: str) -> list[str]:
    """Words that say what is there: lower case, in order, each once, without function words.

    Example:
        >>> content_words("A photo of the dog's red-and-white ball, left of two dogs.")
        ['dog', 'red', 'white', 'ball', 'left', 'two', 'dogs']
    """
    return list(dict.fromkeys(word for word, _ in content_spans(text)))


def content_spans(text: str) -> list[tuple[str, int]]:
    """Every content word in a text, in order, and the place in the text behind its last letter.

    Example:
        >>> content_spans("A Dog's ball on top of a dog")
        [('dog', 5), ('ball', 12), ('dog', 28)]
    """
    spans = []
    for match in _WORD.finditer(_COMPOUND_PREPOSITION.sub(lambda found: " " * len(found[0]), text)):
        # An apostrophe that is left is a contraction's: auxiliary or pronoun.
        word = re.sub(r"['\u2019]s$", "", match[0].lower())
        if len(word) > 1 and word.isalpha() and word not in STOP_WORDS:
            spans.append((word, match.start() + len(word)))
    return spans


def description_words(description: str) -> list[str]:
    """Content words of a latent's description, in plain English or in this project's own form.

    Example:
        >>> description_words("references to cats and other pets")
        ['cats', 'pets']
        >>> description_words("on: a, standing, (-s), wooden | promotes: clf, foo")
        ['standing', 'wooden', 'clf', 'foo']
    """
    own = _OWN_FORM.fullmatch(description)
    if own is None:
        return [word for word in content_words(description) if word not in EXPLAINER_WORDS]
    items = [item for part in own.groups() for item in part.split(", ")]
    # Words in brackets are forms of a token, such as "(number)"; a bracket alone is a mark.
    items = [i for i in items if not (i[0:1] == "(" and len(i) > 1) and i != "no word in particular"]
    return content_words(", ".join(items))


@cache
def stem(word: str) -> str:
    """What the forms of one lower-case word have in common: Snowball's stem of its base form.

    Example:
        >>> stem("circles") == stem("circle"), stem("running") == stem("run"), stem("men") == stem("man")
        (True, True, True)
        >>> stem("animal") == stem("animation")
        False
    """
    return regular_stem(_lexicon().base.get(word, word))


@cache
def regular_stem(word: str) -> str:
    """Snowball's stem, without the steps that remove derivational endings, and without irregular forms.

    Those steps (2 to 4) make one word of "animal" and "animation", of "office" and "officer".

    Source: Porter, Snowball: A language for stemming algorithms, 2001 (English, "Porter2").
    """
    return _stemmer().stem(word)


def agreement(descriptions: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Where a content word of a description is a form or a synonym of a word.

    Args:
        descriptions: D descriptions of latents, as for `description_words`.
        words: W lower-case words, such as `content_words` of captions.

    Returns:
        bool [D, W].

    Example:
        >>> agreement(["references to cats", "near: a, bike | promotes: -"], ["cat", "bicycles", "dog"])
        array([[ True, False, False],
               [False,  True, False]])
    """
    columns: dict[str | int, list[int]] = defaultdict(list)
    for column, word in enumerate(words):
        for key in _keys(word):
            columns[key].append(column)
    agrees = np.zeros((len(descriptions), len(words)), dtype=bool)
    for row, description in enumerate(descriptions):
        found = {key for word in description_words(description) for key in _keys(word)} & columns.keys()
        agrees[row, [column for key in found for column in columns[key]]] = True
    return agrees


def word_table(texts: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    """Distinct words (in alphabetical order), and which text has which: bool [I, W]."""
    words = sorted({word for text in texts for word in text})
    column = {word: i for i, word in enumerate(words)}
    table = torch.zeros(len(texts), len(words), dtype=torch.bool)
    for row, text in enumerate(texts):
        table[row, [column[word] for word in text]] = True
    return words, table


def stem_table(words: Sequence[str], table: Tensor) -> tuple[list[str], Tensor]:
    """`word_table` with the forms of a word in one column: distinct stems, and bool [I, S]."""
    stems, column = np.unique([stem(word) for word in words], return_inverse=True)
    counts = torch.zeros(len(table), len(stems)).index_add_(1, torch.from_numpy(column), table.float())
    return stems.tolist(), counts > 0


def word_hits(found: Tensor, captions: Tensor) -> Tensor:
    """[I, W] words found for each image, [J, W] words of each caption -> [I, J] whether any agrees."""
    return found.float() @ captions.float().T > 0


@cache
def _keys(word: str) -> frozenset[str | int]:
    """A word's stem and the numbers of its meanings: two words agree where they share one."""
    lexicon = _lexicon()
    base = lexicon.base.get(word, word)
    # "buildings" has the meanings of "building", not those of "build".
    near = [w for w in lexicon.of_stem.get(stem(word), ()) if base.startswith(w[:-1])]
    lemma = base if base in lexicon.meanings else max(near, key=len, default=base)
    return frozenset([stem(word), *lexicon.meanings.get(lemma, ())])


class _Lexicon(NamedTuple):
    """What `synonyms.txt.gz` says.

    Attributes:
        base: Irregular forms to their base.
        meanings: Words to the numbers of the lines that they share with their synonyms.
        of_stem: Regular stems to the words of `meanings` that have them.
    """

    base: dict[str, str]
    meanings: dict[str, list[int]]
    of_stem: dict[str, list[str]]


@cache
def _lexicon() -> _Lexicon:
    base: dict[str, str] = {}
    meanings: dict[str, list[int]] = defaultdict(list)
    for number, line in enumerate(gzip.decompress(SYNONYMS.read_bytes()).decode().splitlines()):
        if line.startswith("#"):
            continue
        form, mark, word = line.partition(" > ")
        if mark:
            base[form] = word
        else:
            for word in line.split():
                meanings[word].append(number)
    of_stem: dict[str, list[str]] = defaultdict(list)
    for word in meanings:
        of_stem[regular_stem(word)].append(word)
    return _Lexicon(base, dict(meanings), dict(of_stem))


@cache
def _stemmer() -> Any:
    from nltk.stem.snowball import EnglishStemmer  # takes seconds, and only `match` needs it

    # The stemmer has no setting for this, so its private lists of suffixes are emptied.
    no_suffixes = {f"_EnglishStemmer__step{step}_suffixes": () for step in (2, 3, 4)}
    return type("InflectionStemmer", (EnglishStemmer,), no_suffixes)()
