"""The floors of the house: imports go down, the lower floors never load torch, nothing imports the scripts."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FLOOR_0 = {"recipe", "recipe_file", "env", "hardware", "errors"}
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


def floor(module: str) -> int:
    name = module.removeprefix("toolkit.")
    if name == "cli":
        return 3
    if name.startswith("engine"):
        return 2
    return 0 if name.split(".")[0] in FLOOR_0 else 1


def imports(path) -> set[str]:  # type: ignore[no-untyped-def]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_name(path) -> str:  # type: ignore[no-untyped-def]
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


KNOWN = {module_name(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_and_only_the_engine_knows_torch(path) -> None:  # type: ignore[no-untyped-def]
    name, found = module_name(path), imports(path)
    here = floor(name)
    assert not [other for other in found & KNOWN if floor(other) > here], "an import goes up"
    assert not [other for other in found if other.startswith("run_")], "scripts are imported by nobody"
    if here != 2:
        assert not {other.split(".")[0] for other in found} & HEAVY


def test_there_is_no_circle() -> None:
    graph = {module_name(path): imports(path) & KNOWN - {module_name(path)} for path in MODULES}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, f"in or behind a circle: {sorted(graph)}"


def test_the_lower_floors_load_without_torch() -> None:
    light = [name for name in sorted(KNOWN) if floor(name) != 2 and not name.endswith("__init__")]
    code = f"import {', '.join(light)}, sys; print(sorted({HEAVY | {'bokeh'}!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
