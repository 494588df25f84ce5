"""runs/<recipe>/<stage>/: where a run writes, and what there is complete.

Whatever says "done" is written to a temporary name and renamed; an adapter counts only with its mark, which is
written last.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.files import write_json
from toolkit.records.marks import AdapterMark
from toolkit.records.record import plain, read_object
from toolkit.records.run_manifest import Manifest
from toolkit.redaction import blanked, marked

MARK = "complete.json"
SEAL, PREFIX = "sealed.json", "checkpoint-"  # of a complete checkpoint; the names of their folders
EVENTS, ANSWERS = "events.jsonl", "answers.jsonl"


@dataclass(frozen=True)
class RunDir:
    """The directory of one run. `stage` is sft, dpo or compare."""

    root: Path
    recipe: str
    stage: str

    @property
    def path(self) -> Path:
        return self.root / self.recipe / self.stage

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def data_report(self) -> Path:
        return self.path / "data_report.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    def of(self, stage: str) -> RunDir:
        """The directory of another stage of the same recipe."""
        return RunDir(self.root, self.recipe, stage)

    def start(self, trajectory: dict[str, Any], fresh: bool = False) -> Path | None:
        """Makes the directory, or takes up an unfinished run of the same trajectory where it stopped.

        With `fresh` an earlier run is moved aside, never deleted; returns where to. Raises UserError when it
        cannot be written, or holds a run that was made otherwise, listing each field with both values.
        """
        if not fresh:
            self._refuse_other("trajectory", self.read_manifest().trajectory, trajectory)
        try:
            moved = self.move_aside() if fresh else None
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".*.tmp"):  # by a process that was killed while it wrote
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self.record({"trajectory": trajectory})
        except OSError as error:
            raise UserError(
                f"cannot write the run to {self.path}: {error.strerror}; choose --runs DIR"
            ) from None
        return moved

    def hold_to(self, conditions: dict[str, Any]) -> None:
        """Records what shapes the weights beside the recipe: package versions, settings, base, rows.

        Raises UserError, listing each with both values, when an unfinished run was trained under other ones. A
        finished run stays finished, whatever is installed later.
        """
        self._refuse_other("conditions", self._conditions(), self._conditions() | conditions)
        self.record({"conditions": self._conditions() | conditions})

    def settings(self) -> dict[str, Any]:
        """What a plan once chose for the run that is unfinished here, by field of the recipe's `memory`; else {}."""
        if self._ended() or not self._has_checkpoints():
            return {}
        kept = self._conditions()
        return {key.removeprefix("memory."): kept[key] for key in kept if key.startswith("memory.")}

    def is_finished(self, trajectory: dict[str, Any]) -> bool:
        """Whether this very run came to its end here. Raises UserError when a run of other values stands here.

        One that died between its adapter and its report is not finished: it does the rest again.
        """
        self._refuse_other("trajectory", self.read_manifest().trajectory, trajectory)
        return self._ended()

    def move_aside(self) -> Path | None:
        """Renames a directory that holds anything; None when there is nothing."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self.path.stat().st_mtime))
        number, target = 0, self.path.with_name(f"{self.stage}.{stamp}")
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.stage}.{stamp}.{number}")
        self.path.rename(target)
        return target

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory for this process; the kernel lets go of it when the process dies, however it does.

        Raises UserError naming the process and host that hold it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stream = open(  # noqa: SIM115  (closed below)
                self.path.parent / f".{self.stage}.lock", "a+", encoding="utf-8", opener=_open_no_link
            )
        except OSError as error:
            raise UserError(
                f"cannot write the run to {self.path}: {error.strerror}; choose --runs DIR"
            ) from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                raise UserError(
                    f"{self.path} is in use by {holder}: wait for it, or choose --runs DIR"
                ) from None
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            yield

    def is_held(self) -> bool:
        """Whether a process holds the directory now: it runs, or was stopped in mid-air but not killed.

        Asks by taking the lock for a moment, shared, so that two who ask do not see each other.
        """
        try:
            with (self.path.parent / f".{self.stage}.lock").open(encoding="utf-8") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def sealed_step(self) -> int | None:
        """The step of the newest checkpoint that was finished; whether its files are still whole is not read."""
        names = (seal.parent.name.removeprefix(PREFIX) for seal in self.checkpoints.glob(f"{PREFIX}*/{SEAL}"))
        return max((int(name) for name in names if name.isdigit()), default=None)

    def record(self, facts: dict[str, Any]) -> None:
        """Adds facts to the manifest, by the names of its fields; what is there beside them stays."""
        replace(Manifest.unknown(), **facts)  # a TypeError for a name that is none
        write_json(self.manifest, blanked(read_object(self.manifest) | plain(facts)))

    def read_manifest(self, notes: list[str] | None = None) -> Manifest:
        """What is recorded of the run; nothing in any field before its start."""
        return Manifest.load(self.manifest, notes) or Manifest.unknown()

    def _conditions(self) -> dict[str, Any]:
        return self.read_manifest().conditions or {}

    def _ended(self) -> bool:
        return self.finished_with() is not None and self.read_manifest().outcome == "finished"

    def _has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob(f"{PREFIX}*"))

    def _refuse_other(self, what: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
        now = marked(now)
        if before is None or not (self.finished_with() or self._has_checkpoints()):
            return  # nothing was trained yet: there is nothing to lose
        known = before.keys() | now.keys() if what == "trajectory" else before.keys() & now.keys()
        changed = [
            f"{field}: {before.get(field)!r} then, {now.get(field)!r} now"
            for field in sorted(known)
            if before.get(field) != now.get(field)
        ]
        if changed:
            kind = "a finished" if self.finished_with() else "an unfinished"
            raise UserError(
                f"{self.path} holds {kind} {self.stage} run that was made otherwise; --fresh moves it aside "
                f"and starts again, --runs DIR keeps both. Changed: {'; '.join(changed)}"
            )

    def starting_adapter(self, starts_from: str | None) -> Path | None:
        """The adapter that the policy starts from: that of another stage of the recipe; None for a fresh LoRA.

        Raises UserError, with the command that makes it, when there is none.
        """
        if starts_from is None:
            return None
        before, this, other = self.of(starts_from), self.stage.upper(), starts_from.upper()
        if before.finished_with() is None:
            raise UserError(
                f"{this} continues the {other} adapter and there is none in {before.adapter}: run `python "
                f"run_{starts_from}.py --recipe {self.recipe}` first, or `--set {starts_from}=null` for {this} on the "
                "model itself"
            )
        return before.adapter

    def finished_with(self) -> AdapterMark | None:
        """What the completion mark of the adapter records, or None while there is no complete adapter."""
        return AdapterMark.load(self.adapter / MARK)


def _open_no_link(path: str, flags: int) -> int:
    """A lock is emptied and written: through a link that would be another file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
