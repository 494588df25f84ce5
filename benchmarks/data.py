"""Rows per second of preparing chats for SFT, beside TRL's own preparation of the same rows, and peak memory.

    python benchmarks/data.py [--rows 20000] [--rounds 5] [--memory-rows 100000] [--out benchmarks/results/data.json]

Same file, chat template, tokenizer (128k tokens) and max_length on both sides; every measurement is a process of its
own, with as many threads as each side takes by itself, and the sides alternate. Two spans are timed: `prepare`, from
rows in Arrow to tokenised, masked and cut rows in Arrow, and `whole`, from the JSONL file on, in CPU seconds and by the
clock on the wall. Of each the quickest round counts: other work on the machine only adds to it. `tokenizer` is the
tokenizer alone on the same texts: were all the rest free, ours could be no faster. Ours also checks turns, removes
duplicates, accounts for every row and, in `whole`, keeps the result for the next start. TRL runs its own
`SFTTrainer._prepare_dataset` twice:

- trl: all tokens trained. With our template its `assistant_only_loss` raises: it needs {% generation %} marks.
- trl_masked: assistant tokens only, with a copy of the template that has the marks.

Aim: at least 3 times TRL's rate by the clock on two cores, and 100,000 rows within 2 GB of resident memory.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizers" / "llama3"
TEMPLATE = ROOT / "recipes" / "templates" / "llama3.jinja"
BOS, EOS, END = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
SPECIAL = (BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", END, "<|finetune_right_pad_id|>")
MAX_LENGTH = 1024
SIDES = ("ours", "trl", "trl_masked")
SPANS = ("prepare", "whole")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# Rows and tokenizer --------------------------------------------------------------------------------------------


def texts() -> list[str]:
    """Paragraphs of the standard library: English and code, on every machine."""
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:120]
    pieces = [piece.strip() for file in files for piece in file.read_text("utf-8", "ignore").split("\n\n")]
    return [piece for piece in pieces if 40 < len(piece) < 1500 and "<|" not in piece]


def write_rows(file: Path, num_rows: int) -> None:
    """Chats of one to three exchanges, the same at every call."""
    pool, rng = texts(), random.Random(3407)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(num_rows):
            messages = []
            for _ in range(rng.choice((1, 1, 2, 3))):
                messages.append({"role": "user", "content": f"{number}: {rng.choice(pool)}"})
                messages.append({"role": "assistant", "content": rng.choice(pool)})
            stream.write(json.dumps({"messages": messages}) + "\n")


def tokenizer_folder(work: Path) -> Path:
    """The Llama-3 tokenizer where it is; else a byte-level one of its size, trained on what is here."""
    if TOKENIZER.is_dir():
        return TOKENIZER
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    made_up = (
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 12))) for _ in range(400_000)
    )
    trainer = trainers.BpeTrainer(
        vocab_size=128_256, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*texts(), *made_up], trainer)
    folder = work / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# One measurement, in a process of its own ----------------------------------------------------------------------


def recipe_for(rows: Path) -> Any:
    from toolkit.recipe.load import load

    return load(
        "tiny",
        (
            f"sft.datasets.0.path={rows}",
            "sft.eval_datasets=[]",
            f"sft.max_length={MAX_LENGTH}",
            "sft.overlong=cut",
        ),
    )


def loaded_from(folder: Path, template: str) -> Any:
    """What `preparation.prepare` asks of a loaded model, without the model."""
    from transformers import AutoTokenizer

    from toolkit.data.template import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return SimpleNamespace(tokenizer=tokenizer, template=ChatTemplate(template, BOS, EOS), end_of_turn=END)


def measure_ours(rows: Path, tokenizer: Path) -> dict[str, Any]:
    from toolkit import env

    env.prepare("expandable_segments:True", use_gpu=False)
    from toolkit.engine.data import preparation

    loaded, recipe = loaded_from(tokenizer, TEMPLATE.read_text()), recipe_for(rows)
    batches = _watch_tokenizer()
    started = _now()
    masking = preparation.masking_of(recipe.section("sft"), loaded)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "prepare"
    [(pool, selection)] = preparation.select(recipe, recipe.section("sft"), "chat", folder).values()
    begun = _now()
    account = preparation.encode(masking, "chat", pool, selection, folder / "rows")
    spans = _spans(started, begun)
    spans["tokenizer"] = _tokenizer_alone(masking, batches).tolist()
    return spans | {"tokens": account.num_tokens, "trained": account.num_trained_tokens}


def _now() -> Any:
    """CPU seconds of all threads, and the clock on the wall."""
    return np.array([time.process_time(), time.perf_counter()])


def _spans(started: Any, begun: Any) -> dict[str, Any]:
    now = _now()
    return {"prepare": (now - begun).tolist(), "whole": (now - started).tolist()}


def _watch_tokenizer() -> list[list[str]]:
    """The batches of texts that the tokenizer gets from now on."""
    from toolkit.data.masking import Masking

    encode, batches = Masking._encode, []

    def watched(self: Masking, texts: list[str]) -> Any:
        batches.append(texts)
        return encode(self, texts)

    Masking._encode = watched  # type: ignore[method-assign]
    return batches


def _tokenizer_alone(masking: Any, batches: list[list[str]]) -> Any:
    from toolkit import env

    before = _now()
    with env.tokenizer_threads():
        for texts in list(batches):
            masking._encode(texts)
    return _now() - before


def measure_trl(rows: Path, tokenizer: Path, masked: bool) -> dict[str, Any]:
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    template = TEMPLATE.read_text()
    if masked:
        said = "message['content'] | trim + \"<|eot_id|>\" }}"
        assert said in template
        marked = (
            '{%- if message["role"] == "assistant" %}{% generation %}{{- message["content"] | trim + "<|eot_id|>" }}'
            '{% endgeneration %}{%- else %}{{- message["content"] | trim + "<|eot_id|>" }}{%- endif %}'
        )
        template = template.replace(" + " + said, " }}" + marked)
    loaded = loaded_from(tokenizer, template)
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    config = SFTConfig(
        output_dir=os.environ["XDG_CACHE_HOME"],
        max_length=MAX_LENGTH,
        assistant_only_loss=masked,
        report_to="none",
        bf16=False,
    )
    trainer = SimpleNamespace(_tokenizer=loaded.tokenizer, chat_template=None, completion_only_loss=False)
    started = _now()
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train")
    begun = _now()
    done = SFTTrainer._prepare_dataset(trainer, dataset, loaded.tokenizer, config, False, None, "train")
    spans = _spans(started, begun)
    batches = done.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000)
    tokens = trained = 0
    for batch in batches:
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        tokens, trained = tokens + len(labels), trained + int((labels != -100).sum())
    return spans | {"tokens": tokens, "trained": trained}


def measure_memory(rows: Path, tokenizer: Path) -> dict[str, Any]:
    """Peak of what one whole preparation holds."""
    import psutil

    peak, ended, me = [0], threading.Event(), psutil.Process()

    def watch() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], me.memory_full_info().pss)

    from toolkit import env

    env.prepare("expandable_segments:True", use_gpu=False)
    from rich.console import Console

    from toolkit.engine.data import preparation

    loaded, recipe = loaded_from(tokenizer, TEMPLATE.read_text()), recipe_for(rows)
    threading.Thread(target=watch, daemon=True).start()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        prepared = preparation.prepare(recipe, recipe.section("sft"), "chat", loaded, Console(quiet=True))
        times.append(time.perf_counter() - started)
    ended.set()
    return {
        "rows": prepared.report.used,
        "tokens": prepared.report.tokens_per_epoch,
        "peak_gib": peak[0] / 2**30,
        "first_start_seconds": times[0],
        "second_start_seconds": times[1],
    }


# The whole of it -----------------------------------------------------------------------------------------------


def in_a_process(what: str, rows: Path, tokenizer: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=rows.parent) as cache:
        caches = {"XDG_CACHE_HOME": cache, "HF_HOME": cache, "HF_DATASETS_CACHE": cache}
        command = [sys.executable, __file__, "--one", what, str(rows), str(tokenizer)]
        environment = {**os.environ, **ENVIRONMENT, **caches}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def measure(what: str, rows: Path, tokenizer: Path) -> dict[str, Any]:
    if what == "memory":
        return measure_memory(rows, tokenizer)
    return (
        measure_ours(rows, tokenizer)
        if what == "ours"
        else measure_trl(rows, tokenizer, what == "trl_masked")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, rows, tokenizer = arguments.one
        print(json.dumps(measure(what, Path(rows), Path(tokenizer))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = run(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows, tokenizer = folder / "rows.jsonl", tokenizer_folder(folder)
    write_rows(rows, arguments.rows)
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            measured[side].append(in_a_process(side, rows, tokenizer))
            print(f"round {number + 1}, {side}: {measured[side][-1]}", flush=True)
    result: dict[str, Any] = {
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "max_length": MAX_LENGTH,
        "tokenizer": "llama3" if tokenizer == TOKENIZER else "trained here, 128,256 tokens at most",
    }
    seconds = {
        (side, span): np.min([one[span] for one in measured[side]], axis=0)
        for side, span in [*itertools.product(SIDES, SPANS), ("ours", "tokenizer")]
    }
    for span, (which, clock) in itertools.product(SPANS, enumerate(("cpu", "wall"))):
        rates = {side: float(arguments.rows / seconds[side, span][which]) for side in SIDES}
        result[f"{span}_{clock}"] = {
            "rows_per_second": rates,
            "ours_over_trl": rates["ours"] / rates["trl"],
            "ours_over_trl_masked": rates["ours"] / rates["trl_masked"],
        }
    share = seconds["ours", "tokenizer"] / seconds["ours", "prepare"]
    result["tokenizer_share_of_prepare"] = dict(zip(("cpu", "wall"), share.tolist(), strict=True))
    result["tokens"] = {side: measured[side][-1]["tokens"] for side in SIDES}
    result["trained_tokens"] = {side: measured[side][-1]["trained"] for side in SIDES}
    write_rows(rows, arguments.memory_rows)
    result["memory"] = in_a_process("memory", rows, tokenizer)
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
