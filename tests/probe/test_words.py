"""Words of captions and descriptions, and which of them agree."""

from __future__ import annotations

import doctest
import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest

import lightning_limber.probe.words
from dev.shipped_saes.synonyms import build
from lightning_limber.probe.words import (
    STOP_WORDS,
    SYNONYMS,
    agreement,
    content_words,
    description_words,
    stem,
)


def agree(a: str, b: str) -> bool:
    """In both directions, which must not differ."""
    there, back = agreement([a], [b])[0, 0], agreement([b], [a])[0, 0]
    assert there == back, (a, b)
    return bool(there)


def test_examples_in_docstrings():
    result = doctest.testmod(lightning_limber.probe.words)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (
            "a small red circle left of a large blue star on a pink background.",
            "small red circle left large blue star pink",
        ),
        ("Two men aren\u2019t sitting in front of the CAT's T-shirt!", "two men sitting cat shirt"),
        ("there is a photo of the dog and the dog", "dog"),
        ("a tree above, a bird below, a car to the right", "tree above bird below car right"),
        ("the front of a train on top of a café table", "front train café table"),
        ("of the 3 ...", ""),
    ],
)
def test_content_words(caption, words):
    assert content_words(caption) == words.split()


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("references to cats and other pets", "cats pets"),
        ("terms related to specific kinds of water, especially near: rivers", "water rivers"),
        ("near: a, standing, wooden | promotes: clf, foo", "standing wooden clf foo"),
        ("on: (-s), (inside a word), (number), 12, red | promotes: -", "red"),
        ("after: ., ,, and, ; | promotes: policym", "policym"),
        ("near: (, ^, %, gdp, ) | promotes: word", "gdp word"),
        ("before: no word in particular | promotes: near", ""),
    ],
)
def test_description_words(description, words):
    assert description_words(description) == words.split()


@pytest.mark.parametrize(
    "forms",
    """
    circle circles|run runs running|man men|woman women|child children|box boxes|bus buses|puppy puppies
    foot feet|leaf leaves|sit sits sat sitting|ride rides rode ridden riding
    hold held holding|fisherman fishermen
    decorate decorates decorated decorating|dish dishes|tooth teeth|glass glasses
    """.strip()
    .replace("\n", "|")
    .split("|"),
)
def test_forms_of_one_word(forms):
    assert len({stem(form) for form in forms.split()}) == 1


@pytest.mark.parametrize(
    "words",
    """
    animal animation|office officer|business busy|universe university|apart apartment|saw see|rose rise
    left leave|star stare|bear born|flow flower
    """.strip()
    .replace("\n", "|")
    .split("|"),
)
def test_other_words_that_look_like_forms(words):
    first, second = words.split()
    assert stem(first) != stem(second)
    assert not agree(first, second)


@pytest.mark.parametrize(
    "pair",
    """
    bicycle bike|car automobile|child kid|couch sofa|big large|small little|red crimson|gray grey
    color colour|tv television|airplane plane|phone telephone|rock stone|rug carpet|children kids
    bikes bicycle
    """.strip()
    .replace("\n", "|")
    .split("|"),
)
def test_synonyms_agree(pair):
    first, second = pair.split()
    assert stem(first) != stem(second)
    assert agree(first, second)


# Words of one field, so that chance and loose relations would show first.
DIFFERENT = (
    "red blue green yellow orange purple pink brown black white grey turquoise",
    "circle square triangle star cross ring diamond heart rectangle line",
    "cat dog horse cow sheep goat pig bird lion tiger bear mouse",
    "left right above below",
    "big small tall narrow old young round",
    "man woman boy girl baby farmer",
    "car bus truck bicycle motorcycle train boat aeroplane",
    "table chair couch bed desk lamp clock",
    "apple banana cherry lemon pear carrot",
    "run jump sit stand sleep eat drink ride",
    "plant work toilet pot building make",
    "two three four five",
)


@pytest.mark.parametrize("words", DIFFERENT)
def test_different_words_of_one_field_do_not_agree(words):
    words = words.split()
    assert (agreement(words, words) == np.eye(len(words), dtype=bool)).all()


def test_words_of_different_fields_do_not_agree():
    words = [word for field in DIFFERENT for word in field.split()]
    agrees = agreement(words, words)
    found = [(words[i], words[j]) for i, j in np.argwhere(agrees) if i != j]
    assert found == []


def test_a_meaning_is_not_handed_on():
    """Each line of the lexicon is one meaning; groups are not merged into classes."""
    assert agree("cellphone", "phone")
    assert agree("phone", "telephone")
    assert not agree("cellphone", "telephone")


def test_a_noun_has_not_the_synonyms_of_its_verb():
    assert agree("build", "construct")
    assert not agree("building", "construct")
    assert not agree("buildings", "construct")
    assert agree("buildings", "edifice")


def test_agreement_is_any_word_against_each_word():
    descriptions = [
        "references to bicycles and other vehicles",
        "near: a, kids, (-s) | promotes: sofa, the",
        "on: , | promotes: -",
    ]
    words = ["bike", "child", "couch", "dog", "bike", "on"]
    expected = [[1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    agrees = agreement(descriptions, words)
    assert agrees.dtype == bool
    assert agrees.tolist() == np.array(expected, bool).tolist()
    assert agreement([], words).shape == (0, 6)
    assert agreement(descriptions, []).shape == (3, 0)


def test_agreement_is_that_of_all_pairs():
    """The index against a loop over pairs of words."""
    words = "red crimson kid children sofa couches runs running dog".split()
    descriptions = [f"{a}, {b}" for a, b in itertools.permutations(words, 2)]
    slow = [
        [any(agree(word, d) for d in description.split(", ")) for word in words]
        for description in descriptions
    ]
    assert agreement(descriptions, words).tolist() == slow


def test_the_shipped_synonyms_carry_their_licence_and_no_stop_word():
    text = gzip.decompress(SYNONYMS.read_bytes()).decode()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert "# WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in head
    assert any("THIS SOFTWARE AND DATABASE IS PROVIDED" in line for line in head)
    entries = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(entries) > 4000
    assert not STOP_WORDS & {word for line in entries for word in line.split()}
    assert SYNONYMS.stat().st_size < 250_000


SYNSETS = {
    # offset, members: sofa is tagged; "lounge" is mostly something else.
    "noun": [
        ("00000001", "sofa couch lounge"),
        ("00000002", "lounge"),
        ("00000003", "Sat"),
        ("00000004", "rose"),
    ],
    "verb": [("00000005", "sit"), ("00000006", "rise")],
    "adj": [("00000007", "big(a) large")],
}
USES = """couch%1:06:00:: 1 5
lounge%1:06:01:: 2 1
lounge%1:06:00:: 1 9
sofa%1:06:00:: 1 5
sit%2:35:00:: 1 50
rise%2:39:00:: 1 70
rose%1:06:00:: 1 1
big%3:00:01:: 1 107
large%3:00:00:: 1 139
"""


@pytest.fixture
def wordnet(tmp_path) -> Path:
    """A WordNet of nine words, in its file formats."""
    for name, synsets in SYNSETS.items():
        data, senses = ["  1 THE LICENCE  "], {}
        for offset, members in synsets:
            words = members.split()
            data.append(f"{offset} 06 n {len(words):02x} {' '.join(f'{w} 0' for w in words)} 000 | gloss")
            for word in words:
                senses.setdefault(word.lower().partition("(")[0], []).insert(0, offset)
        index = [f"{w} {name[0]} {len(o)} 0 {len(o)} 0 {' '.join(o)}  " for w, o in senses.items()]
        (tmp_path / f"data.{name}").write_text("\n".join(data) + "\n")
        (tmp_path / f"index.{name}").write_text("\n".join(["  1 THE LICENCE  ", *sorted(index)]) + "\n")
    (tmp_path / "cntlist.rev").write_text(USES)
    (tmp_path / "noun.exc").write_text("teeth tooth\n")
    (tmp_path / "verb.exc").write_text("sat sit\nrose rise\n")
    return tmp_path


def test_synonyms_are_built_from_wordnets_files(wordnet):
    text = gzip.decompress(build(wordnet, wordnet / "out.gz").read_bytes()).decode()
    lines = text.splitlines()
    assert "# THE LICENCE" in lines
    assert "couch sofa" in lines  # without "lounge", whose first sense is another
    assert "big large" in lines
    assert "sat > sit" in lines  # "Sat", a name, does not stand in the way
    assert "rose > rise" not in lines


def test_the_build_is_deterministic(wordnet):
    first, second = (build(wordnet, wordnet / name).read_bytes() for name in ("a.gz", "b.gz"))
    assert first == second
    assert first[4:8] == bytes(4)  # no time of day in the header
