"""All runs in a browser, live: curves over each other, what differs, answers side by side with votes, log.

    python run_board.py
    python run_board.py --runs /workspace/runs --port 8888
    python run_board.py --host 0.0.0.0

Listens on this machine alone; with --host for others too, who are asked for a token. Reads runs and writes votes, as
pairs, to runs/<recipe>/votes/.
"""

import sys

from toolkit import cli
from toolkit.board import serving
from toolkit.console.screen import Steady
from toolkit.console.text import Terminal


def main() -> None:
    arguments = serving.parse(__doc__)
    serving.serve(arguments, Terminal(file=Steady(sys.stdout)))


if __name__ == "__main__":
    cli.run(main)
