"""What this machine is, and whether a recipe can run on it: driver, CUDA, memory, disk, network, cache.

    python run_doctor.py
    python run_doctor.py --recipe llama31_8b
    python run_doctor.py --recipe llama31_8b --json

Loads no torch and downloads nothing. Exit code 2 when the recipe cannot run here.
"""

import sys

from toolkit import cli
from toolkit.console.screen import Screen, Steady
from toolkit.doctor import view
from toolkit.doctor.examine import examine
from toolkit.errors import UserError
from toolkit.recipe.load import load


def main() -> None:
    parser = cli.options(__doc__, needs_recipe=False)
    parser.add_argument("--json", action="store_true", help="as JSON: can_run, and each check")
    arguments = parser.parse_args()
    recipe = load(arguments.recipe, tuple(arguments.set)) if arguments.recipe else None
    checks = examine(recipe, arguments.runs)
    if arguments.json:
        Steady(sys.stdout).write(view.as_json(checks) + "\n")
    else:
        view.show([check for check in checks if check.status != "ok" or not arguments.quiet], Screen())
    what, failed = recipe.name if recipe else "a recipe", [one.name for one in checks if one.status == "fail"]
    if failed:
        raise UserError(f"{what} cannot run here: {', '.join(dict.fromkeys(failed))}")
    if recipe and not arguments.json:
        cli.result(Screen(), "yes", f": {what} can run here")


if __name__ == "__main__":
    cli.run(main)
