"""What the latents mean, in words: a reader (and writer) of Neuronpedia's bulk explanation files.

Neuronpedia exports the explanations of one SAE as gzipped JSON Lines in numbered batches,
`<bucket>/v1/<neuronpedia_id>/explanations/batch-0.jsonl.gz`, `batch-1.jsonl.gz`, ... The SAEs that
this package ships describe their latents in the same fields, so that one reader serves both.

A row keeps the name of the model that wrote it: explanations of one SAE, and of neighbouring layers,
may come from different explainers, and those are not to be compared without saying so.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.utils.files import write_whole

FIELDS = {
    "model_id": "modelId",
    "layer": "layer",
    "index": "index",
    "description": "description",
    "explainer": "explanationModelName",
    "density": "density",
    "score": "score",
}


@dataclass(frozen=True)
class Explanation:
    """One latent's description.

    Attributes:
        model_id: The language model, as Neuronpedia names it (`gemma-2-2b`).
        layer: The SAE's name within it, which starts with its layer (`20-gemmascope-res-16k`).
        index: The latent.
        description: A few words.
        explainer: Who wrote them; "unknown" where the export does not say.
        density: Share of text tokens on which the latent fires, 0..1; None where not given.
        score: How well the description predicts firing on unseen text, AUROC 0.5..1; None where
            not given (Neuronpedia's own exports give none).
    """

    model_id: str
    layer: str
    index: int
    description: str
    explainer: str
    density: float | None = None
    score: float | None = None


SCHEMES = ("http", "https", "s3", "gs", "hf")
"""Of addresses."""


def read_explanations(where: str | Path) -> list[Explanation]:
    """Reads one SAE's explanations, in the order of the files; rows without a description are left out.

    Args:
        where: One `.jsonl` or `.jsonl.gz` file, or a folder of them, local or at an address of one of
            `SCHEMES` (a checkpoint may name it, and other schemes of fsspec do more than read). A folder
            at an address is read as `batch-0.jsonl.gz` and on, as plain web servers list nothing.

    Raises:
        FileNotFoundError: There is no such file, or the folder has no batch.
        ValueError: The address has another scheme; or a row lacks `layer`, `index` or `description`, and
            the message names file and line.
    """
    rows: list[Explanation] = []
    for name, data in _files(str(where)):
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        for number, line in enumerate(text.decode("utf-8").splitlines(), start=1):
            if line.strip():
                rows += _parse(json.loads(line), f"{name}, line {number}")
    return rows


@dataclass
class Descriptions:
    """What is known of each latent of a layer's SAE: texts [K] ("" where none) and density [K]."""

    texts: list[str]
    density: Tensor

    @property
    def described(self) -> Tensor:
        """[K] whether a latent has a description."""
        return torch.tensor([bool(text) for text in self.texts])

    @classmethod
    def read(cls, where: str, d_sae: int) -> Descriptions:
        """Reads explanations in Neuronpedia's export format; of several for a latent the first counts.

        Warns where several explainers described latents of one SAE: their texts differ in what they can
        match.
        """
        rows = read_explanations(where)
        if len(names := explainers(rows)) > 1:
            rank_zero_info(f"[warning] {where}: descriptions by several explainers: {dict(names)}")
        texts, density = [""] * d_sae, torch.zeros(d_sae)
        for row in reversed(rows):
            texts[row.index] = row.description
            density[row.index] = row.density or 0.0
        return cls(texts, density)


def explainers(rows: Iterable[Explanation]) -> Counter[str]:
    """How many rows each explainer wrote."""
    return Counter(row.explainer for row in rows)


def neuronpedia_id(release: str, sae_id: str) -> str:
    """Where Neuronpedia keeps an SAE, from SAELens' registry: `gemma-2-2b/20-gemmascope-res-16k`.

    Raises:
        ValueError: The registry has no such SAE, or knows of no Neuronpedia page for it.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise ValueError(f"SAELens' registry has no release {release!r}")
    ids = directory[release].neuronpedia_id
    if not ids.get(sae_id):
        known = [name for name, place in ids.items() if place]
        raise ValueError(
            f"SAELens' registry names no Neuronpedia page for {sae_id!r} of {release!r}; it does for "
            f"{known[:5] or 'none of that release'}{' ...' if len(known) > 5 else ''}"
        )
    return ids[sae_id]


def write_explanations(rows: Iterable[Explanation], path: Path) -> None:
    """Writes rows as gzipped JSON Lines in Neuronpedia's fields, byte-equal for equal rows."""
    lines = []
    for row in rows:
        record = {theirs: getattr(row, ours) for ours, theirs in FIELDS.items()}
        # Neuronpedia writes indices as strings.
        lines.append(json.dumps({**record, "index": str(row.index)}, ensure_ascii=False))
    packed = gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0)
    write_whole(path, lambda part: part.write_bytes(packed))


def _files(where: str) -> Iterator[tuple[str, bytes]]:
    import fsspec

    scheme, is_url, _ = where.partition("://")
    if "::" in where or (is_url and scheme not in SCHEMES):
        raise ValueError(
            f"probe.descriptions={where}: allowed are files, folders, and addresses that begin with "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}."
        )
    if where.endswith((".jsonl", ".jsonl.gz")):
        names = [where]
    elif "://" in where:
        yield from _numbered(where.rstrip("/"))
        return
    else:
        names = sorted((str(p) for p in Path(where).glob("*.jsonl*")), key=_batch_number)
        if not names:
            raise FileNotFoundError(f"{where} holds no .jsonl or .jsonl.gz file of explanations")
    for name in names:
        with fsspec.open(name, "rb") as file:
            yield name, file.read()


def _numbered(folder: str) -> Iterator[tuple[str, bytes]]:
    import fsspec

    number = 0
    while True:
        name = f"{folder}/batch-{number}.jsonl.gz"
        try:
            with fsspec.open(name, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            if number == 0:
                raise FileNotFoundError(
                    f"{name} does not exist; expected the folder of one SAE's explanations, "
                    "<bucket>/v1/<neuronpedia_id>/explanations"
                ) from None
            return
        yield name, data
        number += 1


def _batch_number(name: str) -> tuple[int, str]:
    """batch-10 comes after batch-9."""
    digits = "".join(c for c in Path(name).name.split(".")[0] if c.isdigit())
    return int(digits or 0), name


def _parse(record: dict[str, Any], place: str) -> list[Explanation]:
    missing = [key for key in ("layer", "index", "description") if key not in record]
    if missing:
        raise ValueError(f"{place}: no {' and no '.join(missing)} among {sorted(record)}")
    if not record["description"]:
        return []
    number = {key: None if record.get(key) is None else float(record[key]) for key in ("density", "score")}
    return [
        Explanation(
            model_id=str(record.get("modelId", "unknown")),
            layer=str(record["layer"]),
            index=int(record["index"]),
            description=str(record["description"]).strip(),
            explainer=str(record.get("explanationModelName") or "unknown"),
            **number,
        )
    ]
