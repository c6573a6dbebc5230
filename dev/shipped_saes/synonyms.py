"""Makes `lightning_limber/synonyms.txt.gz`, which `lightning_limber.probe.words` reads, from WordNet 3.0.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python -m dev.shipped_saes.synonyms wordnet/usr/share/wordnet

WordNet joins far more words than anyone would call synonyms ("dog" and "cad", "cat" and "guy"). A word
is kept in a meaning only where that meaning is one of the first two of its part of speech and makes up a
good share of all the word's uses in WordNet's sense-tagged texts.

Source: Fellbaum (ed.), WordNet: An Electronic Lexical Database, MIT Press 1998; file formats wndb(5WN),
senseidx(5WN).
"""

from __future__ import annotations

import argparse
import gzip
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from lightning_limber.probe.words import STOP_WORDS, SYNONYMS, regular_stem

SENSES = 2
"""A word's first senses, which WordNet orders by frequency, are looked at."""
SHARE = 0.4
"""A sense counts where it has at least this share of the word's tagged uses, in any part of speech."""
FEW = 10
"""A word tagged less often than this counts as a noun, if it can be one ("crow" is not "gloat")."""
FORM_SHARE = 1 / 5
"""What looks like a form of another word has synonyms of its own only where it is tagged at least this
often against that word: "building" has, but "works" is not "plant"."""
OWN_SHARE = 1 / 10
"""An irregular form is a word of its own where it is tagged more often than this against its base."""
COMMON = 20
"""A noun tagged at least this often is a common one."""
ADDED = """
color colour|gray grey|donut doughnut|television tv|fridge refrigerator|burger hamburger|lorry truck
|motorbike motorcycle|pajamas pyjamas|cab taxi|pup puppy|kitten kitty|bunny rabbit|mom mother mum|dad father
|cellphone phone|bike cycle|tire tyre|guy man|lady woman
""".replace("\n", "").split("|")
"""Groups by hand: words of captions that the tagged texts (American, 1961) hold too rarely to decide."""
LEFT_OUT = frozenset(["john", "born", "borne"])
"""By hand: a name for a toilet; and forms of "bear" that the animal would answer to."""
PARTS = {"noun": "n", "verb": "v", "adj": "a"}
_SENSE_KEY_PART = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}

HEAD = """\
# English synonyms for lightning_limber.probe.words, made by `python -m dev.shipped_saes.synonyms`.
# Several words in a line share one meaning; a line of one word says that the word has no synonym here,
# though another word of its stem has; "men > man" says that "men" is a form of "man".
# A modified part of WordNet 3.0, https://wordnet.princeton.edu/, with a few lines added by hand, under
# this licence:
"""


def build(wordnet: Path, out: Path = SYNONYMS) -> Path:
    """Writes the synonyms; equal files of WordNet give byte-equal output.

    Args:
        wordnet: Folder with `index.noun`, `data.noun`, `noun.exc`, `cntlist.rev` and so on.
        out: The gzipped text to write.

    Raises:
        FileNotFoundError: `wordnet` lacks one of these files.
    """
    uses = _uses(wordnet)
    total: dict[str, int] = defaultdict(int)
    for (word, _, _), count in uses.items():
        total[word] += count
    words = {name: _words(wordnet / f"data.{name}") for name in PARTS}
    forms = dict(_forms(wordnet, words["noun"], total))
    groups = {
        *_groups(wordnet, set().union(*words.values()), uses, total),
        *map(tuple, map(str.split, ADDED)),
    }
    grouped = {word for group in groups for word in group}
    stems = {regular_stem(word) for word in grouped}
    lines = sorted(" ".join(group) for group in groups)
    lines += [f"{form} > {base}" for form, base in sorted(forms.items())]
    # "wedding" has no synonym here: without a line of its own it would have those of "wed".
    alone = {word for word in total if _plain(word)} - grouped - forms.keys()
    lines += sorted(word for word in alone if regular_stem(word) in stems)
    text = HEAD + _licence(wordnet) + "\n".join(lines) + "\n"
    out.write_bytes(gzip.compress(text.encode(), mtime=0))
    return out


def _uses(wordnet: Path) -> dict[tuple[str, str, int], int]:
    """How often each (word, part of speech, sense number) is tagged; absent where never."""
    uses: dict[tuple[str, str, int], int] = defaultdict(int)
    for line in _lines(wordnet / "cntlist.rev"):
        key, number, count = line.split()
        word, _, rest = key.partition("%")
        uses[word, _SENSE_KEY_PART[rest[0]], int(number)] += int(count)
    return uses


def _words(data: Path) -> set[str]:
    """Words of one part of speech as they are written, which leaves out names; the index has no case."""
    words: set[str] = set()
    for line in _lines(data):
        fields = line.split(maxsplit=4)
        members = fields[4].split()[: 2 * int(fields[3], 16) : 2]
        words.update(word.partition("(")[0] for word in members)
    return {word for word in words if _plain(word)}


def _groups(
    wordnet: Path, words: set[str], uses: dict[tuple[str, str, int], int], total: dict[str, int]
) -> Iterator[tuple[str, ...]]:
    """Words of one meaning, two or more, of which one at least is tagged with it."""
    exceptions = [line.split() for name in ("noun", "verb") for line in _lines(wordnet / f"{name}.exc")]
    irregular = {form for form, base, *_ in exceptions if form != base}
    words = {word for word in words if word not in irregular and not _rare_form(word, total)}
    offsets = {
        (fields[0], part): fields[-int(fields[2]) :]
        for name, part in PARTS.items()
        for fields in map(str.split, _lines(wordnet / f"index.{name}"))
        if fields[0] in words
    }
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    tagged: set[tuple[str, str]] = set()
    for (word, part), synsets in offsets.items():
        if total.get(word, 0) < FEW and part != "n" and (word, "n") in offsets:
            continue
        for number, synset in enumerate(synsets[:SENSES], start=1):
            count = uses.get((word, part, number), 0)
            if count >= SHARE * total.get(word, 0):
                members[part, synset].append(word)
                if count:
                    tagged.add((part, synset))
    return (tuple(sorted(m)) for key, m in members.items() if len(m) > 1 and key in tagged)


def _rare_form(word: str, total: dict[str, int]) -> bool:
    """Whether a word is above all a regular form of a commoner one."""
    cut = [word[: -len(end)] for end in ("s", "es", "ed", "ing") if word.endswith(end)]
    bases = {c + e for c in cut for e in ("", "e")} | {c[:-1] for c in cut if c[-2:-1] == c[-1:]}
    most = max((total.get(base, 0) for base in bases if len(base) > 2), default=0)
    return total.get(word, 0) < FORM_SHARE * most


def _forms(wordnet: Path, nouns: set[str], total: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Plurals and verb forms that the stemmer cannot bring back: (form, base).

    A form that is a noun too ("saw", "rose", "cola") stays that noun, but for plurals of common nouns
    ("men", "teeth").
    """
    verbs = [line.split()[:2] for line in _lines(wordnet / "verb.exc")]
    plurals = [line.split()[:2] for line in _lines(wordnet / "noun.exc")]
    plurals += [[noun[:-3] + "men", noun] for noun in sorted(nouns) if noun.endswith("man")]
    singular = (
        noun for noun in sorted(nouns) if noun[-1] == "s" and noun[:-1] not in nouns and total.get(noun)
    )
    plurals += [[noun + "es", noun] for noun in singular]
    common = {noun for noun in nouns if total.get(noun, 0) >= COMMON}
    for pairs, may_be_noun in ((plurals, common), (verbs, set[str]())):
        for form, base in pairs:
            free = form not in nouns or base in may_be_noun
            rare = total.get(form, 0) <= OWN_SHARE * total.get(base, 0)
            if free and rare and _plain(form) and _plain(base) and regular_stem(form) != regular_stem(base):
                yield form, base


def _plain(word: str) -> bool:
    return (
        word.isascii()
        and word.isalpha()
        and word.islower()
        and len(word) > 2
        and word not in STOP_WORDS | LEFT_OUT
    )


def _lines(path: Path) -> Iterator[str]:
    """Lines but those of the licence, which start with two spaces."""
    text = path.read_text(encoding="latin-1")
    return (line for line in text.splitlines() if not line.startswith("  "))


def _licence(wordnet: Path) -> str:
    """The notice that WordNet's licence wants on every copy, as it stands at the head of its files."""
    text = (wordnet / "index.noun").read_text(encoding="latin-1")
    notice = (line.split(maxsplit=1)[1:] for line in text.splitlines() if line.startswith("  "))
    return "".join(f"# {' '.join(line).strip()}".rstrip() + "\n" for line in notice)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dev.shipped_saes.synonyms")
    parser.add_argument("wordnet", type=Path, help="folder of WordNet 3.0's index and data files")
    parser.add_argument("--out", type=Path, default=SYNONYMS)
    arguments = parser.parse_args()
    path = build(arguments.wordnet, arguments.out)
    print(f"{path}: {path.stat().st_size:,} bytes")
