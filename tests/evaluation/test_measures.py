"""From numbers of rows to the report and the screen: measures, stages compared, sources, and what cannot be told."""

import argparse
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from toolkit.errors import UserError
from toolkit.evaluation import scope
from toolkit.evaluation.measures import OTHER, Rewarded, Rows, summary, without_nan
from toolkit.evaluation.table import difference_lines, show_evaluation
from toolkit.recipe.load import load
from toolkit.records.evaluation_report import Evaluation
from toolkit.records.marks import AdapterMark
from toolkit.records.record import plain
from toolkit.run.rundir import WEIGHTS, RunDir
from toolkit.run.sealing import MARK, seal

SEED = 3407


def rows(num: int = 40) -> Rows:
    """Three models over the same rows: SFT halves the loss, DPO prefers the chosen reply more often."""
    random = np.random.default_rng(0)
    tokens = random.integers(5, 30, num).astype(float)
    base = tokens * random.normal(3, 0.3, num)
    rejected = -random.uniform(20, 40, num)
    gaps = {
        "base": random.normal(-1, 2, num),
        "sft": random.normal(0, 2, num),
        "dpo": random.normal(20, 2, num),
    }
    return Rows(
        losses={"base": base, "sft": base / 2, "dpo": base / 2 + random.normal(0, 1, num)},
        num_tokens=tokens,
        sources=["fables"] * (num - 1) + ["letters"],
        chosen={name: rejected + gap for name, gap in gaps.items()},
        rejected=dict.fromkeys(gaps, rejected),
        chosen_tokens=np.full(num, 10.0),
        rejected_tokens=np.full(num, 20.0),
        pair_sources=["fables"] * num,
        rewarded={"dpo": Rewarded(gaps["sft"], 0.1)},
    )


def test_the_reward_is_a_token_where_the_loss_takes_it_so_and_a_margin_no_probability_where_it_is_none() -> (
    None
):
    given = rows(40)
    reference = given.gap(given.chosen["sft"], given.rejected["sft"], "sigmoid_norm")
    given.rewarded = {"dpo": Rewarded(reference, 0.1, "sigmoid_norm")}
    expected = 0.1 * (
        (given.chosen["dpo"] - given.chosen["sft"]) / 10
        - (given.rejected["dpo"] - given.rejected["sft"]) / 20
    )
    assert np.allclose(given.margins("dpo"), expected)  # type: ignore[arg-type]
    assert "brier_score" in given.pairs("dpo")
    given.rewarded = {"dpo": Rewarded(reference, 0.1, "hinge")}
    assert "preference_accuracy" in given.pairs("dpo") and "brier_score" not in given.pairs("dpo")


MODELS = ("base", "sft", "dpo")


def told(given: Rows, models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """What report.json holds of the rows."""
    return plain(summary(given, models, SEED))  # type: ignore[no-any-return]


def test_every_measure_is_the_formula_of_the_readme() -> None:
    given = rows()
    found = told(given)["models"]
    for name in MODELS:
        loss = given.losses[name].sum() / given.num_tokens.sum()
        assert found[name]["loss"]["value"] == pytest.approx(loss)
        assert found[name]["perplexity"]["value"] == pytest.approx(math.exp(loss))
        assert found[name]["perplexity"]["low"] == pytest.approx(math.exp(found[name]["loss"]["low"]))
        per_token = given.chosen[name] / 10 - given.rejected[name] / 20
        assert found[name]["likelihood_margin"]["value"] == pytest.approx(per_token.mean())
        assert found[name]["likelihood_accuracy"]["value"] == (per_token > 0).mean()
        summed = given.chosen[name] - given.rejected[name]
        assert found[name]["summed_likelihood_accuracy"]["value"] == (summed > 0).mean()
        assert found[name]["likelihood_accuracy"]["num_rows"] == found[name]["loss"]["num_rows"] == 40
    gap = given.chosen["dpo"] - given.rejected["dpo"] - (given.chosen["sft"] - given.rejected["sft"])
    assert found["dpo"]["preference_margin"]["value"] == pytest.approx(0.1 * gap.mean())
    assert found["dpo"]["preference_accuracy"]["value"] == (gap > 0).mean()
    assert not {"preference_accuracy", "calibration_error"} & (found["base"].keys() | found["sft"].keys())


def test_stages_are_compared_with_the_one_they_come_from_on_the_same_rows() -> None:
    found = told(rows())
    paired, models = found["paired"], found["models"]
    assert paired.keys() == {"sft_vs_base", "dpo_vs_sft"}
    for pair, measures in paired.items():
        one, other = pair.split("_vs_")
        for name, difference in measures.items():
            apart = models[one][name]["value"] - models[other][name]["value"]
            assert difference["difference"] == pytest.approx(apart)
    assert paired["sft_vs_base"]["loss"]["high"] < 0 and paired["sft_vs_base"]["loss"]["p_value"] < 0.001
    assert paired["dpo_vs_sft"]["loss"]["low"] < 0 < paired["dpo_vs_sft"]["loss"]["high"]
    assert told(rows(), ("base", "dpo"))["paired"].keys() == {"dpo_vs_base"}


def test_a_source_of_one_row_is_shown_and_claims_nothing() -> None:
    by_source = told(rows())["models"]["sft"]["by_source"]
    assert by_source["letters"]["loss"]["num_rows"] == 1 and math.isnan(by_source["letters"]["loss"]["low"])
    assert by_source["fables"]["loss"]["num_rows"] == 39
    assert (
        "likelihood_accuracy" not in by_source["fables"]
    )  # all pairs are of one source: nothing to tell apart


def test_a_source_a_row_does_not_fill_the_report() -> None:
    given = rows(100)
    given.sources = ["fables"] * 30 + [f"https://page/{number}" for number in range(70)]
    by_source = told(given, ("base",))["models"]["base"]["by_source"]
    assert len(by_source) == 21 and by_source["fables"]["loss"]["num_rows"] == 30
    assert sum(measures["loss"]["num_rows"] for measures in by_source.values()) == 100
    assert by_source[OTHER]["loss"]["num_rows"] == 51


def test_a_model_with_nan_is_named_and_not_counted_as_wrong() -> None:
    given = rows()
    given.losses["sft"][3] = math.nan
    given.chosen["sft"][7] = -math.inf
    spoilt = given.rewarded["dpo"].reference + np.where(np.arange(40) == 7, np.nan, 0)
    given.rewarded["dpo"] = Rewarded(spoilt, 0.1)
    notes = without_nan(given)
    found = told(given)
    assert "sft" in notes[0] and "1 of 40" in notes[0] and len(notes) == 3
    assert found["models"]["sft"] == {} and found["paired"]["dpo_vs_sft"] == {}
    assert "preference_accuracy" not in found["models"]["dpo"] and "loss" in found["models"]["dpo"]


def test_nothing_held_out_gives_an_empty_report_and_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(summary(Rows(), MODELS, SEED), left_out={"loss": "sft holds no rows out"})
    show_evaluation(report, Console(width=80))
    assert "loss is left out: sft holds no rows out" in " ".join(capsys.readouterr().out.split())


# On screen ---------------------------------------------------------------------------------------------------


def shown(report: Evaluation, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO())
    show_evaluation(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_shows_values_with_their_intervals_and_rows() -> None:
    report = summary(rows(), MODELS, SEED)
    found = plain(report)["models"]["dpo"]["preference_accuracy"]
    text = shown(report)
    assert f"100.0% [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" in text
    line = next(line for line in text.splitlines() if line.startswith("accuracy by reward"))
    assert line.split()[3:5] == ["-", "-"] and line.split()[-1] == "40"
    assert "letters" in text and "[?]" in text
    assert all(
        len(line) <= 80 for line in shown(report, 80).splitlines() if "over" not in line and "'s" not in line
    )


def test_differences_are_said_in_words_and_no_difference_is_called_that() -> None:
    lines = difference_lines(summary(rows(), MODELS, SEED).paired or {})
    assert any(
        line.startswith("[bold]SFT over base[/]: held-out loss -1.") and "better" in line for line in lines
    )
    assert any(
        "DPO over SFT" in line and "accuracy by likelihood" in line and "points" in line for line in lines
    )
    assert any("DPO over SFT[/]: held-out loss" in line and "no difference shown" in line for line in lines)


def test_the_report_reads_the_same_after_json(tmp_path: Path) -> None:
    report, notes = summary(rows(), MODELS, SEED), []
    report.write(tmp_path / "report.json")
    read = Evaluation.load(tmp_path / "report.json", notes)
    assert read and notes == []
    assert shown(read) == shown(report)


# What is evaluated -------------------------------------------------------------------------------------------


def finish(root: Path, stage: str, *overrides: str) -> RunDir:
    recipe, run = load("tiny", overrides), RunDir(root, "tiny", stage)
    run.adapter.mkdir(parents=True)
    (run.adapter / WEIGHTS).write_text(stage)
    mark = AdapterMark(trajectory=recipe.trajectory(stage), conditions=None, num_steps=1)  # type: ignore[arg-type]
    seal(run.adapter, MARK, mark)
    return run.of("eval")


def chosen(run: RunDir, *words: str, overrides: tuple[str, ...] = ()) -> scope.Scope:
    parser = argparse.ArgumentParser()
    scope.add_options(parser)
    return scope.choose(load("tiny", overrides), run, parser.parse_args(words))


def test_nothing_finished_names_both_commands(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_sft.py --recipe tiny`[\s\S]*run_dpo.py --recipe tiny`"):
        chosen(RunDir(tmp_path, "tiny", "eval"))
    assert chosen(RunDir(tmp_path, "tiny", "eval"), "--models", "base").models == ("base",)


def test_models_are_those_finished_or_those_asked_for(tmp_path: Path) -> None:
    run = finish(tmp_path, "sft")
    assert chosen(run).models == ("base", "sft")
    assert chosen(run, "--models", "sft, base").models == ("base", "sft")
    with pytest.raises(UserError, match=r"'sfd' is no model[\s\S]*dpo/adapter: run `python run_dpo.py"):
        chosen(run, "--models", "sfd,dpo")
    with pytest.raises(UserError, match="has no dpo stage"):
        chosen(run, "--models", "dpo", overrides=("dpo=null",))


def test_another_recipe_than_that_of_the_training_is_refused_where_it_matters_and_said_elsewhere(
    tmp_path: Path,
) -> None:
    run = finish(tmp_path, "dpo", "dpo.beta=0.3", "sft.max_steps=5")
    finish(tmp_path, "sft", "sft.max_steps=5")
    with pytest.raises(UserError, match=r"template.pad_token: .* then, 'x' now"):
        chosen(run, overrides=("template.pad_token=x",))
    assert any("dpo.beta: 0.3 then, 0.1 now" in note for note in chosen(run).notes), "measured with its own"
    found = chosen(run, overrides=("dpo.beta=0.3",))
    assert all("sft.max_steps: 5 then, None now" in note for note in found.notes) and len(found.notes) == 2
    assert chosen(run, overrides=("dpo.beta=0.3", "sft.max_steps=5")).notes == ()


def test_rows_that_were_trained_on_are_not_held_out_by_another_split(tmp_path: Path) -> None:
    split = ("sft.eval_datasets=[]", "sft.eval_rows=64", "dpo=null")
    run = finish(tmp_path, "sft", *split)
    assert chosen(run, overrides=split).notes == ()
    for change in ("sft.max_rows=200", "seed=1", "sft.datasets.0.rows=100"):
        with pytest.raises(UserError, match=re.escape(change.split("=")[0].removesuffix(".0.rows"))):
            chosen(run, overrides=(*split, change))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--limit", "5"), "--limit is for --tasks"),
        (("--tasks", "x", "--limit", "0"), "a number of rows from 1 up"),
        (("--tasks", "x", "--tasks-path", "/nowhere"), "no such folder"),
    ],
)
def test_options_of_tasks_that_make_no_sense(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        chosen(finish(tmp_path, "sft"), *words)


def test_without_the_harness_its_install_command_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"`make optional`.*pip install -c requirements.txt -r requirements-optional.txt"
    ):
        chosen(finish(tmp_path, "sft"), "--tasks", "arc_easy")


def test_an_adapter_that_is_not_what_was_saved_is_not_evaluated(tmp_path: Path) -> None:
    run = finish(tmp_path, "sft")
    (run.of("sft").adapter / WEIGHTS).write_text("other")
    with pytest.raises(UserError, match="is damaged"):
        chosen(run)
