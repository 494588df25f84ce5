"""Variants of a stage beside each other: the same start and reference log-probs, names of their own everywhere."""

import argparse
import json
from pathlib import Path

import pytest

from tests.engine.conftest import Stage, run_stage, tiny, weights
from toolkit.compare import candidates
from toolkit.evaluation import scope
from toolkit.export import artefact
from toolkit.report import run_page
from toolkit.run import start

FAST = "dpo.learning_rate=5e-3"  # as the shared DPO run


@pytest.fixture
def beta02(dpo: Stage, runs_with_sft: Path) -> Stage:
    """DPO again from the shared SFT run, beside the shared DPO run, with another beta."""
    (runs_with_sft / "tiny" / "dpo").symlink_to(dpo.run.path)
    return run_stage(tiny(FAST, "dpo.beta=0.2"), "dpo", runs_with_sft, name="beta02")


def test_another_beta_computes_no_reference_log_probs(beta02: Stage) -> None:
    again = run_stage(tiny(FAST, "dpo.beta=0.3", "dpo.max_steps=1"), "dpo", beta02.run.root, name="beta03")
    reference = again.report["reference"]
    assert reference["reused"] == reference["pairs"] == beta02.report["reference"]["pairs"] > 0


def test_another_beta_beside_the_first(dpo: Stage, beta02: Stage) -> None:
    run, recipe = beta02.run, tiny(FAST)
    assert run.path.name == "dpo-beta02" and run.variants() == ["sft", "dpo", "dpo-beta02"]
    assert weights(beta02) != weights(dpo)
    assert beta02.report["answers"]["before"] == "sft" and beta02.report["answers"]["after"] == "dpo-beta02"

    models = candidates.choose(recipe, run.of("compare"), "base,sft,dpo,dpo-beta02")
    assert models["dpo-beta02"] == run.adapter and list(models)[-1] == "dpo-beta02"
    found = candidates.reference(recipe, run.of("compare"), models)
    assert found and found.folder == run.of("sft").adapter

    words = argparse.Namespace(models="dpo,dpo-beta02,base", tasks=None, tasks_path=None, limit=None)
    words.no_chat_template = False
    chosen = scope.choose(recipe, run.of("eval"), words)
    assert chosen.models == ("base", "dpo", "dpo-beta02")
    assert chosen.notes == (
        "dpo-beta02 was trained otherwise than the recipe says now: dpo.beta: 0.2 then, 0.1 now",
    )

    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path)
    artefact.add_options(parser)
    words = parser.parse_args(["--runs", str(run.root), "--stage", "dpo-beta02", "--format", "adapter"])
    wanted = artefact.wanted(recipe, words)
    assert wanted.folder.name == "dpo-beta02-adapter" and wanted.recipe.dpo.beta == 0.2  # type: ignore[union-attr]
    assert "Direct preference optimisation of tiny: beta02" in (run_page.write(run) or Path()).read_text()


def test_what_from_names_is_where_it_starts_and_what_it_is_held_to(dpo: Stage, runs_with_sft: Path) -> None:
    recipe = tiny(FAST, "dpo.max_steps=1", "dpo.warmup_steps=0")
    again = run_stage(recipe, "dpo", runs_with_sft, name="again", from_=str(dpo.run.adapter))
    assert again.report["answers"]["before"] == str(dpo.run.adapter)
    assert start.origin(recipe, again.run) == str(dpo.run.adapter)
    first = json.loads((again.run.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "its reference is what it started from"
    assert again.run.finished_with().trajectory["from"] == str(dpo.run.adapter)  # type: ignore[index, union-attr]
