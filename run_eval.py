"""Base, SFT and DPO on held-out rows and benchmarks, with error bars, and whether a stage made a difference.

    python run_eval.py --recipe tiny
    python run_eval.py --recipe llama31_8b --models base,dpo,dpo-beta02
    python run_eval.py --recipe llama31_8b --tasks arc_easy,hellaswag --limit 200
    python run_eval.py --recipe tiny --tasks my_task --tasks-path my_tasks/

Writes runs/<recipe>/eval/report.json.
"""

from toolkit import cli, hardware, process
from toolkit.console.screen import Screen
from toolkit.evaluation import scope
from toolkit.recipe.load import load
from toolkit.run.rundir import RunDir


def main() -> None:
    parser = cli.options(__doc__)
    scope.add_options(parser)
    arguments = parser.parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Screen(quiet=arguments.quiet)
    run = RunDir(arguments.runs, recipe.name, "eval")
    chosen = scope.choose(recipe, run, arguments)
    process.prepare(recipe, hardware.here(), console, run.problems())
    with cli.importing(console):
        from toolkit.engine.inference import evaluate  # imports torch: only once there is something to run

    evaluate.run(recipe, run, chosen, console)
    cli.result(console, "evaluated", f"; see {run.report}")


if __name__ == "__main__":
    cli.run(main)
