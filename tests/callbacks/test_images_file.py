"""``images_epoch_{n}.npz``: its sums are those behind the tables, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from parts import callback

from lightning_limber.data.held_out import spread, stand_in
from lightning_limber.models import limber
from lightning_limber.tools.compare import PAIRED, differences
from lightning_limber.tools.intervals import ratio
from lightning_limber.tools.report import read_run
from lightning_limber.utils.by_image import add_arrays

FLAGS = ["--trainer.max_steps=4", "--data.val_size=12", "--probe.num_images=11"]


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_sums_are_those_behind_the_tables(fit, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(limber, "rank_zero_info", said.append)
    cli = fit(*FLAGS, probe=True)
    folder = Path(cli.trainer.log_dir)
    found = arrays(folder / "images_epoch_1.npz")
    indices = {"held_out": range(12), "captions": spread(12, 4), "probe": sorted(spread(12, 11))}
    for part, chosen in indices.items():
        assert found[f"{part}/names"].tolist() == [f"val/{i:06d}" for i in chosen]
    table = pd.read_csv(folder / "probe.csv").query("epoch == 1")
    groups, layers = found["probe/groups"].tolist(), found["probe/layers"].tolist()
    assert groups == ["image", "caption", "text", "noise", "words_long"]
    metrics = "fvu fvu_text mse rel_error cosine norm_ratio norm variance l0 outliers".split()
    metrics += ["direction_l0", "lens_hit", "use", "harm_splice"]
    checked = set()
    for row in table.itertuples():
        key = f"probe/{row.metric}"
        if key in found and not (row.group == "caption" and row.metric.startswith("direction")):
            if np.isnan(row.value) and row.metric == "loss_recovered":
                continue
            sums = found[key][groups.index(row.group), layers.index(row.layer)].astype(np.float64)
            # The mean is taken off in float64, and sums are kept in float32.
            assert ratio(sums.sum(0)) == pytest.approx(row.value, rel=1e-5), row
            checked.add(row.metric)
    assert checked >= set(metrics)
    captions = pd.read_csv(folder / "captions.csv").query("writer == 'model'")
    for row in captions.itertuples():
        assert ratio(found[f"captions/{row.metric}"].sum(0)) == pytest.approx(row.value, rel=1e-12)
    validation = pd.read_csv(folder / "validation.csv")
    assert list(validation) == "run epoch step split metric value low high".split()
    assert validation.metric.tolist() == ["loss", "loss_shuffled", "perplexity", "accuracy"]
    assert set(zip(validation.epoch, validation.step, validation.split, strict=True)) == {(1, 4, "val")}
    for row in validation.query("metric != 'perplexity'").itertuples():
        assert ratio(found[f"held_out/{row.metric}"].sum(0)) == pytest.approx(row.value, rel=1e-12)
        assert row.low < row.value < row.high
    loss = validation.iloc[0]
    [line] = (line for line in said if line.startswith("[val]"))
    assert line.startswith(
        f"[val] step 4: loss {loss.value:.3f} [{loss.low:.3g}, {loss.high:.3g}], loss_sh"
    )
    # The probe before training and the one after it are of the same images.
    run = read_run(folder)
    growth = differences([run], [run], (-1, 0))
    assert {growth["over"][f"metrics/{metric}"] for metric in metrics} == {PAIRED}
    assert growth["over"]["metrics/alive"] != PAIRED
    # Other batches, same numbers.
    again = fit(*FLAGS, "--data.val_batch_size=5", probe=True)
    other = arrays(Path(again.trainer.log_dir) / "images_epoch_1.npz")
    assert list(other) == list(found)
    for name, values in found.items():
        if values.dtype.kind == "U":
            assert values.tolist() == other[name].tolist()
        else:
            np.testing.assert_allclose(other[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_held_out_loss_by_image_is_the_models_own(fit):
    """One image at a time, with its caption and with another's."""
    cli = fit(*FLAGS, "--captions.num_images=0")
    found = arrays(Path(cli.trainer.log_dir) / "images_epoch_1.npz")
    records = [cli.datamodule.val_set[i] for i in range(12)]
    cli.model.eval()
    for i, record in enumerate(records):
        another = stand_in(record, i, 12, records.__getitem__)
        for name, other in (("loss", record), ("loss_shuffled", another)):
            with torch.no_grad():
                _, losses, correct = cli.model(cli.model.collator()([record], [other.captions[:1]]))
            expected = [float(losses.double().sum()), len(losses)]
            assert found[f"held_out/{name}"][i].tolist() == pytest.approx(expected, rel=1e-5)
            if name == "loss":
                assert found["held_out/accuracy"][i].tolist() == [int(correct.sum()), len(losses)]
    assert found["held_out/loss"].shape == (12, 2)


def test_test_has_tables_of_its_own(fit):
    cli = fit(*FLAGS)
    folder = Path(cli.trainer.log_dir)
    files = {name: (folder / name).read_bytes() for name in ("validation.csv", "images_epoch_1.npz")}
    history = dict(callback(cli, "RunRecord").history)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert callback(cli, "RunRecord").history == history
    table, tested = (pd.read_csv(folder / f"{name}.csv") for name in ("validation", "test"))
    assert set(tested.split) == {"test"}
    # Scenes have no test part: it sees the same images.
    pd.testing.assert_frame_equal(tested.drop(columns="split"), table.drop(columns="split"))
    a, b = (arrays(folder / f"{name}images_epoch_1.npz") for name in ("", "test_"))
    assert a.keys() == b.keys()
    np.testing.assert_array_equal(a["held_out/loss"], b["held_out/loss"])


def test_parts_of_a_file_are_replaced_one_by_one(tmp_path):
    path = tmp_path / "run/images_epoch_3.npz"
    add_arrays(path, "a", {"names": ["x", "y"], "old": np.ones(2)})
    add_arrays(path, "b", {"names": ["x"]})
    add_arrays(path, "a", {"names": ["z"]})
    assert {name: array.tolist() for name, array in arrays(path).items()} == {
        "b/names": ["x"],
        "a/names": ["z"],
    }
    assert [file.name for file in path.parent.iterdir()] == ["images_epoch_3.npz"]
