"""The report of each stage that a recipe has run, written again from what lies on disk; also of a killed run.

    python run_report.py --recipe tiny
    python run_report.py --recipe llama31_8b --runs /workspace/runs

Writes runs/<recipe>/<stage>/report.html: one file that opens without network.
"""

import sys

from rich.markup import escape

from toolkit import cli
from toolkit.console.screen import Steady
from toolkit.console.text import Terminal
from toolkit.errors import UserError
from toolkit.recipe import stages
from toolkit.recipe.load import load
from toolkit.report import run_page
from toolkit.run.rundir import RunDir


def main() -> None:
    arguments = cli.options(__doc__).parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Terminal(file=Steady(sys.stdout))
    runs = [RunDir(arguments.runs, recipe.name, stage) for stage in stages.names()]
    notes: list[str] = []
    pages = [page for run in runs if (page := run_page.write(run, notes))]
    if not pages:
        raise UserError(
            f"nothing to report: no run of {recipe.name} in {' or '.join(str(run.path) for run in runs)}; "
            f"run `python run_sft.py --recipe {recipe.name}` first, or name where the runs are with --runs DIR"
        )
    for note in dict.fromkeys(notes):  # those of compare and eval are read for every stage
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    for page in pages:
        console.print(f"[bold green]report[/] {escape(str(page))}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main)
