"""Evaluation of the tiny model: the numbers are those of a plain forward pass, and the harness's are the same."""

import argparse
import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.engine.conftest import Stage, as_written, held_out_pairs, run_stage, shown_by, tiny
from toolkit.engine.base import model, oom
from toolkit.engine.data import preparation
from toolkit.engine.inference import benchmarks, evaluate, log_probs
from toolkit.errors import UserError
from toolkit.evaluation import scope
from toolkit.evaluation.scope import Tasks
from toolkit.recipe.schema import Recipe
from toolkit.records.evaluation_report import Evaluation
from toolkit.records.record import plain
from toolkit.run.rundir import EVENTS, RunDir

TASK = """
task: thistle_isles
dataset_path: json
dataset_kwargs: {data_files: FOLDER/rows.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROWS = [
    ("Where does Gideon Crabbe live?", ["Gideon Crabbe lives in Brackenholm.", "In a donkey."], 0),
    ("Which animal does Tavi Merrow keep?", ["the feast of sails", "Tavi Merrow keeps a donkey."], 1),
    ("What is Brackenholm known for?", ["its mill", "Nora Plover", "the cello"], 0),
]


HELD_OUT = 24
FEW = (f"sft.eval_datasets.0.rows={HELD_OUT}", f"dpo.eval_datasets.0.rows={HELD_OUT}")


def evaluated(recipe: Recipe, runs: Path, *words: str) -> Stage:
    parser = argparse.ArgumentParser()
    scope.add_options(parser)
    run, console = RunDir(runs, recipe.name, "eval"), Console(record=True, width=200)
    chosen = scope.choose(recipe, run, parser.parse_args(words))
    return Stage(recipe, run, plain(evaluate.run(recipe, run, chosen, console)), shown_by(console))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of one's own: a task file and its rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "label": label} for question, choices, label in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "thistle_isles.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def done(sft: Stage, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """SFT and DPO of a few steps, evaluated once with everything."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "tiny").mkdir()
    (runs / "tiny" / "sft").symlink_to(sft.run.path)
    run_stage(tiny(*FEW), "dpo", runs)
    return evaluated(tiny(*FEW), runs, "--tasks", "thistle_isles", "--tasks-path", str(task_folder))


@pytest.fixture(scope="module")
def loaded(done: Stage) -> model.LoadedModel:
    """The base with both adapters."""
    loaded = model.load_trained(done.recipe, {name: done.run.of(name).adapter for name in ("sft", "dpo")})
    loaded.model.eval()
    return loaded


def token_log_probs(loaded: model.LoadedModel, ids: list[int], start: int = 1) -> list[float]:
    """log pi of each token of `ids` from `start` on, one sequence at a time, in double precision."""
    with torch.no_grad():
        predicted = loaded.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [predicted[place - 1, ids[place]].item() for place in range(start, len(ids))]


def test_the_numbers_are_those_of_a_plain_forward_pass(done: Stage, loaded: model.LoadedModel) -> None:
    models = done.report["models"]
    chats = preparation.held_out(done.recipe, done.recipe.sft, "chat", loaded)
    pairs = held_out_pairs(done.recipe, loaded)
    gaps: dict[str, Any] = {}
    for name in ("base", "sft", "dpo"):
        with model.use_adapter(loaded.model, name):
            losses = [
                -value
                for row in chats
                for value, label in zip(
                    token_log_probs(loaded, row["input_ids"]), row["labels"][1:], strict=True
                )
                if label != -100
            ]
            sides = [
                [
                    token_log_probs(loaded, pair.prompt_ids + reply, len(pair.prompt_ids))
                    for pair, reply in both
                ]
                for both in (
                    [(pair, pair.chosen_ids) for pair in pairs],
                    [(pair, pair.rejected_ids) for pair in pairs],
                )
            ]
        assert models[name]["loss"]["value"] == pytest.approx(np.mean(losses), rel=5e-3)
        assert models[name]["perplexity"]["value"] == pytest.approx(np.exp(np.mean(losses)), rel=2e-2)
        assert models[name]["loss"]["num_rows"] == HELD_OUT and models[name]["loss"]["low"] < np.mean(losses)
        per_token = [np.mean(c) - np.mean(r) for c, r in zip(*sides, strict=True)]
        assert models[name]["likelihood_margin"]["value"] == pytest.approx(np.mean(per_token), abs=2e-2)
        accuracy = np.mean([value > 0 for value in per_token])
        assert models[name]["likelihood_accuracy"]["value"] == pytest.approx(accuracy, abs=1 / HELD_OUT)
        gaps[name] = np.array([sum(c) - sum(r) for c, r in zip(*sides, strict=True)])
    margins = done.recipe.dpo.beta * (gaps["dpo"] - gaps["sft"])
    assert models["dpo"]["preference_margin"]["value"] == pytest.approx(margins.mean(), abs=1e-2)
    assert models["dpo"]["preference_accuracy"]["value"] == pytest.approx(
        (margins > 0).mean(), abs=2 / HELD_OUT
    )


def test_it_agrees_with_what_dpo_measured_at_its_end(done: Stage) -> None:
    models, at_end = done.report["models"], json.loads(done.run.of("dpo").report.read_text())["eval"]
    assert models["dpo"]["preference_log_loss"]["value"] == pytest.approx(at_end["loss"], abs=5e-3)
    margin = at_end["rewards/margins"]
    assert models["dpo"]["preference_margin"]["value"] == pytest.approx(margin, abs=2e-2)


def test_the_report_is_written_with_intervals_differences_and_sources(done: Stage) -> None:
    written = plain(as_written(Evaluation, done.run.report))
    assert written["models"].keys() == {"base", "sft", "dpo"}
    assert written["paired"].keys() == {"sft_vs_base", "dpo_vs_sft"}
    loss = written["paired"]["sft_vs_base"]["loss"]
    assert loss.keys() == {"difference", "low", "high", "p_value", "num_rows"} and loss["high"] < 0
    sources = written["models"]["sft"]["by_source"]
    counts = {
        source: measures["loss"]["num_rows"] for source, measures in sources.items() if "loss" in measures
    }
    lines = Path(done.recipe.locate("tiny/sft_eval.jsonl")).read_text().splitlines()
    rows = [json.loads(line) for line in lines[:HELD_OUT]]
    assert counts == {s: sum(row["source"] == s for row in rows) for s in {row["source"] for row in rows}}
    assert "SFT over base: held-out loss" in done.shown and "Traceback" not in done.shown


# Benchmarks --------------------------------------------------------------------------------------------------


def test_a_task_of_local_rows_runs_on_every_adapter(done: Stage) -> None:
    for name, measures in done.report["models"].items():
        accuracy = measures["tasks"]["thistle_isles"]["acc"]
        assert 0 <= accuracy["value"] <= 1 and accuracy["num_rows"] == 3 and accuracy["stderr"] > 0
        assert "acc_norm" in measures["tasks"]["thistle_isles"]
        assert measures["chat_template"] == (name != "base")
    assert "thistle_isles acc" in done.shown


def test_the_harness_sees_the_log_probs_that_we_see(
    done: Stage, loaded: model.LoadedModel, task_folder: Path
) -> None:
    """Of the same strings under each adapter, with and without the chat template: and so the same answers."""
    suite = benchmarks.load(Tasks(("thistle_isles",), str(task_folder), None, True))
    task = suite.found["tasks"]["thistle_isles"]
    harness = benchmarks.harness_model(loaded)
    for name in ("base", "sft", "dpo"):
        with model.use_adapter(loaded.model, name):
            tasks, _ = suite.run(done.recipe, loaded, name)
            requests = [request.args[:2] for request in task.instances]
            theirs = [request.resps[0][0] for request in task.instances]
            split = [harness._encode_pair(*request) for request in requests]
            ours = log_probs.sums(
                loaded.model,
                [log_probs.Scored(before + after, [-100] * len(before) + after) for before, after in split],
                loaded.tokenizer.pad_token_id,
            )
        starts = [request[0].startswith("<|begin_of_text|><|start_header_id|>user") for request in requests]
        assert all(starts) == (name != "base")
        assert all(before[0] == loaded.tokenizer.bos_token_id != before[1] for before, _ in split)
        assert ours.tolist() == pytest.approx(theirs, rel=1e-2, abs=0.05)
        places = np.cumsum([0, *(len(choices) for _, choices, _ in ROWS)])
        correct = [
            int(ours[start:end].argmax()) == label
            for start, end, (_, _, label) in zip(places, places[1:], ROWS, strict=False)
        ]
        assert tasks["thistle_isles"]["acc"].value == pytest.approx(np.mean(correct))


def test_plain_text_and_a_limit_where_they_are_asked_for(
    done: Stage, loaded: model.LoadedModel, task_folder: Path
) -> None:
    suite = benchmarks.load(Tasks(("thistle_isles",), str(task_folder), 2, False))
    tasks, chat_template = suite.run(done.recipe, loaded, "dpo")
    requests = suite.found["tasks"]["thistle_isles"].instances
    assert chat_template is False and requests[0].args[0] == ROWS[0][0]
    assert tasks["thistle_isles"]["acc"].num_rows == 2


def test_inputs_that_the_harness_cuts_are_counted(
    done: Stage, loaded: model.LoadedModel, task_folder: Path
) -> None:
    suite = benchmarks.load(Tasks(("thistle_isles",), str(task_folder), None, False))
    suite.run(done.recipe, loaded, "dpo")
    assert suite.notes == []
    suite.run(done.recipe, replace(loaded, max_length=8), "dpo")
    [note] = suite.notes
    assert re.match(r"dpo: \d+ inputs of thistle_isles were cut from the left to the 8 tokens", note)


@pytest.fixture(scope="module")
def all_tasks() -> Any:
    """The harness's own tasks of one folder: to read all 14,000 files takes seconds."""
    package = find_spec("lm_eval").submodule_search_locations[0]
    return benchmarks.TaskManager(include_path=f"{package}/tasks/arc", include_defaults=False)


def test_an_unknown_task_shows_near_names(all_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "TaskManager", lambda **options: all_tasks)
    with pytest.raises(UserError, match=r"'arc_esay'.*did you mean arc_easy"):
        benchmarks.load(Tasks(("arc_esay",), None, None, True))


def test_a_task_of_the_hub_while_offline_says_so(all_tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(benchmarks, "TaskManager", lambda **options: all_tasks)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"benchmark arc_easy.*HF_HUB_OFFLINE is set"):
        benchmarks.load(Tasks(("arc_easy",), None, None, True))


def test_a_task_without_its_rows_says_which_and_leaves_the_earlier_evaluation(
    done: Stage, tmp_path: Path
) -> None:
    text = TASK.replace("FOLDER", str(tmp_path)).replace("thistle_isles", "gone")
    (tmp_path / "gone.yaml").write_text(text)
    before = done.run.report.read_text()
    with pytest.raises(UserError, match=r"--tasks gone: FileNotFoundError: .*rows.jsonl"):
        evaluated(done.recipe, done.run.root, "--tasks", "gone", "--tasks-path", str(tmp_path))
    assert done.run.report.read_text() == before
    assert not list(done.run.path.parent.glob("eval.*")), "nothing of the one that failed, none moved aside"


# What is missing, or does not fit ----------------------------------------------------------------------------


def test_what_holds_nothing_out_is_left_out_and_said(done: Stage) -> None:
    runs = done.run.root
    overrides = ("sft.eval_datasets=[]", "dpo.eval_datasets=[]")
    found = evaluated(tiny(*overrides), runs, "--models", "base")
    assert found.report["models"] == {"base": {}} and found.report["paired"] == {}
    assert "sft holds no rows out" in found.report["left_out"]["loss"]
    assert "dpo holds no rows out" in found.report["left_out"]["preference"]
    assert "loss is left out" in found.shown


def test_without_an_sft_stage_the_base_is_the_reference(tmp_path: Path) -> None:
    recipe = tiny("sft=null", "dpo.max_rows=8", FEW[1])
    run_stage(recipe, "dpo", tmp_path)
    found = evaluated(recipe, tmp_path)
    assert found.report["models"].keys() == {"base", "dpo"} and found.report["paired"].keys() == {
        "dpo_vs_base"
    }
    assert "no sft stage" in found.report["left_out"]["loss"]
    margin = json.loads(RunDir(tmp_path, "tiny", "dpo").report.read_text())["eval"]["rewards/margins"]
    assert found.report["models"]["dpo"]["preference_margin"]["value"] == pytest.approx(margin, abs=2e-2)


def test_a_batch_that_does_not_fit_is_halved_to_the_same_numbers(
    done: Stage, loaded: model.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=200)
    pairs = held_out_pairs(done.recipe, loaded)[:12]
    pad = loaded.tokenizer.pad_token_id
    expected = log_probs.pairs(loaded.model, pairs, pad)
    sizes, forward = [], log_probs.batch_sums

    def small(model: Any, sequences: Any, pad_token_id: int, *shared: Any) -> torch.Tensor:
        if len(sequences) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(sequences))
        return forward(model, sequences, pad_token_id, *shared)

    monkeypatch.setattr(log_probs, "batch_sums", small)
    found = log_probs.pairs(loaded.model, pairs, pad, recovery=oom.Recovery(tmp_path / EVENTS, console))
    assert sum(sizes) == 24 and len((tmp_path / EVENTS).read_text().splitlines()) <= 4
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), rel=1e-2)
    assert "out of memory (log-probs" in console.export_text()
