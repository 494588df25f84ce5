"""runs/<recipe>/<name>/: where a run writes, and what there is complete.

Whatever says "done" is written to a temporary name and renamed; an adapter counts only with its mark, which is
written last.
"""

from __future__ import annotations

import re
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit import command
from toolkit.errors import UserError
from toolkit.files import digest, write_json
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe
from toolkit.records.marks import AdapterMark, Made
from toolkit.records.record import plain, read_object
from toolkit.records.run_manifest import Manifest
from toolkit.redaction import blanked, marked
from toolkit.run import changes, locking, sealing
from toolkit.run.sealing import MARK, SEAL

PREFIX = "checkpoint-"  # of the folders of checkpoints
EVENTS, ANSWERS = "events.jsonl", "answers.jsonl"
COMPLETIONS, HELD_OUT = "completions.jsonl", "held_out.jsonl"  # of learning from rewards
WEIGHTS = "adapter_model.safetensors"
OTHER_RUNS = "--runs DIR"
STARTED_FROM = "_adapter"  # ends the condition that names the hash of another stage's adapter
PROCESSES = "processes"  # the condition that says how many train a run
OF_PROCESSES = (PROCESSES, "memory.per_device_train_batch_size")
MOVED_ASIDE = re.compile(r"\.\d{8}-\d{6}(\.\d+)?$")  # ends the name of a folder that `move_aside` renamed


def saved_steps(checkpoints: Path) -> list[int]:
    """Those of the checkpoints in a folder, complete or not."""
    names = (path.name.removeprefix(PREFIX) for path in checkpoints.glob(f"{PREFIX}*"))
    return [int(name) for name in names if name.isdigit()]


@dataclass(frozen=True)
class RunDir:
    """The directory of one run. `name` is a variant of a stage (sft, dpo, dpo-beta02), or compare or eval."""

    root: Path
    recipe: str
    name: str

    @property
    def stage(self) -> str:
        return stages.of(self.name).name

    @property
    def path(self) -> Path:
        return self.root / self.recipe / self.name

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

    def of(self, name: str) -> RunDir:
        """The directory of another variant of the same recipe, or of its compare or eval."""
        return RunDir(self.root, self.recipe, name)

    def variants(self) -> list[str]:
        """The stages and their variants that have a directory here; runs that were moved aside are none."""
        folder = self.path.parent
        names = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
        return stages.in_order(filter(stages.is_variant, sorted(names)))

    def finished(self) -> list[str]:
        """Those with a finished adapter."""
        return [name for name in self.variants() if self.of(name).finished_with() is not None]

    def start(self, trajectory: dict[str, Any], fresh: bool = False) -> Path | None:
        """Makes the directory, or takes up an unfinished run of the same trajectory where it stopped.

        With `fresh` an earlier run is moved aside, never deleted; returns where to. Raises UserError when it
        cannot be written, or holds a run that was made otherwise, listing each field with both values.
        """
        if not fresh:
            self._check_manifest()
            self._refuse_other("trajectory", trajectory)
        try:
            moved = self.move_aside() if fresh else None
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(".*.tmp"):  # by a process that was killed while it wrote
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            self._add({"trajectory": trajectory})
        except OSError as error:
            raise UserError(
                f"cannot write the run to {self.path}: {error.strerror}; choose --runs DIR"
            ) from None
        return moved

    def hold_to(self, conditions: dict[str, Any]) -> None:
        """Records what shapes the weights beside the recipe: package versions, settings, base, rows, processes.

        Raises UserError, listing each with both values, when an unfinished run was trained under other ones. A
        finished run stays finished, whatever is installed later.
        """
        self._refuse_other("conditions", conditions)
        self.record({"conditions": self.conditions() | conditions})

    def reshard(self, conditions: dict[str, Any]) -> list[str]:
        """Holds the run to another number of processes from now on, as OF_PROCESSES has it; returns what changed."""
        before = self.conditions()
        changed = changes.between(before, conditions, [name for name in OF_PROCESSES if name in before])
        self.record({"conditions": before | {name: conditions[name] for name in OF_PROCESSES}})
        return list(changed.values())

    def conditions(self) -> dict[str, Any]:
        """What the run was held to so far; {} before it was to anything."""
        return next(iter(self._recorded("conditions")), {})

    def settings(self) -> dict[str, Any]:
        """What a plan once chose for the run that is unfinished here, by field of the recipe's `memory`; else {}."""
        self._check_manifest()
        if self._ended() or not self._has_checkpoints():
            return {}
        kept = self.conditions()
        return {key.removeprefix("memory."): kept[key] for key in kept if key.startswith("memory.")}

    def is_finished(self, trajectory: dict[str, Any]) -> bool:
        """Whether this very run came to its end here, and its adapter is to be used.

        Raises UserError when a run of other values stands here, and as `check_adapter`. One that died between its
        adapter and its report is not finished: it does the rest again.
        """
        self._check_manifest()
        self._refuse_other("trajectory", trajectory)
        if not self._ended():
            return False
        self.check_adapter()
        return True

    def move_aside(self) -> Path | None:
        """Renames a directory that holds anything, to a name as MOVED_ASIDE has it; None when there is nothing."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self.path.stat().st_mtime))
        number, target = 0, self.path.with_name(f"{self.name}.{stamp}")
        while target.exists():
            number += 1
            target = self.path.with_name(f"{self.name}.{stamp}.{number}")
        self.path.rename(target)
        return target

    def locked(self) -> AbstractContextManager[None]:
        """Holds the directory for this process; see `locking.locked`."""
        return locking.locked(self.path, OTHER_RUNS)

    def problems(self) -> list[str]:
        """Why nothing could be written here now: another process holds it, or the disk or its rights forbid it."""
        problem = locking.problem(self.path, OTHER_RUNS)
        return [problem] if problem else []

    def is_held(self) -> bool:
        """Whether a process holds the directory now: it runs, or was stopped in mid-air but not killed."""
        return locking.is_held(self.path)

    def sealed_step(self) -> int | None:
        """The step of the newest checkpoint that was finished; whether its files are still whole is not read."""
        steps = saved_steps(self.checkpoints)
        sealed = (step for step in steps if (self.checkpoints / f"{PREFIX}{step}" / SEAL).exists())
        return max(sealed, default=None)

    def record(self, facts: dict[str, Any]) -> None:
        """Adds facts to the manifest, by the names of its fields; what is there beside them stays.

        Raises UserError when it was taken away since `start`.
        """
        self.begun_manifest()
        self._add(facts)

    def begun_manifest(self) -> Manifest:
        """What is recorded of the run that goes on. Raises UserError when it was taken away since `start`."""
        if not read_object(self.manifest):
            raise UserError(
                f"{self.manifest} was deleted or damaged while the run went on, so what the run was held to is lost: "
                "delete the file if anything is left of it; the same command then continues from the last checkpoint "
                "that is there"
            )
        return self.read_manifest()

    def _add(self, facts: dict[str, Any]) -> None:
        replace(Manifest.unknown(), **facts)  # a TypeError for a name that is none
        write_json(self.manifest, blanked(read_object(self.manifest) | plain(facts)))

    def read_manifest(self, notes: list[str] | None = None) -> Manifest:
        """What is recorded of the run; nothing in any field before its start."""
        return Manifest.load(self.manifest, notes) or Manifest.unknown()

    def as_read(self) -> RunDir:
        """The same directory for a process that writes nothing there: another one holds it."""
        return ReadRunDir(self.root, self.recipe, self.name)

    def _ended(self) -> bool:
        return self._mark() is not None and self.read_manifest().outcome == "finished"

    def _has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob(f"{PREFIX}*"))

    def _check_manifest(self) -> None:
        if self.manifest.exists() and not read_object(self.manifest):
            raise UserError(
                f"{self.manifest} cannot be read: it was cut off, damaged, or is not yours to read. Put it back from a "
                "copy; or delete it, and the run is held to what its checkpoints say of themselves; or --fresh moves "
                "the run aside and starts again"
            )

    def _recorded(self, what: str) -> list[dict[str, Any]]:
        """`trajectory` or `conditions` wherever they were noted: in the manifest, and beside all weights."""
        seals = (*sorted(self.checkpoints.glob(f"{PREFIX}*/{SEAL}")), self.adapter / MARK)
        records = (self.read_manifest(), *map(Made.load, seals))
        return [found for record in records if record and (found := getattr(record, what)) is not None]

    def _refuse_other(self, what: str, now: dict[str, Any]) -> None:
        """Weights of the manifest's word alone could be another recipe's: what stands beside them has to agree."""
        now = marked(now)
        if not (self._mark() or self._has_checkpoints()):
            return  # nothing was trained yet: there is nothing to lose
        recorded = self._recorded(what)
        if what == "trajectory" and not recorded and (self._mark() or self.sealed_step() is not None):
            raise UserError(
                f"nothing in {self.path} says by which recipe its weights were made: {self.manifest.name} is lost, and "
                "an earlier version of the toolkit wrote the rest. Put it back from a copy, or --fresh moves the run "
                "aside and starts again"
            )
        changed = dict.fromkeys(
            text
            for newest, before in enumerate(recorded)
            for text in changes.between(
                before,
                now,
                # Once a run was resharded its older checkpoints say otherwise.
                None
                if what == "trajectory"
                else (before.keys() & now.keys()).difference(OF_PROCESSES if newest else ()),
            ).values()
        )
        if changed:
            kind = "a finished" if self._mark() else "an unfinished"
            beside = command.propose(self.stage, self.recipe, "--name", "NAME")
            of_processes = ""
            if any(text.startswith(f"{PROCESSES}:") for text in changed):
                of_processes = ", --reshard continues it with another number of processes"
            raise UserError(
                f"{self.path} holds {kind} {self.name} run that was made otherwise; `{beside}` trains another beside "
                f"it, --fresh moves it aside and starts again{of_processes}. Changed: {'; '.join(changed)}"
            )

    def check_adapter(self) -> None:
        """Raises UserError when the adapter is not what was saved, or continued one that another has replaced since.

        Reads all of it.
        """
        sealing.check(self.adapter)
        mark = self.finished_with()
        known = (mark and mark.conditions) or self.read_manifest().conditions or {}
        for condition, recorded in known.items():
            other = condition.removesuffix(STARTED_FROM)
            weights = self.adapter_of(other) / WEIGHTS
            if other != condition and weights.exists() and digest(weights) != recorded:
                raise UserError(
                    f"{self.adapter} continues another {other} adapter than the one that stands in {weights.parent} "
                    f"now: {other} was trained again since. Train {self.name} again with "
                    f"`{self.proposed('--fresh')}`, or put the earlier {other} back in its place"
                )

    def adapter_of(self, name: str) -> Path:
        """The folder of a variant's adapter, or the one whose path it is."""
        return self.of(name).adapter if stages.is_variant(name) else Path(name)

    def started_from(self) -> str | None:
        """The variant, or the path of the adapter, that the one here continued, or base; None where nothing says it."""
        mark = self.finished_with()
        known = (mark and mark.conditions) or self.read_manifest().conditions
        names = (key.removesuffix(STARTED_FROM) for key in known or {} if key.endswith(STARTED_FROM))
        return next(names, stages.BASE) if known else None

    def as_trained(self, recipe: Recipe) -> Recipe:
        """The recipe with the values that the adapter here was made by."""
        mark = self.finished_with()
        return recipe.with_values((mark and mark.trajectory) or {})

    def proposed(self, *options: str) -> str:
        """The command that trains this variant, with `options`."""
        label, start = stages.label_of(self.name), (self.read_manifest().trajectory or {}).get("from")
        named = ["--name", label] if label else []
        return command.propose(
            self.stage, self.recipe, *named, *(["--from", start] if start else []), *options
        )

    def finished_with(self) -> AdapterMark | None:
        """What the completion mark of the adapter records, or None while there is no complete adapter.

        Raises UserError for a mark that cannot be read: without it a finished stage would be passed over in silence.
        """
        mark = self._mark()
        if mark is None and (self.adapter / MARK).exists():
            sealing.check(self.adapter)
        return mark

    def _mark(self) -> AdapterMark | None:
        """The same, where a damaged one counts as none: the run itself saves its adapter again."""
        return AdapterMark.load(self.adapter / MARK)


class ReadRunDir(RunDir):
    """The directory of a run that another process writes: what this one would record is not."""

    def hold_to(self, conditions: dict[str, Any]) -> None: ...

    def record(self, facts: dict[str, Any]) -> None: ...
