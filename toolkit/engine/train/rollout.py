"""TRL's trainers that learn from rewards, RLOO and GRPO, as this toolkit runs them: what both share.

A step begins with its completions: made with dice of their own, at most so many at once, then scored. They are used
once, in micro-batches of whole rows; one that does not fit into memory runs in pieces, as in pieces.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from toolkit.engine.base import oom, recompute
from toolkit.engine.base.random_state import RandomState
from toolkit.engine.reference import starting_policy
from toolkit.engine.train.completions import Completions
from toolkit.engine.train.pieces import OutOfMemoryRecovery, Ran
from toolkit.engine.train.reward_watch import held_out_correct
from toolkit.engine.train.rewards import RewardFunction, completions_of
from toolkit.errors import UserError
from toolkit.recipe.schema import Rl


def as_examples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prepared rows as TRL takes them: turns and answers instead of their JSON."""
    return [{"prompt": json.loads(row["prompt"]), "answers": json.loads(row["answers"])} for row in rows]


class Rollouts(OutOfMemoryRecovery):
    """Mixin before GRPOTrainer or RLOOTrainer.

    `averages_rows` says that the loss of a micro-batch is a mean over its rows, so that pieces count by their share.
    `told` is what is noted for the report on the way.
    """

    averages_rows: bool
    section: Rl
    completions: Completions
    told: dict[str, Any]
    _step: int
    _tokens_before_step = 0
    _evaluates = False  # Unsloth switches a model on a GPU to training where held-out completions are scored

    def __init__(self, *args: Any, section: Rl, completions: Completions, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section, self.completions = section, completions
        self.data_collator = as_examples
        self.told = {}
        self._seconds = {"generation": 0.0, "scoring": 0.0}

    @property
    def reward_learning(self) -> dict[str, Any]:
        """What the report says of it all."""
        return self.told | {"held_out_correct": held_out_correct(self.completions.right(), self.args.seed)}

    # TRL keeps this count in the state, where checkpoints have it

    @property
    def _total_train_tokens(self) -> float:
        return self.state.num_input_tokens_seen if hasattr(self, "state") else 0

    @_total_train_tokens.setter
    def _total_train_tokens(self, value: float) -> None:
        if hasattr(self, "state"):
            self.state.num_input_tokens_seen = int(value)

    # A step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients and loss of a micro-batch of completions, at once or in pieces; the first of a step makes them."""
        model.train()  # else the first completions after an evaluation would be held-out ones to TRL
        is_first, is_probe = self._step % self.args.gradient_accumulation_steps == 0, isinstance(inputs, dict)
        num_recomputing, step = recompute.num_recomputing(self.model), self._step
        if is_first and not is_probe:
            self._tokens_before_step = self.state.num_input_tokens_seen
        batch = self._prepare_inputs(inputs)
        recompute.recompute(self.model, num_recomputing)  # TRL's passes without a graph turn all of them on
        begun = time.perf_counter()
        losses = self._rows_in_pieces(model, batch, num_items_in_batch)
        self._step = step if is_probe else step + 1
        if not is_probe:
            self._metrics["train"]["seconds/step"].append(time.perf_counter() - begun)
        self.ran += [Ran(self.state.global_step + 1, loss.detach(), []) for loss in losses]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _rows_in_pieces(self, model: Any, batch: dict[str, Any], num_items: Any) -> list[torch.Tensor]:
        num_rows, step, at = len(batch["completion_ids"]), self._step, 0
        losses: list[torch.Tensor] = []
        train = super(OutOfMemoryRecovery, self).training_step
        with ExitStack() as until_done:
            while at < num_rows:
                size = min(math.ceil(num_rows / self.recovery.split["train"]), num_rows - at)
                piece = {
                    name: value[at : at + size] if isinstance(value, torch.Tensor) and value.ndim else value
                    for name, value in batch.items()
                }
                self._step, self._share = step, size / num_rows if self.averages_rows else 1.0
                try:
                    loss, logged = self._undoable("train", partial(train, model, piece, num_items))
                finally:
                    self._share = 1.0
                if not isinstance(loss, oom.OutOfMemory):
                    losses.append(loss)
                    for name, values in logged.items():
                        self._metrics["train"][name] += values
                    at += size
                elif size > 1:
                    self.recovery.split["train"] = 2 * math.ceil(num_rows / size)
                    self._record("train", loss, f"completions now run in pieces of {math.ceil(size / 2)}")
                else:
                    row = {
                        "input_ids": batch["prompt_ids"][at].tolist() + batch["completion_ids"][at].tolist()
                    }
                    until_done.enter_context(self._more_layers_recompute("train", loss, row))
        return losses

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if isinstance(generation_batch, dict):
            return generation_batch  # prepared already
        batch = super()._prepare_inputs(generation_batch)
        self.model.train(not self._evaluates)
        for log in self._metrics.values():  # a reward that said nothing of any completion
            for name in [
                name for name in log if name.startswith("rewards/") and all(map(math.isnan, log[name]))
            ]:
                del log[name]
        return batch

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Held-out completions, generated and scored."""
        found: tuple[Any, Any, Any] = super(OutOfMemoryRecovery, self).prediction_step(
            model, inputs, prediction_loss_only, ignore_keys
        )
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL does it, with the completions kept."""
        num_recomputing = recompute.num_recomputing(self.model)
        self.completions.begin_evaluation()
        self._evaluates = True
        try:
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            self._evaluates = False
            recompute.recompute(self.model, num_recomputing)
        self.completions.end_evaluation(self.state.global_step)
        return found

    # Its completions

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Completions of all prompts, `generation_rows` at once; fewer after an out-of-memory error.

        Drawn by the sampling seed, the step and the prompts alone: what training draws does not move them.
        """
        generators, begun, at = RandomState(), time.perf_counter(), 0
        step = 0 if self._evaluates else self.state.global_step + 1
        torch.manual_seed(_seed_of(self.section.sampling_seed, step, prompt_ids))
        most, made = self.section.generated_at_once, list[Any]()
        with recompute.recomputing(self.model, 0):  # a layer that recomputes keeps no keys and values
            while at < len(prompt_ids):
                size = min(most, len(prompt_ids) - at)

                def of_first(size: int, at: int = at) -> Any:
                    return super(Rollouts, self)._generate_single_turn(
                        prompt_ids[at : at + size], *args, **kwargs
                    )

                found, fitting = self.recovery.halving("generation", size, of_first, lambda: "one prompt")
                most = min(most, fitting) if fitting < size else most
                made.append(found)
                at += fitting
        generators.restore()
        self._seconds["generation"] = time.perf_counter() - begun
        if isinstance(made[0], tuple):  # GRPO's: (ids, None)
            return [ids for found, _ in made for ids in found], made[0][1]
        return [ids for found in made for ids in found]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        """TRL's rewards, (completions, rewards); what of them a log and a reader want beside that is kept here."""
        begun, mode = time.perf_counter(), "eval" if self._evaluates else "train"
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        columns = {"answers": [row["answers"] for row in inputs], "completion_ids": completion_ids_list}
        found = completions_of({"prompts": prompts, "completions": completions, **columns}, self._ends)
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        if unscored := int(rewards.isnan().all(dim=1).sum()):
            raise UserError(
                f"no reward said anything of {unscored} of {len(found)} completions: each needs one number at least; "
                "a function may return None only beside another reward"
            )
        log, num = self._metrics[mode], self.num_generations if mode == "train" else 1
        log["completions/ended_ratio"].append(sum(one.ended for one in found) / len(found))
        if any(one.answers for one in found):
            right = [one.is_right for one in found if one.answers]
            log["correct"].append(sum(map(bool, right)) / len(right))
        if mode == "train":
            for name, spread in zip(self.reward_func_names, _spreads(rewards, num), strict=True):
                log[f"rewards/{name}/spread"].append(spread)
            self._seconds["scoring"] = time.perf_counter() - begun
            for what, seconds in self._seconds.items():
                log[f"seconds/{what}"].append(seconds)
        self.completions.take(
            self.state.global_step + 1, mode, found, self.reward_func_names, rewards.tolist(), totals.tolist()
        )
        return rewards

    @property
    def _ends(self) -> frozenset[int]:
        [first, *_] = self.reward_funcs
        assert isinstance(first, RewardFunction)
        return first.ends

    # The probe, and checkpoints

    def longest_rows(self, count: int) -> list[dict[str, Any]]:
        """The longest prompts with the longest completions there can be, as rows."""
        filler = [self.processing_class.pad_token_id] * self.section.max_completion_length
        prompts = super().longest_rows(count)
        prompts = (prompts * count)[:count]  # each has several completions
        return [{"input_ids": row["prompt_ids"] + filler, "prompt_ids": row["prompt_ids"]} for row in prompts]

    def batch_of(self, rows: list[dict[str, Any]]) -> Any:
        """Rows of `longest_rows` as a micro-batch that has been generated and scored."""
        device, num = self.accelerator.device, len(rows)
        width, longest = max(len(row["prompt_ids"]) for row in rows), self.section.max_completion_length
        prompts = [[0] * (width - len(row["prompt_ids"])) + row["prompt_ids"] for row in rows]
        completions = torch.zeros(num, longest, dtype=torch.long, device=device)
        batch = {
            "prompt_ids": torch.tensor(prompts, device=device),
            "prompt_mask": torch.ones(num, width, dtype=torch.long, device=device),
            "completion_ids": completions,
            "completion_mask": torch.ones_like(completions),
            "advantages": torch.ones(num, device=device),
        }
        if self.section.algorithm == "rloo":
            return batch | {"old_logps": torch.zeros(num, device=device)}
        reference = {"ref_per_token_logps": torch.zeros(num, longest, device=device)} if self.beta else {}
        return batch | {"num_items_in_batch": torch.tensor(num * longest, device=device)} | reference

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if (
            self._step % self.args.gradient_accumulation_steps
        ):  # a signal dropped the step: it is generated again
            self.state.num_input_tokens_seen = self._tokens_before_step
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        with starting_policy.left_out(self.model) as policy:
            super()._save(output_dir, policy if state_dict is None else state_dict)


def _spreads(rewards: torch.Tensor, num_generations: int) -> list[float]:
    """Of each reward: the standard deviation within the completions of a prompt, in the mean over prompts."""
    grouped = rewards.view(-1, num_generations, rewards.shape[1])
    known = ~grouped.isnan()
    count = known.sum(1).clamp(min=1)
    mean = grouped.nansum(1) / count
    apart = torch.where(known, (grouped - mean[:, None]) ** 2, 0.0).sum(1)
    return [float(spread) for spread in (apart / count).sqrt().mean(0)]


def _seed_of(seed: int, step: int, prompts: list[list[int]]) -> int:
    digest = hashlib.blake2b(f"{seed}:{step}:{prompts}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
