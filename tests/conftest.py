from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "tests" / "helpers"))
os.environ["LIGHTNING_LIMBER_TRACEBACK"] = "1"  # Errors are raised, not printed.
import tiny  # noqa: E402 (found on the path that is set above)


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Every test in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with a tiny LLM, vision encoder and SAEs."""
    root = tmp_path_factory.mktemp("models")
    tiny.write_llm(root / "llm")
    tiny.write_vision(root / "vision")
    tiny.write_saes(root / "saes")
    return root


@pytest.fixture(scope="session")
def straight(models, tmp_path_factory) -> Path:
    """The uninterrupted run: 3 epochs of 4 steps. Dropout makes the random stream matter."""
    from process import HELPERS, run_cli
    from runs import crash_flags

    root = tmp_path_factory.mktemp("straight")
    flags = [*tiny.arguments(models, probe=False), "--model.adapter.dropout=0.3", *crash_flags("batches")]
    done = run_cli("fit", *flags, cwd=root, env=HELPERS)
    assert done.returncode == 0, done.stdout
    return root


@pytest.fixture
def fit(models, monkeypatch):
    """Runs the CLI in this process on the tiny models; returns the CLI object.

    Without `figures` none is drawn: they are most of a tiny run's time.
    """
    from process import run_here

    def run(
        *args: str, command: str = "fit", base: bool = True, probe: bool = False, figures: bool = False
    ):
        flags = tiny.arguments(models, probe) if base else []
        return run_here(monkeypatch, Path.cwd(), command, *flags, *args, figures=figures)

    return run


@pytest.fixture
def parse(monkeypatch, capsys):
    """The real entry point, in this process, up to the point where it would build anything."""
    from lightning_limber.cli import main

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lightning_limber"])
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out + output.err

    return run


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium's page; what uses it is skipped where there is none."""
    from browser import Page, find_chromium

    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium was found: .ci/run installs one where it can")
    page = Page(executable)
    yield page
    page.close()
