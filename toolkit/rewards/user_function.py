"""A reward function of the user's own: found and looked at before anything heavy is loaded, and held to its file."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.recipe.schema import Recipe


@dataclass(frozen=True)
class UserFunction:
    """`written` is FILE.py:NAME as the recipe has it."""

    written: str
    file: Path
    name: str

    @classmethod
    def of(cls, recipe: Recipe, written: str) -> UserFunction:
        path, _, name = written.rpartition(":")
        return cls(written, Path(recipe.locate(path)), name)

    def problem(self, looked_in: str) -> str | None:
        """What is plainly wrong with it; the file is parsed, not run."""
        try:
            tree = ast.parse(self.file.read_text(encoding="utf-8"), str(self.file))
        except OSError as error:
            return f"reward function {self.written}: {self.file} cannot be read ({error.strerror}){looked_in}"
        except (SyntaxError, ValueError) as error:
            return f"reward function {self.written}: {self.file} is no Python: {error}"
        kinds = (ast.FunctionDef, ast.Assign, ast.ImportFrom, ast.Import, ast.ClassDef)
        names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        is_plain = all(isinstance(node, kinds) for node in tree.body)
        if is_plain and self.name not in names and not _is_bound(tree, self.name):
            there = ", ".join(sorted(names)) or "none"
            return f"reward function {self.written}: {self.file} has no {self.name}; its functions: {there}"
        return None

    def load(self) -> Callable[..., Any]:
        """Runs the file. Raises UserError where that fails, or there is nothing to call."""
        module_name = f"_reward_function_{self.file.stem}"
        spec = importlib.util.spec_from_file_location(module_name, self.file)
        assert spec is not None and spec.loader is not None, "problem() has looked at the ending"
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(
                f"reward function {self.written}: importing {self.file} failed: {error!r}"
            ) from error
        function = getattr(module, self.name, None)
        if not callable(function):
            raise UserError(
                f"reward function {self.written}: {self.file} has nothing to call under that name"
            )
        found: Callable[..., Any] = function
        return found

    def checked(self, given: Any, num: int) -> list[float | None]:
        """What it returned, once that is a list of so many numbers or None. Raises UserError."""
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else None
        if values is None or len(values) != num:
            got = type(given).__name__ if values is None else f"{len(values)} values"
            raise UserError(
                f"reward function {self.written} returned {got} for {num} completions: one number for each is "
                "expected, or None where it has none"
            )
        wrong = next((value for value in values if not (value is None or _is_number(value))), None)
        if wrong is not None:
            raise UserError(
                f"reward function {self.written} returned {wrong!r}: finite numbers are expected, or None"
            )
        return [None if value is None else float(value) for value in values]


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not isinstance(value, str)
    except (TypeError, ValueError):
        return False


def _is_bound(tree: ast.Module, name: str) -> bool:
    """Whether an assignment or an import of the module gives the name a value."""
    targets = (target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets)
    assigned = {target.id for target in targets if isinstance(target, ast.Name)}
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    return name in assigned | imported or "*" in imported
