"""Published data sets of pictures on disk beside one JSON file: LLaVA's conversations, COCO's captions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.image_folder import hash_share, open_image
from lightning_limber.data.loader import PackedList, RecordSet
from lightning_limber.data.records import Record, Turns


class AnnotationSet:
    """Records from packed rows ``{id, image, captions or turns}``; images are opened when asked for."""

    def __init__(self, rows: Iterator[dict[str, Any]], images: Path) -> None:
        lengths: list[int] = []

        def measured() -> Iterator[dict[str, Any]]:
            for row in rows:
                texts = row.get("captions") or [text for turn in row["turns"] for text in turn]
                # Records without an image apart from the others: such batches have no image tokens.
                lengths.append(sum(map(len, texts)) if row["image"] else -sum(map(len, texts)))
                yield row

        self.packed = PackedList(measured())
        self.lengths = np.array(lengths)
        self.images = images

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> Record:
        row = self.packed[index]
        turns: Turns | None = [(user, answer) for user, answer in row["turns"]] if "turns" in row else None
        image = open_image(self.images / row["image"]) if row["image"] else None
        return Record(row["id"], image, self._captions(row), turns=turns)

    def captions(self, index: int) -> list[str]:
        return self._captions(self.packed[index])

    @staticmethod
    def _captions(row: dict[str, Any]) -> list[str]:
        return row.get("captions") or [answer for _, answer in row["turns"]]


class LLaVAConversations(CaptionData):
    """LLaVA's JSON: ``[{id, image, conversations: [{from: human, value}, {from: gpt, value}, ...]}, ...]``.

    Both of LLaVA's stages have it: ``blip_laion_cc_sbu_558k.json`` and ``llava_v1_5_mix665k.json``
    (arXiv 2310.03744). Records without an image are trained on as text alone and are never held out.
    The ``<image>`` mark is taken out of the text: the image stands where ``model.prompt`` says.

    Args:
        annotations: The JSON file.
        images: Folder that the records' image paths are relative to.
        val_share: Share of the records with an image held out, chosen by a hash of the image's path:
            all conversations about an image are on one side.
    """

    def __init__(self, annotations: str, images: str, val_share: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.annotations, self.images = Path(annotations).expanduser(), Path(images).expanduser()
        self.val_share = val_share
        self.save_hyperparameters()

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        entries = read_json(self.annotations, "data.annotations")
        rows = [row for i, entry in enumerate(entries) if (row := self._row(entry, i))]
        if bad := len(entries) - len(rows):
            message = f"{bad} of {len(entries)} records of '{self.annotations}' are no conversation"
            if bad > self.max_bad_share * len(entries):
                raise ValueError(
                    f"{message}: human and gpt must take turns. Allowed is a share of data.max_bad_share="
                    f"{self.max_bad_share:g}."
                )
            rank_zero_warn(f"{message} and are left out.")
        held_out = [bool(row["image"]) and hash_share(row["image"]) < self.val_share for row in rows]
        check_images(self.images, [row["image"] for row in rows if row["image"]])
        train, val = (
            AnnotationSet(
                (row for row, out in zip(rows, held_out, strict=True) if out == part), self.images
            )
            for part in (False, True)
        )
        return train, val

    def _row(self, entry: dict[str, Any], place: int) -> dict[str, Any] | None:
        said = list(entry.get("conversations", ()))
        # As LLaVA does: a conversation begins with the user. What no one answers is never trained on.
        said = said[1:] if said and said[0]["from"] == "gpt" else said
        said = said[: len(said) // 2 * 2]
        if not said or [turn["from"] for turn in said] != ["human", "gpt"] * (len(said) // 2):
            return None
        texts = [turn["value"].replace("<image>", "").strip() for turn in said]
        turns = list(zip(texts[::2], texts[1::2], strict=True))
        # Ids of the mixture repeat; with the place they do not.
        return {"id": f"{place}/{entry.get('id', '')}", "image": entry.get("image"), "turns": turns}


class CocoCaptions(CaptionData):
    """COCO Captions (arXiv 1504.00325): five captions an image, trained on `captions_per_image` at a time.

    ``annotations`` is Karpathy's ``dataset_coco.json``, whose split is used (train and restval for
    training, val held out, test for `test`), or an official ``captions_train2017.json``, of which
    `val_share` of the images is held out.

    Args:
        annotations: The JSON file.
        images: Folder with the images; in Karpathy's file ``filepath/filename`` is relative to it.
        val_share: Share of the images of an official file that is held out, by a hash of the name.
    """

    def __init__(self, annotations: str, images: str, val_share: float = 0.04, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.annotations, self.images = Path(annotations).expanduser(), Path(images).expanduser()
        self.val_share = val_share
        self.save_hyperparameters()

    def datasets(self) -> tuple[RecordSet, RecordSet]:
        data = read_json(self.annotations, "data.annotations")
        parts = self._karpathy(data) if "annotations" not in data else self._official(data)
        check_images(self.images, [row["image"] for rows in parts.values() for row in rows])
        sets = {name: AnnotationSet(iter(rows), self.images) for name, rows in parts.items()}
        self._test_set = sets.get("test", sets["val"])
        return sets["train"], sets["val"]

    def test_dataset(self) -> RecordSet:
        return self._test_set

    @staticmethod
    def _karpathy(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        parts: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
        for image in data["images"]:
            name = "/".join(filter(None, [image.get("filepath"), image["filename"]]))
            captions = [" ".join(sentence["raw"].split()) for sentence in image["sentences"]]
            split = {"restval": "train"}.get(image["split"], image["split"])
            parts[split].append({"id": name, "image": name, "captions": captions})
        return parts

    def _official(self, data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        captions = defaultdict(list)
        for annotation in data["annotations"]:
            captions[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        parts: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        for image in data["images"]:
            name = image["file_name"]
            part = "val" if hash_share(name) < self.val_share else "train"
            if captions[image["id"]]:
                parts[part].append({"id": name, "image": name, "captions": captions[image["id"]]})
        return parts


def read_json(path: Path, option: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file '{path}'.")
    with path.open(encoding="utf-8") as file:
        return json.load(file)


def check_images(folder: Path, names: Sequence[str], count: int = 64) -> None:
    """Looks for a few of the images, evenly spaced: a wrong folder is met before training.

    Raises:
        FileNotFoundError: one is missing.
    """
    for name in names[:: max(1, len(names) // count)]:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"data.images: '{folder}' has no '{name}', which data.annotations names. Give the folder "
                "that the names are relative to, or fetch the missing images."
            )
