"""The house: imports go down, packages of a floor in one direction, and only the engine knows torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Each file or package may import those that stand before it. The order is the architecture.
ORDER = [
    *("errors", "world", "command", "redaction", "files", "cards", "hardware", "env"),
    *(
        "recipe",
        "process",
        "records",
        "data",
        "rewards",
        "memory",
        "run",
        "console",
        "training",
        "report",
        "compare",
        "evaluation",
        "export",
        "doctor",
        "listing",
        "drafting",
        "sweep",
        "board",
    ),
    "engine",
    *(
        "engine.base",
        "engine.data",
        "engine.shared_prompt",
        "engine.reference",
        "engine.inference",
        "engine.train",
        "engine.export",
        "engine.drafting",
    ),
    "cli",
]
PACKAGES = [name for name in ORDER if (ROOT / "toolkit" / name.replace(".", "/")).is_dir()]
HEAVY = {
    "torch",
    "unsloth",
    "unsloth_zoo",
    "trl",
    "transformers",
    "peft",
    "datasets",
    "bitsandbytes",
    "accelerate",
}
MODULES = sorted((ROOT / "toolkit").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


KNOWN = {module_name(path) for path in MODULES}


def package(module: str) -> str:
    """The room of a module: the longest name of ORDER that it begins with."""
    name = module.removeprefix("toolkit").lstrip(".")
    return max((room for room in ORDER if f"{name}.".startswith(f"{room}.")), key=len, default="")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_stands_in_a_room() -> None:
    assert [name for name in KNOWN if name != "toolkit" and not package(name)] == []
    assert [module for module in MODULES if not module.parent.joinpath("__init__.py").is_file()] == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_and_only_the_engine_knows_torch(path: Path) -> None:
    name, found = module_name(path), imports(path)
    here = package(name)
    above = [
        other
        for other in found & KNOWN
        if package(other) not in ("", here) and ORDER.index(package(other)) > ORDER.index(here)
    ]
    if here == "cli":
        above = []  # it starts the engine, once a command is known
    if name == "toolkit.engine":  # it makes the libraries quiet before it imports them
        above = [other for other in above if not other.startswith("toolkit.engine.base.quiet")]
        above = [other for other in above if other != "toolkit.engine.base"]
    assert not above, "an import goes up"
    assert not [other for other in found if other.startswith("run_")], "scripts are imported by nobody"
    if not here.startswith("engine"):
        assert not {other.split(".")[0] for other in found} & HEAVY


def test_there_is_no_circle() -> None:
    graph = {module_name(path): imports(path) & KNOWN - {module_name(path)} for path in MODULES}
    packages = {f"toolkit.{name}" for name in PACKAGES} | {"toolkit"}
    graph = {name: needs - packages for name, needs in graph.items() if name not in packages}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, f"in or behind a circle: {sorted(graph)}"


def test_the_lower_floors_load_without_torch() -> None:
    light = [name for name in sorted(KNOWN) if not package(name).startswith("engine")]
    code = f"import {', '.join(light)}, sys; print(sorted({HEAVY | {'bokeh'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tests_stand_where_what_they_test_stands() -> None:
    """tests/data/ tests toolkit/data/; beside them only conftest and what tests the whole."""
    rooms = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {str(room).replace("/", ".") for room in rooms if str(room) != "."} <= {*PACKAGES, "engine"}
