"""README.md of an export: what the model is, what it was made from, what was measured, and code that loads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from toolkit.export.artefact import QUANTISED, Wanted
from toolkit.recipe import stages
from toolkit.recipe.schema import Recipe, Source
from toolkit.records.evaluation_report import Evaluation, Measure
from toolkit.records.parity import Parity, ScoreParity
from toolkit.records.run_report import RunReport
from toolkit.redaction import blanked
from toolkit.report.run_record import is_of_other_weights, written
from toolkit.run import start

UNKNOWN_LICENCE = "unknown: the card of the base was not at hand. Look there before you share this"
LOAD = {
    "adapter": """\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained({arguments})
model.generation_config = GenerationConfig.from_pretrained(folder)  # its end tokens; PEFT takes the base's
""",
    "merged_16bit": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")
""",
}
LOAD |= dict.fromkeys(QUANTISED, LOAD["merged_16bit"])  # with compressed-tensors beside transformers
ASK = """\
inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": {prompt}}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
).to(model.device)
output = model.generate(**inputs, max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
SCORE = """\
model.config.pad_token_id = tokenizer.pad_token_id
ids = tokenizer.apply_chat_template(
    [{{"role": "user", "content": {prompt}}}, {{"role": "assistant", "content": "An answer."}}],
    return_tensors="pt", return_dict=True,
).to(model.device)
print(model(**ids).logits.item())  # larger for the better answer to the same question
"""
LLAMA_CPP = """\
from llama_cpp import Llama

llama = Llama("{file}", n_ctx={max_length})
print(llama.create_chat_completion([{{"role": "user", "content": {prompt}}}])["choices"][0]["message"]["content"])
"""


def write(
    wanted: Wanted,
    licence: str | None,
    parity: Parity | ScoreParity | None,
    gguf: str | None = None,
    notes: list[str] | None = None,
    data_licences: Mapping[str, str] | None = None,
) -> str:
    """The whole file, secrets blanked: `push` refuses such a card.

    `licence` is what the base's own card says of it, None where that could not be read; `data_licences` what the cards
    of sets say, by the path of the set. `notes` is given a line for each report that another version of the toolkit
    wrote, or that is not of this adapter.
    """
    recipe, stage = wanted.recipe, wanted.run.stage
    local = is_local(recipe)
    front = ["---"] if local else ["---", f"base_model: {recipe.model.path}"]
    if licence:
        front.append(f"license: {licence}")
    if wanted.format in LOAD:
        front += [f"library_name: {'peft' if wanted.format == 'adapter' else 'transformers'}"]
    front += [
        f"pipeline_tag: {'text-generation' if wanted.answers else 'text-classification'}",
        f"tags: [trl, unsloth, {stage}, lora]",
        "---",
        "",
    ]
    trained = start.lineage(recipe, wanted.run)
    lines = [
        f"# {recipe.name}: {wanted.name}, {_format(wanted)}",
        "",
        recipe.description + ".",
        "",
        f"- **Base**: {_name(recipe, recipe.model.path)}{' (a folder, not on the Hub)' if local else ''}"
        + (f" at {recipe.model.revision}" if recipe.model.revision else ""),
        f"- **Licence**: {licence + ', as the card of the base says' if licence else UNKNOWN_LICENCE}",
        f"- **Trained**: {' then '.join(map(stages.title, trained))}, LoRA r={recipe.lora.r}, "
        f"alpha={recipe.lora.lora_alpha}"
        f"{' on NF4 weights' if recipe.model.load_in_4bit else ''}, seed {recipe.seed}, with Unsloth and TRL",
    ]
    for name in trained:
        section = wanted.run.of(name).as_trained(recipe).section(stages.of(name).name)
        lines.append(
            f"- **Data, {name}**: {', '.join(_source(recipe, one, data_licences or {}) for one in section.datasets)}; "
            f"learning rate {section.learning_rate:g}, batch {section.effective_batch_size}, "
            f"{section.max_steps or f'{section.num_train_epochs:g} epochs'}{' (steps)' if section.max_steps else ''}"
        )
    lines += ["", "## Measures", "", *_measures(wanted, trained, parity, notes if notes is not None else [])]
    lines += ["", "## Use", "", *_use(wanted, gguf)]
    return str(blanked("\n".join(front + lines) + "\n"))


def is_local(recipe: Recipe) -> bool:
    """Whether the base is a folder, which another machine does not find by its name."""
    return Path(recipe.locate(recipe.model.path)).is_dir()


def licence_of(base: Path) -> str | None:
    """The licence that a model folder's own README names in its metadata; None where it names none."""
    if base == Path():
        return None
    try:
        text = (base / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = YAML(typ="safe").load(front[1]) if front else None
    except YAMLError:
        return None
    licence = metadata.get("license_name") or metadata.get("license") if isinstance(metadata, dict) else None
    if isinstance(licence, list):  # as the cards of some sets have it
        licence = ", ".join(map(str, licence))
    return licence if isinstance(licence, str) else None


def _format(wanted: Wanted) -> str:
    if wanted.format in QUANTISED:
        return f"{wanted.format.upper()}, compressed-tensors"
    return {"adapter": "adapter", "merged_16bit": "merged, 16 bits"}.get(
        wanted.format, f"GGUF {wanted.quant}"
    )


def _source(recipe: Recipe, source: Source, licences: Mapping[str, str]) -> str:
    licence = licences.get(source.path)
    said = [*([source.name] if source.name else []), *([f"licence {licence}"] if licence else [])]
    return _name(recipe, source.path) + (f" ({', '.join(said)})" if said else "")


def _name(recipe: Recipe, path: str) -> str:
    """As the recipe has it; of a path that tells of this machine's folders the last part alone."""
    tells = path.startswith((".", "/", "~"))
    return os.path.basename(os.path.abspath(recipe.locate(path))) if tells else path


def _measures(
    wanted: Wanted, trained: list[str], parity: Parity | ScoreParity | None, notes: list[str]
) -> list[str]:
    rows = []
    for name in trained:
        report = RunReport.load(wanted.run.of(name).report, notes) or RunReport.unknown()
        if report.loss_first is not None and report.loss_last is not None:
            rows.append(
                f"- {name}: loss {report.loss_first:.4f} to {report.loss_last:.4f} in {report.num_steps} steps"
            )
        if report.scores and report.scores.accuracy:
            accuracy = report.scores.accuracy
            rows.append(
                f"- {name}: {accuracy.value:.1%} of {accuracy.num_rows} held-out pairs have the larger score for the "
                f"chosen reply, 95 % interval {accuracy.low:.1%} to {accuracy.high:.1%}"
            )
        for key, value in (report.eval or {}).items():
            if key in ("loss", "rewards/accuracies", "rewards/margins") and value is not None:
                rows.append(f"- {name}, held-out {key}: {value:.4f}")
    for name, measure in _evaluated(wanted, notes).items():
        if measure.value is not None:
            ends = (
                f" [{measure.low:.4f}, {measure.high:.4f}]" if None not in (measure.low, measure.high) else ""
            )
            rows.append(f"- {wanted.name}, {name}: {measure.value:.4f}{ends}")
    if isinstance(parity, ScoreParity):
        rows.append(
            f"- this export against {parity.against}: scores differ by {parity.mean_score_diff:.4f} of their spread in "
            f"the mean and {parity.max_score_diff:.4f} at most (`parity.json`)"
        )
    elif parity:
        rows.append(
            f"- this export against {parity.against}: log-probs differ by {parity.mean_logprob_diff:.4f} in the "
            f"mean and {parity.max_logprob_diff:.4f} at most, {parity.equal_greedy_fraction:.1%} of greedy "
            "tokens are equal (`parity.json`)"
        )
        if other := parity.quantisation:
            rows.append(
                f"- against the model as trained{' on NF4 weights' if wanted.recipe.model.load_in_4bit else ''}: "
                f"{other.mean_logprob_diff:.4f} and {other.max_logprob_diff:.4f}, "
                f"{other.equal_greedy_fraction:.1%} of greedy tokens"
            )
    return rows or ["Nothing was measured."]


def _evaluated(wanted: Wanted, notes: list[str]) -> dict[str, Measure]:
    """What run_eval.py measured of the exported model, with its intervals; {} where it measured another one."""
    file = wanted.run.of("eval").report
    evaluation, moment = Evaluation.load(file, notes), written(file)
    found = (evaluation.models or {}).get(wanted.name) if evaluation else None
    if found is None or moment is None:
        return {}
    if is_of_other_weights(moment, wanted.run.read_manifest()):
        notes.append(f"{file} is older than the {wanted.name} adapter: the card leaves its measures out")
        return {}
    return found.measures()


def _use(wanted: Wanted, gguf: str | None) -> list[str]:
    recipe, folder = wanted.recipe, wanted.folder.name
    prompt = json.dumps(recipe.compare.prompts[0], ensure_ascii=False)
    if wanted.format == "ollama":
        return ["```bash", f"ollama create {recipe.name} -f Modelfile", f"ollama run {recipe.name}", "```"]
    if wanted.format == "gguf":
        section = recipe.section(wanted.run.stage)
        code = LLAMA_CPP.format(file=gguf, prompt=prompt, max_length=section.max_length)
    else:
        arguments = ["folder", 'device_map="auto"', 'dtype="auto"']
        if recipe.model.load_in_4bit:
            arguments.append(
                'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",\n'
                "        bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"
            )
        if not wanted.answers and wanted.format == "adapter":
            arguments.append("num_labels=1")
        code = LOAD[wanted.format].format(
            folder=folder, arguments="\n    " + ",\n    ".join(arguments) + ",\n"
        )
        if not wanted.answers:
            code = "\n".join(line for line in code.splitlines() if "generation_config" not in line) + "\n"
            code = code.replace("ForCausalLM", "ForSequenceClassification").replace(", GenerationConfig", "")
            code += SCORE.format(prompt=prompt)
            return ["```python", code.rstrip("\n"), "```"]
        code += ASK.format(prompt=prompt, max_new_tokens=recipe.compare.max_new_tokens)
    server = ["```bash", f"vllm serve {folder}", "```", ""] if wanted.format in QUANTISED else []
    return [*server, "```python", code.rstrip("\n"), "```"]
