"""What differs between runs: the values of their recipes, and what beside them shaped the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe import yaml_file
from toolkit.run.rundir import RunDir

RESOLVED = "recipe.resolved.yaml"
ABSENT = "-"


def between(runs: Sequence[RunDir]) -> list[tuple[str, list[str]]]:
    """(what, its value in each run) of all that is not the same in all of them."""
    found = [_values(run) for run in runs]
    paths = dict.fromkeys(path for values in found for path in values)
    rows = [(path, [values.get(path, ABSENT) for values in found]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def _values(run: RunDir) -> dict[str, str]:
    try:
        recipe = yaml_file.plain(yaml_file.read(run.path / RESOLVED), run.path / RESOLVED)
    except UserError:
        recipe = {}
    manifest = run.read_manifest()
    values = _leaves(recipe)
    values |= {f"held to · {key}": str(value) for key, value in (manifest.conditions or {}).items()}
    if manifest.gpu:
        values["machine · gpu"] = str(manifest.gpu.name)
    return values


def _leaves(node: Any, path: str = "") -> dict[str, str]:
    if isinstance(node, Mapping) and node:
        return {
            at: value
            for key, item in node.items()
            for at, value in _leaves(item, f"{path}.{key}" if path else str(key)).items()
        }
    if isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        return _leaves(dict(enumerate(node)), path)
    return {path: "null" if node is None else str(node)}
