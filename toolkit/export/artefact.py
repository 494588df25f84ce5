"""What `run_export.py` is asked for, and what an export is on disk: whole, checked, and made from which adapter.

An export is built under a temporary name. It gets its mark and then its own name only after it passed the check of its
format; one that did not pass stands beside it as `<name>.failed`, to be looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe
from toolkit.records.marks import ExportMark
from toolkit.run import changes, locking
from toolkit.run.rundir import RunDir
from toolkit.run.sealing import MARK, damage, put_in_place, room, seal

Format = Literal["adapter", "merged_16bit", "gguf", "ollama", "gptq", "fp8", "w8a8", "awq"]
FORMATS: tuple[Format, ...] = ("adapter", "merged_16bit", "gguf", "ollama", "gptq", "fp8", "w8a8", "awq")
QUANTISED = ("gptq", "fp8", "w8a8", "awq")  # for servers, by llm-compressor
PARITY = "parity.json"
OTHER_FOLDER = "--out DIR"
FAILED = ".failed"  # ends the name of one that did not pass its check

# Names of llama.cpp's quantisations and their numbers there (include/llama.h, enum llama_ftype).
QUANTS = {
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q5_0": 8,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_0": 2,
    "q3_k_l": 13,
    "q3_k_m": 12,
    "q3_k_s": 11,
    "q2_k": 10,
}
# What asks the model and knows when it has ended: the names of transformers.
PROMPTING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
LLAMA_CPP_VARIABLES = ("LLAMA_CPP_PATH", "UNSLOTH_LLAMA_CPP_PATH")
RUNS_CODE = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}  # pickles: loading one can run code


@dataclass(frozen=True)
class Wanted:
    """One export to make. `quant` is None but for GGUF; `llama_cpp` is the user's checkout, where there is one."""

    recipe: Recipe
    run: RunDir
    format: Format
    quant: str | None
    folder: Path
    verify: bool
    llama_cpp: Path | None

    @property
    def name(self) -> str:
        """The variant's: a stage, or dpo-beta02."""
        return self.run.name

    @property
    def answers(self) -> bool:
        """Whether the model can be asked; a reward model gives scores instead."""
        return stages.of(self.name).answers

    @property
    def base_16bit(self) -> str:
        """The 16-bit weights to merge onto, as this process can open them."""
        return self.recipe.locate(self.recipe.model.base_16bit or self.recipe.model.path)

    @property
    def temporary(self) -> Path:
        """This process's own, so that no other writes into it even where a file system knows no locks."""
        return self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")

    @property
    def failed(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}{FAILED}")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log.txt")

    def mark(self, verified: bool | None) -> ExportMark:
        """What the export is made of; another value of any of it makes it another export."""
        return ExportMark(
            recipe=self.recipe.name,
            stage=self.name,
            format=self.format,
            quant=self.quant,
            base=self.recipe.model.path,
            revision=self.recipe.model.revision,
            base_16bit=None if self.format == "adapter" else self.recipe.model.base_16bit,
            adapter_sha256=adapter_hash(self.run.adapter),
            verified=verified,
        )

    def is_made(self) -> bool:
        """Whether this very export stands there as it was made, and was checked if it is to be. Reads all of it."""
        mark = read_mark(self.folder)
        if mark is None or replace(mark, files=None) != self.mark(mark.verified) or damage(self.folder, MARK):
            return False
        return bool(mark.verified) or not self.verify

    def in_the_way(self) -> str | None:
        """What stands under the export's name and must not be replaced; None for nothing, or an earlier one of it."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return None
        mark = read_mark(self.folder)
        if mark is None:
            return "is there already and is no export"
        theirs, ours = (
            (mark.recipe, mark.stage, mark.format, mark.quant),
            (self.recipe.name, self.name, self.format, self.quant),
        )
        if theirs != ours:
            return f"holds another export: {' '.join(filter(None, theirs))}"
        found = {
            path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir()
        }
        if others := sorted(found - {MARK, *(mark.files or ())}):
            return f"holds files that are none of the export's: {', '.join(others[:6])}"
        return None

    def problems(self) -> list[str]:
        """Why nothing could be built now: another process makes it, or the disk or its rights forbid it."""
        problem = locking.problem(self.folder, OTHER_FOLDER)
        return [problem] if problem else []

    @contextmanager
    def building(self) -> Iterator[None]:
        """An empty folder under the temporary name, gone again after the block; nobody else makes this export in it.

        Raises UserError where another process does, or nothing can be written.
        """
        with locking.locked(self.folder, OTHER_FOLDER):
            ours = re.compile(rf"\.{re.escape(self.folder.name)}\.\d+(\.old)?\.tmp")
            for left in filter(lambda path: ours.fullmatch(path.name), self.folder.parent.iterdir()):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            if problem := self.in_the_way():  # since the options were read
                raise UserError(f"{self.folder} {problem}: name another --out, or move it away")
            try:
                self.temporary.mkdir()
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder.parent}: {error.strerror}; choose --out DIR"
                ) from None
            try:
                with room(self.folder.parent, "take --out DIR on another disk"):
                    yield
            finally:
                shutil.rmtree(self.temporary, ignore_errors=True)

    def keep(self, verified: bool) -> None:
        """Marks what was built under the temporary name, and gives it its own."""
        seal(self.temporary, MARK, self.mark(verified))
        put_in_place(self.temporary, self.folder)

    def reject(self, problems: Sequence[str], *fixes: str) -> NoReturn:
        """Sets what was built aside, without a mark, and raises UserError with what its check found."""
        shutil.rmtree(self.failed, ignore_errors=True)
        self.temporary.rename(self.failed)
        raise UserError(
            *(f"the export is not the model that was trained: {problem}" for problem in problems),
            *fixes,
            f"it stands in {self.failed} to be looked at, with {PARITY}; nothing was written to {self.folder}",
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage",
        required=True,
        metavar="NAME",
        help=f"whose adapter: {', '.join(stages.names())} or a variant, as dpo-beta02",
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to make of it")
    parser.add_argument(
        "--quant", metavar="NAME", help=f"of gguf and ollama (default q4_k_m): {', '.join(QUANTS)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of runs/<recipe>/export/...")
    parser.add_argument("--no-verify", action="store_true", help="skip the check against the trained model")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help=f"your llama.cpp, for gguf and ollama (else ${' or $'.join(LLAMA_CPP_VARIABLES)})",
    )
    parser.add_argument("--push", metavar="USER/REPO", help="upload the checked export to the Hub, private")
    parser.add_argument("--public", action="store_true", help="with --push: a public repository")
    parser.add_argument("--dry-run", action="store_true", help="with --push: list the files, upload nothing")


def wanted(recipe: Recipe, arguments: argparse.Namespace) -> Wanted:
    """The export that the options name. Raises UserError with everything that is wrong with them, all at once."""
    run, named = RunDir(arguments.runs, recipe.name, arguments.stage), arguments.stage
    if not stages.is_variant(named):
        known = dict.fromkeys([*stages.names(), *run.finished()])
        raise UserError(f"--stage {named}: no such stage or variant; one of {', '.join(known)}")
    is_gguf, problems = arguments.format in ("gguf", "ollama"), []
    quant = arguments.quant.lower() if arguments.quant else "q4_k_m" if is_gguf else None
    if quant and not is_gguf:
        problems.append(
            f"--quant {arguments.quant} goes with --format gguf or ollama, not {arguments.format}"
        )
    elif quant and quant not in QUANTS:
        problems.append(f"--quant {arguments.quant}: no such quantisation; one of {', '.join(QUANTS)}")
    if (is_gguf or arguments.format in QUANTISED) and not stages.of(named).answers:
        problems.append(
            f"--format {arguments.format} is for models that answer, {named} gives scores: take adapter or merged_16bit"
        )
    if not arguments.push and (arguments.public or arguments.dry_run):
        problems.append("--public and --dry-run go with --push USER/REPO")
    if arguments.push and arguments.no_verify:
        problems.append("--push uploads what was checked: leave --no-verify out")
    if arguments.push and arguments.push.count("/") != 1:
        problems.append(f"--push {arguments.push}: a repository is USER/REPO")
    llama_cpp = arguments.llama_cpp or next(
        (Path(os.environ[name]) for name in LLAMA_CPP_VARIABLES if os.environ.get(name)), None
    )
    if is_gguf and llama_cpp and not llama_cpp.is_dir():
        problems.append(f"llama.cpp in {llama_cpp}: there is no such folder")
    name = f"{named}-{arguments.format}" + (f"-{quant}" if is_gguf else "")
    folder = (arguments.out or arguments.runs / recipe.name / "export" / name).absolute()
    asked = Wanted(recipe, run, arguments.format, quant, folder, not arguments.no_verify, llama_cpp)
    if problem := asked.in_the_way():
        problems.append(f"{folder} {problem}: name another --out, or move it away")
    recipe.section(run.stage)
    if problems:
        raise UserError(*problems)
    mark = run.finished_with()
    if mark is None or not run.is_finished(mark.trajectory or recipe.trajectory(run.stage)):
        raise UserError(
            f"nothing to export: no finished adapter in {run.adapter}; run `{run.proposed()}` first"
        )
    return replace(asked, recipe=_as_trained(recipe, run))


def _as_trained(recipe: Recipe, run: RunDir) -> Recipe:
    """The recipe by which the adapter was made. Raises UserError where that is of another model or template."""
    trained, decides = run.as_trained(recipe), recipe.what_decides()
    changed = changes.between(
        trained.trajectory(run.stage),
        recipe.trajectory(run.stage),
        [field for field, what in decides.items() if what == "model"],
    )
    if changed:
        raise UserError(
            f"{run.adapter} was trained with another model or template than the recipe names; give the same --set as "
            f"then. Changed: {'; '.join(changed.values())}"
        )
    return trained


def read_mark(folder: Path) -> ExportMark | None:
    """What the mark of an export records; None where there is no complete export."""
    mark = ExportMark.load(folder / MARK)
    return mark if mark and mark.format else None


def adapter_hash(folder: Path) -> str:
    """SHA-256 over the files of an adapter that take part in an answer."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".jinja", ".model") or file.name.startswith(("tokenizer", "gen")):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def files(folder: Path, mark: ExportMark) -> dict[str, int]:
    """Bytes of each file of an export, by its path in it: what was sealed, and nothing that came to lie beside it."""
    return {name: (folder / name).stat().st_size for name in sorted(mark.files or {})}
