"""``python -m bench train|probe|scale|start|data|gpu``: see this package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch

import bench
from bench import measure
from bench.sizes import SIZES, Setup, write_models


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench", description=bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("train", "probe", "scale", "start", "data", "gpu"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="gpu: cuda, else cpu")
    parser.add_argument("--size", choices=SIZES, help="gpu: venhoff, else default")
    parser.add_argument("--repeats", type=int, default=5, help="rounds in which all contenders run")
    parser.add_argument("--minutes", type=float, default=10, help="most that gpu may take")
    parser.add_argument("--steps", type=int, help="timed steps of a contender in a round (train)")
    parser.add_argument("--batch_size", type=int, help="images in a training step")
    parser.add_argument("--num_images", type=int, help="probed images (probe, scale)")
    captions = "captions of each image; more than one: with all image tokens (train)"
    parser.add_argument("--captions", type=int, default=1, help=captions)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders; the first is compared with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    options = parser.parse_args(args)
    gpu = options.command == "gpu"
    options.device = options.device or ("cuda" if gpu else "cpu")
    options.size = options.size or ("venhoff" if gpu else "default")
    if options.size == "venhoff" and options.device != "cuda":
        parser.error("--size venhoff needs --device cuda: a 2.6B-parameter model at full length.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    return options


def main(args: list[str] | None = None) -> dict[str, Any]:
    started = time.monotonic()
    options = parse(args)
    gpu = options.command == "gpu"
    size = SIZES[options.size]
    if options.captions > 1:
        size = size.many_tokens()
    given = {name: getattr(options, name) for name in ("batch_size", "num_images", "steps")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    about = measure.machine(options.device)
    command = import_module(f"bench.{options.command}")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        setup = Setup(size, folder, options.device, options.repeats, options.captions, options.only)
        if gpu:
            until = started + 60 * options.minutes
            setup = replace(setup, until=until, json=options.json, in_process=True)
        write_models(setup)
        # Features and indices are kept in the cache; the user's own is left alone.
        with patch.dict(os.environ, LIGHTNING_LIMBER_CACHE=str(folder / "cache")):
            found = command.main(setup)
    settings = {"size": options.size, "repeats": options.repeats, "captions": options.captions}
    settings |= {"batch_size": size.batch_size, "num_images": size.num_images, "steps": size.steps}
    result = {"bench": options.command, **about, "settings": settings, **found}
    for key, value in result.items():
        if key != "results":
            print(f"{key}: {value}")
    table = pd.DataFrame(result["results"]).reindex(columns=command.COLUMNS)
    print(table.to_string(index=False, na_rep="-", float_format="{:,.4g}".format))
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    elif gpu:
        print(text)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
