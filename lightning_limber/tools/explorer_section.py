"""The explorer of image tokens in the report: a page's section made of what probes left; no torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from lightning_limber.assets import ASSETS

SMALL = 1_000_000
"""Bytes of one run in the page up to which its first probe stands beside the last."""


def explorer_section(runs: Iterable[tuple[str, Path]]) -> str:
    """HTML, style, data and script; "" where no run has an explorer's file.

    Args:
        runs: Name and folder of each run.
    """
    kept = [{"name": name, "epochs": epochs} for name, folder in runs if (epochs := read_epochs(folder))]
    if not kept:
        return ""
    html, style, script = (
        (ASSETS / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    # A name may hold "</script>", or a placeholder of the page; escaped they are the same JSON.
    data = json.dumps(kept, separators=(",", ":")).replace("</", "<\\/").replace("{{", "{\\u007b")
    return (
        f"<style>\n{style}</style>\n{html}"
        f'<script id="explorer-data" type="application/json">{data}</script>\n<script>\n{script}</script>\n'
    )


def read_epochs(folder: Path) -> dict[int, str]:
    """The newest file of a run in base64, by its epoch; beside the oldest where both are small."""
    found = {int(path.stem.rpartition("_")[2]): path for path in folder.glob("explorer_epoch_*.gz")}
    ends = sorted({min(found), max(found)}) if found else []
    texts = {epoch: base64.b64encode(found[epoch].read_bytes()).decode() for epoch in ends}
    if sum(map(len, texts.values())) > SMALL:
        return {ends[-1]: texts[ends[-1]]}
    return texts
