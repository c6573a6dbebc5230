"""``python -m dev.hypotheses runs/scenes``: predictions about adapter designs, each with the numbers that
confirm or falsify it.

The folder is a grid's (configs/lab/scenes.yaml). Ratios over seeds are means of their logarithms.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lightning_limber.tools.compare import Run, table_value
from lightning_limber.tools.grid_page import ends, key_of, level_of, read_folder
from lightning_limber.tools.intervals import Interval

Arms = dict[str, list[Run]]
LOSS = "held_out/loss"


def main(folder: Path) -> None:
    arms: Arms = {}
    for arm in sorted(path for path in folder.iterdir() if path.is_dir()):
        seeds = sorted(path for path in arm.glob("seed_*") if (path / "probe.csv").is_file())
        if seeds:
            arms[arm.name] = [read_folder(seed) for seed in seeds]
    for name, runs in arms.items():
        print(f"{name}: {len(runs)} seed(s), loss {shown(mean(runs, LOSS))}")
    for hypothesis, numbers in HYPOTHESES.items():
        print(f"\n{hypothesis}")
        try:
            print("\n".join(f"  {line}" for line in numbers(arms)))
        except KeyError as missing:
            print(f"  not measured: there is no arm {missing} yet")


# -- hypotheses ---------------------------------------------------------------------------------------


def dilution(arms: Arms) -> Iterator[str]:
    for run in arms["linear"]:
        ratios = by_layer(run, "l0", "image", "words_long")
        yield f"{run['folder'].name}: log ratio of l0 by layer {ratios}"


def length(arms: Arms) -> Iterator[str]:
    for arm in ("linear", "fixed"):
        for run in arms[arm]:
            ratios = {k: math.exp(v) for k, v in by_layer(run, "l0", "image", "words").items() if k <= 6}
            yield f"{arm}, {run['folder'].name}: l0 over that of words {rounded(ratios)}"


def inertia(arms: Arms) -> Iterator[str]:
    yield f"hold_fixed minus linear: {shown(minus(arms['hold_fixed'], arms['linear'], LOSS))}"
    yield f"fixed minus linear: {shown(minus(arms['fixed'], arms['linear'], LOSS))}"
    yield f"hold_fixed minus fixed: {shown(minus(arms['hold_fixed'], arms['fixed'], LOSS))}"


def reading_depth(arms: Arms) -> Iterator[str]:
    for arm in ("enter_6", "enter_12", "enter_18"):
        yield f"{arm} minus linear: {shown(minus(arms[arm], arms['linear'], LOSS))}"
    yield f"enter_18 minus enter_12: {shown(minus(arms['enter_18'], arms['enter_12'], LOSS))}"
    layers = arms["linear"][0]["layers"]
    use = {k: shown(mean(arms["linear"], f"probe/use@{k}")) for k in layers}
    yield f"use of linear by layer: {use}"


def meaning(arms: Arms) -> Iterator[str]:
    for layer in (0, 3, 15):
        yield f"layer {layer}: {shown(mean(arms['linear'], f'probe/neighbour_lift@{layer}'))}"
    first, last = (mean(arms["linear"], f"probe/neighbour_lift@{layer}") for layer in (0, 15))
    if first and last:
        yield f"layer 15 over layer 0: {last[0] / first[0]:.2f}"


def penalty(arms: Arms) -> Iterator[str]:
    for arm in ("direction", "norm"):
        yield f"{arm} minus linear: loss {shown(minus(arms[arm], arms['linear'], LOSS))}"
    for layer in arms["norm"][0]["layers"]:
        endpoint = f"probe/direction_fvu@{layer}"
        of_arm = {arm: shown(mean(arms[arm], endpoint)) for arm in ("direction", "norm", "linear")}
        difference = shown(minus(arms["direction"], arms["norm"], endpoint))
        yield f"error at text's length, layer {layer}: {of_arm}, direction minus norm {difference}"


def vocabulary(arms: Arms) -> Iterator[str]:
    yield f"vocabulary minus fixed: {shown(minus(arms['vocabulary'], arms['fixed'], LOSS))}"
    for arm, runs in arms.items():
        if table_value(runs[0], -1, key_of("probe/neighbour_lift@3")):
            yield f"neighbour lift of {arm} at layer 3: {shown(mean(runs, 'probe/neighbour_lift@3'))}"


# -- numbers ------------------------------------------------------------------------------------------


def value(run: Run, metric: str, layer: int, group: str = "image") -> float:
    found = table_value(run, -1, ("probe", metric, layer), group)
    return math.nan if found is None else found[0]


def by_layer(run: Run, metric: str, group: str, other: str) -> dict[int, float]:
    """Logarithm of a group's number over another's."""
    pairs = {k: (value(run, metric, k, group), value(run, metric, k, other)) for k in run["layers"]}
    return rounded({k: math.log(a / b) for k, (a, b) in pairs.items()})


def mean(runs: Sequence[Run], endpoint: str) -> Interval | None:
    return ends(level_of([runs], key_of(endpoint)))


def minus(runs: Sequence[Run], base: Sequence[Run], endpoint: str) -> Interval | None:
    """The difference with its interval over images and seeds."""
    return ends(level_of([runs, base], key_of(endpoint)))


def rounded(numbers: dict[int, float]) -> dict[int, float]:
    return {k: round(v, 3) for k, v in numbers.items()}


def shown(interval: Interval | None) -> str:
    return "not measured" if interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(*interval)


HYPOTHESES: dict[str, Callable[[Arms], Iterator[str]]] = {
    "H1: image tokens are as sparse as random words of their norms (|log ratio of l0| < .15 "
    "everywhere); falsified if sparser by more than .25 at two or more layers.": dilution,
    "H2: length is the early mismatch: `fixed` within 25 % of `words` in l0 at layers 0 to 6; "
    "falsified if more than twice theirs at layer 3.": length,
    "H3: length is needed to persist: `hold_fixed` within .07 nats of linear, `fixed` at least .1 "
    "worse; falsified if `hold_fixed` is no better than `fixed`.": inertia,
    "H4: entering at layer k costs what `use` says is read before k: 6 and 12 within .07 of linear, "
    "18 worse by .05 to .3; falsified if 12 is worse by more than .2, or 18 better than 12.": reading_depth,
    "H5: meaning is there at layer 0: neighbour lift of linear at least 1.4 (low end above 1.2), and "
    "no rise beyond 25 % to layer 15; falsified below 1.1, or if it doubles by layer 15.": meaning,
    "H6: a penalty by SAEs is one of norm: at equal loss `direction` is no better than `norm` in the "
    "error at text's length, at layers without the penalty; falsified if better by over 20 %.": penalty,
    "H7: convex combinations of words align best and caption worst; falsified if the loss is within "
    ".07 of `fixed`.": vocabulary,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
