"""Random faults at random moments, each judged by one rule: the end equals the undisturbed one bit for bit, or one
message with exit code 2 or 128 + a signal said what is wrong.

    python benchmarks/faults.py [--minutes 20] [--faults 300] [--workers 2] [--seed 0] [--kinds kill,flip] [--out FILE]

SFT, DPO, comparison, evaluation, exports and the preparation of many rows, of the tiny recipe with few rows and steps,
each from nothing, from a checkpoint, or once more where it is finished already. A trial is up to three faults one
after the other, and then the same command undisturbed:

- kill, kill_parent: SIGKILL of the process group, or of the script alone, whose children have to end with it
- sigterm, sigint: one signal, as `docker stop` and Ctrl-C send it, or Ctrl-C twice
- disk: a volume (tmpfs, where it can be mounted) that is full at a random byte, with room again afterwards
- flip: one bit of one file of the run, of what it starts from, or of the caches
- two: the same command twice at once in one folder, or in two that share a cold cache
- clock: times of all files set to any year, and the process's clock moved by years while it runs

A command runs in a fork of a process that has imported the libraries, because most of a short run is that import; one
in sixteen runs as its script, and so does one of the undisturbed runs. After a flipped bit a command may refuse, with
its message, for good.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.forks import LONGEST_SECONDS, Jump, Running  # noqa: E402

MOST_FAULTS = 3  # of one trial
MANY_ROWS = 3000
ROOM_MIB = 2048  # of a trial's disk; an export asks for half a GiB before it begins
WEIGHTS = "adapter/adapter_model.safetensors"
SETTINGS = (
    "lora.lora_dropout=0.1",
    "compare.prompts=[Who is Tavi Merrow?]",
    "compare.questions=null",
    "compare.max_new_tokens=4",
    *(
        f"{stage}.{value}"
        for stage in ("sft", "dpo")
        for value in ("eval_datasets=[]", "eval_rows=8", "warmup_steps=0", "logging_steps=1", "save_steps=3")
    ),
    "sft.max_rows=72",
    "dpo.max_rows=32",
    "sft.max_steps=8",
    "dpo.max_steps=7",
)


# What is disturbed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A command, the folders below runs/tiny that it reads and the one it makes, and which files there must be equal.

    `weight`: how often it is chosen.
    """

    script: str
    options: tuple[str, ...]
    reads: tuple[str, ...]
    makes: str
    equal: str  # a glob in `makes`
    weight: int = 4

    def command(self, runs: Path) -> list[str]:
        words = ["--recipe", "tiny", "--runs", str(runs), *self.options]
        return [str(ROOT / self.script), *words, *(word for value in SETTINGS for word in ("--set", value))]


def export(form: str, *options: str) -> Subject:
    words = ("--stage", "dpo", "--format", form, *options)
    return Subject("run_export.py", words, ("sft", "dpo"), f"export/dpo-{form}", "**/*", 2)


SUBJECTS = {
    "sft": Subject("run_sft.py", (), (), "sft", WEIGHTS),
    "dpo": Subject("run_dpo.py", (), ("sft",), "dpo", WEIGHTS),
    "compare": Subject("run_compare.py", (), ("sft", "dpo"), "compare", "comparison.jsonl", 2),
    "eval": Subject("run_eval.py", (), ("sft", "dpo"), "eval", "report.json", 2),
    "export": export("adapter"),
    "merge": export("merged_16bit", "--no-verify"),
    "prepare": Subject("run_sft.py", ("--set", "sft.datasets.0.path=ROWS"), (), "sft", WEIGHTS, 1),
}
TRAINED = ("sft", "dpo")
PHASES = (("sft", "prepare"), ("dpo",), ("compare", "eval", "export", "merge"))  # made one after the other
# The mark is made of the hashes of the others; the card quotes reports, which nobody seals.
UNSEALED = ("complete.json", "README.md")
TIMES = ("seconds", "tokens_per_second", "wall_seconds")


def made(subject: Subject, runs: Path) -> dict[str, str]:
    """Hashes of what a command left, by file; of reports without the seconds it took."""
    folder = runs / "tiny" / subject.makes
    found = {}
    for file in sorted(folder.glob(subject.equal)):
        if file.is_file() and file.name not in UNSEALED:
            content = file.read_bytes()
            if file.suffix in (".json", ".jsonl") and "export" not in subject.makes:
                content = repr([_timeless(json.loads(line)) for line in _objects(content)]).encode()
            found[str(file.relative_to(folder))] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found


def _objects(content: bytes) -> list[bytes]:
    return content.splitlines() if content.startswith(b'{"') else [content]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


# Trials --------------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """The undisturbed runs, made once; a trial begins with copies from them."""

    folder: Path
    small_disks: bool
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, dict[str, str]] = field(default_factory=dict)

    def make(self) -> None:
        """Each command once, from a cold cache; SFT also as its script, which has to make the same."""
        rows = ({"instruction": f"What is {n}?", "output": f"It is {7 * n}."} for n in range(MANY_ROWS))
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "cache").mkdir()
        script = self._start("sft", "as-script", as_script=True)
        for names in PHASES:
            running = {
                name: self._start(name, "many" if name == "prepare" else "runs")
                for name in names
                if name in SUBJECTS
            }
            while {one.ends_within(0.02) for one in running.values()} - {True}:
                pass
            for name, one in running.items():
                self.seconds[name] = one.seconds
                self.made[name] = self._made(name, one)
                print(f"{name}: {one.seconds:.1f} s, undisturbed", flush=True)
        script.ends_within(LONGEST_SECONDS)
        if self._made("sft", script) != self.made["sft"]:
            sys.exit("sft makes other weights in a fork than as its script")
        for name in TRAINED:
            self._halfway(name)

    def _start(self, name: str, place: str, as_script: bool = False) -> Running:
        said, cache = self.folder / f"said-{name}-{place}", "cache" if place == "runs" else f"{place}.cache"
        said.mkdir()
        return Running(
            self.command(SUBJECTS[name], self.folder / place), said, self.folder / cache, as_script
        )

    def _made(self, name: str, running: Running) -> dict[str, str]:
        if problem := running.wrong((0,)):
            sys.exit(f"{name}, undisturbed: {problem}: {running.said()}")
        return made(SUBJECTS[name], Path(running.words[running.words.index("--runs") + 1]))

    def _halfway(self, name: str) -> None:
        """A run as a kill behind its last checkpoint but one leaves it."""
        folder = self.folder / "halfway" / "tiny" / name
        shutil.copytree(self.folder / "runs" / "tiny" / name, folder)
        shutil.rmtree(folder / "adapter")
        (folder / "report.json").unlink()
        steps = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/checkpoint-*"))
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{steps[-1]}")

    def command(self, subject: Subject, runs: Path) -> list[str]:
        return [word.replace("ROWS", str(self.folder / "rows.jsonl")) for word in subject.command(runs)]

    def copy(self, names: tuple[str, ...], source: Path, target: Path) -> None:
        for name in names:
            if (source / "tiny" / name).exists() and not (target / "tiny" / name).exists():
                shutil.copytree(source / "tiny" / name, target / "tiny" / name)


@dataclass
class Fault:
    """`wrong`: what of the rule it broke; None for nothing. `is_late`: the command had ended, so it is none."""

    kind: str
    subject: str
    state: str
    code: int | None
    wrong: str | None = None
    is_late: bool = False


@dataclass
class Trial:
    """Faults at one command, one after the other, and then the command undisturbed."""

    base: Base
    number: int
    dice: random.Random
    kinds: tuple[str, ...]
    folder: Path
    faults: list[Fault] = field(default_factory=list)
    may_refuse: bool = False  # a bit of what it reads was changed
    tail: str = ""

    def run(self) -> None:
        names = list(SUBJECTS)
        self.name = self.dice.choices(names, [SUBJECTS[name].weight for name in names])[0]
        self.subject, self.runs, self.cache = (
            SUBJECTS[self.name],
            self.folder / "runs",
            self.folder / "cache",
        )
        kinds = self.dice.choices(self.kinds, k=self.dice.randint(1, MOST_FAULTS))
        self._begin(kinds[0])
        for kind in kinds:
            fault = Fault(kind, self.name, self.state, None)
            self.faults.append(fault)
            running = KINDS[kind](self)
            fault.code = running.code
            allowed = ALLOWED[fault.kind] + ((2,) if self.may_refuse else ())
            fault.wrong = fault.wrong or running.wrong(allowed) or self._differs(running)
            if fault.wrong or running.code == 0 or (running.code == 2 and self.may_refuse):
                break
        else:
            running = self.start()
            running.ends_within(LONGEST_SECONDS)
            allowed = (0, 2) if self.may_refuse else (0,)
            self.faults[-1].wrong = running.wrong(allowed) or self._differs(running)
        if any(fault.wrong for fault in self.faults):
            running.signal(signal.SIGKILL)
            self.tail = running.said()[-1500:].replace(str(self.base.folder), "")

    def _begin(self, kind: str) -> None:
        """From nothing, from a checkpoint, or where it is finished already and a kill would come too late."""
        states = ["nothing", *(["halfway"] if self.name in TRAINED else [])]
        states += ["finished"] if kind in ("flip", "two", "clock") and self.name in TRAINED else []
        self.state = self.dice.choice(states)
        self.base.copy(self.subject.reads, self.base.folder / "runs", self.runs)
        if self.state != "nothing":
            source = "halfway" if self.state == "halfway" else "runs"
            self.base.copy((self.subject.makes,), self.base.folder / source, self.runs)
        if self.dice.random() < 0.5 and self.name != "prepare":
            shutil.copytree(self.base.folder / "cache", self.cache)

    def _differs(self, running: Running) -> str | None:
        if running.code != 0 or made(self.subject, self.runs) == self.base.made[self.name]:
            return None
        return "exit 0, and the end is another one"

    def start(self, runs: Path | None = None, jump: Jump | None = None, place: str = "") -> Running:
        folder = self.base.folder / f"said-{self.number}{place}"  # not on the disk that is full
        folder.mkdir(exist_ok=True)
        as_script = jump is None and self.dice.random() < 1 / 16
        return Running(
            self.base.command(self.subject, runs or self.runs), folder, self.cache, as_script, jump
        )

    def moment(self) -> float:
        """Any of the seconds that the command takes."""
        return self.dice.uniform(0, self.base.seconds[self.name])

    def files(self) -> list[Path]:
        found = [*self.runs.rglob("*"), *self.cache.rglob("*")]
        return [path for path in sorted(found) if path.is_file() and path.stat().st_size]


def kill(trial: Trial) -> Running:
    return _signalled(trial, lambda running: running.signal(signal.SIGKILL))


def kill_parent(trial: Trial) -> Running:
    running = _signalled(trial, lambda running: os.kill(running.pid, signal.SIGKILL))
    if running.leaves_children():
        trial.faults[-1].wrong = "children outlived it"
        running.signal(signal.SIGKILL)
    return running


def sigterm(trial: Trial) -> Running:
    return _signalled(trial, lambda running: os.kill(running.pid, signal.SIGTERM))


def sigint(trial: Trial) -> Running:
    twice = trial.dice.random() < 0.3

    def press(running: Running) -> None:
        running.signal(signal.SIGINT)
        if twice and not running.ends_within(0.3):
            running.signal(signal.SIGINT)

    return _signalled(trial, press)


def _signalled(trial: Trial, send: Callable[[Running], None]) -> Running:
    running = trial.start()
    if running.ends_within(trial.moment()):
        trial.faults[-1].is_late = True
    else:
        with contextlib.suppress(ProcessLookupError):
            send(running)
        running.ends_within(LONGEST_SECONDS)
    return running


def disk(trial: Trial) -> Running:
    disk = os.statvfs(trial.folder)
    most = sum(path.stat().st_size for path in _whole(trial))
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    resize(trial.folder, used + int(trial.dice.uniform(0, 1.1) * most) + disk.f_frsize)
    try:
        running = trial.start()
        running.ends_within(LONGEST_SECONDS)
    finally:
        resize(trial.folder, ROOM_MIB * 2**20)
    return running


def _whole(trial: Trial) -> list[Path]:
    """The files that the command leaves, undisturbed."""
    source = (
        trial.base.folder / ("many" if trial.name == "prepare" else "runs") / "tiny" / trial.subject.makes
    )
    return [path for path in source.rglob("*") if path.is_file()]


def flip(trial: Trial) -> Running:
    if files := trial.files():
        file = trial.dice.choice(files)
        place, bit = trial.dice.randrange(file.stat().st_size), 1 << trial.dice.randrange(8)
        with file.open("r+b") as stream:
            stream.seek(place)
            byte = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([byte ^ bit]))
        trial.faults[-1].state += f", {file.relative_to(trial.folder)} byte {place}"
        trial.may_refuse = True
    else:
        trial.faults[-1].is_late = True  # nothing is there yet
    running = trial.start()
    running.ends_within(LONGEST_SECONDS)
    return running


def two(trial: Trial) -> Running:
    """Two in one folder are one and a message; two in two folders that share a cache are two."""
    together, other = trial.dice.random() < 0.5, trial.folder / "other"
    if not together:
        shutil.rmtree(other, ignore_errors=True)
        trial.base.copy((*trial.subject.reads, trial.subject.makes), trial.runs, other)
    first = trial.start()
    first.ends_within(trial.moment() * trial.dice.choice((0, 0.2, 1)))
    second = trial.start(trial.runs if together else other, place=".second")
    for running in (first, second):
        running.ends_within(LONGEST_SECONDS)
    allowed = (0, 2) if together or trial.may_refuse else (0,)
    fault = trial.faults[-1]
    fault.wrong = second.wrong(allowed) or first.wrong(allowed)
    if together and first.code == 2 == second.code and not trial.may_refuse:
        fault.wrong = "two at once, and none of them went on"
    if not together and second.code == 0 and made(trial.subject, other) != trial.base.made[trial.name]:
        fault.wrong = "the second ended otherwise"
    return first if first.code == 0 or not together else second


def clock(trial: Trial) -> Running:
    for path in (*trial.runs.rglob("*"), *trial.cache.rglob("*")):
        moment = trial.dice.uniform(0, 4e9)  # up to 2096
        os.utime(path, (moment, moment))
    running = trial.start(jump=(trial.dice.uniform(-1e9, 1e9), trial.moment()))
    running.ends_within(LONGEST_SECONDS)
    return running


KINDS: dict[str, Callable[[Trial], Running]] = {
    one.__name__: one for one in (kill, kill_parent, sigterm, sigint, disk, flip, two, clock)
}
ALLOWED = {
    "kill": (0, -signal.SIGKILL),
    "kill_parent": (0, -signal.SIGKILL),
    "sigterm": (0, 143, -signal.SIGTERM),
    "sigint": (0, 130, -signal.SIGINT),
    "disk": (0, 2),
    "flip": (0, 2),
    "two": (0, 2),
    "clock": (0,),
}


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, mounts: bool) -> Iterator[None]:
    folder.mkdir(parents=True)
    if mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "faults", str(folder)], check=True)
    try:
        yield
    finally:
        if mounts:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "faults", name]
        done = shutil.which("mount") and subprocess.run(command, capture_output=True, check=False)
        if not done or done.returncode:
            return False
        subprocess.run(["umount", name], check=True)
        return True


def trial(base: Base, number: int, seed: int, kinds: tuple[str, ...]) -> tuple[list[Fault], str]:
    """One trial, in a worker."""
    folder = base.folder / f"trial-{number}"
    with small_disk(folder, base.small_disks):
        one = Trial(base, number, random.Random(f"{seed} {number}"), kinds, folder)
        one.run()
    return one.faults, one.tail


# The campaign --------------------------------------------------------------------------------------------------


def load_libraries(cache: Path) -> None:
    """What every script imports, once; forks begin with it."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from toolkit import env
    from toolkit.recipe.load import load

    env.prepare(load("tiny").memory.alloc_conf, use_gpu=False)
    from toolkit.engine.export import export  # noqa: F401
    from toolkit.engine.inference import chat, evaluate  # noqa: F401
    from toolkit.engine.train import dpo, sft  # noqa: F401
    from toolkit.report import figures  # noqa: F401


def campaign(base: Base, wanted: int, minutes: float, workers: int, seed: int, kinds: tuple[str, ...]) -> Any:
    until, faults, exceptions, number = time.monotonic() + 60 * minutes, [], [], 0
    pending: set[Future[tuple[list[Fault], str]]] = set()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        while pending or (len(faults) < wanted and time.monotonic() < until):
            while len(pending) < workers and len(faults) < wanted and time.monotonic() < until:
                pending.add(pool.submit(trial, base, number, seed, kinds))
                number += 1
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                given, tail = future.result()
                faults += [one for one in given if not one.is_late or one.wrong]
                for one in (one for one in given if one.wrong):
                    exceptions.append(asdict(one) | {"tail": tail})
                    print(f"EXCEPTION {one}\n{tail}", flush=True)
                told = ", ".join(f"{one.kind} of {one.subject} (exit {one.code})" for one in given)
                print(f"{len(faults):>4} faults, {len(exceptions)} exceptions: {told}", flush=True)
    return {
        "faults": len(faults),
        "exceptions": exceptions,
        "trials": number,
        "by_kind": dict(sorted(Counter(one.kind for one in faults).items())),
        "by_subject": dict(sorted(Counter(one.subject for one in faults).items())),
        "by_end": dict(sorted(Counter(f"{one.kind}: exit {one.code}" for one in faults).items())),
        "workers": workers,
        "seed": seed,
        "undisturbed_seconds": {name: round(seconds, 1) for name, seconds in base.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="no trial begins after that many")
    parser.add_argument("--faults", type=int, default=300, help="no trial begins after so many")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="which of them, separated by commas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    kinds, skipped = tuple(arguments.kinds.split(",")), {}
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    mounts = can_mount()
    if "disk" in kinds and not mounts:
        kinds = tuple(kind for kind in kinds if kind != "disk")
        skipped["disk"] = "no tmpfs can be mounted here: it takes root, or a container that may mount"
        print(f"disk is skipped: {skipped['disk']}")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        load_libraries(folder / "libraries")
        base = Base(folder, mounts)
        base.make()
        began = time.monotonic()
        result = campaign(base, arguments.faults, arguments.minutes, arguments.workers, arguments.seed, kinds)
        result |= {"minutes": (time.monotonic() - began) / 60, "skipped": skipped}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(result["exceptions"]))


if __name__ == "__main__":
    main()
