"""README and docs/: commands are run or parsed, links lead somewhere, names are complete, figures agree."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.engine.scripts import Script
from tests.test_architecture import ORDER, PACKAGES
from toolkit.cards import CARDS
from toolkit.data.reasons import Reason
from toolkit.data.rows import recognise, to_item
from toolkit.data.schemas import SCHEMAS
from toolkit.recipe.stages import RowKind

DOCS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, MEASURED = DOCS["README.md"], DOCS["measured.md"]
MOST_LINES = 150  # of the README: what can be read in a minute

FENCED = {  # in the order in which a reader meets them
    name: [
        line.split("  #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line
    ]
    for name, text in DOCS.items()
}
COMMANDS = {command for commands in FENCED.values() for command in commands}
COMMANDS |= set(re.findall(r"^- Command: `([^`]+)`", MEASURED, re.MULTILINE))
SCRIPTS = sorted(one for one in COMMANDS if one.startswith(("python run_", "python benchmarks/")))
PLANNED = (
    "run_sft.py",
    "run_dpo.py",
    "run_reward.py",
    "run_rl.py",
    "run_kto.py",
)  # of the other scripts the options are looked up


# Commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_is_called_as_it_can_be(command: str, tmp_path: Path) -> None:
    script, *words = shlex.split(command)[1:]
    if script in PLANNED:
        words += [] if {"--preview", "--plan"} & {*words} else ["--plan"]
        words += ["--runs", str(tmp_path)]
        if "--from" in words:  # of a run that is not there
            at = words.index("--from")
            words[at : at + 2] = []
        for file in re.findall(r"[\w-]+\.jsonl", command):  # the reader's own
            (tmp_path / file).write_bytes((ROOT / f"recipes/tiny/{script[4:7]}.jsonl").read_bytes())
    asked = words if script in PLANNED else ["--help"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *asked],
        cwd=tmp_path if script in PLANNED else ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if script not in PLANNED:
        assert all(word in done.stdout for word in words if word.startswith("--"))


def test_make_targets_and_requirement_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
        for name in re.findall(r"-r (\S+\.txt)", command):
            assert (ROOT / name).is_file()


FILES = {  # of the reader's, which the commands name: the layout of a row
    "my_rows.jsonl": '{"instruction": "What comes after %(number)d?", "output": "The one after %(number)d."}',
    "tiny-votes.jsonl": '{"prompt": [{"role": "user", "content": "What comes after %(number)d?"}], '
    '"chosen": [{"role": "assistant", "content": "The next one."}], '
    '"rejected": [{"role": "assistant", "content": "No idea, %(number)d."}]}',
}


FEW_STEPS = 12  # more than are warmed up


def runs_on_a_cpu(command: str) -> bool:
    """Without a network, a large model or anything to install, within the clone."""
    if command == "make run" or command == "python run_doctor.py":
        return True
    is_of_tiny = "--recipe tiny" in command and "/tmp/" not in command
    asks_the_hub = command.startswith("python run_fetch.py")  # its plan too: sizes and licences
    return command.startswith("python run_") and (is_of_tiny or ("--plan" in command and not asks_the_hub))


def fresh_clone(folder: Path) -> Path:
    """What is tracked, as it is now, and a .venv as `make setup` leaves it, of the packages that run this test.

    The embedded recipe trains a few steps a stage: whole it is tests/engine/train/test_tiny.py's.
    """
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode or sys.prefix == sys.base_prefix:
        pytest.skip("needs a git checkout and a virtual environment")
    for name in filter(lambda name: (ROOT / name).is_file(), tracked.stdout.split("\0")[:-1]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    recipe = folder / "recipes/tiny.yaml"
    steps = re.sub(r"^  max_steps: null", f"  max_steps: {FEW_STEPS}", recipe.read_text(), flags=re.MULTILINE)
    recipe.write_text(steps.replace("save_steps: 200", f"save_steps: {FEW_STEPS}"))
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith(".installed"):
            (folder / ".venv" / part.name).symlink_to(part)
    for stamp in (".installed", ".installed-optional", ".installed-dev"):
        (folder / ".venv" / stamp).touch()
    return folder


def ended(command: str, clone: Path) -> tuple[int, str]:
    """(exit code, what it said) of a command in the clone: a script's own process is a fork."""
    if command.startswith("python "):
        script = Script(shlex.split(command)[1:], clone.parent / "said", clone)
        return script.wait(600), script.said()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["PATH"] = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=clone, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.campaign
def test_the_commands_of_readme_and_docs_work_one_after_the_other_in_a_fresh_clone(tmp_path: Path) -> None:
    clone, kept = fresh_clone(tmp_path / "clone"), tmp_path / "kept"
    runs = clone / "runs"
    for name, layout in FILES.items():
        (clone / name).write_text("".join(layout % {"number": number} + "\n" for number in range(32)))
    failed, done = [], set()
    for name, commands in FENCED.items():
        if kept.exists():  # each document begins where the README ended
            shutil.rmtree(runs)
            shutil.copytree(kept, runs)
        for command in commands:
            is_dry = command.startswith("make ") and not runs_on_a_cpu(command)
            asked = command.replace("make ", "make -n ", 1) if is_dry else command
            asked = re.sub(r"checkpoint-\d+", f"checkpoint-{FEW_STEPS}", asked)
            if command in done or not (is_dry or runs_on_a_cpu(command)):
                continue
            done.add(command)
            code, said = ended(asked, clone)
            if code:
                failed.append(f"{name}: {asked}\n{said[-2000:]}")
        if name == "README.md":
            shutil.copytree(runs, kept)
    assert not failed, "\n\n".join(failed)


# Links and names -----------------------------------------------------------------------------------------------


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "file",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")],
    ids=lambda it: it.name,
)
def test_links_and_named_files_are_there(file: Path) -> None:
    text = file.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`((?:toolkit|tests|benchmarks|recipes|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_names_every_document() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert [name for name in DOCS if name != "README.md" and f"docs/{name}" not in README] == []


def test_the_architecture_names_every_package_in_the_order_of_imports() -> None:
    tree = DOCS["architecture.md"].partition("toolkit/\n")[2].partition("```")[0]
    names = [f"{room.split('.')[-1]}/" if room in PACKAGES else f"{room}.py" for room in ORDER]
    assert re.findall(r"(?<!\S)(?:\w+/|\w+\.py)(?=\s)", tree.partition("tests/ ")[0]) == names


def test_reasons_and_cards_are_complete() -> None:
    for reason in Reason:
        assert f"| `{reason.value}` | {reason.sentence} |" in DOCS["data.md"]
    assert [key for key in CARDS if f"`{key}`" not in DOCS["memory.md"]] == []


# Schemas -------------------------------------------------------------------------------------------------------


def tables(text: str) -> Iterator[list[list[str]]]:
    """The cells of each table, its header first."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.splitlines()]
        yield [[cell.strip() for cell in row] for row in (rows[0], *rows[2:])]


SHOWN = [table[1:] for table in tables(DOCS["data.md"]) if table[0][0] == "schema"]
EXAMPLES = [
    (kind, name.strip("`"), example.strip("`").replace("\\|", "|"))
    for kind, table in zip(SCHEMAS, SHOWN, strict=True)
    for name, _, example in table
]


@pytest.mark.parametrize(("kind", "schema", "example"), EXAMPLES)
def test_an_example_is_a_row_of_its_schema(kind: RowKind, schema: str, example: str) -> None:
    row = json.loads(example)
    assert recognise(row, kind, row) == schema
    assert not isinstance(to_item(row, kind, schema), Reason)


def test_every_schema_is_shown() -> None:
    assert {(kind, name) for kind, name, _ in EXAMPLES} == {
        (kind, name) for kind in SCHEMAS for name in SCHEMAS[kind]
    }
    asked = README.partition("## Your own model and data")[2].partition("\n## ")[0]
    assert [name for kind in ("chat", "pair") for name in SCHEMAS[kind] if f"`{name}`" not in asked] == []


# Figures -------------------------------------------------------------------------------------------------------


def figures(text: str) -> dict[str, list[str]]:
    """Rows of tables by their label."""
    return {
        label: cells for table in tables(text) for label, *cells in table if label and label != "measured"
    }


def test_the_readmes_figures_are_those_that_were_measured() -> None:
    section = README.partition("## Measured")[2].partition("\n## ")[0]
    shown, measured = figures(section), figures(MEASURED)
    assert shown and {label: measured.get(label) for label in shown} == shown
    assert not re.search(r"\d", re.sub(r"^\|.*$", "", section, flags=re.MULTILINE)), (
        "a figure outside the tables"
    )


def test_no_label_is_measured_twice() -> None:
    labels = [row[0] for table in tables(MEASURED) for row in table[1:]]
    assert len(set(labels)) == len(labels)


def test_every_figure_says_how_it_was_made() -> None:
    for section in MEASURED.split("\n## ")[1:]:
        if "\n|" in section:
            for fact in ("Command", "Hardware", "Date"):
                assert re.search(rf"^- {fact}: \S", section, re.MULTILINE), (section.splitlines()[0], fact)
