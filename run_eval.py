"""Base, SFT and DPO on held-out rows and benchmarks, with error bars, and whether a stage made a difference.

    python run_eval.py --recipe tiny
    python run_eval.py --recipe llama31_8b --models base,dpo
    python run_eval.py --recipe llama31_8b --tasks arc_easy,hellaswag --limit 200
    python run_eval.py --recipe tiny --tasks my_task --tasks-path my_tasks/

Writes runs/<recipe>/eval/report.json.
"""

from toolkit import cli, evaluation_scope, hardware
from toolkit.recipe import load
from toolkit.rundir import RunDir
from toolkit.screen import Screen


def main() -> None:
    parser = cli.options(__doc__)
    evaluation_scope.add_options(parser)
    arguments = parser.parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Screen(quiet=arguments.quiet)
    run = RunDir(arguments.runs, recipe.name, "eval")
    scope = evaluation_scope.scope(recipe, run, arguments)
    cli.prepare(recipe, hardware.here(), console)
    with cli.importing(console):
        from toolkit.engine import evaluate  # imports torch: only once there is something to run

    evaluate.run(recipe, run, scope, console)
    console.print(f"[bold green]evaluated[/]; see {run.report}")


if __name__ == "__main__":
    cli.run(main)
