"""Adds a LoRA adapter to 16-bit weights, one tensor at a time and one shard in memory.

W' = W + s * B A with s = lora_alpha / r (Hu et al. 2021, section 4.1), or lora_alpha / sqrt(r) with rank-stabilised
LoRA (Kalajdzievski 2023, equation 6); for an embedding the transpose of B A. Computed in fp32 and rounded once. Rows
that the adapter trained themselves (lora.trainable_tokens) take the place of the base's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from toolkit import hardware
from toolkit.engine.base import score_head
from toolkit.engine.base.token_rows import ROWS
from toolkit.errors import UserError
from toolkit.files import write_json

INDEX = "model.safetensors.index.json"
# What an adapter config may hold beside plain LoRA; each would merge by another formula.
OTHER_FORMULAS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
)
HEADS = {"classifier", "score"}  # what PEFT trains whole of a model that gives scores
LM_HEAD, SCORE = "lm_head.weight", f"{score_head.HEAD}.weight"
SPARE_GIB = 0.5  # interpreter and libraries, and files beside the weights


@dataclass(frozen=True)
class Lora:
    """An adapter's update of each weight by the weight's own name: s, B (out, r) and A (r, in), in fp32; and rows that
    it trained themselves, their numbers and values."""

    scale: float
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rows: dict[str, tuple[list[int], torch.Tensor]]
    score: torch.Tensor | None = None  # the head of a reward model, in place of the one over the vocabulary

    @property
    def changed(self) -> set[str]:
        """The weights that are other ones with the adapter."""
        return self.updates.keys() | self.rows.keys()

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the adapter uses it, in the weight's own dtype. Raises UserError where shapes differ."""
        if name in self.rows:
            return self._with_rows(name, weight)
        if name not in self.updates:
            return weight
        b, a = self.updates[name]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise UserError(
                f"{name} is {tuple(weight.shape)} in the 16-bit base and {b.shape[0]} x {a.shape[1]} in the adapter: "
                "model.base_16bit is another model than the adapter was trained on"
            )
        return (weight.float() + self.scale * (b @ a)).to(weight.dtype)

    def _with_rows(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        ids, values = self.rows[name]
        if len(weight) <= max(ids) or weight.shape[1] != values.shape[1]:
            raise UserError(
                f"{name} is {tuple(weight.shape)} in the 16-bit base, and the adapter trained rows up to {max(ids)} of "
                f"{values.shape[1]} numbers: model.base_16bit is another model than the adapter was trained on"
            )
        return weight.index_copy(0, torch.tensor(ids), values.to(weight.dtype))


def read_lora(folder: Path) -> Lora:
    """The adapter in a folder. Raises UserError when it is more than plain LoRA."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    others = [key for key in OTHER_FORMULAS if config.get(key)] + ["bias"] * (config["bias"] != "none")
    if config.get("task_type") == "SEQ_CLS" and set(config["modules_to_save"] or ()) <= HEADS:
        others = [key for key in others if key != "modules_to_save"]
    if config["peft_type"] != "LORA" or others:
        raise UserError(
            f"the adapter in {folder} uses {', '.join(others) or config['peft_type']}: only plain LoRA is merged here; "
            "export it with --format adapter"
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    score = None
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            if key == score_head.WEIGHT:
                score = file.get_tensor(key)
                continue
            module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
            parts.setdefault(f"{module}.weight", {})[part] = file.get_tensor(key).float()
    updates, rows = {}, {}
    for name, found in parts.items():
        if found.keys() == {ROWS}:
            weight = name.replace(".token_adapter.", ".")
            rows[weight] = (_token_ids(config, weight), found[ROWS])
        elif found.keys() == {"lora_A", "lora_B"}:
            updates[name] = (found["lora_B"], found["lora_A"])
        elif found.keys() == {"lora_embedding_A", "lora_embedding_B"}:  # (r, vocabulary), (width, r)
            updates[name] = (found["lora_embedding_A"].T, found["lora_embedding_B"].T)
        else:
            raise UserError(
                f"the adapter in {folder} holds {', '.join(sorted(found))} of {name}: no LoRA pair"
            )
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return Lora(config["lora_alpha"] / divisor, updates, rows, score)


def _token_ids(config: dict[str, Any], weight: str) -> list[int]:
    """Which rows of a weight the adapter trained."""
    module = weight.removesuffix(".weight")
    return next(list(ids) for name, ids in config["trainable_token_indices"].items() if module.endswith(name))


def shards(base: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file of a model folder, in file order. Raises UserError without any."""
    index = base / INDEX
    if index.is_file():
        found: dict[str, list[str]] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            found.setdefault(file, []).append(name)
        if absent := [file for file in found if not (base / file).is_file()]:
            raise UserError(f"{base} lacks {', '.join(absent)}, which its {INDEX} names: fetch it again")
        return dict(sorted(found.items()))
    single = base / "model.safetensors"
    if not single.is_file():
        raise UserError(
            f"{base} has neither model.safetensors nor {INDEX}: no safetensors weights to merge onto"
        )
    with safe_open(single, framework="pt") as file:
        return {single.name: list(file.keys())}


def check_base(base: Path, name: str, lora: Lora) -> None:
    """Raises UserError when the base is quantised, or lacks a weight that the adapter updates."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise UserError(
            f"{name} holds quantised weights, and merging onto them would keep their error: name the same model's "
            "16-bit repository with --set model.base_16bit=OWNER/NAME"
        )
    known = {name for names in shards(base).values() for name in names}
    unknown = sorted(lora.changed - known)
    tied = {"lm_head.weight", "model.embed_tokens.weight"} if config.get("tie_word_embeddings") else set()
    problems = []
    if both := sorted(tied & lora.updates.keys()):
        problems.append(
            f"the adapter changes {', '.join(both)}, and input and output embeddings of {name} are one tensor: no "
            "single weight stands for both; export with --format adapter"
        )
        unknown = [name for name in unknown if name not in tied]
    if unknown:
        problems.append(
            f"{name} lacks {len(unknown)} weights that the adapter updates ({', '.join(unknown[:3])}, ...): "
            "model.base_16bit is another model"
        )
    if problems:
        raise UserError(*problems)


def check_room(base: Path, target: Path, lora: Lora, copies: float = 1) -> None:
    """Raises UserError when disk (so many copies of the weights) or RAM does not suffice, with the figures."""
    sizes = [(base / file).stat().st_size / hardware.GIB for file in shards(base)]
    disk, free = copies * sum(sizes) + SPARE_GIB, hardware.disk_free_gib(target)
    ram, available = needed_ram_gib(base, lora), hardware.here().ram_available_gib
    problems = []
    if free < disk:
        problems.append(
            f"the export takes up to {disk:.1f} GiB on disk and {target.parent} has {free:.1f} GiB free: make room, or "
            "take --out DIR on another disk"
        )
    if available < ram:
        problems.append(
            f"merging takes {ram:.1f} GiB of RAM (the largest of {len(sizes)} shards, a tensor in fp32, the adapter) "
            f"and {available:.1f} GiB are available: close other programs, or take a machine with more"
        )
    if problems:
        raise UserError(*problems)


def needed_ram_gib(base: Path, lora: Lora) -> float:
    """Largest shard, three fp32 copies of the largest updated weight (itself, its update, their sum), the adapter."""
    largest_shard = max((base / file).stat().st_size for file in shards(base))
    adapter = sum(4 * (b.numel() + a.numel()) for b, a in lora.updates.values())
    largest = max((b.shape[0] * a.shape[1] for b, a in lora.updates.values()), default=0)
    return (largest_shard + 3 * 4 * largest + adapter) / hardware.GIB + SPARE_GIB


def merge(
    base: Path, lora: Lora, target: Path, advance: Callable[[int], None] = lambda count: None
) -> dict[str, Any]:
    """Writes the merged weights into `target`, sharded as the base is. Returns {num_tensors, num_merged, dtypes}.

    Weights of a base in fp32 are written in bf16: the export is called one of 16 bits.
    """
    weight_map, total, merged, dtypes = {}, 0, 0, set()
    files = shards(base)
    *_, last = files
    for file, names in files.items():
        tensors = {}
        with safe_open(base / file, framework="pt") as stream:
            for name in names:
                if name != LM_HEAD or lora.score is None:
                    tensors[name] = _in_16_bits(lora.merged(name, stream.get_tensor(name)))
                merged += name in lora.changed
                advance(1)
        if lora.score is not None and file == last:
            tensors[SCORE] = _in_16_bits(lora.score)
        for name, tensor in tensors.items():
            total += tensor.numel() * tensor.element_size()
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            weight_map[name] = file
        save_file(tensors, target / file, metadata={"format": "pt"})
        (target / file).chmod(0o644)  # safetensors writes for the owner alone
        del tensors  # before the next shard is read, else there are two of them
    if len(files) > 1 or (base / INDEX).is_file():
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    assert merged == len(lora.changed)
    return {"num_tensors": len(weight_map), "num_merged": merged, "dtypes": sorted(dtypes)}


def _in_16_bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.bfloat16) if weight.dtype == torch.float32 else weight
