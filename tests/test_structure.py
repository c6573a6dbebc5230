"""The house: which room may import which, how long a file may be, and what ships as data."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest
from process import REPO

FLOORS = [
    {"assets", "utils"},
    {"data"},
    {"models"},
    {"probe"},
    {"captioning"},
    {"api", "callbacks"},
    {"tools", "sae_training"},
    {"cli"},
    {"__main__", "__init__"},
]
"""From below: a room imports from its own floor and lower ones, and from no room beside it."""
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted([*(REPO / "lightning_limber").rglob("*.py"), *(REPO / "callbacks").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = ("lightning_limber", *parts) if parts[0] == "callbacks" else parts
    return ".".join(parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path, type_checking: bool = False) -> set[str]:
    """Modules of the package that a file imports, wherever in the file; not those for type checkers."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not type_checking:
            pending += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lightning_limber"):
            for name in node.names:
                inside = f"{node.module}.{name.name}"
                found.add(inside if inside in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("lightning_limber")}
        pending += ast.iter_child_nodes(node)
    return found


MODULES = {module_of(path): path for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_down(path):
    room = room_of(module_of(path))
    for target in map(room_of, imports(path)):
        if target in (room, "__init__"):
            continue
        assert FLOOR_OF[target] < FLOOR_OF[room], f"{module_of(path)} imports from {target}"


def test_no_circle_between_files():
    depth: dict[str, int] = {}

    def visit(module: str, above: tuple[str, ...]) -> int:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in depth:
            below = (imports(MODULES[module]) & MODULES.keys()) - {"lightning_limber"}
            depth[module] = 1 + max((visit(name, (*above, module)) for name in below), default=0)
        return depth[module]

    for module in MODULES:
        visit(module, ())


def test_only_cli_imports_callbacks():
    users = {
        module
        for module, path in MODULES.items()
        if any(room_of(target) == "callbacks" for target in imports(path, type_checking=True))
    }
    assert {module for module in users if room_of(module) != "callbacks"} == {"lightning_limber.cli"}


def test_no_file_is_long():
    long = {str(path.relative_to(REPO)): n for path in SOURCES if (n := lines(path)) > 400}
    assert not long
    assert lines(REPO / "lightning_limber/models/limber.py") <= 300


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_private_name_of_another_file():
    """Files talk to each other in public names."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_limber"):
                private = [name.name for name in node.names if name.name.startswith("_")]
                assert not [name for name in private if not name.startswith("__")], path


def test_the_repository_names_no_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        path = REPO / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".cff", ".txt", ".ipynb", ".json"}:
            text = path.read_text(encoding="utf-8")
            assert not [home for home in ("home", "root", "work") if f'"/{home}/' in text], name
