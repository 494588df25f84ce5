"""Base, SFT, DPO and any other adapters of one base side by side: their answers, and what can be measured of them.

    python run_compare.py --recipe tiny
    python run_compare.py --recipe llama31_8b --prompts my_prompts.jsonl
    python run_compare.py --recipe llama31_8b --prompts my_prompts.jsonl --questions
    python run_compare.py --recipe tiny --models base,sft,dpo,dpo-beta02
    python run_compare.py --recipe tiny --models base,dpo,runs/tiny/dpo/checkpoints/checkpoint-80
    python run_compare.py --recipe llama31_8b --set compare.do_sample=true --set seed=2
    python run_compare.py --recipe tiny --chat

Writes runs/<recipe>/compare/: comparison.html, comparison.md, comparison.jsonl, report.json. --chat writes nothing.
"""

from toolkit import cli, hardware, process
from toolkit.compare import candidates
from toolkit.console.screen import Screen
from toolkit.data.prompts import read_prompts
from toolkit.recipe.load import load
from toolkit.run.rundir import RunDir


def main() -> None:
    parser = cli.options(__doc__)
    parser.add_argument(
        "--models", metavar="A,B", help="base, sft, dpo, variants, or paths of adapters and checkpoints"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompts", metavar="FILE", help="one a line, or rows of a .jsonl; - is stdin")
    what.add_argument("--chat", action="store_true", help="talk with all the models at the terminal")
    parser.add_argument(
        "--questions",
        action="store_true",
        help="with --prompts: also the recipe's held-out questions and pairs, which are asked without it",
    )
    arguments = parser.parse_args()
    if arguments.questions and not arguments.prompts:
        parser.error("--questions goes with --prompts")
    recipe = load(arguments.recipe, tuple(arguments.set))
    console = Screen(quiet=arguments.quiet and not arguments.chat)
    run = RunDir(arguments.runs, recipe.name, "compare")
    prompts = read_prompts(recipe, arguments.prompts)
    models = candidates.choose(recipe, run, arguments.models)
    process.prepare(recipe, hardware.here(), console, [] if arguments.chat else run.problems())
    with cli.importing(console):
        from toolkit.engine.inference import (  # they import torch: only once there is something to run
            chat,
            compare,
        )

    if arguments.chat:
        chat.run(recipe, run, models, console)
        return
    held_out = arguments.prompts is None or arguments.questions
    compare.run(recipe, run, models, prompts, console, held_out)
    cli.result(console, "compared", f"; see {run.path / 'comparison.html'}")


if __name__ == "__main__":
    cli.run(main)
