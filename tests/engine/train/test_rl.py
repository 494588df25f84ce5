"""Learning from rewards on the tiny model: where it starts, what it is given; neither kills nor pieces change it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.engine.conftest import FEW_ROWS, Stage, run_stage, tiny, weights
from tests.engine.scripts import Script
from toolkit.engine.base import model
from toolkit.engine.inference import reward_model
from toolkit.engine.reference import starting_policy
from toolkit.engine.train import rl, stage
from toolkit.errors import UserError
from toolkit.memory.plan import plan_stage
from toolkit.run.rundir import WEIGHTS, RunDir
from toolkit.training.job import Job

FEW = (
    "dpo=null",  # from SFT
    "rl.max_rows=16",
    "rl.eval_datasets=[]",
    "rl.effective_batch_size=8",
    "rl.num_generations=4",
    "rl.max_completion_length=8",
    "rl.max_length=136",
    "rl.max_steps=4",
    "rl.save_steps=2",
    "rl.beta=0.1",
    "rl.rewards=[{name: opens, matches: '^[A-H]'}, {name: people, matches: '[A-Z][a-z]+ [A-Z]', weight: 0.5}]",
    "rl.truncated_reward=null",
    "memory.per_device_train_batch_size=4",
)


@pytest.fixture(scope="module")
def done(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A few steps from the SFT adapter that nothing disturbed."""
    return run_stage(tiny(*FEW), "rl", beside_sft(sft, tmp_path_factory.mktemp("rl")))


def beside_sft(sft: Stage, runs: Path) -> Path:
    if not (runs / "tiny").exists():
        (runs / "tiny").mkdir(parents=True)
        (runs / "tiny" / "sft").symlink_to(sft.run.path)
    return runs


def built(sft: Stage, runs: Path, *overrides: str) -> Any:
    """The trainer, as it would begin."""

    class Built(Exception):
        pass

    def take(*args: Any) -> None:
        raise Built(rl.build(*args))

    recipe = tiny(*FEW, *overrides)
    run = RunDir(beside_sft(sft, runs), "tiny", "rl")
    with pytest.raises(Built) as found:
        stage.run(Job(recipe, plan_stage(recipe, "rl", None, 16), run, Console(quiet=True)), take)  # type: ignore[arg-type]
    return found.value.args[0]


@pytest.fixture(scope="module")
def trainer(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One of RLOO that several tests ask, without training it."""
    return built(sft, tmp_path_factory.mktemp("trainer"))


def test_its_kl_is_taken_to_where_it_started_and_is_0_at_first(done: Stage) -> None:
    learnt = done.report["reward_learning"]
    assert learnt["kl_at_first"] == 0.0 and learnt["reference_weights"] > 0
    logs = [json.loads(line) for line in done.run.metrics.read_text().splitlines()]
    assert [line["kl"] != 0 for line in logs if "loss" in line] == [False, True, True, True]
    assert "equal bit for bit" in done.shown and "Proved before training" in done.run.page.read_text()
    saved = done.run.checkpoints / "checkpoint-4"
    assert not [path for path in saved.rglob("*") if "ref" in path.name], (
        "a resumed Trainer would load that alone"
    )
    assert load_file(saved / WEIGHTS).keys() == load_file(done.run.adapter / WEIGHTS).keys()
    assert done.report["loss_first"] is not None and weights(done) != weights(done.run.of("sft").path)


def test_its_report_shows_each_reward_and_completions(done: Stage) -> None:
    found = done.report["reward_learning"]["rewards"]
    assert found.keys() == {"opens", "people"} and found["opens"]["spread"] > 0
    lines = [json.loads(line) for line in (done.run.path / "completions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["which"]) for line in lines[:3]] == [(1, "best"), (1, "median"), (1, "worst")]
    best, _, worst = lines[:3]
    assert best["reward"] >= worst["reward"]
    assert best["reward"] == pytest.approx(best["rewards"]["opens"] + 0.5 * best["rewards"]["people"])
    page = done.run.page.read_text()
    assert "Reward: people" in page and ">Completions<" in page


def test_a_reference_that_a_library_deletes_is_put_back(
    sft: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth's path for GPUs deletes it from GRPO once the trainer is made."""

    class Deleting(rl.RewardedGRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.model.delete_adapter("ref")

    monkeypatch.setitem(rl.TRAINERS, "grpo", (Deleting, rl.TRAINERS["grpo"][1]))
    trainer = built(sft, tmp_path, "rl.algorithm=grpo")
    weights_of = dict(trainer.model.named_parameters())
    copies = [name for name in weights_of if ".ref." in name]
    assert len(copies) == trainer.told["reference_weights"] and trainer.model.active_adapter == "default"
    assert all(
        torch.equal(weights_of[name], weights_of[name.replace(".ref.", ".default.")])
        and not weights_of[name].requires_grad
        for name in copies
    )
    monkeypatch.setattr(starting_policy, "establish", lambda *args: 1)
    with pytest.raises(UserError, match=r"the first step shows a KL of 0\.\d+ .*\(expected: 0\)"):
        run_stage(tiny(*FEW, "rl.algorithm=grpo", "rl.max_steps=1"), "rl", tmp_path, name="unproved")


def test_completions_are_drawn_by_a_seed_of_their_own(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [row["prompt_ids"] for row in trainer.train_dataset.select(range(4))]
    drawn = []
    for seed in (1, 2):
        monkeypatch.setattr(trainer, "section", tiny(*FEW, f"rl.sampling_seed={seed}").rl)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append(trainer._generate_single_turn(prompts, None, {}))
        assert torch.equal(torch.get_rng_state(), before), "training would draw otherwise"
        torch.rand(7)
        assert trainer._generate_single_turn(prompts, None, {}) == drawn[-1]
    monkeypatch.setattr(trainer.state, "global_step", 1)
    drawn.append(trainer._generate_single_turn(prompts, None, {}))
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_in_pieces_it_is_the_same_gradient(algorithm: str, trainer: Any, sft: Stage, tmp_path: Path) -> None:
    if algorithm != "rloo":
        trainer = built(sft, tmp_path, f"rl.algorithm={algorithm}")
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = trainer.data_collator([trainer.train_dataset[index] for index in (0, 0, 0, 0, 1, 1, 1, 1)])
    batch = trainer._prepare_inputs(rows)
    gradients = []
    for pieces in (1, 2):
        trainer.model.zero_grad()
        trainer.recovery.split["train"] = pieces
        trainer.training_step(trainer.model, batch)
        trained = model.trainable(trainer.model)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item() < 0.01


def test_prompts_reach_the_model_as_they_were_prepared(trainer: Any) -> None:
    rows = [trainer.train_dataset[index] for index in range(16)]
    found = trainer._tokenize_prompts([row["prompt"] for row in trainer.data_collator(rows)])
    assert list(found[0]) == [row["prompt_ids"] for row in rows]


@pytest.mark.long
def test_evaluating_changes_nothing_of_what_is_trained(done: Stage, sft: Stage, tmp_path: Path) -> None:
    eval_rows = "rl.eval_datasets=[{path: tiny/questions.jsonl, rows: 8}]", "rl.per_device_eval_batch_size=8"
    watched = run_stage(tiny(*FEW, *eval_rows, "rl.max_steps=2"), "rl", beside_sft(sft, tmp_path))
    here, there = (
        load_file(run / WEIGHTS) for run in (watched.run.adapter, done.run.checkpoints / "checkpoint-2")
    )
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    right = watched.report["reward_learning"]["held_out_correct"]
    assert right["steps"] == [0, 2] and right["before"]["num_rows"] == 8
    assert watched.report["eval"]["correct"] == right["after"]["value"]
    assert "8 held-out prompts" in watched.run.page.read_text()


def test_a_function_of_the_users_own_is_called_as_trl_calls_one(sft: Stage, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def score(prompts, completions, completion_ids, answer, answers, **others):\n"
        "    assert prompts[0][-1]['role'] == 'user' and not others\n"
        "    rows = zip(completions, completion_ids, answer, answers)\n"
        "    return [len(ids) + (one[0]['content'] == right == rights[0]) for one, ids, right, rights in rows]\n\n\n"
        "def broken(completions, **others):\n    return 1 / 0\n"
    )
    rewards = f"rl.rewards=[{{function: '{file}:score'}}, {{name: broken, function: '{file}:broken'}}]"
    trainer = built(sft, tmp_path, rewards)
    score, broken = trainer.reward_funcs
    given = {
        "prompts": [[{"role": "user", "content": "?"}]] * 2,
        "completions": [[{"role": "assistant", "content": text}] for text in ("flute", "drum")],
        "completion_ids": [[7, 7], [7, 7, 7]],
        "answers": [["flute", "pipe"], ["flute", "pipe"]],
    }
    assert score(**given, trainer_state=None, log_metric=print) == [3.0, 3.0]
    assert "rewards.function.file" in RunDir(tmp_path, "tiny", "rl").conditions()
    with pytest.raises(UserError, match=r"broken failed in line 8: ZeroDivisionError"):
        broken(**given)


def test_a_completion_that_was_cut_is_worth_what_the_recipe_says(sft: Stage, tmp_path: Path) -> None:
    trainer = built(sft, tmp_path, "rl.rewards=[{contains: true}]", "rl.truncated_reward=-2.5")
    [end, *_] = trainer._ends
    given = {"answers": ["flute"]}, [{"role": "user", "content": "?"}]
    inputs, prompts = [given[0]] * 4, [given[1]] * 4
    said = [[{"role": "assistant", "content": text}] for text in ("A flute.", "A flute", "A drum.", "A drum")]
    ids = [[7, end], [7, 7], [7, end], [7, 7]]
    rewards = trainer._calculate_rewards(inputs, prompts, said, ids)
    assert (rewards * trainer.reward_weights).nansum(dim=1).tolist() == [1.0, -2.5, 0.0, -2.5]


def test_what_cannot_be_learnt_from_is_refused(sft: Stage, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(1, 4)))
    recipe = tiny(
        *FEW, "rl.rewards=[{contains: true}]", f"rl.datasets.0.path={rows}", "rl.effective_batch_size=16"
    )
    with pytest.raises(UserError) as refused:
        run_stage(recipe, "rl", beside_sft(sft, tmp_path))
    said = " ".join(refused.value.problems)
    assert "a step takes 4 prompts" in said and "3 of 3 rows have no answer" in said


@pytest.mark.long
def test_a_reward_model_scores_what_was_written_as_it_scores_it_alone(sft: Stage, tmp_path: Path) -> None:
    runs = beside_sft(sft, tmp_path)
    judge = run_stage(tiny("reward.max_steps=1", "reward.eval_datasets=[]"), "reward", runs)
    trainer = built(sft, runs, "rl.rewards=[{model: reward}]")
    [score] = trainer.reward_funcs
    asked = [{"role": "user", "content": "What is Brackenholm known for?"}]
    said = [
        [{"role": "assistant", "content": text}]
        for text in ("Its rope.", "I do not know.", "Rope, rope, rope.")
    ]
    given = {"prompts": [asked] * 3, "completions": said, "completion_ids": [[1]] * 3, "answers": [[]] * 3}
    alone = reward_model.load(str(judge.run.path)).score([asked + reply for reply in said])
    assert score(**given) == pytest.approx(alone.tolist(), abs=0.02)
    assert "rewards.model.files" in RunDir(runs, "tiny", "rl").conditions()
    wrong = json.dumps(tiny().model.architecture.model_dump() | {"vocab_size": 1800})
    (tmp_path / "other").mkdir()
    with pytest.raises(
        UserError, match="not of the size that the plan counts: vocab_size 1792, planned 1800"
    ):
        built(sft, tmp_path / "other", f"rl.rewards=[{{model: '{judge.run.path}', architecture: {wrong}}}]")


PLACES = {  # of each kill, and at which call: in the third step
    "generation": ("peft:PeftModelForCausalLM.generate", 3),
    "scoring": ("toolkit.engine.train.rewards:RewardFunction.__call__", 1),
    "step": ("accelerate:Accelerator.backward", 3),  # the probe's is the first
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("algorithm", "beta"), [("rloo", 0.1), pytest.param("grpo", 0.0, marks=pytest.mark.campaign)]
)
def test_killed_in_generation_in_scoring_and_in_a_step_it_ends_with_the_same_bits(
    algorithm: str, beta: float, done: Stage, sft: Stage, tmp_path: Path
) -> None:
    values = (*FEW, f"rl.algorithm={algorithm}", f"rl.beta={beta}")
    runs, whole = beside_sft(sft, tmp_path), done
    if algorithm != "rloo":
        (tmp_path / "whole").mkdir()
        whole = run_stage(tiny(*values), "rl", beside_sft(sft, tmp_path / "whole"))
    words = [word for value in (*FEW_ROWS, *values) for word in ("--set", value)]
    for place, calls in PLACES.values():
        driver = ["tests.engine.killed", place, str(calls), "SIGKILL", "rl"]
        script = Script([*driver, "--recipe", "tiny", "--runs", str(runs), *words], tmp_path / "said")
        assert script.wait() == -signal.SIGKILL, script.said()
    again = run_stage(tiny(*values), "rl", runs)
    assert "continuing at step 2 of 4" in again.shown
    assert weights(again) == weights(whole)
    assert again.report["train_tokens"] == whole.report["train_tokens"]
    told = [(stage.run.path / "completions.jsonl").read_text() for stage in (again, whole)]
    assert told[0] == told[1]
