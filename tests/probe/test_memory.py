"""SAEs by memory budget: a part on the device at a time, the same numbers."""

from __future__ import annotations

import pytest
import tiny
import torch
from parts import probe_batches, sae_probe

from lightning_limber.models.saes import chunks_on_device


def test_a_memory_budget_changes_no_number(fit, tmp_path):
    """One, two or all of three layers at a time: every row and matrix is the same to the bit."""
    tiny.write_saes(tmp_path / "saes", (0, 1, 2))
    flags = ["--trainer.max_steps=4", f"--probe.sae_release={tmp_path / 'saes'}"]
    cli = fit(*flags, probe=True)
    callback, data = sae_probe(cli), cli.datamodule
    probe = callback.probe
    layer = sum(tensor.nbytes for tensor in probe.saes["blocks.0.hook_resid_post"].parameters()) / 1e9

    def found(budget: float | None):
        probe.config.sae_memory_gb = budget
        parts = probe_batches(cli, 10), probe_batches(cli, 6, interventions=True)
        report = probe.run(*parts, data.attributes)
        return str((report.rows, report.matrices, report.tables))  # As text: NaN is NaN.

    resident = found(None)
    assert "loss_recovered" in resident
    assert "'fvu': [[" in resident
    for layers in (1, 2, 3):
        assert found(layers * layer) == resident
    # And a whole run with it, sanity check included.
    again = sae_probe(fit(*flags, f"--probe.sae_memory_gb={2 * layer}", probe=True))
    assert str(again.history) == str(callback.history)
    assert again.probe.text == probe.text


def test_an_sae_over_the_budget_is_named(fit):
    with pytest.raises(ValueError, match=r"blocks.0.hook_resid_post alone takes 1.677e-05 GB"):
        fit("--probe.sae_memory_gb=1e-5", probe=True)


def test_no_more_saes_are_on_the_device_than_fit():
    """Chunks keep the order, hold as much as fits, and leave before the next one comes."""
    there: set[str] = set()

    class Counted(torch.nn.Linear):  # 40 bytes.
        def __init__(self, name):
            super().__init__(9, 1)
            self.name = name

        def to(self, device):
            (there.add if str(device) == "cuda" else there.remove)(self.name)

    saes = {name: Counted(name) for name in "abcde"}
    seen = []
    for chunk in chunks_on_device(saes, torch.device("cuda"), 99 / 1e9):
        assert there == set(chunk)
        seen.append("".join(chunk))
    assert seen == ["ab", "cd", "e"]
    assert not there
