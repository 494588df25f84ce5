"""Batched generation against one prompt at a time: how much faster, and how many greedy answers are the same.

    python run_sft.py --recipe tiny && python run_dpo.py --recipe tiny
    python benchmarks/generation.py [--runs runs] [--prompts 200] [--rounds 1] [--out results.json]

Base, SFT and DPO of the tiny recipe answer the same prompts, greedily, in one process; the three ways alternate from
model to model: one at a time, batches of one length (`mix_lengths: false`), and batches of like length, padded
(`mix_lengths: true`). Aim: at least 3 times as fast, with equal texts. What differs is shown, and asked once more in
a batch of the same prompt twice: where that gives the batch's answer, the difference is the single row's, for which
bitsandbytes has a kernel of its own.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from toolkit import hardware, process  # noqa: E402
from toolkit.compare import candidates  # noqa: E402
from toolkit.data.prompts import as_messages  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402
from toolkit.run.rundir import RunDir  # noqa: E402

ONE, SAME, MIXED = "one at a time", "batches of one length", "batches of like length, padded"
WAYS = {ONE: (1, True), SAME: (64, False), MIXED: (64, True)}


def read_prompts(num: int) -> list[list[dict[str, str]]]:
    """Questions, held-out prompts and, for the rest, prompts of training: each once, in file order."""
    recipe, prompts = load("tiny"), []
    for name, column in (("questions", "messages"), ("dpo_eval", "prompt"), ("dpo", "prompt")):
        for line in Path(recipe.locate(f"tiny/{name}.jsonl")).read_text(encoding="utf-8").splitlines():
            value = json.loads(line)[column]
            prompts.append(value if isinstance(value, list) else as_messages(recipe, value))
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())[:num]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe, console = load("tiny"), Console(highlight=False)
    models = candidates.choose(recipe, RunDir(arguments.runs, "tiny", "compare"), None)
    process.prepare(recipe, hardware.here(), console)
    from toolkit.engine.base import model
    from toolkit.engine.inference import generate

    prompts = read_prompts(arguments.prompts)
    loaded = model.load_trained(recipe, models)
    seconds, texts = dict.fromkeys(WAYS, 0.0), {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for name in models:
            for way in list(WAYS)[number % 3 :] + list(WAYS)[: number % 3]:
                batch_size, mix_lengths = WAYS[way]
                how = recipe.compare.model_copy(update={"batch_size": batch_size, "mix_lengths": mix_lengths})
                begun = time.perf_counter()
                with model.use_adapter(loaded.model, name):
                    answers = generate.answer(loaded, prompts, how, recipe.seed)
                seconds[way] += time.perf_counter() - begun
                texts[way] += [(name, answer.text) for answer in answers]
    results = {"num_prompts": len(prompts), "models": list(models), "device": model.device_name(), "ways": {}}
    for way in WAYS:
        differing = [
            at for at, (one, other) in enumerate(zip(texts[ONE], texts[way], strict=True)) if one != other
        ]
        twice = 0
        for at in differing:
            name, text = texts[way][at]
            how = recipe.compare.model_copy(update={"batch_size": 1, "mix_lengths": False})
            with model.use_adapter(loaded.model, name):
                [again] = generate.answer(loaded, [prompts[at % len(prompts)]], how, recipe.seed)
            twice += again.text == text
            print(f"   {name}: {texts[ONE][at][1]!r}\n   {' ' * len(name)}  {text!r}")
        results["ways"][way] = {
            "seconds": round(seconds[way], 2),
            "times_as_fast": round(seconds[ONE] / seconds[way], 2),
            "equal_texts": 1 - len(differing) / len(texts[ONE]),
            "differing": len(differing),
            "of_them_equal_to_the_prompt_twice": twice,
        }
        print(f"{way}: {results['ways'][way]}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
