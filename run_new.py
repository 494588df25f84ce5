"""A recipe for a model and rows of your own: complete, each value with its source beside it, and its plan.

    python run_new.py --model my_model --sft my_rows.jsonl --dpo my_pairs.jsonl
    python run_new.py --model unsloth/Qwen3-8B --sft my_rows.jsonl --gpu rtx4090 --out mine.yaml
    python run_new.py --model my_model --dpo my_pairs.jsonl --set dpo.beta=0.2

Writes one YAML, which run_sft.py and run_dpo.py take as --recipe. What it cannot find out it asks for as options.
"""

from toolkit import cli, env
from toolkit.console.plan_view import show_plan
from toolkit.console.screen import Screen
from toolkit.drafting import request
from toolkit.recipe.sections import Memory


def main() -> None:
    wanted, console = request.parse(__doc__), Screen()
    env.prepare(Memory().alloc_conf, use_gpu=False)
    with cli.importing(console):
        from toolkit.engine.drafting import recipe  # imports torch: only once there is something to read

    written, plans = recipe.write(wanted, console)
    for plan in plans:
        show_plan(written, plan, plan.stage, console)
        if problem := plan.problem(written.name):
            console.print(problem, style="yellow", markup=False)
    cli.result(console, "written", f": {wanted.draft.file}")


if __name__ == "__main__":
    cli.run(main)
