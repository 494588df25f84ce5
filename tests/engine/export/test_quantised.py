"""Exports for servers: what they are calibrated on, what is kept, and that a damaged one is caught.

What runs llm-compressor skips where it is not installed.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.conftest import HAS_GPU
from tests.engine.conftest import Stage, as_written, tiny
from tests.engine.export.test_export import FEWER
from toolkit.engine.data.examples import load_tokenizer
from toolkit.engine.export import export, quantised
from toolkit.errors import UserError
from toolkit.export.artefact import Format, Wanted
from toolkit.records.parity import Parity

MISSING = [name for name in quantised.PACKAGES if find_spec(name) is None]
needs_llm_compressor = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)}: make optional"
)


def wanted(sft: Stage, kind: Format, out: Path) -> Wanted:
    return Wanted(tiny(*FEWER), sft.run, kind, None, out, True, None)


@pytest.mark.parametrize(
    ("widths", "size"), [({4096, 14336}, 128), ({192, 384}, 64), ({128, 96}, 32), ({2048}, 128)]
)
def test_a_group_is_the_largest_that_divides_every_layer(widths: set[int], size: int) -> None:
    assert quantised.group_size(widths) == size


def test_layers_that_no_group_divides_are_refused_with_what_can_be_taken() -> None:
    with pytest.raises(UserError, match=r"have 100, 4096 inputs.*--format fp8 or w8a8"):
        quantised.group_size({100, 4096})


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
def test_awq_is_refused_on_a_cpu_before_anything_is_loaded(sft: Stage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--format awq needs a GPU.*take gptq"):
        export.run(wanted(sft, "awq", tmp_path / "out"), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_said_with_the_command(
    sft: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "PACKAGES", ("no_such_package",))
    with pytest.raises(
        UserError, match=r"needs no_such_package: `make optional`.*requirements-quantise\.txt"
    ):
        export.run(wanted(sft, "gptq", tmp_path / "out"), Console(quiet=True))


def test_it_is_calibrated_on_whole_rows_of_the_recipe_through_its_template(
    sft: Stage, tmp_path: Path
) -> None:
    rows = quantised.calibration(wanted(sft, "gptq", tmp_path))
    assert len(rows) == 64, "the rows of this SFT, at most CALIBRATION_ROWS of them"
    texts = load_tokenizer(sft.recipe).tokenizer.batch_decode(rows)
    assert all(text.startswith("<|begin_of_text|><|start_header_id|>") for text in texts)
    assert all(
        text.count("<|begin_of_text|>") == 1 and text.rstrip().endswith("<|eot_id|>") for text in texts
    )


@needs_llm_compressor
@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("gptq", marks=pytest.mark.campaign),
        "fp8",
        pytest.param("w8a8", marks=pytest.mark.campaign),
    ],
)
def test_a_quantised_export_is_the_trained_model_to_its_consumer(
    kind: Any, sft: Stage, tmp_path: Path
) -> None:
    asked = wanted(sft, kind, tmp_path / "out")
    measured = export.run(asked, Console(quiet=True))
    stored = as_written(Parity, asked.folder / "parity.json")
    assert isinstance(measured, Parity) and stored.passed and asked.is_made()
    config = json.loads((asked.folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    tensors = load_file(asked.folder / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    assert not (asked.folder / ".merged").exists()
    adapter = sft.run.adapter
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (asked.folder / name).read_bytes() == (adapter / name).read_bytes(), name
    assert "vllm serve" in (asked.folder / "README.md").read_text()


@needs_llm_compressor
@pytest.mark.long
def test_a_damaged_one_does_not_get_its_name(
    sft: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = quantised.make

    def swapped(wanted: Wanted, merged: Path, target: Path, console: Console) -> None:
        make(wanted, merged, target, console)
        file = target / "model.safetensors"
        tensors = load_file(file)
        other = {
            name.replace(".0.", ".9.").replace(".1.", ".0.").replace(".9.", ".1."): name for name in tensors
        }
        save_file({name: tensors[other[name]] for name in tensors}, file, {"format": "pt"})

    monkeypatch.setattr(quantised, "make", swapped)
    asked = wanted(sft, "fp8", tmp_path / "out")
    with pytest.raises(UserError, match="not the model that was trained"):
        export.run(asked, Console(quiet=True))
    assert (
        not asked.folder.exists()
        and json.loads((asked.failed / "parity.json").read_text())["passed"] is False
    )
    shutil.rmtree(asked.failed)
