"""DPO with shared prompts on the real path: right, or the run stops before it trains on something else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.engine.conftest import Stage, held_out_pairs, run_stage, tiny
from toolkit.engine.base import model
from toolkit.engine.inference import log_probs
from toolkit.engine.shared_prompt import attention, check
from toolkit.engine.shared_prompt.hooks import installed
from toolkit.errors import UserError
from toolkit.run.rundir import RunDir

ONE_STEP = ("dpo.max_steps=1", "dpo.eval_datasets=[]")


def leaking(q: Any, k: Any, v: Any, tree: Any, scale: Any = None) -> torch.Tensor:
    """The rejected reply sees the chosen one."""
    sees = torch.ones(tree.T, tree.T, dtype=torch.bool).tril()
    return scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)


def test_the_report_says_how_near_they_are_and_that_every_layer_had_them(dpo: Stage) -> None:
    found = dpo.report["shared_prompts"]
    assert found["kernel"] == "segments" and found["pairs"] == 16
    assert found["attention_calls"] == found["expected_calls"] > 0
    assert f"log-probs of 16 pairs differ from padded ones by {found['median']:.1e} nats" in dpo.shown


def test_a_wrong_mask_stops_the_run(runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "segments", leaking)
    with pytest.raises(
        UserError, match=r"are not those of padded pairs: they differ by .*share_prompts=false"
    ):
        run_stage(tiny(*ONE_STEP), "dpo", runs_with_sft)
    assert not RunDir(runs_with_sft, "tiny", "dpo").adapter.exists()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_pairs_of_one_length_give_no_noise_to_go_by(
    is_wrong: bool, runs_with_sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"prompt": "Where does Ada live?", "chosen": "In the north.", "rejected": "In a town by the sea."}
    rows = tmp_path / "alike.jsonl"
    rows.write_text(
        "".join(json.dumps(pair | {"prompt": f"{n}: {pair['prompt']}"}) + "\n" for n in range(10, 34))
    )
    recipe = tiny(*ONE_STEP, f"dpo.datasets=[{{path: {rows}}}]")
    if not is_wrong:
        assert run_stage(recipe, "dpo", runs_with_sft).report["shared_prompts"]["worst_noise"] < 0.05
        return
    monkeypatch.setattr(attention, "segments", leaking)
    with pytest.raises(UserError, match="are not those of padded pairs"):
        run_stage(recipe, "dpo", runs_with_sft)


def test_a_layer_that_loses_the_tree_stops_the_run(
    runs_with_sft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(attend: Any) -> Any:
        counted = count(attend)

        def some(q: Any, k: Any, v: Any, tree: Any, scale: Any) -> torch.Tensor:
            calls.append(1)
            return (counted if len(calls) % 4 else attend)(q, k, v, tree, scale)

        return some

    calls, count = list[int](), attention.counted
    monkeypatch.setattr(attention, "counted", forgetful)
    with pytest.raises(UserError, match="of 4 attention calls of the first step 3 were over shared prompts"):
        run_stage(tiny(*ONE_STEP), "dpo", runs_with_sft)


@pytest.mark.long
def test_padded_training_is_the_same_training(dpo: Stage, runs_with_sft: Path) -> None:
    values = ("dpo.learning_rate=5e-3", "dpo.share_prompts=false")
    padded = run_stage(tiny(*values), "dpo", runs_with_sft).report
    assert padded["shared_prompts"] is None
    assert padded["loss_last"] == pytest.approx(dpo.report["loss_last"], abs=0.02)
    assert padded["eval"]["loss"] == pytest.approx(dpo.report["eval"]["loss"], abs=0.02)


def test_evaluation_shares_them_too_unless_they_come_out_otherwise(
    sft: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    loaded = model.load_trained(sft.recipe, {"sft": sft.run.adapter})
    pairs, pad = held_out_pairs(sft.recipe, loaded)[:20], loaded.tokenizer.pad_token_id
    padded = log_probs.pairs(loaded.model, pairs, pad)
    monkeypatch.setattr(attention, "segments", leaking)
    log_probs.share_prompts(loaded.model, pairs, pad, Console())
    assert installed(loaded.model) is None and "prompts of pairs are run twice" in capsys.readouterr().out
    monkeypatch.undo()
    log_probs.share_prompts(loaded.model, pairs, pad, Console())
    sharing = installed(loaded.model)
    assert sharing is not None
    before = sharing.uses.passes
    for one, other in zip(log_probs.pairs(loaded.model, pairs, pad), padded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=max(check.LEAST_HALF))
    assert sharing.uses.passes > before


def test_the_check_takes_long_prompts_and_all_lengths() -> None:
    lengths = [(n % 7 + 1, n + 1, 3) for n in range(100)]
    rows = check.choose(lengths)
    assert len(set(rows)) == 16 and {0, 99} & set(rows)
    assert [lengths[row][0] for row in rows[:4]] == [7, 7, 7, 7]
    assert check.choose(lengths[:2]) == [1, 0] and check.choose(lengths[:1]) == [0]
