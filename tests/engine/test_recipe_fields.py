"""No value of a recipe is lost on its way: another one changes what the code that consumes it gives.

Each field is changed alone, and one of `OUTPUTS` must change. They are what the toolkit acts by; the trajectory and
the key of the row cache, which merely list fields, are none of them.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import huggingface_hub.constants
import pytest
from rich.console import Console

from tests.conftest import ROOT
from toolkit import hardware
from toolkit.cards import CARDS
from toolkit.compare.answer_measures import matches
from toolkit.compare.view import comparison_markdown
from toolkit.data import sets
from toolkit.data.prompts import read_prompts, read_questions
from toolkit.env import ALLOCATOR_VARIABLES
from toolkit.errors import UserError
from toolkit.export.artefact import Wanted
from toolkit.memory.plan import plan_stage
from toolkit.recipe.fields import declared, key_of, sections_in
from toolkit.recipe.load import load
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import RowKind
from toolkit.run.rundir import RunDir
from toolkit.training import trainer_args
from toolkit.training.class_balance import ClassBalance
from toolkit.training.job import Job


def numbered(**texts: str) -> list[dict[str, Any]]:
    """Rows that differ in their number, with one that repeats, one with a system turn, a long and an unusable one."""
    rows: list[dict[str, Any]] = [
        {"system": "", "score": i, "rank": -i} | {key: text.format(i) for key, text in texts.items()}
        for i in range(12)
    ]
    reply = list(texts)[1]
    return [
        *rows,
        rows[0],
        rows[1] | {"system": "Be brief."},
        rows[2] | {reply: "word " * 300},
        rows[3] | {reply: ""},
    ]


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every third is a good one."""
    return [row | {"label": row["score"] % 3 == 0} for row in rows]


SETS = {
    "sft": numbered(instruction="question {}", output="answer {}"),
    "dpo": numbered(prompt="question {}", chosen="answer {}", rejected="nothing"),
    "reward": numbered(prompt="question {}", chosen="answer {}", rejected="nothing"),
    "kto": labelled(numbered(prompt="question {}", completion="answer {}")),
    "rl": [
        *numbered(prompt="question {}", answer="{}"),
        numbered(prompt="{}", answer="{}")[0] | {"prompt": ""},
    ],
}
KINDS: dict[str, RowKind] = {
    "sft": "chat",
    "dpo": "pair",
    "reward": "pair",
    "kto": "labelled",
    "rl": "prompt",
}

HELD_OUT = {
    "sft": numbered(instruction="other {}", output="answer {}")[:5],
    "dpo": numbered(prompt="other {}", chosen="answer {}", rejected="nothing")[:5],
    "reward": numbered(prompt="other {}", chosen="answer {}", rejected="nothing")[:5],
    "kto": labelled(numbered(prompt="other {}", completion="answer {}")[:5]),
    "rl": numbered(prompt="other {}", answer="{}")[:5],
}

# A field that acts in a whole run alone, and the test that changes it there.
LEAVES = "tests/engine/train/test_finite.py::test_a_loss_out_of_its_range_ends_the_run"
IN_A_RUN = {
    "divergence.factor": LEAVES,
    "divergence.patience": LEAVES,
    "sampling_seed": "tests/engine/train/test_rl.py::test_completions_are_drawn_by_a_seed_of_their_own",
    "save_minutes": "tests/engine/train/test_resume.py::test_by_minutes_too_and_a_slow_one_is_warned_of_once",
    "save_within_seconds": "tests/engine/train/test_resume.py::test_by_minutes_too_and_a_slow_one_is_warned_of_once",
}

# What must hold for a field to act. {stage} is the stage that the field is of.
GIVEN = {
    "model.revision": ["model.path=owner/name"],
    "model.trust_remote_code": ["model.path=custom"],
    "compare.batch_size": ["compare.mix_lengths=true"],
    "compare.temperature": ["compare.do_sample=true"],
    "compare.top_p": ["compare.do_sample=true"],
    "datasets[].name": ["{stage}.datasets.0.path=owner/name"],
    "datasets[].data_dir": ["{stage}.datasets.0.path=owner/name"],
    "datasets[].split": ["{stage}.datasets.0.path=owner/name"],
    "datasets[].revision": ["{stage}.datasets.0.path=owner/name"],
    "datasets[].top_k.column": ["{stage}.datasets.0.top_k={{column: score, rows: 3}}"],
    "datasets[].top_k.rows": ["{stage}.datasets.0.top_k={{column: score, rows: 3}}"],
    "datasets[].weight": [
        "{stage}.datasets=[{{path: {stage}.jsonl, weight: 1}}, {{path: held_out_{stage}.jsonl, weight: 1}}]"
    ],
    "eval_steps": ["{stage}.eval_rows=3"],
    "label_smoothing": ["{stage}.loss_type=robust"],
    "rewards[].function": ["rl.rewards=[{{function: own.py:score}}]"],
    "rewards[].model": ["rl.rewards=[{{model: custom}}]"],
    "rewards[].revision": ["rl.rewards=[{{model: owner/name}}]"],
    "rewards[].load_in_4bit": ["rl.rewards=[{{model: owner/name}}]"],
    "rewards[].ends": ["rl.truncated_reward=null", "rl.rewards=[{{ends: true}}]"],
    "rewards[].length": ["rl.truncated_reward=null", "rl.rewards=[{{length: 8}}]"],
    "rewards[].matches": ["rl.rewards=[{{matches: '{{answer}}'}}]"],
    "rewards[].json": ["rl.rewards=[{{json: []}}]"],
    "max_completion_length": ["rl.rewards=[{{contains: true}}]"],
    "precompute_ref_batch_size": ["{stage}.max_length=16"],  # else the tokens of a micro-batch bound it first
}

# What is there or is not: another value is refused.
SWITCHES = ("rewards[].ends", "rewards[].contains")

# Another value, where it does not follow from the type.
OTHER = {
    "gpu": "rtx4090",
    "model.base_16bit": "owner/name",
    "model.revision": "b" * 40,
    "template.file": "templates/chatml.jinja",
    "lora.target_modules": ["q_proj"],
    "lora.trainable_tokens": ["<|eot_id|>"],
    "memory.budget_gib": 1.0,
    "memory.recompute_layers": "all",
    "memory.per_device_train_batch_size": 2,
    "memory.tokens_per_micro_batch": 64,
    "memory.loss_chunk_gib": 3.0,
    "compare.batch_size": 1,
    "compare.measures": {"thanks": "thank"},
    "compare.prompts": ["Why?"],
    "compare.temperature": 9.0,
    "compare.top_p": 0.01,
    "datasets[].filter": "score > 2",
    "datasets[].top_k.column": "rank",
    "desirable_weight": 7.0,
    "undesirable_weight": 7.0,
    "eval_datasets": [{"path": "held_out_{stage}.jsonl"}],
    "max_dropped_fraction": 0.0,
    "report_to": ["tensorboard"],
    "rewards[].function": "own.py:other",
    "rewards[].matches": "nothing",
    "rewards[].json": ["name"],
    "effective_batch_size": 32,
    "num_generations": 4,
    "top_p": 0.5,
    "truncated_reward": -2.0,
}

FIELDS = [
    path
    for path, field in declared(Recipe)
    if key_of(field)
    and "eval_datasets[]" not in path  # the same class as the entries of `datasets`
    and ".rewards[].architecture." not in path  # the same class as `model.architecture`
    and (not sections_in(field.annotation) or path.endswith(".eval_datasets"))
]


def of_any_stage(path: str) -> str:
    stage, _, rest = path.partition(".")
    return rest if stage in KINDS else path


def another(path: str, value: Any) -> Any:
    """A value of the field that is not this one."""
    if of_any_stage(path) in OTHER:
        return OTHER[of_any_stage(path)]
    annotation = dict(declared(Recipe))[path].annotation
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str) or str in (annotation, *get_args(annotation)):
        return f"{value or ''}x"
    if isinstance(value, float):
        return value / 2 or 0.25
    return (value or 2) + 1


# What the toolkit acts by ---------------------------------------------------------------------------------------


def plans(recipe: Recipe) -> Any:
    return [asdict(plan_stage(recipe, name, CARDS["rtx3090"], 64)) for name in KINDS]


def arguments(recipe: Recipe) -> Any:
    settings = plan_stage(recipe, "sft", None, 64).settings
    return [getattr(trainer_args, name)(recipe, settings, Path("out")) for name in KINDS]


def balance(recipe: Recipe) -> Any:
    assert recipe.kto
    return ClassBalance.of(recipe.kto, 4, 12)


def checks(recipe: Recipe) -> Any:
    """Of the machine, were it one without a GPU, and of the sets as they lie there."""
    machine = replace(hardware.here(), gpu=None, no_gpu="for this test")
    found = hardware.check(recipe.gpu, machine, ("2.0", None))
    return found + [
        text for name, kind in KINDS.items() for text in sets.problems(recipe, recipe.section(name), kind)
    ]


def comparison(recipe: Recipe) -> Any:
    matched = matches(recipe.compare.measures, ["thank you", "no"])
    return [read_prompts(recipe, None), read_questions(recipe), comparison_markdown(recipe, [], {}), matched]


def merged_onto(recipe: Recipe) -> Any:
    run = RunDir(Path("runs"), recipe.name, "sft")
    return Wanted(recipe, run, "merged_16bit", None, Path("out"), True, None).base_16bit


def environment(recipe: Recipe) -> Any:
    """In a process of its own, as on a machine with a card: it is set before torch is imported."""
    code = (
        "import os, sys; from rich.console import Console; from toolkit import env, hardware, process\n"
        "from toolkit.recipe.load import load\n"
        "hardware.check = lambda *asked: []\n"
        "gpu = hardware.Gpu('a card', 24.0, 24.0, (8, 9), '580', (13, 0))\n"
        "machine = hardware.Hardware(gpu, None, 64.0, 64.0, 8)\n"
        "process.prepare(load('tiny', tuple(sys.argv[1:])), machine, Console())\n"
        "print(env.require_prepared(), os.environ['UNSLOTH_BLOCK_COMPILE'])\n"
    )
    section = recipe.memory
    overrides = f"memory.alloc_conf={section.alloc_conf}", f"memory.compile={str(section.compile).lower()}"
    words = [sys.executable, "-c", code, *overrides]
    free = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    return subprocess.run(words, cwd=ROOT, env=free, capture_output=True, text=True, check=True).stdout


def asked_of_the_hub(recipe: Recipe) -> Any:
    from toolkit.engine.data import reading

    asked: list[Any] = []

    def load_dataset(*args: Any, **keywords: Any) -> Any:
        asked.append([args, keywords])
        raise reading.datasets.exceptions.DatasetNotFoundError("for this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.datasets, "load_dataset", load_dataset)
        for name in KINDS:
            for source in recipe.section(name).datasets:
                if not sets.is_local_file(recipe, source):
                    with pytest.raises(UserError):
                        list(reading.rows_of(recipe, source, False))
    return asked


def tokenizer(recipe: Recipe) -> Any:
    from toolkit.engine.data.examples import load_tokenizer

    loaded = load_tokenizer(recipe)
    return [type(loaded.tokenizer).__name__, loaded.tokenizer.pad_token, asdict(loaded.template)]


def rows(recipe: Recipe) -> Any:
    from toolkit.engine.data import preparation
    from toolkit.engine.data.examples import load_tokenizer
    from toolkit.engine.train.stage import in_order

    made = []
    for name, kind in KINDS.items():
        section = recipe.section(name)
        prepared = preparation.prepare(recipe, section, kind, load_tokenizer(recipe), Console(quiet=True))
        made.append([in_order(prepared.train, section, recipe.seed)[:], prepared.eval and prepared.eval[:]])
    return made


def adapter(recipe: Recipe) -> Any:
    from toolkit.engine.base import model

    loaded = model.load(recipe, 64)
    model.attach_lora(loaded, recipe, plan_stage(recipe, "sft", None, 64).settings, 64)
    return loaded.model.peft_config["default"].to_dict()


def answers(recipe: Recipe) -> Any:
    from toolkit.engine.inference import generate

    lengths = [len(ids) for ids in generate.tokens(base(), read_prompts(recipe, None))]
    found = generate.answer(base(), read_prompts(recipe, None), recipe.compare, recipe.seed)
    return [generate.batches(lengths, recipe.compare), [answer.ids for answer in found]]


def rewarded(recipe: Recipe) -> Any:
    """What each reward gives to a right answer and to one that was cut, or which model it asks for."""
    from toolkit.engine.inference import reward_model
    from toolkit.engine.train import rewards

    def load_model(*args: Any) -> Any:
        raise UserError(f"asked for {args}")

    prompt, right = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": '{"7": 7}'}]
    given = {
        "prompts": [prompt] * 2,
        "completions": [right, [{"role": "assistant", "content": "no"}]],
        "completion_ids": [[1, 9], list(range(10, 22))],
        "answers": [["7"], ["7"]],
    }
    run = RunDir(Path("runs"), recipe.name, "rl")
    job = Job(recipe, plan_stage(recipe, "rl", None, 64), run, Console(quiet=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_model, "load", load_model)
        patch.setattr(RunDir, "hold_to", lambda self, conditions: None)
        made = rewards.build(job, frozenset({9}), None)  # type: ignore[arg-type]
        return [[function.name, function(**given)] for function in made]


@cache
def base() -> Any:
    from toolkit.engine.base import model

    return model.load(load("tiny"), 256)


OUTPUTS: list[Callable[[Recipe], Any]] = [  # what is fast comes first
    *(
        plans,
        arguments,
        balance,
        comparison,
        merged_onto,
        checks,
        asked_of_the_hub,
        rewarded,
        tokenizer,
        rows,
    ),
    *(adapter, answers),
    environment,
]


def output(of: Callable[[Recipe], Any], recipe: Recipe) -> Any:
    """What it gives, or what it says when it refuses."""
    try:
        return of(recipe)
    except UserError as error:
        return error.problems


# Field by field -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with small sets, and beside it what some fields need to act."""
    folder = tmp_path_factory.mktemp("fields")
    shutil.copytree(ROOT / "recipes/templates", folder / "templates")
    shutil.copytree(ROOT / "recipes/tiny", folder / "tiny")
    (folder / "own.py").write_text(
        "def score(completions, **given):\n    return [1.0] * len(completions)\n\n\n"
        "def other(completions, **given):\n    return [2.0] * len(completions)\n"
    )
    for name, of_stage in SETS.items():
        write(folder / f"{name}.jsonl", of_stage)
        write(folder / f"held_out_{name}.jsonl", HELD_OUT[name])
    values = [
        "datasets=[{{path: {0}.jsonl}}]",
        "eval_datasets=[]",
        "max_dropped_fraction=0.9",
        "max_length=256",
    ]
    overrides = [f"{name}.{value.format(name)}" for name in KINDS for value in values]
    (folder / "fields.yaml").write_text(load("tiny", (*overrides, "compare.max_new_tokens=4")).to_yaml())

    wanted = ("tokenizer.json", "tokenizer_config.json", "config.json")
    other = {"bos_token": "<|eot_id|>"}
    own = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    hub = folder / "models--owner--name"
    for place, changes in (
        (hub / "snapshots" / ("a" * 40), {}),
        (hub / "snapshots" / ("b" * 40), other),
        (folder / "custom", own),
    ):
        place.mkdir(parents=True)
        for name in wanted:
            shutil.copy(folder / "tiny" / "base" / name, place)
        config = json.loads((place / "tokenizer_config.json").read_text()) | changes
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    (folder / "custom" / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


def write(file: Path, given: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in given))


def test_the_recipe_that_is_changed_is_sound(folder: Path) -> None:
    recipe = load(str(folder / "fields.yaml"))
    assert checks(recipe) == [] and asked_of_the_hub(recipe) == []
    assert all(part["input_ids" if "input_ids" in part else "prompt_ids"] for part, _ in rows(recipe))
    assert rewarded(recipe) == [["contains", [1.0, None]], ["truncated", [None, 0.0]]]


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: f"recipe.{path}")
def test_another_value_changes_what_is_done(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    field, stage = of_any_stage(path), path.split(".")[0]
    if field in IN_A_RUN:
        file, _, test = IN_A_RUN[field].partition("::")
        _, _, source = (ROOT / file).read_text().partition(f"def {test}(")
        assert f".{field}=" in source.partition("\ndef ")[0]
        return
    given = [override.format(stage=stage) for override in GIVEN.get(field, [])]
    before = load(str(folder / "fields.yaml"), tuple(given))
    dotted = path.replace("[]", ".0")
    if field in SWITCHES:
        with pytest.raises(UserError, match="gives nothing"):
            load(str(folder / "fields.yaml"), (*given, f"{dotted}=false"))
        return
    value = json.dumps(another(path, value_at(before, dotted))).replace("{stage}", stage)
    after = load(str(folder / "fields.yaml"), (*given, f"{dotted}={value}"))
    assert any(output(of, before) != output(of, after) for of in OUTPUTS), f"{path} is read by nothing"


def value_at(recipe: Recipe, dotted: str) -> Any:
    node: Any = recipe.model_dump(mode="json", by_alias=True)
    for part in dotted.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
