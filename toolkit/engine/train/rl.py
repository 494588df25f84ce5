"""Learning from rewards: completions of the policy's own, scored, the better ones made likelier by RLOO or GRPO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.markup import escape
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from toolkit.engine.base import model
from toolkit.engine.data import preparation
from toolkit.engine.reference import starting_policy
from toolkit.engine.train import attempt, rewards, stage
from toolkit.engine.train.across_ranks import GroupsAcrossRanks
from toolkit.engine.train.checkpoints import DurableCheckpoints
from toolkit.engine.train.completions import Completions
from toolkit.engine.train.reward_watch import RewardWatch
from toolkit.engine.train.rollout import Rollouts
from toolkit.errors import UserError
from toolkit.recipe.schema import Rl
from toolkit.records.run_report import RunReport
from toolkit.run.rundir import COMPLETIONS, HELD_OUT
from toolkit.training import trainer_args
from toolkit.training.job import Job


class RewardedRLOOTrainer(GroupsAcrossRanks, DurableCheckpoints, Rollouts, RLOOTrainer):
    """TRL's RLOO under our rows, rewards, checkpoints and recovery."""

    averages_rows = True


class RewardedGRPOTrainer(GroupsAcrossRanks, DurableCheckpoints, Rollouts, GRPOTrainer):
    """TRL's GRPO, the same. Its loss divides by the tokens of the whole step."""

    averages_rows = False


TRAINERS: dict[str, tuple[Any, Any]] = {
    "rloo": (RewardedRLOOTrainer, RLOOConfig),
    "grpo": (RewardedGRPOTrainer, GRPOConfig),
}


def run(job: Job) -> RunReport:
    """Trains the stage; see `stage.run`. Stops unless the KL's reference is the policy that it starts from."""
    return stage.run(job, build)


def build(job: Job, loaded: model.LoadedModel, prepared: preparation.Prepared) -> Any:
    """The trainer, ready to train, its rewards loaded and its reference proved."""
    section, run, console = job.section, job.run, job.console
    assert isinstance(section, Rl)
    left_out = _check_rows(section, prepared)
    recovery = attempt.recovery(job)
    ends = frozenset(loaded.model.generation_config.eos_token_id)
    functions = rewards.build(job, ends, recovery)
    completions = Completions(
        *_files(job),
        section.logging_steps,
        lambda said: console.print(escape(said)),
    )
    kind, config = TRAINERS[section.algorithm]
    arguments = trainer_args.rl(job.recipe, job.plan.settings, run.checkpoints, job.stage.name)
    arguments["eval_on_start"] = arguments["eval_on_start"] and run.sealed_step() is None
    with model.keep_float32(loaded.model):
        trainer = kind(
            model=loaded.model,
            reward_funcs=functions,
            args=config(**arguments),
            train_dataset=prepared.train,
            eval_dataset=prepared.eval,
            processing_class=loaded.tokenizer,
            recovery=recovery,
            processes=job.processes,
            section=section,
            completions=completions,
        )
    told = trainer.told
    told |= {"prompts": len(prepared.train), "prompts_left_out_of_an_epoch": left_out}
    if section.beta:
        source = str(job.start.folder) if job.start else job.recipe.model.path
        num = told["reference_weights"] = starting_policy.establish(trainer.model, source)
        console.print(
            f"[green]the KL reference is the policy[/] ({escape(source)}): {num} weights equal bit for bit"
        )
        trainer.add_callback(starting_policy.NoKlAtFirst(told))
    trainer.add_callback(completions)
    trainer.add_callback(RewardWatch(trainer, [function.name for function in functions], console))
    return trainer


def _files(job: Job) -> tuple[Path, Path]:
    """Where completions are kept: by the first of several processes, its part of each step."""
    if not job.world.is_first:
        return Path(os.devnull), Path(os.devnull)
    return job.run.path / COMPLETIONS, job.run.path / HELD_OUT


def _check_rows(section: Rl, prepared: preparation.Prepared) -> int:
    """How many prompts an epoch leaves out, because they do not fill a step. Raises UserError where none would do, and
    for a reward that needs answers where rows have none."""
    num, problems = len(prepared.train), []
    if num < section.rows_per_step:
        problems.append(
            f"rl: a step takes {section.rows_per_step} prompts ({section.effective_batch_size} completions, "
            f"{section.num_generations} each) and there are {num}: lower rl.effective_batch_size"
        )
    needing = [reward.called for reward in section.rewards if reward.needs_answer]
    if needing:
        for name, rows in (("rows", prepared.train), ("held-out rows", prepared.eval)):
            if rows is not None and (lacking := sum(answers == "[]" for answers in rows["answers"][:])):
                problems.append(
                    f"rl: {lacking:,} of {len(rows):,} {name} have no answer, and the reward {needing[0]} needs one: a "
                    "column `answer` or `answers`"
                )
    if problems:
        raise UserError(*problems)
    return num % section.rows_per_step
