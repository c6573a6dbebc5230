from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="module")
def probed(models, tmp_path_factory):
    """The CLI object of a short run in this process, with its model, data and probe, to be asked more."""
    from lightning_limber.cli import main

    flags = [*tiny.arguments(models), "--trainer.max_steps=4", "--probe.outlier_factor=1e9"]
    flags += ["--probe.intervention_images=10", "--probe.lens_top_k=2", "--probe.bootstrap_samples=200"]
    flags += ["--data.val_size=60"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("probed"))
        patch.setenv("LIGHTNING_LIMBER_TRACEBACK", "1")
        patch.setattr("sys.argv", ["lightning_limber"])
        return main(["fit", *flags])
