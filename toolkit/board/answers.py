"""Answers of chosen runs side by side, as the comparison's page shows them, and votes on them that stay on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.board.differences import RESOLVED
from toolkit.compare import answer_measures
from toolkit.compare.page import identity, page
from toolkit.compare.view import Row
from toolkit.errors import UserError
from toolkit.files import write_json, write_text
from toolkit.recipe import yaml_file
from toolkit.records.comparison_report import AnswerMeasures, Comparison
from toolkit.records.record import read_lines, read_object
from toolkit.redaction import blanked
from toolkit.run.rundir import ANSWERS, RunDir

VOTES = "votes"  # the folder beside a recipe's runs: <id>.jsonl holds pairs, <id>.json what was clicked
COMPARED = "comparison.jsonl"
MOST_VOTES = 10_000  # clicks that are kept of one page


@dataclass(frozen=True)
class SideBySide:
    """Rows of a recipe with an answer of each of `names` in all of them."""

    recipe: str
    description: str
    names: list[str]
    rows: list[Row]
    folder: Path

    @property
    def name(self) -> str:
        return self.recipe

    @property
    def id(self) -> str:
        return identity(self.rows)

    def page(self) -> str:
        """The comparison's page, which sends its votes to where it came from."""
        return page(self, self.rows, self._measures(), cast=self.cast())

    def cast(self) -> list[Any]:
        found = read_object(self.folder / f"{self.id}.json").get("cast")
        return found if isinstance(found, list) else []

    def keep(self, cast: Any) -> int:
        """Writes votes and the pairs that they make; returns how many. Raises UserError for what are none."""
        asked = [row for row in self.rows if "expected" not in row]
        if (
            not isinstance(cast, list)
            or len(cast) > MOST_VOTES
            or not all(self._is_vote(one, asked) for one in cast)
        ):
            raise UserError("these are no votes on the answers that are shown")
        now: dict[int, Any] = {}
        for row, winner in cast:
            now.pop(row, None)
            if winner is not None:
                now[row] = winner
        pairs = [
            pair
            for row, winner in now.items()
            if isinstance(winner, int)
            for pair in self._pairs(asked[row], self.names[winner])
        ]
        lines = (json.dumps(blanked(pair), ensure_ascii=False) + "\n" for pair in pairs)
        write_text(self.folder / f"{self.id}.jsonl", "".join(lines))
        write_json(self.folder / f"{self.id}.json", {"models": self.names, "cast": cast})
        return len(pairs)

    def _is_vote(self, vote: Any, asked: Sequence[Row]) -> bool:
        if not (isinstance(vote, list) and len(vote) == 2 and type(vote[0]) is int):
            return False
        row, winner = vote
        is_model = type(winner) is int and 0 <= winner < len(self.names)
        return 0 <= row < len(asked) and (is_model or winner in ("tie", "skip", None))

    def _pairs(self, row: Row, winner: str) -> list[dict[str, Any]]:
        """In the layout that `dpo.datasets` reads; nothing is to be learnt from equal answers, or empty ones."""
        chosen = row["answers"][winner]
        return [
            {
                "prompt": row["messages"],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "chosen_model": winner,
                "rejected_model": name,
            }
            for name in self.names
            if (rejected := row["answers"][name]) and chosen and rejected != chosen
        ]

    def _measures(self) -> dict[str, AnswerMeasures]:
        prompts = [row["prompt"] for row in self.rows]
        found = {}
        for name in self.names:
            texts = [row["answers"][name] for row in self.rows]
            measured = [row["measured"][name] for row in self.rows]
            tokens = [one["num_tokens"] or 0 for one in measured]
            ended = sum(bool(one["ended"]) for one in measured) / max(1, len(measured))
            known = answer_measures.measures(prompts, texts, tokens) | {"ended_fraction": ended}
            found[name] = replace(AnswerMeasures.unknown(), **known)
        return found


def side_by_side(runs: Sequence[RunDir]) -> SideBySide:
    """Of runs of one recipe: what `run_compare.py` asked of all of them, else what each was asked at its end.

    Raises UserError where no prompt was answered by all.
    """
    recipe, names = runs[0].recipe, [run.name for run in runs]
    compare = runs[0].of("compare")
    report = Comparison.load(compare.report)
    if report and set(names) <= set(report.models or {}):
        names = list(report.models or {})
        rows = [
            row for row in read_lines(compare.path / COMPARED) if set(names) <= set(row.get("answers") or {})
        ]
    else:
        names, rows = _at_their_ends(runs)
    if absent := [run.name for run in runs if run.name not in names]:
        raise UserError(f"{', '.join(absent)}: no answers yet; they come at the end of a run")
    if not rows:
        raise UserError(
            f"{', '.join(names)} were asked nothing in common: `run_compare.py --models` asks all of them"
        )
    description = str(_resolved(runs[0]).get("description") or "")
    return SideBySide(recipe, description, names, rows, runs[0].root / recipe / VOTES)


def _at_their_ends(runs: Sequence[RunDir]) -> tuple[list[str], list[Row]]:
    """answers.jsonl of each, and what the first one started from where it is none of the others."""
    found: dict[str, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        before = run.started_from() or "before"
        names = {"after": run.name} | (
            {"before": before} if number == 0 and before not in map(_name, runs) else {}
        )
        for row in read_lines(run.path / ANSWERS):
            for side, name in names.items():
                if isinstance(row.get(side), dict):
                    found.setdefault(name, {})[str(row.get("prompt"))] = row[side]
    order = [name for name in found if name not in map(_name, runs)] + [
        run.name for run in runs if run.name in found
    ]
    if len(order) < len(runs):
        return order, []
    common = [prompt for prompt in found[order[0]] if all(prompt in found[name] for name in order)]
    system = (_resolved(runs[0]).get("compare") or {}).get("system")
    turns = [{"role": "system", "content": system}] if system else []
    return order, [
        {
            "prompt": prompt,
            "messages": [*turns, {"role": "user", "content": prompt}],
            "answers": {name: str(found[name][prompt].get("text") or "") for name in order},
            "measured": {
                name: {
                    "num_tokens": found[name][prompt].get("num_tokens") or 0,
                    "ended": bool(found[name][prompt].get("ended")),
                    "seconds": None,
                }
                for name in order
            },
        }
        for prompt in common
    ]


def _name(run: RunDir) -> str:
    return run.name


def _resolved(run: RunDir) -> dict[str, Any]:
    file = run.path / RESOLVED
    try:
        found = yaml_file.plain(yaml_file.read(file), file)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
