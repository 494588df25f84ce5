"""What the implicit reward of DPO and KTO says of models: of their own answers, and of held-out pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from toolkit.console.screen import bar
from toolkit.data.masking import TokenizedPair
from toolkit.data.turns import Messages
from toolkit.engine.base import model
from toolkit.engine.data import preparation
from toolkit.engine.inference import generate, log_probs
from toolkit.recipe import stages
from toolkit.recipe.dpo_losses import LOSSES
from toolkit.recipe.schema import Dpo, Kto, Recipe
from toolkit.recipe.stages import BASE


def measure(
    recipe: Recipe,
    loaded: model.LoadedModel,
    reference: str,
    asked: Sequence[Messages],
    answers: Mapping[str, Sequence[generate.Answer]],
    console: Console,
    with_pairs: bool = True,
) -> dict[str, dict[str, Any]]:
    """Model -> the rewards among `AnswerMeasures`: of its own answers, and of pairs where it was trained further.

    The implicit reward of a reply is beta (log pi(reply | prompt) - log pi_ref(reply | prompt)): Rafailov et al.
    2023, equation 5, without the term that depends on the prompt alone. On answers that the model itself sampled its
    mean estimates beta KL(pi || pi_ref): it says how far a model went from its reference, not how good it became.
    The accuracy is the share of held-out pairs whose chosen reply has the larger reward, a token where the loss takes
    it so. The reference itself has none, and a base that was not the reference has neither: it did not start there.
    """
    encoded = generate.encode(loaded, asked, recipe.compare)
    trained = [name for name in answers if name not in (reference, BASE)]
    held_out, dpo = None, recipe.dpo
    if trained and with_pairs:
        held_out = preparation.held_out(recipe, dpo, "pair", loaded)
    pairs = preparation.as_pairs(held_out or ())
    if dpo and dpo.share_prompts:
        log_probs.share_prompts(loaded.model, pairs, loaded.tokenizer.pad_token_id, console)
    expected = _pairs(loaded, reference, pairs, console) if pairs else None
    measured: dict[str, dict[str, Any]] = {reference: {"mean_implicit_reward": 0.0}}  # by definition
    for name in trained:
        section = _section(recipe, name)
        own_answers = [answer.ids for answer in answers[name]]
        sequences = list(zip(encoded, own_answers, strict=True))
        own, theirs = (_log_probs(loaded, judge, sequences, name, console) for judge in (name, reference))
        measured[name] = {"mean_implicit_reward": section.beta * (own - theirs).mean().item()}
        if expected is not None:
            per_token = isinstance(section, Dpo) and LOSSES[section.loss_type].per_token
            both = (_pairs(loaded, name, pairs, console), expected)
            gaps, of_reference = (_gaps(log_probs, pairs, per_token) for log_probs in both)
            measured[name]["preference_accuracy"] = torch.gt(gaps, of_reference).float().mean().item()
    return measured


def _section(recipe: Recipe, name: str) -> Dpo | Kto:
    """The section whose beta a model's rewards take: its own stage's, else that of the first one with a reference."""
    with_reference = [stage.name for stage in recipe.stages() if stage.has_reference]
    own = stages.of(name).name if stages.is_variant(name) else None
    section = recipe.section(own if own in with_reference else with_reference[0])
    assert isinstance(section, (Dpo, Kto))
    return section


def _log_probs(
    loaded: model.LoadedModel, judge: str, sequences: Any, name: str, console: Console
) -> torch.Tensor:
    title = f"{name}: log-probs of its {len(sequences)} answers, by {judge.lstrip('_')}"
    with bar(console, title, len(sequences)) as advance, model.use_adapter(loaded.model, judge):
        return log_probs.replies(loaded.model, sequences, loaded.tokenizer.pad_token_id, advance)


Both = tuple[
    torch.Tensor, torch.Tensor
]  # log pi(chosen | prompt) and log pi(rejected | prompt): (pairs,) each


def _pairs(loaded: model.LoadedModel, name: str, pairs: list[TokenizedPair], console: Console) -> Both:
    title = f"{name.lstrip('_')}: log-probs of {len(pairs)} held-out pairs"
    with bar(console, title, 2 * len(pairs)) as advance, model.use_adapter(loaded.model, name):
        return log_probs.pairs(loaded.model, pairs, loaded.tokenizer.pad_token_id, advance)


def _gaps(both: Both, pairs: list[TokenizedPair], per_token: bool) -> torch.Tensor:
    """Their difference, of whole replies or a token: (pairs,)."""
    chosen, rejected = both
    if per_token:
        chosen = chosen / torch.tensor([len(pair.chosen_ids) for pair in pairs])
        rejected = rejected / torch.tensor([len(pair.rejected_ids) for pair in pairs])
    return chosen - rejected
