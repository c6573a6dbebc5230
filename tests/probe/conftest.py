from __future__ import annotations

import pytest
import tiny
from process import run_here


@pytest.fixture(scope="module")
def probed(models, tmp_path_factory):
    """The CLI object of a short run in this process, with its model, data and probe, to be asked more."""
    flags = [*tiny.arguments(models), "--trainer.max_steps=4", "--probe.outlier_factor=1e9"]
    flags += ["--probe.intervention_images=10", "--probe.lens_top_k=2", "--probe.bootstrap_samples=200"]
    flags += ["--data.val_size=60"]
    with pytest.MonkeyPatch.context() as patch:
        return run_here(patch, tmp_path_factory.mktemp("probed"), "fit", *flags)
