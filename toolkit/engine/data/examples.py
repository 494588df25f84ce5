"""`--preview`: a stage's rows through its real tokenizer, without the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import AutoTokenizer

from toolkit.console.text import visible
from toolkit.data.reasons import Reason
from toolkit.data.rows import Labelled, Pair, Question
from toolkit.engine.base import model, tokens
from toolkit.engine.base.hub import HUB_ERRORS, explain
from toolkit.engine.data import preparation
from toolkit.engine.data.reading import EXCERPT, excerpt, load_item, places_of, read_sets
from toolkit.errors import UserError
from toolkit.files import write_text
from toolkit.recipe.schema import Recipe
from toolkit.recipe.stages import Stage
from toolkit.report.preview import Example, Preview, Reader, choose, show
from toolkit.report.preview_page import page
from toolkit.run.rundir import RunDir

MOST_ROWS = 2000  # of each set: enough to find every kind, and read within seconds
FILE = "preview.html"


def run(recipe: Recipe, stage: Stage, num: int, run: RunDir, console: Console) -> Path:
    """Shows up to `num` rows of each kind and writes them as one page. Returns the page's path.

    Raises UserError when the tokenizer or a set cannot be read, or no row is left to show.
    """
    loaded = load_tokenizer(recipe)
    with console.status("reading rows"), tempfile.TemporaryDirectory() as folder:
        preview = _preview(recipe, stage, loaded, num, Path(folder))
    show(preview, console)
    file = run.path / FILE
    try:
        write_text(file, page(preview))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose --runs DIR") from None
    console.print(f"\n[bold green]the same as a page:[/] {escape(str(file))}")
    return file


def load_tokenizer(recipe: Recipe) -> model.LoadedModel:
    """What `model.load` gives, without the model."""
    base = recipe.model
    return with_tokens(
        recipe, read_tokenizer(recipe.locate(base.path), base.revision, base.trust_remote_code)
    )


def with_tokens(recipe: Recipe, tokenizer: Any) -> model.LoadedModel:
    """A tokenizer with the recipe's template and tokens, as `load_tokenizer` gives it."""
    template = tokens.set_tokens(recipe, None, tokenizer)
    return model.LoadedModel(None, tokenizer, template, recipe.template.end_of_turn, [], 0)


def read_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """As it stands in the model's folder or repository. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (*HUB_ERRORS, ValueError) as error:
        if Path(path).is_dir():
            raise UserError(
                f"the tokenizer in {path} cannot be read: {' '.join(str(error).split())[:300]}"
            ) from None
        raise UserError(explain(error, "model", path, revision)) from None


def _preview(recipe: Recipe, stage: Stage, loaded: model.LoadedModel, num: int, folder: Path) -> Preview:
    section = recipe.section(stage.name)
    masking = preparation.masking_of(section, loaded)
    pool, chosen = read_sets(recipe, section, stage.row_kind, section.datasets, folder, at_most=MOST_ROWS)
    if not chosen.rows:
        raise UserError(f"no row of {', '.join(pool.sets)} is left to show: look at filter and top_k")
    rows = pool.rows.select(sorted(chosen.rows)[: section.max_rows])[:]
    items: Any = [load_item(text) for text in rows["item"]]
    results = masking.tokenize(stage.row_kind, items)
    reader = Reader(masking.tokenizer, loaded.template.bos_token, loaded.end_of_turn)
    places = places_of(pool.sets, rows["set"], rows["row"])
    examples = []
    for kind, i in choose(results, [_num_replies(item) for item in items], num):
        result = results[i]
        if isinstance(result, Reason):
            text = visible(f"{result.sentence}\n\n{_source_text(items[i], rows['item'][i])}")
            examples.append(Example(kind, places[i], text=text))
        else:
            examples.append(reader.example(kind, places[i], result))
    num_used = sum(not isinstance(result, Reason) for result in results)
    return Preview(
        f"{recipe.name} · {stage.name}: what is trained",
        [
            f"{', '.join(pool.sets)}: {num_used:,} of {len(items):,} rows used"
            + (f" (only the first {MOST_ROWS:,} of a set are looked at)" if _is_partial(rows) else ""),
            f"template {recipe.template.file}, end of turn {loaded.end_of_turn}, max_length {section.max_length}",
        ],
        examples,
    )


def _is_partial(rows: dict[str, list[Any]]) -> bool:
    return bool(max(rows["row"]) >= MOST_ROWS)


def _num_replies(item: Any) -> int:
    if isinstance(item, Reason):
        return 0
    if isinstance(item, Question):
        item = item.prompt
    turns = item.prompt + item[1] if isinstance(item, (Pair, Labelled)) else item
    return sum(turn["role"] == "assistant" for turn in turns)


def _source_text(item: Any, text: str) -> str:
    """A dropped row: as it was read, or its turns where only the tokens were at fault."""
    if isinstance(item, Reason):
        return excerpt(text)
    if isinstance(item, Pair):
        named = [*item.prompt, *({**turn, "role": "chosen"} for turn in item.chosen)]
        named += [{**turn, "role": "rejected"} for turn in item.rejected]
    elif isinstance(item, Labelled):
        side = "desirable" if item.label else "undesirable"
        named = [*item.prompt, *({**turn, "role": side} for turn in item.completion)]
    else:
        named = item.prompt if isinstance(item, Question) else item
    return "\n".join(f"{turn['role']}: {turn['content'][:EXCERPT]}" for turn in named)
