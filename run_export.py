"""A finished stage as files that other programs load, checked by loading them there.

    python run_export.py --recipe tiny --stage dpo --format adapter
    python run_export.py --recipe llama31_8b --stage dpo --format merged_16bit
    python run_export.py --recipe llama31_8b --stage dpo --format ollama --quant q4_k_m --llama-cpp ~/llama.cpp
    python run_export.py --recipe llama31_8b --stage dpo --format adapter --push USER/REPO --dry-run

Writes runs/<recipe>/export/<name>-<format>/; a name is a stage, or a variant of one as dpo-beta02. With the same
export already there, only --push does something.
"""

from toolkit import cli, hardware, process
from toolkit.console.screen import Screen
from toolkit.export import artefact, push
from toolkit.recipe.load import load


def main() -> None:
    parser = cli.options(__doc__)
    artefact.add_options(parser)
    arguments = parser.parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Screen(quiet=arguments.quiet)
    wanted = artefact.wanted(recipe, arguments)
    if wanted.is_made():
        console.print(f"{wanted.folder} is this export already", markup=False)
    else:
        process.prepare(recipe, hardware.here(), console, wanted.problems())
        with cli.importing(console):
            from toolkit.engine.export import export  # imports torch: only once there is something to make

        export.run(wanted, console)
    if arguments.push:
        push.push(wanted, arguments.push, arguments.public, arguments.dry_run, console)


if __name__ == "__main__":
    cli.run(main)
