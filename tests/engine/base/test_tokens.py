"""A template of tokens that the model was never trained on stops the run before anything is trained."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.conftest import ROOT
from tests.engine.conftest import run_stage, tiny
from toolkit.engine.base import tokens
from toolkit.errors import UserError
from toolkit.run.rundir import RunDir

BASE = ROOT / "recipes" / "tiny" / "base"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = Tokenizer.from_file(str(BASE / "tokenizer.json"))
HEADER, END = (TOKENS.token_to_id(token) for token in ("<|start_header_id|>", "<|eot_id|>"))
RESERVED = slice(TOKENS.get_vocab_size(), TOKENS.get_vocab_size() + 5)  # rows that no token has


def variant(folder: Path, **rows: float | int) -> str:
    """The tiny base with another embedding row of <|start_header_id|>, or head rows equal to that of <|eot_id|>."""
    shutil.copytree(BASE, folder)
    weights = load_file(folder / "model.safetensors")
    if "scaled" in rows:
        weights[EMBEDDING][HEADER] *= rows["scaled"]
    if "repeated" in rows:
        weights[HEAD][RESERVED] = weights[HEAD][END]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return f"model.path={folder}"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"scaled": 0.0}, r"input embeddings of <\|start_header_id\|> are zero"),
        ({"repeated": 1}, r"output rows of <\|eot_id\|> \(with 5 others\) repeat"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_tokens_that_the_model_does_not_know_stop_the_run(
    stage: str, rows: dict[str, float], said: str, tmp_path: Path
) -> None:
    overrides = (variant(tmp_path / "base", **rows), *(["sft=null"] if stage == "dpo" else []))
    with pytest.raises(UserError, match=said) as error:
        run_stage(tiny(*overrides), stage, tmp_path)
    assert "--set template.file=templates/chatml_text.jinja" in str(error.value)
    run = RunDir(tmp_path, "tiny", stage)
    assert run.read_manifest().outcome == "failed" and not run.adapter.exists()


def test_a_template_in_ordinary_text_is_the_way_out(tmp_path: Path) -> None:
    """Both rows broken: the same run goes through with ChatML in ordinary text and the tokenizer's own end token."""
    done = run_stage(
        tiny(
            variant(tmp_path / "base", scaled=0.0, repeated=1),
            "template.file=templates/chatml_text.jinja",
            "template.end_of_turn=<|end_of_text|>",
            "sft.max_rows=32",
        ),
        "sft",
        tmp_path,
    )
    assert done.report["loss_last"] < done.report["loss_first"]


def test_a_short_row_is_said_and_goes_on(tmp_path: Path) -> None:
    done = run_stage(tiny(variant(tmp_path / "base", scaled=0.2), "sft.max_rows=16"), "sft", tmp_path)
    [note] = done.report["notes"]
    assert "nearly untrained input embeddings" in note and "<|start_header_id|> 0.2" in note


def test_equal_rows_are_counted_in_whatever_piece_of_the_head_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        """Two matrices are all that is asked of it."""

        def __init__(self, weight: torch.Tensor):
            self.layer = torch.nn.Linear(*weight.T.shape, bias=False)
            self.layer.weight.data = weight

        def get_input_embeddings(self) -> torch.nn.Linear:
            return self.layer

        get_output_embeddings = get_input_embeddings

    class Numbers:
        def convert_tokens_to_ids(self, names: list[str]) -> list[int]:
            return [int(name) for name in names]

    monkeypatch.setattr(tokens, "ROWS_AT_ONCE", 7)
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    weight[[3, 20, 49]] = weight[11].clone()
    counts = [row.num_equal for row in tokens.rows_of(Model(weight), Numbers(), ["11", "12", "49"])]
    assert counts == [3, 0, 3]
