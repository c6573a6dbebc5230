"""What to measure on a GPU, in one command of at most ``--minutes``: training, the probe, and their peers.

Pieces are done in order of worth, each as ``train`` or ``probe`` does it alone. A piece is begun if the
longest one so far would end in time, and rounds stop when the time is up; what is left out and what fails
is listed. After each piece the JSON is written anew, so that whoever stops the command keeps what is done.

MFU counts the FLOPs that the maths needs (``needed_flops_per_sample``: 4N a token, since frozen weights
need no gradient of their own) against the card's peak, ``share_of_matmul_4n`` against what matrix products
reach on the spot. Peak memory is the allocator's, of a contender alone; on a CPU, where this command only
shows that it runs, it is the whole process'.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace
from importlib import import_module
from typing import NamedTuple

import torch

from bench.measure import Row
from bench.sizes import Setup


class Piece(NamedTuple):
    """One part: a command of the bench, captions of each image, and contenders."""

    command: str
    captions: int
    names: list[str]


PIECES = {
    "train": Piece("train", 1, ["limber", "llava-bf16"]),
    "probe": Piece("probe", 1, ["limber", "saelens"]),
    "train, 5 captions": Piece("train", 5, ["limber-shared", "limber", "llava-bf16"]),
    "train, ways": Piece("train", 1, ["limber", "limber-step", "limber-compiled"]),
    "train, peers": Piece("train", 1, ["limber", "llava-bf16-weights", "plain-bf16"]),
    "probe, ways": Piece("probe", 1, ["limber", "limber-float32", "limber-first"]),
}
"""By name, the one that is worth most first."""


def main(setup: Setup) -> Row:
    """Measures as many pieces as there is time for."""
    found: Row = {"seconds": {}, "left_out": [], "failed": {}, "pieces": {}, "results": []}
    for label, piece in PIECES.items():
        started = time.monotonic()
        if started + max(found["seconds"].values(), default=0.0) > setup.until:
            found["left_out"].append(label)
            continue
        print(f"{label}, {setup.until - started:.0f} s are left", file=sys.stderr)
        size = setup.size.many_tokens() if piece.captions > 1 else setup.size
        own = replace(setup, size=size, captions=piece.captions, only=piece.names)
        try:
            of_piece = import_module(f"bench.{piece.command}").main(own)
        except Exception as error:  # Whatever it is, the other pieces may work.
            found["failed"][label] = f"{type(error).__name__}: {error}"
        else:
            found["results"] += [{"piece": label, **row} for row in of_piece.pop("results")]
            found["pieces"][label] = {**piece._asdict(), **of_piece}
        found["seconds"][label] = time.monotonic() - started
        gc.collect()
        if setup.device == "cuda":
            torch.cuda.empty_cache()
        if setup.json:
            setup.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


COLUMNS = (
    "piece name samples_per_s images_per_s step_s step_s_p10 step_s_p90 speedup speedup_min speedup_max "
    "mfu_4n share_of_matmul_4n peak_bytes"
).split()
