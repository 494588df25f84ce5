"""Every run: outcome, figures, size, what it continues; and away with what is not needed.

    python run_list.py
    python run_list.py --recipe tiny --stage dpo --sort size
    python run_list.py --outcome killed --json
    python run_list.py --remove tiny/dpo-beta02 tiny/export/dpo-adapter
    python run_list.py --prune --unused-days 7

--remove and --prune show what goes and how much room that makes, and ask.
"""

import sys

from toolkit import cli
from toolkit.console.screen import Steady
from toolkit.console.text import Terminal
from toolkit.listing import entries, removal, request, view


def main() -> None:
    arguments, console = request.parse(__doc__), Terminal(file=Steady(sys.stdout))
    found = entries.find(arguments.runs)
    if arguments.remove or arguments.prune:
        going, notes = request.removals(found, arguments)
        view.show_removals(going, notes, console)
        gone = removal.remove(going) if going and request.agreed(going, console, arguments.yes) else []
        cli.result(console, "removed", f" {len(gone):,}, which made {view.room(gone)} of room")
    elif arguments.json:
        Steady(sys.stdout).write(view.as_json(request.chosen(found, arguments)) + "\n")
    else:
        view.show(request.chosen(found, arguments), console)


if __name__ == "__main__":
    cli.run(main)
