"""A recipe's model and data into the cache, before the bill for a GPU starts: sizes, disk, tokens and licences first.

    python run_fetch.py --recipe llama31_8b --plan
    python run_fetch.py --recipe llama31_8b
    python run_fetch.py --recipe llama31_8b --base-16bit

The same command goes on where one broke off. After it the recipe runs without network: HF_HUB_OFFLINE=1.
"""

from toolkit import cli, command, env
from toolkit.console.screen import Screen
from toolkit.doctor import sizes
from toolkit.recipe.load import load


def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument(
        "--base-16bit", action="store_true", help="also the 16-bit weights that exports merge onto"
    )
    parser.add_argument("--plan", action="store_true", help="show what would be fetched, and stop")
    arguments = parser.parse_args()
    recipe, console = load(arguments.recipe, tuple(arguments.set)), Screen(quiet=arguments.quiet)
    parts = sizes.parts(recipe, arguments.base_16bit)
    for part in parts:
        console.print(part.told(), markup=False)
    if arguments.plan:
        return
    if parts:
        env.prepare(recipe.memory.alloc_conf, use_gpu=False)
        with cli.importing(console):
            from toolkit.engine.data import fetching  # imports torch: only once there is something to do

        fetching.fetch(parts, console)
    offline = f"HF_HUB_OFFLINE=1 {command.propose(recipe.stages()[0].name, recipe.name)}"
    cli.result(console, "all of it is on this machine", f"; it runs without network: {offline}")


if __name__ == "__main__":
    cli.run(main)
