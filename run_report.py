"""The report of every run of a recipe, written again from what lies on disk; also of a killed one.

    python run_report.py --recipe tiny
    python run_report.py --recipe llama31_8b --runs /workspace/runs

Writes runs/<recipe>/<name>/report.html: one file that opens without network.
"""

import sys

from toolkit import cli, command
from toolkit.console.screen import Steady
from toolkit.console.text import Terminal
from toolkit.errors import UserError
from toolkit.recipe.load import load
from toolkit.report import run_page
from toolkit.run.rundir import RunDir


def main() -> None:
    arguments = cli.options(__doc__).parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Terminal(file=Steady(sys.stdout))
    first = RunDir(arguments.runs, recipe.name, recipe.stages()[0].name)
    notes: list[str] = []
    pages = [page for name in first.variants() if (page := run_page.write(first.of(name), notes))]
    if not pages:
        raise UserError(
            f"nothing to report: no run of {recipe.name} in {first.path.parent}; run "
            f"`{command.propose(first.name, recipe.name)}` first, or name where the runs are with --runs DIR"
        )
    for note in dict.fromkeys(notes):  # those of compare and eval are read for every stage
        console.print(note, style="yellow", markup=False)
    for page in pages:
        cli.result(console, "report", f" {page}")


if __name__ == "__main__":
    cli.run(main)
