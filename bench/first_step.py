"""``python -m bench.first_step OUT fit ...``: a run to its first step, and where the seconds went.

Its own imports are light: those of the command line are part of what is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any


def main(out: Path, args: list[str]) -> None:
    """Runs the command line, writes seconds by part to `out` and leaves.

    ``BENCH_STARTED`` is the time at which the process was asked for, in seconds since the epoch.
    """
    start = float(os.environ["BENCH_STARTED"])
    seconds: dict[str, float] = {"interpreter": time.time() - start}

    def timed(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - begin

        setattr(owner, name, wrapper)

    begin = time.perf_counter()
    from lightning_limber import cli
    from lightning_limber.probe import load, sanity_check

    seconds["imports"] = time.perf_counter() - begin
    limber: Any = cli.Limber
    timed(cli.LimberCLI, "parse_arguments", "config")
    timed(limber, "configure_model", "models")
    timed(load, "load_saes", "saes")
    timed(sanity_check, "measure_once", "sanity_check")
    timed(load.Probe, "run", "probe")
    marks: list[float] = []

    def on_train_epoch_start(self: Any) -> None:
        marks.append(time.perf_counter())

    before = limber.on_train_batch_start

    def on_train_batch_start(self: Any, batch: Any, batch_idx: int) -> Any:
        marks.append(time.perf_counter())
        return before(self, batch, batch_idx)

    def on_train_batch_end(self: Any, *args: Any) -> None:
        epoch, batch, end = *marks, time.perf_counter()
        seconds.update(first_batch=batch - epoch, first_step=end - batch)
        total = time.time() - start
        seconds.update(rest=total - sum(seconds.values()), total=total)
        out.write_text(json.dumps(seconds))
        sys.stdout.flush()
        os._exit(0)  # Nothing after the first step is of interest.

    limber.on_train_epoch_start = on_train_epoch_start
    limber.on_train_batch_start = on_train_batch_start
    limber.on_train_batch_end = on_train_batch_end
    cli.main(args)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
