"""README and docs are API: links lead somewhere, quotes are the code, commands are parsed."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import tiny
import yaml
from process import REPO

from lightning_limber.models.limber import Limber
from lightning_limber.utils.commands import COMMANDS

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@by_page
def test_trees_are_the_repository(page):
    for tree in blocks(page, "text"):
        for line in tree.splitlines() if " # " in tree else ():
            name = line.split("#")[0].strip()
            inside = REPO / "lightning_limber" if line.startswith("  ") else REPO
            assert (inside / name).exists(), name


def commands(page: Path) -> list[list[str]]:
    """The arguments of every command of this project on a page."""
    found = []
    for block in blocks(page, "bash"):
        for line in os.path.expandvars(block).splitlines():
            if match := re.search(r"python -m lightning_limber (\w+.*)$", line):
                found.append(shlex.split(match[1], comments=True))
    return found


@by_page
def test_commands_are_parsed(page, parse, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(REPO / "examples")
    for name, value in {"adapter": "PixelShuffle", "seed": "2"}.items():  # Of the sweeps.
        monkeypatch.setenv(name, value)
    for command, *flags in commands(page):
        assert command in COMMANDS, command
        if (
            command in ("report", "export", "grid")
            or "--ckpt_path" in flags
            or "--model.adapter_weights" in flags
        ):
            continue  # Tests of their own: tests/test_resume.py, test_extending.py and tools/.
        code, output = parse(command, *flags, "--print_config")
        assert code == 0, (command, flags, output)


def test_pages_have_commands():
    found = {page.stem: len(commands(page)) for page in PAGES}
    assert found["README"] >= 7
    assert found["recipes"] >= 8
    assert found["extending"] >= 4


def test_make_targets_are_in_the_makefile():
    makefile = (REPO / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(
            r"\bmake (fit|test|check|tensorboard|[\w-]+)(?=[` ]*(?:#|`|$))", page.read_text()
        ):
            assert f"\n{target}:" in makefile, target


def test_readme_quotes_the_forward():
    forward = textwrap.dedent(inspect.getsource(Limber.forward)).strip()
    assert forward in [block.strip() for block in blocks(REPO / "README.md", "python")]
    body = forward.split('"""')[-1].strip().splitlines()
    assert len(body) <= 8


def test_extending_quotes_the_example():
    example = (REPO / "examples/my_parts.py").read_text()
    quoted = [
        block.strip() for block in blocks(REPO / "docs/extending.md", "python") if "(TokenMean)" in block
    ]
    quoted += [
        block.strip() for block in blocks(REPO / "docs/extending.md", "python") if "(Adapter)" in block
    ]
    assert len(quoted) == 2
    for block in quoted:
        assert block in example


def test_the_data_set_and_callback_of_extending_run(models, fit, monkeypatch, tmp_path, capsys):
    for block in blocks(REPO / "docs/extending.md", "python"):
        if match := re.match(r"# (my_\w+\.py)\n", block):
            (tmp_path / match[1]).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    flags = [flag for flag in tiny.arguments(models, probe=False) if not flag.startswith("--data.")]
    flags += ["--data=my_data.MyData", "--data.batch_size=100", "--data.num_workers=0"]
    cli = fit(*flags, "--trainer.callbacks+=my_callbacks.Norms", "--trainer.max_steps=2", base=False)
    assert cli.trainer.global_step == 2
    assert cli.datamodule.val_set[0].id == "square/200"
    assert f"tensor({cli.model.adapter.project.weight.norm():.4f}" in capsys.readouterr().out


def test_readme_is_short():
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_citation():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert {entry["url"].rpartition("/")[2] for entry in citation["references"]} == {
        "2209.15162",
        "2506.11976",
    }


def test_configs_open_with_command_time_and_result():
    for config in (REPO / "configs").rglob("*.yaml"):
        head = [line for line in config.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
        assert len(head) == 3, config
        assert "python -m lightning_limber" in head[0], config
