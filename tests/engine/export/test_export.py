"""Exports load elsewhere and are the trained model; one that is not is caught and does not get its name."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.engine.conftest import Stage, as_written, tiny
from toolkit.engine.export import export, gguf, merge, parity
from toolkit.errors import UserError
from toolkit.export import artefact
from toolkit.records.marks import ExportMark
from toolkit.records.parity import Parity, Tolerance
from toolkit.records.record import plain
from toolkit.run.sealing import MARK

BASE = ROOT / "recipes" / "tiny" / "base"


FEWER = (
    "compare.max_new_tokens=12",
    "compare.prompts=[Which animal does Tavi Merrow keep?, What is Brackenholm known for?]",
)


@pytest.fixture(scope="module")
def runs(sft: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export-runs")
    shutil.copytree(sft.run.path, folder / "tiny" / "sft")
    return folder


def wanted(runs: Path, out: Path, kind: str, **options: Any) -> artefact.Wanted:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path)
    artefact.add_options(parser)
    words = ["--runs", str(runs), "--stage", "sft", "--format", kind, "--out", str(out)]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", *([value] if value is not None else [])]
    return artefact.wanted(tiny(*FEWER), parser.parse_args(words))


@pytest.fixture(scope="module", params=["adapter", "merged_16bit"])
def made(
    request: pytest.FixtureRequest, runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> artefact.Wanted:
    """An export of each kind, checked by a consumer in a process of its own."""
    asked = wanted(runs, tmp_path_factory.mktemp("exports") / request.param, request.param)
    export.run(asked, Console(quiet=True))
    return asked


def test_an_export_is_the_trained_model_where_no_unsloth_is(made: artefact.Wanted) -> None:
    stored = plain(as_written(Parity, made.folder / "parity.json"))
    assert stored["passed"] and stored["equal_greedy_fraction"] >= 0.95
    assert {"max_logprob_diff", "mean_logprob_diff", "tolerance"} <= stored.keys()
    assert ("quantisation" in stored) == (made.format == "merged_16bit")
    assert as_written(ExportMark, made.folder / MARK).verified
    assert made.is_made() and not made.temporary.exists()
    assert {file.suffix for file in made.folder.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    assert len(json.loads((made.folder / "generation_config.json").read_text())["eos_token_id"]) == 2


def test_the_model_card_says_what_is_known_and_its_code_runs(made: artefact.Wanted) -> None:
    card = (made.folder / "README.md").read_text()
    assert "Licence**: unknown" in card and "greedy tokens" in card and "seed 3407" in card
    if made.format == "adapter":
        code = card.partition("```python\n")[2].partition("```")[0]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=made.folder.parent, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.fixture(scope="module")
def answered(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> parity.Answered:
    """The trained model's answers: the same for every export."""
    return export._trained(
        wanted(runs, tmp_path_factory.mktemp("none") / "x", "adapter"), Console(quiet=True)
    )


def swap_layers(folder: Path) -> None:
    file = next(folder.glob("*model.safetensors"))
    weights = load_file(file)
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}

    def swapped(name: str) -> str:
        for mine, theirs in other.items():
            if mine in name:
                return name.replace(mine, theirs)
        return name

    save_file({swapped(name): tensor for name, tensor in weights.items()}, file, {"format": "pt"})


def forget_the_adapter(folder: Path) -> None:
    file = next(folder.glob("*model.safetensors"))
    if file.name == "model.safetensors":
        shutil.copy(BASE / "model.safetensors", file)
    else:
        weights = load_file(file)
        save_file(
            {name: tensor * ("lora_A" in name) for name, tensor in weights.items()}, file, {"format": "pt"}
        )


def another_template(folder: Path) -> None:
    shutil.copy(ROOT / "recipes" / "templates" / "question_answer.jinja", folder / "chat_template.jinja")


def no_end_token(folder: Path) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 1}))


@pytest.mark.parametrize("kind", ["adapter", "merged_16bit"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (swap_layers, "logprob_diff"),
        (forget_the_adapter, "nearly the base model"),
        (another_template, "the chat template or the tokenizer is another one"),
        (no_end_token, "not among its end tokens"),
    ],
)
def test_a_broken_export_is_caught(
    kind: str,
    damage: Callable[[Path], None],
    said: str,
    runs: Path,
    answered: parity.Answered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = {"adapter": "adapter", "merged_16bit": "merged"}[kind]
    right = getattr(export, name)

    def broken(*arguments: Any) -> None:
        right(*arguments)
        damage(asked.temporary)

    monkeypatch.setattr(export, name, broken)
    monkeypatch.setattr(export, "_trained", lambda *_: answered)
    asked = wanted(runs, tmp_path / "out", kind)
    with pytest.raises(UserError, match="not the model that was trained") as error:
        export.run(asked, Console(quiet=True), parity.in_this_process)
    assert said in str(error.value) and export.OF_NF4 not in str(error.value)
    assert not asked.folder.exists() and not asked.temporary.exists() and not (asked.failed / MARK).exists()
    assert json.loads((asked.failed / "parity.json").read_text())["passed"] is False


def test_where_only_nf4s_own_error_is_too_large_the_ways_out_are_named(
    runs: Path, answered: parity.Answered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_trained", lambda *_: answered)
    monkeypatch.setattr(export, "UNQUANTISED", Tolerance(0.0, 0.0, 1.0, "less than NF4 can do"))
    with pytest.raises(UserError, match="against the model as it was trained") as error:
        export.run(
            wanted(runs, tmp_path / "out", "merged_16bit"), Console(quiet=True), parity.in_this_process
        )
    assert "--no-verify exports it anyway" in str(error.value)
    assert "--set model.load_in_4bit=false" in str(error.value)


def test_the_merge_equals_peft_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = runs / "tiny" / "sft" / "adapter"
    merge.merge(BASE, merge.read_lora(folder), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def write_adapter(folder: Path, updates: dict[str, tuple[int, int]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    weights = {}
    for module, (rows, columns) in updates.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, columns)
        weights[f"base_model.model.{module}.lora_B.weight"] = torch.ones(rows, 2)
    save_file(weights, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "bias": "none", "r": 2, "lora_alpha": 8, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    return folder


def test_the_scale_is_alpha_over_r_or_over_its_root(tmp_path: Path) -> None:
    zero = torch.zeros(3, 5)
    for rslora, scale in ((False, 4.0), (True, 8 / 2**0.5)):
        lora = merge.read_lora(write_adapter(tmp_path, {"x": (3, 5)}, use_rslora=rslora))
        assert torch.equal(lora.merged("x.weight", zero), torch.full((3, 5), scale * 2))
        assert lora.merged("y.weight", zero) is zero


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "--set model.base_16bit"),
        ({"tie_word_embeddings": True}, "are one tensor"),
        ({}, "lacks 1 weights that the adapter updates"),
    ],
)
def test_a_base_that_cannot_be_merged_onto(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.norm.weight": torch.ones(2)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    lora = merge.read_lora(write_adapter(tmp_path / "lora", {"lm_head": (3, 5)}))
    with pytest.raises(UserError, match=said):
        merge.check_base(base, "owner/name", lora)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_only_plain_lora_is_merged(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only plain LoRA is merged"):
        merge.read_lora(write_adapter(tmp_path, {"x": (3, 5)}, **config))


MERGE_IN_A_PROCESS = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
import importlib.machinery, types
package = types.ModuleType("toolkit.engine"); package.__path__ = [{root!r} + "/toolkit/engine"]
import toolkit; sys.modules["toolkit.engine"] = package  # without unsloth: its gigabyte would hide the merge's
from toolkit.engine.export import merge
base, lora, out = map(Path, sys.argv[1:])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
read = merge.read_lora(lora); before = peak()
merge.merge(base, read, out)
print(peak() - before)
"""


@pytest.mark.campaign
def test_a_merge_holds_one_shard_in_memory(tmp_path: Path) -> None:
    """Eight shards of 32 MiB; twice a shard is allowed for (mapped pages of the file being read count too)."""
    base, out, names = tmp_path / "base", tmp_path / "out", {}
    base.mkdir(), out.mkdir()
    for shard in range(8):
        file = f"model-{shard + 1:05}-of-00008.safetensors"
        tensors = {
            f"layers.{shard}.{part}.weight": torch.ones(1024, 4096, dtype=torch.bfloat16) for part in range(4)
        }
        save_file(tensors, base / file)
        names |= dict.fromkeys(tensors, file)
    (base / merge.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    lora = write_adapter(tmp_path / "lora", {name.removesuffix(".weight"): (1024, 4096) for name in names})
    command = [
        sys.executable,
        "-c",
        MERGE_IN_A_PROCESS.format(root=str(ROOT)),
        str(base),
        str(lora),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 2 * 32 + 3 * 16 + 32, (
        f"{done.stdout} MiB for shards of 32 MiB"
    )
    assert {file.name for file in out.iterdir()} == {*names.values(), merge.INDEX}


def test_an_export_that_is_there_is_not_made_again_and_never_replaced_by_another(
    runs: Path, tmp_path: Path
) -> None:
    asked = wanted(runs, tmp_path / "one", "adapter")
    asked.temporary.mkdir()
    asked.keep(verified=True)
    assert asked.is_made()
    with pytest.raises(UserError, match="holds another export"):
        wanted(runs, tmp_path / "one", "merged_16bit")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no export"):
        wanted(runs, tmp_path / "mine", "adapter")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("adapter", {"quant": "q4_k_m"}, "goes with --format gguf"),
        ("gguf", {"quant": "q4_km"}, "no such quantisation; one of f16, bf16, q8_0"),
        ("gguf", {"llama_cpp": "/nowhere"}, "there is no such folder"),
        ("adapter", {"push": "me"}, "a repository is USER/REPO"),
    ],
)
def test_wrong_options_are_said_before_anything_is_loaded(
    kind: str, options: dict[str, str], said: str, runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        wanted(runs, tmp_path / "out", kind, **options)


CONVERTER = """
import sys
from pathlib import Path
model = Path(sys.argv[1])
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in model.iterdir()}
Path(options["--outfile"]).write_text(options["--outtype"])
"""


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder with a stand-in for llama.cpp's converter, which tells what it was given."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / gguf.CONVERTER).write_text(CONVERTER)
    return folder


@pytest.mark.parametrize("kind", ["gguf", "ollama"])
def test_the_llama_cpp_that_is_named_converts_the_merged_model(
    kind: str, llama_cpp: Path, runs: Path, tmp_path: Path
) -> None:
    asked = wanted(runs, tmp_path / "out", kind, quant="f16", llama_cpp=str(llama_cpp), no_verify=None)
    export.run(asked, Console(quiet=True))
    assert (asked.folder / "tiny-sft-f16.gguf").read_text() == "f16"
    files = {"tiny-sft-f16.gguf", "README.md", MARK, *(["Modelfile"] if kind == "ollama" else [])}
    assert {file.name for file in asked.folder.iterdir()} == files, "the merged weights are gone again"


def test_what_the_converter_refuses_is_said_in_its_words(llama_cpp: Path, runs: Path, tmp_path: Path) -> None:
    (llama_cpp / gguf.CONVERTER).write_text("raise SystemExit('BPE pre-tokenizer was not recognized')")
    asked = wanted(runs, tmp_path / "out", "gguf", quant="f16", llama_cpp=str(llama_cpp), no_verify=None)
    with pytest.raises(
        UserError, match=r"convert_hf_to_gguf.py failed: BPE pre-tokenizer was not recognized"
    ):
        export.run(asked, Console(quiet=True))
    assert not asked.folder.exists() and not asked.temporary.exists()


def test_without_llama_cpp_it_is_said_how_to_get_it_before_anything_is_made(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in artefact.LLAMA_CPP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"git clone .*llama\.cpp.*--llama-cpp"):
        export.run(wanted(runs, tmp_path / "out", "gguf", no_verify=None), Console(quiet=True))
    (tmp_path / "empty").mkdir()
    asked = wanted(runs, tmp_path / "out", "gguf", llama_cpp=str(tmp_path / "empty"), no_verify=None)
    with pytest.raises(UserError, match=r"empty has no convert_hf_to_gguf\.py"):
        export.run(asked, Console(quiet=True))


def test_a_pickle_beside_the_adapter_is_refused(sft: Stage, tmp_path: Path) -> None:
    shutil.copytree(sft.run.path, tmp_path / "tiny" / "sft")
    (tmp_path / "tiny" / "sft" / "adapter" / "extra.bin").touch()
    with pytest.raises(UserError, match=r"extra\.bin: such files can run code"):
        export.run(wanted(tmp_path, tmp_path / "out", "adapter"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_only_files_that_an_export_names_are_copied(runs: Path, tmp_path: Path) -> None:
    made = wanted(runs, tmp_path / "x", "adapter")
    made.temporary.mkdir(parents=True)
    note = made.run.adapter / "notes.txt"
    note.write_text("of mine")
    try:
        export.adapter(made, made.temporary)
        assert "notes.txt" not in {file.name for file in made.temporary.iterdir()}
        note.unlink()
        note.symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match="holds links"):
            export.run(made, Console(quiet=True))
    finally:
        note.unlink()


def test_weights_of_32_bits_are_merged_into_16(runs: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    wide = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(wide, base / "model.safetensors", {"format": "pt"})
    made = wanted(runs, tmp_path / "x", "merged_16bit")
    export.merged(made, base, made.temporary, Console(quiet=True))
    assert {tensor.dtype for tensor in load_file(made.temporary / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_near_tie_that_falls_the_other_way_counts_for_little() -> None:
    def told(greedy: list[int]) -> dict[str, Any]:
        return {"greedy": greedy, "log_probs": [[-0.7, -0.7001, -9.0], [-0.001, -7.0, -9.0]]}

    measured = parity.difference({"sequences": [told([1, 5])]}, [told([0, 5])])
    assert measured.equal_greedy_fraction == 0.5 and measured.weighed_equal_fraction > 0.99
    assert not parity.problems(measured, export.SAME, "it")
    clear = parity.difference({"sequences": [told([0, 4])]}, [told([0, 5])])
    assert parity.problems(clear, export.SAME, "it")
