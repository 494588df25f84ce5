"""From a finished adapter to files that other programs load, checked to be the same model."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoTokenizer

from toolkit import hardware
from toolkit.console.screen import bar
from toolkit.data.template import ChatTemplate
from toolkit.engine.base import hub, model
from toolkit.engine.export import gguf, merge, parity, quantised, score_parity
from toolkit.errors import UserError
from toolkit.export import model_card, modelfile
from toolkit.export.artefact import PARITY, PROMPTING, QUANTISED, RUNS_CODE, Wanted
from toolkit.files import write_json, write_text
from toolkit.recipe import stages
from toolkit.records.parity import Parity, Quantisation, ScoreParity, Tolerance
from toolkit.run.runlog import LOG
from toolkit.run.sealing import MARK, damage

# What an export may differ by, in nats. Measured on the tiny recipe after DPO, on a CPU, beside each (maximum, mean;
# all greedy tokens were equal); larger models, and GPUs, whose kernels round differently, were not measured.
SAME = Tolerance(0.75, 0.06, 0.95, "bf16 activations rounded in another order; measured 0.12 and 0.016")
MERGED = {
    "float32": Tolerance(0.1, 0.01, 0.98, "merged weights rounded once to bf16; measured 0.016 and 0.0026"),
    "bfloat16": Tolerance(0.75, 0.06, 0.95, "bf16 weights and activations; measured 0.16 and 0.022"),
}
# 16-bit instead of NF4 weights under the adapter: what quantising the base changes.
OF_NF4 = (
    "the merge itself is right, and NF4's own error under the adapter is large: --no-verify exports it anyway, a run "
    "with --set model.load_in_4bit=false has no such error"
)
UNQUANTISED = Tolerance(4.0, 0.5, 0.8, "the base's NF4 error; measured 1.19 and 0.14")


def run(
    wanted: Wanted, console: Console, ask: parity.Ask = parity.in_fresh_process
) -> Parity | ScoreParity | None:
    """Makes one export and checks it. Returns what parity.json holds, or None where it was not to be checked.

    Raises UserError for whatever the user can fix, and when the export is not the trained model: it then stands as
    `<name>.failed` and nothing bears the name of a whole one.
    """
    wanted.run.check_adapter()
    _refuse_code(wanted.run.adapter)
    tools = gguf.tools(wanted) if wanted.format in ("gguf", "ollama") else None
    if wanted.format in QUANTISED:
        quantised.check(wanted)
    with wanted.building():
        LOG.open(wanted.log, console)
        if wanted.folder.exists() and (problem := damage(wanted.folder, MARK)):
            console.print(
                f"[yellow]{escape(str(wanted.folder))} is not as it was made ({escape(problem)}): it is made again[/]"
            )
        if wanted.format == "ollama":  # first: a template that cannot be said costs no download then
            write_text(wanted.temporary / "Modelfile", _modelfile(wanted))
        base = None
        if wanted.format != "adapter":
            base, lora = _base(wanted, console), merge.read_lora(wanted.run.adapter)
            merge.check_base(base, wanted.recipe.model.base_16bit or wanted.recipe.model.path, lora)
            # GGUF: the merged weights, their 16-bit GGUF, and the quantised one, for a while
            copies = 3 if tools else 2 if wanted.format in QUANTISED else 1
            merge.check_room(base, wanted.temporary, lora, copies)
        answered = _trained(wanted, console) if wanted.verify and wanted.answers else None
        scored = score_parity.trained(wanted) if wanted.verify and not wanted.answers else None
        file = None
        if base is None:
            adapter(wanted, wanted.temporary)
        elif wanted.format in QUANTISED:
            quantise(wanted, base, wanted.temporary, console)
        elif tools is None:
            merged(wanted, base, wanted.temporary, console)
        else:
            file = _gguf(wanted, base, tools, console)
        measured: Parity | ScoreParity | None = None
        if scored:
            console.print(
                f"[dim]checking: {_consumer(wanted)} scores {len(scored.conversations)} conversations[/]"
            )
            measured = score_parity.verify(wanted, base, scored, _dtype(base) if base else scored.dtype, ask)
        if answered:
            console.print(f"[dim]checking: {_consumer(wanted)} answers the recipe's prompts[/]")
            measured = _verify(wanted, base, file, answered, ask)
        licence = model_card.licence_of(base or _cached(wanted))
        notes: list[str] = []
        card = model_card.write(
            wanted, licence, measured, file.name if file else None, notes, _data_licences(wanted)
        )
        for note in notes:
            console.print(note, style="yellow", markup=False)
        write_text(wanted.temporary / "README.md", card)
        wanted.keep(verified=measured is not None)
    say(wanted, measured, console)
    return measured


def adapter(wanted: Wanted, target: Path) -> None:
    """The PEFT files, the base named as another machine can find it, and what is needed to prompt and to stop."""
    source = wanted.run.adapter
    _copy_prompting(source, target)
    shutil.copy(source / "adapter_model.safetensors", target)
    (target / "adapter_model.safetensors").chmod(0o644)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    recipe = wanted.recipe
    config["base_model_name_or_path"] = recipe.locate(recipe.model.path)
    config["revision"] = recipe.model.revision
    write_json(target / "adapter_config.json", config)


def merged(wanted: Wanted, base: Path, target: Path, console: Console) -> None:
    """A whole 16-bit model: weights of the base and the adapter together, and what is needed to prompt and to stop."""
    target.mkdir(parents=True, exist_ok=True)
    lora = merge.read_lora(wanted.run.adapter)
    names = merge.shards(base).values()
    with bar(console, "merging", sum(map(len, names))) as advance:
        done = merge.merge(base, lora, target, advance)
    config = _in_16_bits(json.loads((base / "config.json").read_text(encoding="utf-8")))
    config["pad_token_id"] = _pad_token_id(wanted.run.adapter)
    if not wanted.answers:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one score
        config["architectures"] = [
            f"{name.removesuffix('ForCausalLM')}ForSequenceClassification" for name in config["architectures"]
        ]
    write_json(target / "config.json", config)
    _copy_prompting(wanted.run.adapter, target)
    console.print(
        f"[dim]{done['num_merged']} of {done['num_tensors']} tensors merged in {', '.join(done['dtypes'])}[/]"
    )


def _pad_token_id(folder: Path) -> int:
    pad: int = AutoTokenizer.from_pretrained(folder).pad_token_id
    return pad


def _in_16_bits(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config beside weights of 16 bits."""
    is_wide = {"torch_dtype", "dtype"} & {key for key in config if config[key] == "float32"}
    return config | dict.fromkeys(is_wide, "bfloat16")


def _gguf(wanted: Wanted, base: Path, tools: gguf.Tools, console: Console) -> Path:
    between = wanted.temporary / ".merged"
    merged(wanted, base, between, console)
    file = gguf.make(wanted, between, tools, console)
    shutil.rmtree(between)
    return file


def quantise(wanted: Wanted, base: Path, target: Path, console: Console) -> None:
    """A whole model in 4 or 8 bits, for servers."""
    between = target / ".merged"
    merged(wanted, base, between, console)
    quantised.make(wanted, between, target, console)
    shutil.rmtree(between)


def _modelfile(wanted: Wanted) -> str:
    """Ollama's Modelfile. Raises UserError when the chat template cannot be said in it."""
    source = wanted.run.adapter
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    bos, eos = tokenizer.get("bos_token"), tokenizer["eos_token"]
    template = ChatTemplate((source / "chat_template.jinja").read_text(encoding="utf-8"), bos, eos)
    ends = [wanted.recipe.template.end_of_turn, eos]
    return modelfile.write(template, modelfile.adds_bos(source), gguf.target(wanted).name, ends)


def say(wanted: Wanted, measured: Parity | ScoreParity | None, console: Console) -> None:
    """The last lines: what was measured, and where the export is."""
    if isinstance(measured, ScoreParity):
        console.print(
            f"  against {measured.against}: scores differ by {measured.mean_score_diff:.4f} in the mean and "
            f"{measured.max_score_diff:.4f} at most, of their spread; {measured.equal_order_fraction:.1%} ordered alike"
        )
    elif measured:
        for against, figures in (
            (measured.against, measured),
            ("the model as it was trained", measured.quantisation),
        ):
            if figures:
                console.print(
                    f"  against {against}: next-token log-probs differ by "
                    f"{figures.mean_logprob_diff:.4f} in the mean, {figures.max_logprob_diff:.4f} at most; "
                    f"{figures.equal_greedy_fraction:.1%} of greedy tokens equal"
                )
        if measured.quantisation and wanted.recipe.model.load_in_4bit:
            too = ", and these bits after it," if wanted.format in QUANTISED or wanted.quant else ""
            console.print(
                f"  [dim]the second line is what 16-bit weights under an adapter trained on NF4{too} change[/]"
            )
    if wanted.format == "adapter" and model_card.is_local(wanted.recipe):
        console.print(
            f"[yellow]the base {escape(wanted.recipe.model.path)} is a folder of this machine: elsewhere the adapter "
            "finds it only under the same path[/]"
        )
    checked = "checked" if measured else "[yellow]not checked[/]"
    console.print(f"[bold green]exported[/] and {checked}: {escape(str(wanted.folder))}")


def _trained(wanted: Wanted, console: Console) -> parity.Answered:
    """The trained model's answers; the model itself is let go again."""
    recipe = wanted.recipe
    console.print(f"[dim]loading {escape(recipe.model.path)} with the {wanted.name} adapter[/]")
    loaded = model.load_trained(recipe, {wanted.name: wanted.run.adapter})
    answered = parity.answer(loaded, wanted)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answered


def _verify(
    wanted: Wanted, base: Path | None, file: Path | None, answered: parity.Answered, ask: parity.Ask
) -> Parity:
    """Compares, writes parity.json, and sets the export aside when it is not the trained model."""
    recipe, path = wanted.recipe, str(wanted.temporary)
    common = {"trust_remote_code": recipe.model.trust_remote_code, "quantise": False, "dtype": answered.dtype}
    if base is None:
        got = ask(
            [common | {"kind": "adapter", "path": path, "quantise": recipe.model.load_in_4bit}], answered
        )[0]
        against, tolerance = "the model as it was trained", SAME
        measured = parity.difference(got, answered.sequences)
    else:
        common["dtype"] = dtype = _dtype(base)
        unmerged = {"kind": "unmerged", "path": str(wanted.run.adapter), "base": str(base), "revision": None}
        made = {"kind": "gguf", "path": str(file)} if file else {"kind": "merged", "path": path}
        got, reference = ask([common | made, common | unmerged], answered)
        against = "the 16-bit base with the adapter beside it"
        tolerance = _tolerance(wanted, dtype)
        measured = parity.difference(got, reference["sequences"])
    # coarse weights may differ by more than light training does; the 16-bit ones they are made of may not
    is_coarse = wanted.format in QUANTISED or wanted.quant not in (None, *gguf.WHOLE)
    effect = None if is_coarse else answered.effect
    problems = parity.problems(measured, tolerance, against, effect)
    template = (wanted.run.adapter / "chat_template.jinja").read_text(encoding="utf-8")
    problems += parity.behaviour(got, answered, dated="strftime_now" in template)
    quantisation, fixes = None, []
    if base is not None:
        unquantised = parity.difference(got, answered.sequences)
        loose = UNQUANTISED if tolerance is MERGED[dtype] else gguf.with_nf4(tolerance)
        of_nf4 = parity.problems(unquantised, loose, "the model as it was trained")
        if of_nf4 and not problems and recipe.model.load_in_4bit:
            fixes.append(OF_NF4)
        problems += of_nf4
        quantisation = Quantisation(**vars(unquantised), tolerance=loose)
    result = Parity(
        **vars(measured),
        against=against,
        tolerance=tolerance,
        dtype=str(common["dtype"]),
        training_effect=answered.effect,
        num_prompts=len(answered.sequences),
        num_positions=sum(len(sequence["answer_ids"]) for sequence in answered.sequences),
        problems=problems,
        passed=not problems,
        quantisation=quantisation,
    )
    result.write(wanted.temporary / PARITY)
    if problems:
        wanted.reject(problems, *fixes)
    return result


def _tolerance(wanted: Wanted, dtype: str) -> Tolerance:
    """What whole weights may differ by from the 16-bit base with the adapter beside it."""
    if wanted.format in QUANTISED:
        return quantised.TOLERANCES[wanted.format]
    return gguf.TOLERANCES[wanted.quant] if wanted.quant else MERGED[dtype]


def _dtype(base: Path) -> str:
    """fp32 where twice the 16-bit weights fit into memory: the arithmetic of a merge then shows without the noise of
    bf16 activations, which is ten times as large."""
    needed = 2 * sum((base / file).stat().st_size for file in merge.shards(base)) / hardware.GIB
    machine = hardware.here()
    free = machine.gpu.free_gib if machine.gpu else machine.ram_available_gib
    return "float32" if 1.2 * needed + 2 < free else "bfloat16"


def _consumer(wanted: Wanted) -> str:
    if wanted.format in QUANTISED:
        return "plain transformers + compressed-tensors"
    return {"adapter": "plain transformers + PEFT", "merged_16bit": "plain transformers"}.get(
        wanted.format, "llama.cpp"
    )


def _base(wanted: Wanted, console: Console) -> Path:
    """The folder of the 16-bit base, fetched where it is a Hub id."""
    path = wanted.base_16bit
    if Path(path).is_dir():
        return Path(path)
    console.print(f"[dim]fetching the 16-bit weights of {escape(path)}[/]")
    return hub.fetch_weights(path, wanted.recipe.model.revision if path == wanted.recipe.model.path else None)


def _cached(wanted: Wanted) -> Path:
    """Where the base's own card is, as far as it is on this machine."""
    path = wanted.recipe.locate(wanted.recipe.model.path)
    return Path(path) if Path(path).is_dir() else hub.cached_folder(path, wanted.recipe.model.revision)


def _data_licences(wanted: Wanted) -> dict[str, str]:
    """What the cards of the training sets name, as far as they are on this machine, by the path of the set."""
    recipe, found = wanted.recipe, {}
    for stage in stages.lineage(wanted.name):
        for source in recipe.section(stage.name).datasets if stage in recipe.stages() else ():
            path = Path(recipe.locate(source.path))
            folder = path if path.is_dir() else hub.cached_folder(source.path, source.revision, "dataset")
            if licence := model_card.licence_of(path.parent if path.is_file() else folder):
                found[source.path] = licence
    return found


def _refuse_code(folder: Path) -> None:
    if links := sorted(file.name for file in folder.iterdir() if file.is_symlink()):
        raise UserError(
            f"{folder} holds links ({', '.join(links)}): what they point to is not the adapter; take them away"
        )
    if unsafe := sorted(file.name for file in folder.iterdir() if file.suffix in RUNS_CODE):
        raise UserError(
            f"{folder} holds {', '.join(unsafe)}: such files can run code when they are loaded, and none is exported; "
            "take them away"
        )


def _copy_prompting(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation config: what is needed to ask the model and to know when it has ended."""
    for name in PROMPTING:
        if (source / name).is_file():
            shutil.copy(source / name, target)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows as well
    for key in ("is_local", "local_files_only", "backend"):  # of the machine that trained
        config.pop(key, None)
    write_json(target / "tokenizer_config.json", config)
