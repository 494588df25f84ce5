"""Base, SFT and DPO answers side by side, with what can be measured.

    python run_compare.py --recipe tiny
    python run_compare.py --recipe llama31_8b --prompts my_prompts.txt
    python run_compare.py --recipe llama31_8b --set compare.do_sample=true

Writes runs/<recipe>/compare/: comparison.md, comparison.jsonl, report.json.
"""

from pathlib import Path

from toolkit import cli, hardware
from toolkit.prompts import read_prompts
from toolkit.recipe import load
from toolkit.rundir import RunDir
from toolkit.screen import Screen


def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="one prompt a line, instead of the recipe's"
    )
    arguments = parser.parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Screen(quiet=arguments.quiet)
    prompts = read_prompts(recipe, arguments.prompts)
    cli.prepare(recipe, hardware.here(), console)
    with cli.importing(console):
        from toolkit.engine import compare  # imports torch: only once there is something to run

    run = RunDir(arguments.runs, recipe.name, "compare")
    compare.run(recipe, run, prompts, console)
    console.print(f"[bold green]compared[/]; see {run.path / 'comparison.md'}")


if __name__ == "__main__":
    cli.run(main)
