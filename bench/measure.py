"""Clocks, matmul rates, memory, and what is said about the machine."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Laps = Callable[[int], list[float]]
"""Runs that many timed steps and returns the seconds of each."""
Row = dict[str, Any]


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


def alternate(contenders: dict[str, Laps], repeats: int, steps: int) -> dict[str, list[list[float]]]:
    """Seconds of each step by contender and round; the contenders take turns within a round."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(repeats):
        for name, run in contenders.items():
            rounds[name].append(run(steps))
            median = statistics.median(rounds[name][-1])
            print(f"  round {number + 1}/{repeats}  {name:20} {1000 * median:10.1f} ms", file=sys.stderr)
    return rounds


def spread(values: Sequence[float]) -> tuple[float, float]:
    """10th and 90th percentile."""
    tensor = torch.tensor(values, dtype=torch.float64)
    low, high = tensor.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    return low, high


def step_times(rounds: list[list[float]]) -> Row:
    """Median and spread over all steps of all rounds."""
    every = [lap for laps in rounds for lap in laps]
    low, high = spread(every)
    return {"step_s": statistics.median(every), "step_s_p10": low, "step_s_p90": high}


def speedup(ours: list[list[float]], peer: list[list[float]]) -> Row:
    """How many times faster we are: the median over rounds of the ratio within each, and its range."""
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(ours, peer, strict=True)]
    return {"speedup": statistics.median(ratios), "speedup_min": min(ratios), "speedup_max": max(ratios)}


def matmul_rate(device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]) -> float:
    """FLOP/s that `torch.matmul` reaches on the best of the shapes (m, k, n)."""
    best = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(k, n, device=device, dtype=dtype)
        clock = Clock(device)
        torch.matmul(a, b)
        for _ in range(9):
            clock.mark()
            torch.matmul(a, b)
        clock.mark()
        best = max(best, 2 * m * k * n / statistics.median(clock.laps()))
    return best


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a module-level function in a fresh interpreter: memory is that of one contender alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory(device: str, run: Callable[[], Any]) -> Row:
    """Bytes before `run` and at its peak: allocated on a GPU, else the resident set of this process.

    Linux can forget the peak of what came before (building the models); elsewhere that is part of the
    number.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        built = torch.cuda.memory_allocated()
        run()
        return {"built_bytes": built, "peak_bytes": torch.cuda.max_memory_allocated()}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    built = _resident_peak()
    run()
    return {"built_bytes": built, "peak_bytes": _resident_peak()}


def _resident_peak() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine(device: str) -> Row:
    """Hardware, versions and date: what a number means nothing without."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
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
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def table(rows: list[Row], columns: Sequence[str]) -> str:
    """Rows under their column names; figures are cut to what can be read."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

    lines = [[name for name in columns], *[[cell(row.get(name)) for name in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
