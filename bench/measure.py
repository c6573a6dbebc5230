"""Clocks, matmul rates, memory, and what is said about the machine."""

from __future__ import annotations

import importlib.metadata
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch.utils.benchmark import Timer

Laps = Callable[[int], list[float]]
"""Runs that many timed steps and returns the seconds of each."""
Row = dict[str, Any]
PEAK_BFLOAT16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""FLOP/s of dense bfloat16 products with float32 sums, from NVIDIA's data sheets; the first name that a
card's name contains."""


class Clock:
    """Seconds between marks, as the device lives through them: on CUDA nothing waits for a mark."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def compare(
    contenders: dict[str, Laps],
    repeats: int,
    steps: int = 1,
    each_round: Callable[[], Any] = lambda: None,
    until: float = math.inf,
) -> list[Row]:
    """Lets the contenders take turns, up to `repeats` times; a row for each.

    No round but the first is begun after the time `until`, of `time.monotonic`.

    ``step_s`` is the median over all steps with its 10th and 90th percentile. ``speedup`` says how many
    times faster the first contender is: the median over rounds of the ratio within each, and its range.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(repeats):
        if number and time.monotonic() > until:
            break
        each_round()
        for name, run in contenders.items():
            rounds[name].append(run(steps))
            seconds = median(rounds[name][-1])
            print(f"  round {number + 1}/{repeats}  {name:20} {1000 * seconds:10.1f} ms", file=sys.stderr)
    first = next(iter(rounds.values()))
    rows: list[Row] = []
    for name, laps in rounds.items():
        ratios = [median(b) / median(a) for a, b in zip(first, laps, strict=True)]
        row = {"name": name, "rounds": len(laps), **spread("step_s", sum(laps, []))}
        row |= {"speedup": median(ratios), "speedup_min": min(ratios), "speedup_max": max(ratios)}
        rows.append(row)
    return rows


def spread(name: str, values: Sequence[float]) -> Row:
    """Median, 10th and 90th percentile."""
    low, middle, high = pd.Series(values).quantile([0.1, 0.5, 0.9])
    return {name: middle, f"{name}_p10": low, f"{name}_p90": high}


def matmul_rate(device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    """FLOP/s that `torch.matmul` reaches on the best of the shapes (m, k, n)."""
    rates = []
    for m, k, n in shapes:
        pair = {"a": torch.randn(m, k, device=device, dtype=dtype)}
        pair["b"] = torch.randn(k, n, device=device, dtype=dtype)
        timer = Timer("a @ b", globals=pair, num_threads=torch.get_num_threads())
        rates.append(2 * m * k * n / median(timer.timeit(1).mean for _ in range(9)))
    return max(rates)


def peak_rate() -> float | None:
    """FLOP/s of bfloat16 products that this GPU's data sheet promises; None: not known, or no GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in PEAK_BFLOAT16.items() if part in name), None)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a module-level function in a fresh interpreter: memory is that of one contender alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(device: str, run: Callable[[], Any]) -> Row:
    """Bytes before `run` and at its peak: allocated on a GPU, else the resident set of this process.

    Linux can forget the peak of what came before (building the models); elsewhere that is part of the
    number.
    """
    peak: Callable[[], int]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        built, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        built, peak = _resident_peak(), _resident_peak
    run()
    return {"built_bytes": built, "peak_bytes": peak()}


def allocated(device: str) -> int:
    """Bytes of a GPU's memory that tensors take; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _resident_peak() -> int:
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine(device: str) -> Row:
    """Hardware, versions and date: what a number means nothing without."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name")[1].split(":")[1].split("\n")[0].strip()
    hardware: Row = {
        "device": device,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "load_at_start": os.getloadavg()[0],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        hardware |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    packages = ("torch", "lightning", "transformers", "sae-lens", "transformer-lens", "lightning-limber")
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):  # A checkout need not be installed.
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **versions},
    }
