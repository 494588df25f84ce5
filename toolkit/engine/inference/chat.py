"""`--chat`: every line is answered by all chosen models in turn, each with a history of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from toolkit.console.screen import bar, is_live
from toolkit.console.text import visible
from toolkit.data.turns import Messages
from toolkit.engine.base import model
from toolkit.engine.inference import compare, generate
from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.recipe.schema import Recipe
from toolkit.run.rundir import RunDir

HELP = """/reset          forget the conversation
/models A,B     only these answer from now on; without names: which there are
/system TEXT    a system turn for all that follows; without a text: none
/save FILE      the conversations as JSON lines of {model, messages}
/help           this
/exit           leave, as Ctrl-D does; Ctrl-C stops the answer that is being given"""


def run(recipe: Recipe, run: RunDir, folders: compare.Folders, console: Console) -> None:
    """Talks until /exit or the end of the input. Raises UserError for adapters that cannot be loaded."""
    with bar(console, f"loading {recipe.model.path}", None):
        loaded = model.load_trained(recipe, folders)
    if is_live(console):
        console.print(f"[dim]{escape(', '.join(folders))} answer; /help says what else there is[/]")
    Chat(recipe, loaded, list(folders), console).talk(_read_line(console))


def _read_line(console: Console) -> Callable[[], str]:
    """Reads a line; on a terminal behind a prompt, with the line editing and history of readline."""
    if not (is_live(console) and sys.stdin.isatty()):
        return input
    import readline  # noqa: F401  (gives input() its editing)

    return lambda: input("> ")


@dataclass
class Chat:
    """The conversations of several models on one base."""

    recipe: Recipe
    loaded: model.LoadedModel
    names: list[str]
    console: Console
    active: list[str] = field(default_factory=list)
    histories: dict[str, Messages] = field(default_factory=dict)
    system: str | None = None

    def __post_init__(self) -> None:
        self.active = list(self.names)
        self.histories = {name: [] for name in self.names}
        self.system = self.recipe.compare.system

    def talk(self, read_line: Callable[[], str]) -> None:
        """Answers line after line until /exit or the end of the input."""
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("\n/exit or Ctrl-D leaves")
                continue
            except UnicodeDecodeError as error:
                self._say(f"that was not UTF-8 text ({error.reason})", "yellow")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line:
                self._answer_all(line)

    def _answer_all(self, line: str) -> None:
        try:
            for name in self.active:
                self._answer(name, line)
        except UserError as error:  # the template takes no system turn, say: fix it and go on
            self._say(str(error), "yellow")

    def _answer(self, name: str, line: str) -> None:
        history = [*self.histories[name], {"role": "user", "content": line}]
        kept = self._within_context(history)
        if kept is None:
            most = generate.room(self.loaded, self.recipe.compare)
            self._say(f"{name}: this turn alone is too long, a prompt may have {most:,} tokens", "yellow")
            return
        if dropped := (len(history) - len(kept)) // 2:
            self._say(f"{name}: the oldest {dropped} exchanges no longer fit and are forgotten", "yellow")
        self.console.print(f"\n[bold cyan]{escape(name)}[/]")
        growing = _Growing(self.console)
        note = ""
        try:
            with model.use_adapter(self.loaded.model, name):
                [answer] = generate.answer(
                    self.loaded,
                    [self._with_system(kept)],
                    self.recipe.compare,
                    self.recipe.seed,
                    on_step=growing.hear,
                )
            text = answer.text
            if not answer.ended:
                note = "did not end within compare.max_new_tokens"
        except KeyboardInterrupt:
            text, note = growing.text, "stopped"
        growing.finish(text)
        if note:
            self._say(f"({note})", "yellow")
        if text:
            self.histories[name] = [*kept, {"role": "assistant", "content": text}]

    def _with_system(self, history: Messages) -> Messages:
        return [{"role": "system", "content": self.system}, *history] if self.system else history

    def _within_context(self, history: Messages) -> Messages | None:
        """The history without as many of its oldest exchanges as it takes to leave room for an answer."""
        most = generate.room(self.loaded, self.recipe.compare)
        for start in range(0, len(history), 2):
            [ids] = generate.tokens(self.loaded, [self._with_system(history[start:])])
            if len(ids) <= most:
                return history[start:]
        return None

    def _command(self, name: str, rest: str) -> None:
        rest = rest.strip()
        if name == "/help":
            self._say(HELP)
        elif name == "/reset":
            self.histories = {name: [] for name in self.names}
            self._say("forgotten")
        elif name == "/models":
            self._choose(rest)
        elif name == "/system":
            self.system = rest or None
            self._say(f"system turn: {rest}" if rest else "no system turn")
        elif name == "/save":
            self._save(rest)
        else:
            self._say(f"no command {name}; /help shows them", "yellow")

    def _choose(self, rest: str) -> None:
        wanted = [name.strip() for name in rest.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            self._say(f"not loaded: {', '.join(unknown)}; there are {', '.join(self.names)}", "yellow")
            return
        self.active = wanted or self.active
        self._say(f"{', '.join(self.active)} of {', '.join(self.names)} answer")

    def _save(self, rest: str) -> None:
        told = {name: history for name, history in self.histories.items() if history}
        if not rest or not told:
            self._say("/save FILE: name a file" if told else "nothing was said yet", "yellow")
            return
        lines = [
            json.dumps({"model": name, "messages": self._with_system(history)}, ensure_ascii=False) + "\n"
            for name, history in told.items()
        ]
        try:
            write_text(Path(rest).expanduser(), "".join(lines))
        except (OSError, ValueError) as error:
            self._say(f"cannot write {rest}: {error}", "yellow")
            return
        self._say(f"saved {len(lines)} conversations to {rest}")

    def _say(self, text: str, style: str = "dim") -> None:
        self.console.print(text, style=style, markup=False, highlight=False)


class _Growing:
    """An answer that is printed as it grows, but for the end of it that may still change."""

    def __init__(self, console: Console):
        self._console = console
        self._shown = 0
        self.text = ""

    def hear(self, texts: Callable[[], dict[int, str]]) -> None:
        [self.text] = texts().values()
        whole = self.text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character whose bytes are not all there yet
        self._show(whole)

    def finish(self, text: str) -> None:
        """Shows what is left of the answer."""
        if is_live(self._console):
            self._show(text or "(empty)")
            self._console.print()
        else:
            self._console.out(visible(text or "(empty)"), highlight=False)

    def _show(self, text: str) -> None:
        if is_live(self._console):
            self._console.out(visible(text[self._shown :]), end="", highlight=False)
            self._console.file.flush()
            self._shown = max(self._shown, len(text))
