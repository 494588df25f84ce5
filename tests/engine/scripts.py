"""Scripts in processes of their own that do not import torch and Unsloth again: forks of one that has them imported.

Half a minute of a processor for every two such processes would be their imports. Nothing else is spared: a fork has its
own files, signals and exit code.
"""

import functools
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.conftest import ROOT
from toolkit.recipe import load

IMPORTED = ["tests.conftest", *(f"toolkit.engine.train.{stage}" for stage in ("sft", "dpo", "rl"))]


class Script:
    """`python words[0] words[1:]`, started at once; what it prints goes into one file. Negative codes are signals.

    In `folder`; one that is a clone brings its recipes, but not its toolkit, which is imported already. `environ` comes
    on top of the environment.
    """

    def __init__(
        self, words: list[str], said: Path, folder: Path = ROOT, environ: Mapping[str, str] | None = None
    ):
        self._said = said
        said.touch()
        set_there = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], **(environ or {})}
        target = functools.partial(_run, words, str(said), str(folder), set_there)
        self._process = _server().Process(target=target, daemon=True)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = 240) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it runs after {seconds} s; it said: {self.said()}"
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        return self._said.read_text()


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _run(words: list[str], said: str, folder: str, environ: Mapping[str, str]) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    os.environ.update(environ)
    if (recipes := Path(folder) / "recipes").is_dir():
        load.RECIPES = recipes
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
