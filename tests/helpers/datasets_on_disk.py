"""Published data sets, written in tiny in their own formats: `count` training records each."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from lightning_limber.data import CocoCaptions, LLaVAConversations

SMALL = {"batch_size": 4, "val_batch_size": 4, "num_workers": 2}
COLOURS = ["red", "green", "blue", "yellow", "white", "black"]


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (16, 12), (i, 0, 0))


def caption(i: int) -> str:
    return "a " + " ".join(["small"] * (i % 5)) + f" {COLOURS[i % 6]} circle ."


def jpg(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


# -- writers of each format: `count` training records ------------------------------------------------


def write_llava(root: Path, count: int) -> LLaVAConversations:
    entries = []
    for i in range(count + 8):
        turns = [
            {"from": "human", "value": "<image>\ndescribe the picture" if i % 2 else "describe\n<image>"},
            {"from": "gpt", "value": caption(i)},
        ]
        if i % 3 == 0:
            turns += [{"from": "human", "value": "dog"}, {"from": "gpt", "value": "cat"}]
        entry = {"id": f"{i // 2}", "conversations": turns}
        if i % 4 != 3:
            entry["image"] = f"part/{i}.png"
            (root / "part").mkdir(exist_ok=True)
            picture(i).save(root / entry["image"])
        entries.append(entry)
    (root / "chat.json").write_text(json.dumps(entries))
    return LLaVAConversations(str(root / "chat.json"), str(root), val_share=0.15, **SMALL)


def write_karpathy(root: Path, count: int) -> CocoCaptions:
    images = []
    for i in range(count + 8):
        split = ("val" if i % 2 else "test") if i >= count else ("restval" if i % 3 else "train")
        sentences = [{"raw": f"{caption(i)} {word}"} for word in ("one", "two", "three", "cat", "dog")]
        images.append(
            {"filepath": "val2014", "filename": f"{i}.png", "split": split, "sentences": sentences}
        )
        (root / "val2014").mkdir(exist_ok=True)
        picture(i).save(root / f"val2014/{i}.png")
    (root / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return CocoCaptions(str(root / "dataset_coco.json"), str(root), **SMALL)
