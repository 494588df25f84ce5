"""One stage at several values of its recipe, with one load of the model, and which differences are only noise.

    python run_sweep.py --recipe tiny --stage dpo --vary dpo.beta=0.05,0.1,0.2 --vary seed=1,2,3
    python run_sweep.py --recipe llama31_8b --stage dpo --vary dpo.learning_rate=5e-7,1e-6 --vary seed=1,2,3 --plan
    python run_sweep.py --recipe llama31_8b --stage sft --vary lora.r=8,16,32 --name rank
    python run_sweep.py --recipe llama31_8b --stage dpo --vary dpo.beta=0.05,0.1 --commands

Each run is a variant, runs/<recipe>/dpo-beta0p05-seed1/ ..., as run_dpo.py would have made it; the same command
continues what was stopped. --commands prints the one of each run, to be run anywhere that writes to the same folder.
Writes runs/<recipe>/sweeps/<name>/: sweep.json, sweep.html.
"""

from toolkit import cli, hardware, process
from toolkit.console.screen import Screen
from toolkit.errors import UserError
from toolkit.report import on_finish
from toolkit.sweep import ending, points, runs


def main() -> None:
    parser = cli.options(__doc__)
    points.add_options(parser)
    arguments = parser.parse_args()
    console, machine = Screen(quiet=arguments.quiet and not arguments.plan), hardware.here()
    if not (arguments.plan or arguments.commands):
        on_finish.ask(arguments.on_finish)
    sweep = points.asked(arguments)
    if arguments.commands:
        print(*points.commands(sweep, arguments), sep="\n")
        return
    jobs = runs.jobs(sweep, arguments, machine, console)
    problems = runs.problems(jobs, arguments.plan)
    runs.show(jobs, console)
    if arguments.plan:
        if problems:
            raise UserError(*problems)
        return
    end = ending.Ending(sweep, arguments.runs)
    on_finish.ask(arguments.on_finish, end.facts)
    pending, failed = [job for job in jobs if problems or not job.is_finished()], {}
    if pending:
        process.prepare(jobs[0].recipe, machine, console, problems, jobs[0].plan.settings.loss_chunk_gib)
        with cli.importing(console):
            from toolkit.engine.train import (
                sweep as engine,
            )  # imports torch: only once there is something to run

        failed = engine.run(pending, console, end.write)
    end.show(failed, console)
    cli.result(console, "swept", f" {len(jobs)} runs; see {end.page}")


if __name__ == "__main__":
    cli.run(main)
