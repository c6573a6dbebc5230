"""Published data sets of pictures on disk beside one JSON file: LLaVA's conversations, COCO's captions."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_limber.data.datamodule import CaptionData
from lightning_limber.data.fingerprint import Content, file_stamps
from lightning_limber.data.image_folder import hash_share, open_image
from lightning_limber.data.left_out import LeftOut
from lightning_limber.data.loader import PackedList, RecordSet
from lightning_limber.data.records import Record, Turns, UnreadableRecord, printable
from lightning_limber.data.text import clean_turn, sort_captions

CONVERSATIONS = (
    "a list of {id, image, conversations: [{from: human, value}, {from: gpt, value}, ...]}, in which human "
    "and gpt take turns, every answer is text, and the image is one path or missing"
)
CAPTIONS = (
    "Karpathy's {images: [{filename, split, sentences: [{raw}]}]} or COCO's {images: [{id, file_name}], "
    "annotations: [{image_id, caption}]}"
)


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

    def name(self, index: int) -> str:
        return self.packed[index]["id"]

    def has_image(self, index: int) -> bool:
        return bool(self.packed[index]["image"])

    def contents(self, times: bool) -> Iterator[Content]:
        images = [row["image"] for row in self.packed]
        stamps = iter(file_stamps([self.images / image for image in images if image], times))
        for row in self.packed:
            said = row.get("captions") or row["turns"]
            yield Content(row["id"], said, next(stamps) if row["image"] else "")

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

    Of a held-out image the first conversation is kept, so that every held-out record is another image.

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
        if not isinstance(entries, list):
            raise ValueError(f"data.annotations: '{self.annotations}' must hold {CONVERSATIONS}.")
        left_out = LeftOut(self.annotations, self.max_bad_share)
        train: list[dict[str, Any]] = []
        val: dict[str, dict[str, Any]] = {}
        for place, entry in enumerate(entries):
            # Ids of the mixture repeat; with the place they do not.
            name = printable(f"{place}/{entry.get('id', '')}" if isinstance(entry, dict) else f"{place}")
            try:
                row = {"id": name, **_conversation(entry)}
            except UnreadableRecord as error:
                left_out.record(name, error)
                continue
            if row["image"] and hash_share(row["image"]) < self.val_share:
                val.setdefault(row["image"], row)
            else:
                train.append(row)
        left_out.check(len(entries), CONVERSATIONS)
        check_images(self.images, [row["image"] for row in (*train, *val.values()) if row["image"]])
        return AnnotationSet(iter(train), self.images), AnnotationSet(iter(val.values()), self.images)


def _conversation(entry: Any) -> dict[str, Any]:
    """Image and turns of one entry.

    Raises:
        UnreadableRecord: it is no conversation.
    """
    if not isinstance(entry, dict):
        raise UnreadableRecord(f"an object is expected, found {type(entry).__name__}")
    image, said = entry.get("image"), entry.get("conversations")
    if not isinstance(image, (str, type(None))):
        raise UnreadableRecord(f"its image is {type(image).__name__}; one path is expected")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise UnreadableRecord("it has no list of `conversations` with {from, value} in it")
    # As LLaVA does: a conversation begins with the user. What no one answers is never trained on.
    said = said[1:] if said and said[0].get("from") == "gpt" else said
    said = said[: len(said) // 2 * 2]
    if not said or [turn.get("from") for turn in said] != ["human", "gpt"] * (len(said) // 2):
        raise UnreadableRecord("human and gpt do not take turns")
    texts = [clean_turn(turn.get("value"), f"turn of {turn['from']}") for turn in said]
    texts = [text.replace("<image>", "").strip() for text in texts]
    if not all(texts[1::2]):
        raise UnreadableRecord("an answer is empty")
    return {"image": image or None, "turns": list(zip(texts[::2], texts[1::2], strict=True))}


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
        images = data.get("images") if isinstance(data, dict) else None
        official = isinstance(data, dict) and "annotations" in data
        if not isinstance(images, list) or not (
            official or any(_has(image, "sentences") for image in images)
        ):
            raise ValueError(
                f"data.annotations: '{self.annotations}' has no captions. Expected: {CAPTIONS}."
            )
        left_out = LeftOut(self.annotations, self.max_bad_share)
        said = self._annotations(data["annotations"], left_out) if official else None
        parts: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "val": {}, "test": {}}
        for place, image in enumerate(images):
            name = f"image {place}"
            try:
                name, split, values = _karpathy(image) if said is None else self._official(image, said)
                captions, reasons = sort_captions(values)
                if not captions:
                    raise UnreadableRecord(reasons[0] if reasons else "no caption")
            except UnreadableRecord as error:
                left_out.record(name, error)
                continue
            for why in reasons:
                left_out.caption(name, why)
            row = {"id": printable(name), "image": name, "captions": []}
            parts[split].setdefault(name, row)["captions"] += captions
        left_out.check(len(images), CAPTIONS)
        check_images(self.images, [name for rows in parts.values() for name in rows])
        sets = {part: AnnotationSet(iter(rows.values()), self.images) for part, rows in parts.items()}
        self._test_set = sets["test"] if len(sets["test"]) else sets["val"]
        return sets["train"], sets["val"]

    def test_dataset(self) -> RecordSet:
        return self._test_set

    def _annotations(self, annotations: Any, left_out: LeftOut) -> dict[Any, list[Any]]:
        """Captions as they stand, by the image's id."""
        notes = annotations if isinstance(annotations, list) else []
        if not any(_has(note, "caption") for note in notes):
            keys = list(notes[0]) if notes and isinstance(notes[0], dict) else []
            raise ValueError(
                f"data.annotations: no annotation of '{self.annotations}' has a `caption` (keys: {keys}). "
                "Give COCO's captions_*.json, not its instances or keypoints."
            )
        said = defaultdict(list)
        for place, note in enumerate(notes):
            image = note.get("image_id") if isinstance(note, dict) else None
            if isinstance(image, (int, str)):
                said[image].append(note.get("caption"))
            else:
                left_out.caption(f"annotation {place}", "it has no `image_id`")
        return said

    def _official(self, image: Any, said: dict[Any, list[Any]]) -> tuple[str, str, list[Any]]:
        """Name, part and captions of one image."""
        name, key = (image.get("file_name"), image.get("id")) if isinstance(image, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(key, (int, str)):
            raise UnreadableRecord("it has no `file_name` and `id`")
        return name, "val" if hash_share(name) < self.val_share else "train", said.get(key, [])


def _karpathy(image: Any) -> tuple[str, str, list[Any]]:
    """Name, part and captions of one image in Karpathy's file."""
    if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
        raise UnreadableRecord("it has no `filename`")
    folder, sentences = image.get("filepath"), image.get("sentences")
    name = f"{folder}/{image['filename']}" if folder and isinstance(folder, str) else image["filename"]
    split = "train" if image.get("split") == "restval" else image.get("split")
    if split not in ("train", "val", "test"):
        raise UnreadableRecord(f"{name}: its split is {split!r}, not train, restval, val or test")
    if not isinstance(sentences, list):
        raise UnreadableRecord(f"{name}: it has no list of `sentences`")
    return name, split, [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def read_json(path: Path, option: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file '{path}'.")
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option}: '{path}' is no JSON in UTF-8, or it is cut: {error}") from error


def check_images(folder: Path, names: Sequence[str], count: int = 64) -> None:
    """Looks for a few of the images, evenly spaced: a wrong folder is met before training.

    Raises:
        FileNotFoundError: more than half of them are missing. (Fewer are left out as they are met.)
    """
    some = names[:: max(1, len(names) // count)]
    missing = [name for name in some if not os.path.isfile(folder / name)]
    if len(missing) > len(some) / 2:
        raise FileNotFoundError(
            f"data.images: '{folder}' has no '{missing[0]}', which data.annotations names "
            f"({len(missing)} of {len(some)} looked for are missing). Give the folder that the names are "
            "relative to, or fetch the missing images."
        )
