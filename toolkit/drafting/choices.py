"""From what was found out to values of a recipe, each with its source: pure.

What is left out here takes the schema's default, whose reason then stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from toolkit.drafting.draft import Choice, Draft
from toolkit.drafting.facts import ModelFacts, RowFacts, TemplateFacts
from toolkit.drafting.request import Request, as_written
from toolkit.recipe.sections import LINEARS
from toolkit.recipe.stages import Stage

Choices = dict[str, Choice]

ROUND = 64  # tokens that a max_length is a multiple of
SHORT = 2048  # rows up to here are all held; of longer ones 99 in 100
LONGEST = 131_072  # tokens of a row that is looked at, where the model names no positions
MOST_HELD_OUT, LEAST_ROWS = 500, 100
ENOUGH_STEPS = 100
ENOUGH_ROWS = 2000
NUM_PROMPTS = 4  # of each stage

GUIDE = "Unsloth's guide: 1 to 3"


def of_model(request: Request, facts: ModelFacts, template: TemplateFacts, card: str | None) -> Choices:
    """Model, architecture and template; enough, with the sets, for a recipe that loads."""
    file = request.draft.file
    found = {
        "description": Choice(
            f"{Path(facts.path).name}, {' then '.join(s.label for s in request.stages)} on "
            f"{', '.join(Path(path).name for path in request.sets.values())}",
            "",
        ),
        "gpu": Choice(card, _why_card(request.gpu, card)),
        "model.path": Choice(as_written(facts.path, file), facts.why),
        "model.base_16bit": Choice(facts.base_16bit and as_written(facts.base_16bit, file), facts.why_base),
        "template.file": Choice(
            template.file if template.file == "tokenizer" else as_written(template.file, file), template.why
        ),
        "template.end_of_turn": Choice(template.end_of_turn, template.why_end),
        "template.pad_token": Choice(template.pad_token, template.why_pad),
    }
    found |= {
        f"model.architecture.{key}": Choice(value, "config.json")
        for key, value in facts.architecture.items()
        if value is not None
    }
    if facts.linears != LINEARS:
        found["lora.target_modules"] = Choice(
            list(facts.linears), "all linears of this model, as QLoRA found best"
        )
    for stage in request.stages:
        found[f"{stage.name}.max_length"] = Choice(
            facts.architecture["max_position_embeddings"] or LONGEST, ""
        )
        if not template.has_system:
            found[f"{stage.name}.system_turn"] = Choice("merge", "the template has no system turn")
    return found


def of_rows(draft: Draft, stage: Stage, rows: RowFacts, on_gpu: bool) -> Choices:
    """Lengths, batch and epochs of one stage, from its real rows."""
    name, used = stage.name, rows.accounting.used
    has_own = draft.is_given(f"{name}.eval_datasets")
    held_out = min(MOST_HELD_OUT, used // 20) if used >= LEAST_ROWS and not has_own else 0
    length, why_length = _max_length(rows)
    mean = rows.accounting.num_tokens / used / stage.sequences_per_row
    epochs = 3.0 if stage.row_kind == "chat" and used < ENOUGH_ROWS else 1.0
    packs = stage.name == "sft" and on_gpu and mean < length / 2
    num = (used - held_out) * (mean / length if packs else 1.0) * epochs
    batch = next((batch for batch in (16, 8) if num / batch >= ENOUGH_STEPS), 4)
    found = {
        f"{name}.datasets": Choice(
            draft.choices[f"{name}.datasets"].value, f"{rows.schema}: {rows.counted()}"
        ),
        f"{name}.eval_rows": Choice(
            held_out,
            f"a twentieth of the usable rows, {MOST_HELD_OUT} at most"
            if held_out
            else "there are sets for it"
            if has_own
            else f"fewer than {LEAST_ROWS} rows: all of them are trained",
        ),
        f"{name}.max_length": Choice(length, why_length),
        f"{name}.num_train_epochs": Choice(
            epochs, f"{GUIDE}; {'fewer' if epochs > 1 else 'not fewer'} than {ENOUGH_ROWS:,} rows"
        )
        if stage.row_kind == "chat"
        else Choice(epochs, "alignment-handbook: one epoch is enough"),
        f"{name}.effective_batch_size": Choice(
            batch, f"some {max(1, round(num / batch)):,} steps in the run"
        ),
    }
    if name == "sft":
        found["sft.packing"] = Choice(packs, _why_packing(packs, on_gpu, mean, length))
        found["sft.group_by_length"] = Choice(
            not packs, "packing leaves no padding to save" if packs else "less padding in each micro-batch"
        )
    return found


def fitting(stage: Stage, largest: int, rows: RowFacts) -> Choices:
    """A shorter max_length, the longest that the plan has room for."""
    length = largest // ROUND * ROUND or largest
    counts = rows.accounting.lengths["total"]
    held = sum(count for tokens, count in counts.items() if tokens <= length) / counts.total()
    return {
        f"{stage.name}.max_length": Choice(length, f"the longest that fits; holds {held:.0%} of the rows")
    }


def prompts(rows: Mapping[str, RowFacts]) -> Choices:
    """What the comparison asks."""
    found = list(dict.fromkeys(prompt for one in rows.values() for prompt in one.prompts))
    if not found:
        return {}
    return {"compare.prompts": Choice(found, "from the rows, so trained on: your own say more")}


def header(request: Request, rows: Mapping[str, RowFacts]) -> str:
    """The comment above the recipe."""
    return "\n".join(f"# {line}" for line in _header(request, rows))


def _header(request: Request, rows: Mapping[str, RowFacts]) -> Iterator[str]:
    yield f"{Path(request.model).name}: written by run_new.py from the model's files and the rows."
    yield "Beside each value stands where it comes from; a default's reason is that of docs/recipe.md."
    for name, one in rows.items():
        total = one.accounting.percentile
        yield (
            f"{name}: {one.counted()}; tokens of half of them up to {total('total', 50):,}, of 99 in 100 up to "
            f"{total('total', 99):,}, of the longest {total('total', 100):,}"
        )
        for reason, count in one.accounting.dropped.most_common():
            yield f"  {count:,} are not used: {reason.sentence}"


def _max_length(rows: RowFacts) -> tuple[int, str]:
    of = rows.accounting.percentile
    longest = of("total", 100)
    if longest <= SHORT:
        why = f"the longest row has {longest:,} tokens, half have up to {of('total', 50):,}"
        return _rounded(longest), why
    return _rounded(of("total", 99)), f"holds 99 of 100 rows; the longest has {longest:,} tokens"


def _why_card(asked: str | None, card: str | None) -> str:
    if asked:
        return "as asked for"
    return "the card of the machine that this was written on" if card else "none was named or found: on a CPU"


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def _why_packing(packs: bool, on_gpu: bool, mean: float, length: int) -> str:
    if not on_gpu:
        return "nothing is packed without a GPU"
    share = f"rows fill {mean / length:.0%} of max_length"
    return f"{share}: padding would fill most of a batch" if packs else f"{share}: it would save little"
