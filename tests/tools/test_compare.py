"""Paired differences: against second computations, against the truth, and what a table says of them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_limber.captioning import scores
from lightning_limber.tools import compare, intervals
from lightning_limber.tools.compare import (
    INDEPENDENT,
    PAIRED,
    PAIRED_SEEDS,
    by_seed,
    comparison,
    contrast,
    differences,
    group_name,
)
from lightning_limber.tools.intervals import bootstrap_weights, two_level
from lightning_limber.tools.report import main, read_run
from lightning_limber.tools.seeds import merged
from lightning_limber.utils.by_image import add_arrays, images_file

LAYERS = (0, 9)


def draw(seed: int, images: int, runs: int = 2, shift: float = 0.3, own: float = 0.3) -> np.ndarray:
    """[runs, I, 2] sums: token means of an image differ by 1, those of an image's runs by `own`."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(4, 12, images).astype(float)
    means = 5 + draw.normal(0, 1, images) + shift * np.arange(runs)[:, None]
    means = means + draw.normal(0, own, (runs, images))
    return np.stack([means * tokens, np.broadcast_to(tokens, means.shape)], axis=-1)


def write_run(
    folder: Path, sums: dict[str, np.ndarray], seed: int = 0, lr: float = 0.1, names=None
) -> Path:
    """A run of one epoch after the start, whose every part has these sums [I, 2] by part/metric."""
    folder.mkdir(parents=True)
    some = next(iter(sums.values()))
    names = [f"val/{i:03}" for i in range(len(some))] if names is None else names
    rows: dict[str, list[list]] = {"probe.csv": [], "validation.csv": [], "captions.csv": []}
    for epoch in (0, 1):
        for name, of_metric in sums.items():
            # An interval of a table's, that no paired one could be mistaken for.
            part, metric = name.split("/", 1)
            of_metric = of_metric * [1 + epoch, 1]
            value = of_metric[:, 0].sum() / of_metric[:, 1].sum()
            numbers = [value, value - 100, value + 100]
            if part == "probe":
                rows["probe.csv"] += [["r", epoch, layer, "image", metric, *numbers] for layer in LAYERS]
                of_metric = np.broadcast_to(of_metric, (1, len(LAYERS), *of_metric.shape))
                arrays = {"groups": ["image"], "layers": list(LAYERS), metric: of_metric.astype(np.float32)}
            else:
                row = ["r", epoch, *(([4 * epoch, "val"]) if part == "held_out" else ["model"])]
                table = "validation.csv" if part == "held_out" else "captions.csv"
                rows[table].append([*row, metric, *numbers])
                arrays = {metric: of_metric}
            add_arrays(images_file(folder, epoch), part, {"names": names, **arrays})
    heads = {
        "probe.csv": "run epoch layer group metric value low high",
        "validation.csv": "run epoch step split metric value low high",
        "captions.csv": "run epoch writer metric value low high",
    }
    for name, head in heads.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([head.split(), *rows[name]])
    config = {"model": {"lr": lr}, "trainer": {"logger": folder.name}, "seed_everything": seed}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


PARTS = ("held_out/loss", "captions/slots/all", "probe/l0")


def everywhere(sums: np.ndarray) -> dict[str, np.ndarray]:
    return dict.fromkeys(PARTS, sums)


# -- statistics ---------------------------------------------------------------------------------------


def test_a_paired_interval_by_hand():
    """Images repeated as often as they were drawn; percentiles of the difference."""
    a, b = draw(0, 20)
    found = two_level(b[None], a[None])
    samples = []
    for row in bootstrap_weights(20).astype(int):
        rows = np.repeat(np.arange(20), row)
        samples.append(b[rows, 0].sum() / b[rows, 1].sum() - a[rows, 0].sum() / a[rows, 1].sum())
    assert len(samples) == 1001
    assert found == pytest.approx((samples[0], *np.percentile(samples[1:], [2.5, 97.5])), rel=1e-6)


def test_seeds_are_students_t_beside_the_images():
    """Welch's interval of scipy on the seeds' values, and the bootstrap of the means, added in squares."""
    ours, base = draw(1, 30, runs=4, shift=0.2), draw(2, 30, runs=3, shift=0.1)
    value, low, high = two_level(ours, base)
    means = [sums[..., 0].sum(1) / sums[..., 1].sum(1) for sums in (ours, base)]
    welch = stats.ttest_ind(*means, equal_var=False).confidence_interval(0.95)
    ratios = [
        [(w @ s)[0] / (w @ s)[1] for s in sums] for sums in (ours, base) for w in bootstrap_weights(30)
    ]
    ratios = [np.mean(r) for r in ratios]
    ends = np.percentile(np.subtract(ratios[:1001], ratios[1001:])[1:], [2.5, 97.5])
    assert value == pytest.approx(means[0].mean() - means[1].mean(), rel=1e-9)
    assert value - low == pytest.approx(np.hypot(value - ends[0], value - welch.low), rel=1e-6)
    assert high - value == pytest.approx(np.hypot(ends[1] - value, welch.high - value), rel=1e-6)
    # One group alone: Student's. One seed says nothing of others.
    _, low, _ = two_level(ours)
    ends = np.percentile(ratios[1:1001], 2.5)
    student = stats.sem(means[0]) * stats.t.ppf(0.975, 3)
    assert means[0].mean() - low == pytest.approx(np.hypot(means[0].mean() - ends, student), rel=1e-6)
    alone = [(w @ base[0])[0] / (w @ base[0])[1] for w in bootstrap_weights(30)]
    expected = np.percentile(np.subtract(ratios[:1001], alone)[1:], [2.5, 97.5])
    assert two_level(ours, base[:1])[1:] == pytest.approx(tuple(expected), rel=1e-6)


def test_paired_intervals_cover_and_are_narrow():
    """In 95 of 100 pairs of runs. As independent they are some five times as wide, and cover always."""
    pairs, covered, apart, widths = 1000, 0, 0, []
    for pair in range(pairs):
        a, b = draw(pair, 200)
        _, low, high = two_level(b[None], a[None])
        alone = [two_level(run[None]) for run in (b, a)]
        _, below, above = intervals.independent(*alone)
        covered += low <= 0.3 <= high
        apart += below <= 0.3 <= above
        widths.append((above - below) / (high - low))
    assert 0.93 <= covered / pairs <= 0.97
    assert apart == pairs
    assert 3 < np.mean(widths) < 7


def test_many_at_once_are_each_alone():
    """Also where they have not the same images: the third lacks two, and a ratio has no samples of NaN."""
    sums = np.stack([draw(seed, 30, runs=5) for seed in range(3)])
    sums[2, :, [4, 9]] = 0
    sums[1, 0, 1:] = 0  # Samples without the one image that has tokens.
    for base in (None, sums[:, 3:]):
        found = intervals.levels_of_many(sums[:, :3], base)
        alone = [intervals.levels(sums[k, :3], None if base is None else base[k]) for k in range(3)]
        for one, other in zip(found, alone, strict=True):
            assert one[:3] == pytest.approx(other[:3], rel=1e-12)
            assert one.interval() == pytest.approx(other.interval(), rel=1e-12)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_intervals_over_few_seeds_cover(seeds):
    """Seeds that differ by a third of an interval over images: never less than 95 in 100 (400 worlds)."""
    covered = over_images = 0
    for world in range(400):
        sums = draw(world, 60, runs=2 * seeds, shift=0.0)
        effect = np.random.default_rng(world).normal(0, 0.1, 2 * seeds)
        sums[..., 0] += (effect[:, None] + 0.3 * (np.arange(2 * seeds) < seeds)[:, None]) * sums[..., 1]
        _, low, high = two_level(sums[:seeds], sums[seeds:])
        covered += low <= 0.3 <= high
        one = two_level(sums[:1], sums[seeds : seeds + 1])
        over_images += one[1] <= 0.3 <= one[2]
    assert covered / 400 >= 0.93
    assert over_images / 400 < 0.8


def test_a_p_value_is_that_of_its_interval():
    """Below 0.05 where the interval leaves 0 out; of images alone z, of seeds alone Welch's t."""
    seen = set()
    for world in range(60):
        ours, base = draw(world, 40, runs=3, shift=0), draw(world, 40, runs=6, shift=0)[3:]
        ours[..., 0] += 0.12 * ours[..., 1]
        found = intervals.levels(ours, base)
        _, low, high = found.interval()
        assert (found.p() < 0.05) == (low > 0 or high < 0)
        seen.add(low > 0)
    assert seen == {True, False}
    images = intervals.TwoLevel(1.0, 0.4, 1.5, [np.ones(1)])
    assert images.p() == pytest.approx(2 * stats.norm.sf(1.959964 / 0.6), abs=1e-5)
    seeds = [np.array([1.0, 1.3, 1.4]), np.array([0.5, 0.9, 1.2, 0.7])]
    value = seeds[0].mean() - seeds[1].mean()
    alone = intervals.TwoLevel(value, value, value, seeds)
    assert alone.p() == pytest.approx(stats.ttest_ind(*seeds, equal_var=False).pvalue, abs=1e-5)
    assert intervals.levels(ours, ours).p() == 1
    assert intervals.TwoLevel(0.0, 0.0, 0.0, [np.ones(3)]).p() == 1


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_p_values_are_not_too_small_where_nothing_differs(seeds):
    """Of worlds in which seeds differ a little, and images do; runs of one seed differ by image alone."""
    worlds, found = 400, []
    for world in range(worlds):
        sums = draw(world, 60, runs=2 * seeds, shift=0.0)
        effect = np.random.default_rng(world).normal(0, 0.05 * (seeds > 1), (2 * seeds, 1))
        sums[..., 0] += effect * sums[..., 1]
        found.append(intervals.levels(sums[:seeds], sums[seeds:]).p())
    below = {level: np.mean(np.array(found) < level) for level in (0.01, 0.05, 0.2)}
    for level, share in below.items():  # Three standard errors of so many worlds.
        assert share <= level + 3 * np.sqrt(level * (1 - level) / worlds), below
    assert below[0.2] > 0.02  # Nor does it say nothing at all.


def test_holm_is_the_step_down_procedure():
    """An adjusted p-value is the least level at which the procedure, taken literally, rejects."""
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 11):
        p = random.uniform(0, 0.3, count) ** 2
        p[-1] = p[0]
        adjusted = intervals.holm(p.tolist())
        for level in random.uniform(0, 1, 50):
            rejected, order = set(), np.argsort(p, kind="stable")
            for step, place in enumerate(order):
                if p[place] > level / (count - step):
                    break
                rejected.add(place)
            assert rejected == {place for place in range(count) if adjusted[place] <= level}


def test_ratios_and_bleu_are_those_of_the_scores():
    torch.manual_seed(0)
    counts = torch.randint(1, 9, (30, 10)).double()
    weights = torch.tensor(bootstrap_weights(30))
    expected = scores.bleu(weights @ counts)
    np.testing.assert_allclose(intervals.ratio(weights.numpy() @ counts.numpy()), expected, rtol=1e-12)


def test_images_without_a_part_are_not_of_the_sample():
    a, b = draw(3, 24)
    nothing = np.zeros((40, 2))
    assert two_level(np.concatenate([b, nothing])[None], np.concatenate([a, nothing])[None]) == two_level(
        b[None], a[None]
    )


# -- runs' folders ------------------------------------------------------------------------------------


def test_runs_are_paired_by_name_whatever_the_order(tmp_path):
    a, b = draw(4, 25)
    order = np.random.default_rng(0).permutation(25)
    runs = [
        read_run(write_run(tmp_path / "a/v", everywhere(a))),
        read_run(write_run(tmp_path / "b/v", everywhere(b[order]), names=[f"val/{i:03}" for i in order])),
    ]
    expected = two_level(b[None] * [2, 1], a[None] * [2, 1])
    found = differences(runs[1:], runs[:1])
    assert found["held_out"]["loss"] == pytest.approx(expected, rel=1e-9)
    assert found["scores"]["slots/all"] == pytest.approx(expected, rel=1e-9)
    for layer, row in zip(LAYERS, found["metrics"]["l0"], strict=True):
        assert row == (layer, *(pytest.approx(x, rel=1e-6) for x in expected))
    assert found["over"] == {
        "metrics/l0": PAIRED,
        "scores/slots/all": PAIRED,
        "held_out/loss": PAIRED,
    }


def test_epochs_of_a_run_are_paired(tmp_path):
    a = draw(5, 25)[0]
    run = read_run(write_run(tmp_path / "a/v", everywhere(a)))
    found = differences([run], [run], (-1, 0))
    mean = a[:, 0].sum() / a[:, 1].sum()
    assert found["held_out"]["loss"][0] == pytest.approx(mean)  # It doubles.
    assert found["over"]["held_out/loss"] == PAIRED
    same = differences([run], [run])
    assert same["held_out"]["loss"] == same["scores"]["slots/all"] == (0, 0, 0)


@pytest.mark.parametrize("case", ["other images", "fewer images", "no file", "no sums of the metric"])
def test_what_cannot_be_paired_is_taken_as_independent(tmp_path, case):
    a, b = draw(6, 25)
    names = [f"val/{i:03}" for i in range(25)]
    if case == "other images":
        names = [f"test/{i}" for i in range(25)]
    if case == "fewer images":
        b, names = b[:20], names[:20]
    runs = [
        write_run(tmp_path / "a/v", everywhere(a)),
        write_run(tmp_path / "b/v", everywhere(b), names=names),
    ]
    if case == "no file":
        images_file(runs[1], 1).unlink()
    if case == "no sums of the metric":
        path = images_file(runs[1], 1)
        path.unlink()
        add_arrays(path, "probe", {"names": names, "groups": ["image"], "layers": list(LAYERS)})
    base, ours = map(read_run, runs)
    one = contrast([ours], [base], ("probe", "l0", 9))
    assert one.over == INDEPENDENT
    assert one.interval[2] - one.interval[0] == pytest.approx(100 * 2**0.5, rel=1e-6)


def test_runs_of_several_seeds_are_one_row(tmp_path, capsys):
    sums = draw(7, 40, runs=5)
    folders = [write_run(tmp_path / f"a/{i}", everywhere(sums[i]), seed=i) for i in range(3)]
    folders += [write_run(tmp_path / f"b/{i}", everywhere(sums[i]), seed=i, lr=0.2) for i in (3, 4)]
    main([*map(str, folders), "-o", "out.html"])
    text = capsys.readouterr().out.split("\n\n")
    scores_table, _, minus = text[1:]
    assert scores_table.splitlines()[0] == (
        "held-out images, 95 % over images (and seeds, where there are several)"
    )
    head, *rows = (re.split("  +", line) for line in scores_table.splitlines()[1:])
    assert [row[:2] for row in rows] == [["a", "3"], ["b", "2"]]
    ours, base = sums[3:] * [2, 1], sums[:3] * [2, 1]
    assert rows[0][head.index("loss")] == compare.in_brackets(two_level(base))
    head, *rows = (re.split("  +", line) for line in minus.splitlines()[1:])
    assert head == ["run", "loss", "slot accuracy", "l0 @0", "l0 @9", "over"]
    assert rows == [["b", *[compare.in_brackets(two_level(ours, base))] * 4, PAIRED_SEEDS]]
    page = json.loads(
        re.search(r'"application/json">(.*?)</script>', Path("out.html").read_text(), re.S)[1]
    )
    assert page["comparison"] == "\n\n".join(text[1:]).rstrip("\n")
    assert [run["name"] for run in page["runs"]] == ["a (3 seeds)", "b (2 seeds)"]
    [minus_first] = page["differences"]
    assert minus_first["metrics"]["l0"][1] == pytest.approx([9, *two_level(ours, base)], rel=1e-3)
    assert minus_first["over"]["metrics/l0"] == PAIRED_SEEDS


def test_a_group_is_shown_as_the_mean_and_its_seeds(tmp_path):
    sums = draw(11, 30, runs=3)
    folders = [write_run(tmp_path / f"a/{i}", everywhere(sums[i]), seed=i) for i in range(3)]
    runs = [read_run(folder) for folder in folders]
    for run, scale in zip(runs, (1, 2, 3), strict=True):
        run["scalars"] = {"train/loss": [(4, scale), (9, 10 * scale), (10 + scale, 0.0)]}
    shown = merged(runs)
    for epoch in (0, 1):
        expected = two_level(sums * [1 + epoch, 1])
        for found in (
            *shown["curves"]["l0"]["image"][epoch],
            shown["held_out"][epoch]["loss"],
            shown["scores"][epoch]["slots/all"],
        ):
            assert found == pytest.approx(expected, rel=1e-5)
        for seed, own in zip(shown["seeds"], sums, strict=True):
            value = (1 + epoch) * own[:, 0].sum() / own[:, 1].sum()
            assert seed["curves"]["l0"]["image"][epoch] == pytest.approx([value] * 2)
    assert [seed["seed"] for seed in shown["seeds"]] == ["0", "1", "2"]
    assert shown["summary"]["seed"] == "0, 1, 2"
    assert shown["scalars"] == {"train/loss": [(4, 2.0), (9, 20.0)]}  # Of the steps that all have.
    assert merged(runs[:1]) == {**runs[0], "seeds": []}
    # Of groups other than image tokens, which have no sums here: Student's t and the tables' intervals.
    other = [[(0.5 + seed, 0.4, 0.6)] * 2 for seed in range(3)]
    for run, curve in zip(runs, other, strict=True):
        run["curves"]["l0"]["text"] = {0: curve, 1: curve}
    value, _, _ = merged(runs)["curves"]["l0"]["text"][1][0]
    assert value == pytest.approx(1.5)


def test_the_name_of_a_group():
    def named(names: list[str]) -> str:
        return group_name([{"name": name} for name in names])

    assert named(["Linear-10/version_0", "Linear-11/version_0"]) == "Linear"
    assert named(["mlp2-0/version_0", "mlp2-1/version_0"]) == "mlp2"
    assert named(["late/seed_0", "late/seed_1"]) == "late"
    assert named(["default/version_0", "default/version_3"]) == "default/version"
    assert named(["1/a", "2/a"]) == "1/a"
    assert named(["Linear-10/version_0"]) == "Linear-10/version_0"


def test_a_run_that_is_not_as_far_is_none_of_the_group(tmp_path):
    sums = everywhere(draw(12, 10)[0])
    runs = [read_run(write_run(tmp_path / f"a/{i}", sums, seed=i)) for i in range(3)]
    runs[1]["epochs"] = [0]
    assert [[run["name"] for run in group] for group in by_seed(runs)] == [["a/0", "a/2"], ["a/1"]]


def test_seeds_without_sums_by_image(tmp_path):
    """Student's t on the tables' values, with the mean of their intervals."""
    sums = draw(8, 40, runs=3)
    folders = [write_run(tmp_path / f"a/{i}", everywhere(sums[i]), seed=i) for i in range(3)]
    for folder in folders:
        images_file(folder, 1).unlink()
    runs = [read_run(folder) for folder in folders]
    values = [2 * run[:, 0].sum() / run[:, 1].sum() for run in sums]
    value, low, high = compare.estimate(runs, ("held_out", "loss", None))
    student = stats.sem(values) * stats.t.ppf(0.975, 2)
    assert (value, value - low, high - value) == pytest.approx(
        (np.mean(values), *[np.hypot(100, student)] * 2)
    )


def test_only_seeds_make_a_group(tmp_path):
    sums = everywhere(draw(9, 10)[0])
    runs = [
        read_run(write_run(tmp_path / name, sums, seed, lr))
        for name, seed, lr in [("a/0", 0, 0.1), ("a/1", 1, 0.1), ("b/0", 0, 0.2), ("c/0", 0, 0.1)]
    ]
    # The last repeats the first: it is no other seed, of which an interval could be made.
    assert [[run["name"] for run in group] for group in by_seed(runs)] == [["a/0", "a/1"], ["b/0"], ["c/0"]]
    assert "seeds" in comparison(runs)
    assert "seeds" not in comparison(runs[2:])


def test_what_a_table_calls_nan_stays_nan(tmp_path):
    """Sums by image have a quotient where the metric says that it means nothing."""
    sums = draw(10, 20, runs=3)
    folders = [write_run(tmp_path / f"a/{i}", everywhere(sums[i]), seed=i) for i in range(2)]
    folders.append(write_run(tmp_path / "b/2", everywhere(sums[2]), lr=0.2))
    table = folders[0] / "probe.csv"
    lines = table.read_text().splitlines()
    lines = [
        line if ",9,image," not in line else ",".join([*line.split(",")[:5], "", "", ""]) for line in lines
    ]
    table.write_text("\n".join(lines) + "\n")
    runs = [read_run(folder) for folder in folders]
    assert np.isnan(compare.estimate(runs[:2], ("probe", "l0", 9))[0])
    assert contrast(runs[2:], runs[:2], ("probe", "l0", 9)) is None
    assert contrast(runs[2:], runs[:2], ("probe", "l0", 0)).over == PAIRED  # Of two seeds, and one.
    found = differences(runs[2:], runs[:2])
    assert [row[0] for row in found["metrics"]["l0"]] == [0]
    assert found["over"]["metrics/l0"] == PAIRED
