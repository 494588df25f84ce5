"""The plan: exact where modules can be counted, a table worked out by hand, properties that always hold."""

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toolkit import cards
from toolkit.cards import CARDS, Card
from toolkit.errors import UserError
from toolkit.hardware import GIB
from toolkit.memory import terms
from toolkit.memory.phases import Phases
from toolkit.memory.plan import ITEMS, Settings, plan_stage
from toolkit.memory.search import LONGEST, LOSS_CHUNKS_GIB
from toolkit.recipe.load import load, names
from toolkit.recipe.schema import Architecture, Lora, Recipe
from toolkit.records.data_report import DataReport

ROOT = Path(__file__).resolve().parents[2]
RTX4090 = CARDS["rtx4090"]
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def shaped(*numbers: int) -> Architecture:
    return Architecture(**dict(zip(KEYS, numbers, strict=True)))


# Their config.json.
LLAMA31_8B = shaped(32, 4096, 14336, 32, 8, 128256)
LLAMA2_7B = shaped(32, 4096, 11008, 32, 32, 32000)
GEMMA_NUMBERS = (28, 3072, 24576, 16, 16, 256000)
GEMMA_7B = Architecture(**dict(zip(KEYS, GEMMA_NUMBERS, strict=True)), head_dim=256, tie_word_embeddings=True)
SMALL = shaped(4, 192, 512, 6, 2, 1536)
ARCHITECTURES = {"llama31_8b": LLAMA31_8B, "llama2_7b": LLAMA2_7B, "gemma_7b": GEMMA_7B, "small": SMALL}
TARGETS = (ALL_LINEARS, ("q_proj", "v_proj"), ("o_proj", "down_proj"))
RANKS = (8, 16)
SHAPES = ((192, 512), (4096, 1024), (100, 7), (63, 3), (65, 64))  # (in, out); odd ones round
TENSORS = (100, 4095, 4096, 5000, 65536)


def lora(r: int = 16, targets: tuple[str, ...] = ALL_LINEARS, dropout: float = 0.0) -> Lora:
    return Lora(r=r, lora_alpha=16, lora_dropout=dropout, use_rslora=False, target_modules=targets)


def changed(section: Any, **values: Any) -> Any:
    """A copy of a recipe section; `sft__max_length=8` changes an inner value."""
    for path, value in values.items():
        name, _, rest = path.partition("__")
        section = section.model_copy(
            update={name: changed(getattr(section, name), **{rest: value}) if rest else value}
        )
    return section


# A recipe like llama31_8b's, whatever the shipped ones say today.
EIGHT_B: Recipe = changed(
    load("tiny"),
    gpu="rtx4090",
    model__architecture=LLAMA31_8B,
    model__load_in_4bit=True,
    lora=lora(),
    memory__budget_gib="auto",
    memory__recompute_layers="auto",
    memory__per_device_train_batch_size="auto",
    memory__loss_chunk_gib="auto",
    sft__max_length=2048,
    sft__optim="adamw_8bit",
    sft__effective_batch_size=16,
    sft__per_device_eval_batch_size=2,
    sft__max_steps=None,
    dpo__max_length=2048,
    dpo__optim="adamw_8bit",
    dpo__effective_batch_size=16,
    dpo__per_device_eval_batch_size=2,
    dpo__precompute_ref_batch_size=4,
)

# Counts and stores in a process of its own: unsloth must be the first to import transformers and peft.
REAL_MODULES = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, bitsandbytes as bnb
from peft import LoraConfig, get_peft_model
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

asked = json.load(sys.stdin)

def nf4(shape):
    linear = bnb.nn.Linear4bit(*shape, bias=False, compress_statistics=True, quant_type="nf4")
    linear = linear.to("cpu")  # quantises
    state = linear.weight.quant_state
    parts = (linear.weight, state.absmax, state.state2.absmax, state.offset)
    return sum(part.untyped_storage().nbytes() for part in parts)

def counts(name, config):
    config_class, model_class = (GemmaConfig, GemmaForCausalLM) if "gemma" in name else (LlamaConfig, LlamaForCausalLM)
    with torch.device("meta"):
        model = model_class(config_class(**config))
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    trained = []
    for r in asked["ranks"]:
        for targets in asked["targets"]:
            tuned = get_peft_model(model, LoraConfig(r=r, target_modules=list(targets)))
            trained.append(sum(p.numel() for p in tuned.parameters() if p.requires_grad))
            model = tuned.unload()
    unique = {id(p): p.numel() for p in model.parameters()}
    head = {id(p): p.numel() for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    weights = sum(linear.weight.numel() for linear in linears)
    return {
        "linears": weights,
        "embeddings": sum(head.values()),
        "norms": sum(unique.values()) - weights - sum(head.values()),
        "nf4": sum(nf4((m.in_features, m.out_features)) for m in linears) if name == "small" else None,
        "trained": trained,
    }

def states(optimizer, tensors, skipped):
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    if hasattr(optimizer, "init_state"):
        for index, tensor in enumerate(tensors):
            optimizer.init_state(optimizer.param_groups[0], tensor, 0, index)
    else:
        optimizer.step()
    return [
        sum(v.nbytes for k, v in optimizer.state[t].items() if torch.is_tensor(v) and k not in skipped) for t in tensors
    ]

tensors = [torch.nn.Parameter(torch.zeros(n)) for n in asked["tensors"]]
json.dump({
    "nf4": [nf4(shape) for shape in asked["shapes"]],
    "models": {name: counts(name, config) for name, config in asked["models"].items()},
    "adamw_8bit": states(bnb.optim.AdamW8bit(tensors), tensors, ("qmap1", "qmap2")),  # shared lookup tables
    "adamw_torch_fused": states(torch.optim.AdamW(tensors), tensors, ("step",)),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """What bitsandbytes, transformers, peft and torch really make."""
    asked = {
        "shapes": SHAPES,
        "targets": TARGETS,
        "ranks": RANKS,
        "tensors": TENSORS,
        "models": {
            name: architecture.model_dump(exclude_none=True) for name, architecture in ARCHITECTURES.items()
        },
    }
    done = subprocess.run(
        [sys.executable, "-c", REAL_MODULES], input=json.dumps(asked), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


class TestAgainstRealModules:
    def test_nf4_bytes(self, real):
        assert [terms.quantised_bytes(i * o) for i, o in SHAPES] == real["nf4"]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_base_weights(self, real, name):
        architecture, counted = ARCHITECTURES[name], real["models"][name]
        assert terms.linear_parameters(architecture) == counted["linears"]
        assert terms.embedding_bytes(architecture) == 2 * counted["embeddings"]
        assert terms.layer_weight_bytes(architecture, False) == 2 * (counted["linears"] + counted["norms"])

    def test_storage_of_a_whole_small_model(self, real):
        counted = real["models"]["small"]
        assert terms.layer_weight_bytes(SMALL, True) == counted["nf4"] + 2 * counted["norms"]

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_lora_parameters(self, real, name):
        ours = [
            terms.lora_parameters(ARCHITECTURES[name], lora(r, targets)) for r in RANKS for targets in TARGETS
        ]
        assert ours == real["models"][name]["trained"]

    @pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch_fused"])
    def test_optimizer_states(self, real, optim):
        assert [terms.optimizer_bytes(optim, [n]) for n in TENSORS] == real[optim]


class TestTerms:
    def test_figures_of_memory_md(self):
        assert terms.layer_weight_bytes(LLAMA31_8B, True) / GIB == pytest.approx(3.353, abs=2e-3)
        assert terms.embedding_bytes(LLAMA31_8B) / GIB == pytest.approx(1.957, abs=1e-3)
        assert terms.lora_parameters(LLAMA31_8B, lora()) == 41_943_040
        tensors = terms.lora_tensors(LLAMA31_8B, lora())
        assert terms.optimizer_bytes("adamw_8bit", tensors) / GIB == pytest.approx(0.08, abs=1e-3)
        assert terms.optimizer_bytes("adamw_torch", tensors) / GIB == pytest.approx(0.47, abs=2e-3)
        assert terms.kept_layer_bytes(LLAMA31_8B, lora()) == 110_728
        assert terms.dequantisation_bytes(LLAMA31_8B) / GIB == pytest.approx(0.11, abs=1e-3)
        assert terms.kept_layer_bytes(LLAMA31_8B, lora(), expanded_kv=True) == 123_016
        assert terms.logit_bytes(4096, LLAMA31_8B, 2.0) / GIB == pytest.approx(0.25, abs=0.01)
        assert terms.flops_per_token(LLAMA31_8B, 32) == pytest.approx(44.0e9, rel=1e-3)
        assert terms.flops_per_token(LLAMA31_8B, 0) == pytest.approx(30.0e9, rel=1e-3)

    def test_a_recomputed_layer_holds_what_unsloth_measured(self):
        ours = terms.kept_layer_bytes(LLAMA31_8B, lora()) + terms.layer_backward_bytes(LLAMA31_8B)
        assert ours == pytest.approx(42 * 4096, rel=1e-3)

    def test_what_lora_targets_and_dropout_change(self):
        narrow = terms.kept_layer_bytes(LLAMA31_8B, lora(targets=("q_proj", "v_proj")))
        assert narrow - terms.kept_layer_bytes(LLAMA31_8B, lora()) == 2 * 14336
        dropout = terms.kept_layer_bytes(LLAMA31_8B, lora(dropout=0.1))
        assert dropout - terms.kept_layer_bytes(LLAMA31_8B, lora()) == 6 * 4096 + 14336

    def test_unknown_lora_target(self):
        with pytest.raises(UserError, match=r"lora.target_modules: got wqkv, .*known: q_proj"):
            terms.lora_parameters(LLAMA31_8B, lora(targets=("q_proj", "wqkv")))

    def test_heads_and_ties_that_the_architecture_does_not_tell(self):
        silent = shaped(*GEMMA_NUMBERS)
        assert terms.head_dim(silent) == 192
        assert terms.head_dim(GEMMA_7B) == 256
        assert terms.embedding_bytes(silent) == 2 * terms.embedding_bytes(GEMMA_7B)

    @settings(deadline=None)
    @given(st.integers(1, 50_000), st.integers(1000, 300_000), st.sampled_from([0.125, 0.5, 1.0, 4.0]))
    def test_logits_stay_within_the_chunk(self, tokens, vocab, chunk):
        architecture = LLAMA31_8B.model_copy(update={"vocab_size": vocab})
        held = terms.logit_bytes(tokens, architecture, chunk)
        assert 4 * vocab <= held <= max(chunk * GIB, 2 * 4 * vocab)  # two rows at least

    @pytest.mark.parametrize(
        ("card", "layers", "seconds"),
        [("rtx4090", 32, 14_700), ("rtx4090", 0, 10_060), ("h200", 32, 2_450), ("h200", 0, 1_680)],
    )
    def test_floor_of_finetome(self, card, layers, seconds):
        """One epoch of 54M tokens, in micro-batches of 4,096."""
        floor = terms.step_seconds(LLAMA31_8B, CARDS[card], True, 54_000_000, 54_000_000 // 4096, layers)
        assert floor == pytest.approx(seconds, rel=0.01)


# Predicted by hand from the terms, GiB, for k = 0, 8, 16, 24, 32 kept layers of Llama-3.1-8B, without accumulation.
@pytest.mark.parametrize(
    ("stage", "tokens", "chunk", "peaks"),
    [
        ("sft", 4096, 0.5, (6.7, 10.1, 13.4, 16.8, 20.0)),
        ("dpo", 2048, 2.0, (6.3, 8.0, 9.7, 11.4, 12.9)),
        ("dpo", 4096, 2.0, (6.7, 10.1, 13.4, 16.8, 19.9)),
    ],
)
def test_predicted_peaks_of_llama31_8b(stage, tokens, chunk, peaks):
    phases = Phases(EIGHT_B, stage, on_gpu=True)
    for kept, expected in zip((0, 8, 16, 24, 32), peaks, strict=True):
        settings = Settings(16, 1, 32 - kept, chunk)  # of exactly `tokens` tokens, however they are batched
        peak = max(sum(phase(settings, tokens).values()) for phase in (phases.loss, phases.layer))
        assert peak / GIB == pytest.approx(expected, rel=0.03), f"{kept} layers kept"


class TestPlan:
    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_items_add_up(self, stage):
        plan = plan_stage(EIGHT_B, stage, RTX4090, 64)
        assert tuple(plan.items_gib) == ITEMS
        held = sum(gib for name, gib in plan.items_gib.items() if name not in ("context", "reserve"))
        assert held == pytest.approx(plan.peak_gib)
        assert plan.peak_gib == pytest.approx(max(plan.phases_gib.values()))
        assert plan.budget_gib + plan.items_gib["context"] + plan.items_gib["reserve"] == RTX4090.total_gib
        assert plan.budget_gib == 22.0, "what is planned for on a 4090"

    def test_json(self):
        plan = plan_stage(EIGHT_B, "dpo", cards.card("6"), 64)
        told = json.loads(json.dumps(plan.to_dict()))
        assert {"items_gib", "peak_gib", "budget_gib", "fits", "settings"} <= set(told)
        assert told["settings"] == asdict(plan.settings)
        assert told["fits"] is False

    def test_auto_on_a_4090(self):
        plan = plan_stage(EIGHT_B, "sft", RTX4090, 64)
        assert plan.settings == Settings(16, 1, 0, 0.5, tokens_per_micro_batch=4096)
        assert plan.tokens_per_step == 16 * 2048
        plan = plan_stage(EIGHT_B, "dpo", RTX4090, 64)
        assert plan.settings == Settings(16, 1, 0, 0.5, tokens_per_micro_batch=4096)
        assert plan.tokens_per_step == 16 * 2 * 2048
        packed = plan_stage(changed(EIGHT_B, sft__packing=True), "sft", RTX4090, 64)
        assert packed.settings == Settings(2, 8, 0, 0.5), "packed rows are full: they count as rows"
        by_rows = changed(EIGHT_B, memory__tokens_per_micro_batch=None)
        assert plan_stage(by_rows, "dpo", RTX4090, 64).settings == Settings(1, 16, 0, 0.5)

    def test_a_micro_batch_holds_its_tokens_or_one_longer_row(self):
        few, many = Settings(16, 1, 0, 0.5, 1024), Settings(16, 1, 0, 0.5, 8192)
        assert (few.tokens_at_once(16, 2048), many.tokens_at_once(16, 2048)) == (2048, 8192)
        assert many.tokens_at_once(2, 2048) == 4096, "there are no more rows"

    def test_auto_spends_in_order(self):
        """A growing card buys tokens per micro-batch, then kept layers."""
        chosen = [plan_stage(EIGHT_B, "sft", cards.card(str(gib / 4)), 64) for gib in range(30, 110)]
        spent = [
            (s.tokens_per_micro_batch, -s.recompute_layers, s.loss_chunk_gib)
            for s in (plan.settings for plan in chosen if plan.fits)
        ]
        assert spent[0][0] == 2048
        assert spent[-1] == (4096, 0, 0.5)
        micro_and_layers = [step[:2] for step in spent]
        assert micro_and_layers == sorted(micro_and_layers)

    def test_pinned_values_are_respected(self):
        pinned = changed(
            EIGHT_B,
            memory__recompute_layers=20,
            memory__per_device_train_batch_size=4,
            memory__loss_chunk_gib=1.5,
            memory__budget_gib=30.0,
        )
        plan = plan_stage(pinned, "sft", CARDS["h100"], 64)
        assert plan.settings == Settings(4, 4, 20, 1.5)
        assert plan.budget_gib == 30
        assert plan_stage(pinned, "sft", RTX4090, 64).budget_gib == 23.0, "no more than the card has"
        for word, layers in (("all", 32), ("none", 0)):
            settings = plan_stage(
                changed(EIGHT_B, memory__recompute_layers=word), "sft", RTX4090, 64
            ).settings
            assert settings.recompute_layers == layers

    def test_what_auto_chose_can_be_copied_into_the_recipe(self):
        plan = plan_stage(EIGHT_B, "sft", cards.card("16"), 64)
        values = {f"memory__{name}": value for name, value in asdict(plan.settings).items()}
        del values["memory__gradient_accumulation_steps"]
        again = plan_stage(changed(EIGHT_B, **values), "sft", cards.card("16"), 64)
        assert (again.settings, again.peak_gib) == (plan.settings, plan.peak_gib)

    def test_reference_pass_is_a_phase_of_its_own(self):
        """Before training: two adapters, no gradients, no optimizer; its batch may set the peak."""
        small = plan_stage(EIGHT_B, "dpo", RTX4090, 64).phases_gib
        by_rows = changed(EIGHT_B, dpo__precompute_ref_batch_size=64, memory__tokens_per_micro_batch=None)
        large = plan_stage(by_rows, "dpo", CARDS["h200"], 64)
        tokens, per_token = 2 * 2048, 6 * (14336 + 4096)  # no more pairs at once than a micro-batch holds
        expected = 3.353 + 1.957 + 2 * 0.156 + 0.11 + 0.15 + tokens * per_token / GIB
        assert small["reference"] == pytest.approx(expected, abs=0.01)
        assert large.phases_gib["reference"] == large.peak_gib
        assert large.items_gib["optimizer"] == 0
        assert large.items_gib["reference_pass"] > 0

    def test_evaluation_counts_only_where_there_is_one(self):
        assert "evaluation" in plan_stage(EIGHT_B, "sft", RTX4090, 64).phases_gib
        none = changed(EIGHT_B, sft__eval_datasets=(), sft__eval_rows=0)
        assert "evaluation" not in plan_stage(none, "sft", RTX4090, 64).phases_gib

    def test_16_bit_base(self):
        plan = plan_stage(changed(EIGHT_B, model__load_in_4bit=False), "sft", RTX4090, 64)
        assert plan.items_gib["weights"] == pytest.approx(2 * 6.98e9 / GIB, rel=1e-3)
        assert plan.items_gib["dequantisation"] == 0

    def test_without_a_gpu(self):
        plan = plan_stage(EIGHT_B, "sft", None, 64)
        assert plan.budget_gib == pytest.approx(48)
        assert plan.card == "CPU with 64.0 GiB of RAM"
        assert plan.items_gib["context"] == plan.items_gib["dequantisation"] == 0
        assert plan.floor_seconds_per_1000_steps is None
        # There are no 8-bit optimizers on a CPU: AdamW's two fp32 states and its temporary.
        assert plan.items_gib["optimizer"] == pytest.approx(12 * 41_943_040 / GIB)

    def test_floors(self):
        unknown = plan_stage(EIGHT_B, "sft", cards.card("24"), 64)
        assert unknown.floor_seconds_per_1000_steps is None
        plan = plan_stage(changed(EIGHT_B, sft__max_steps=500), "sft", RTX4090, 64)
        assert plan.floor_seconds_per_1000_steps is not None
        assert plan.floor_seconds == pytest.approx(plan.floor_seconds_per_1000_steps / 2)
        bound = 1000 * plan.tokens_per_step * plan.flops_per_token / 165.2e12
        assert bound < plan.floor_seconds_per_1000_steps < 1.05 * bound
        assert plan_stage(EIGHT_B, "sft", RTX4090, 64).floor_seconds is None

    def test_the_rows_of_a_run_tell_its_time(self):
        """10,000 pairs of 400 + 200 + 200 tokens: the prompt counts once where it is shared, the reference pass too."""
        rows = replace(
            DataReport.unknown(),
            used=10_000,
            tokens_per_epoch=12_000_000,
            prompt_tokens_per_epoch=4_000_000,
        )

        def planned(**values):
            return plan_stage(changed(EIGHT_B, **values), "dpo", RTX4090, 64, rows=rows)

        shared, padded = planned(), planned(dpo__share_prompts=False)
        assert (shared.tokens_of_run, padded.tokens_of_run) == (8_000_000, 12_000_000)
        reference = 2 * (terms.linear_parameters(EIGHT_B.model.architecture) + 128_256 * 4096)
        products = 8_000_000 * (shared.flops_per_token + reference) / 165.2e12
        assert products < shared.floor_seconds < 1.1 * products
        half = planned(dpo__max_steps=10_000 // 16 // 2)
        assert half.tokens_of_run == pytest.approx(4_000_000, rel=0.01)
        assert half.floor_seconds > shared.floor_seconds / 2, "the reference pass is of all rows"

    def test_no_such_stage(self):
        with pytest.raises(UserError, match="has no sft stage"):
            plan_stage(changed(EIGHT_B, sft=None), "sft", RTX4090, 64)

    @pytest.mark.parametrize("name", names())
    def test_shipped_recipes_fit_the_card_they_name(self, name):
        shipped = load(name)
        card = cards.card(shipped.gpu) if shipped.gpu else None
        for stage in ("sft", "dpo"):
            if getattr(shipped, stage) is not None:
                assert plan_stage(shipped, stage, card, 8).fits


class TestFixes:
    def sets(self, fix: str) -> dict[str, Any]:
        """`--set a.b=c` of a fix as keyword arguments of `changed`."""
        words = fix.partition(": ")[0].split()
        pairs = [word.partition("=")[::2] for word in words if "=" in word]
        return {
            path.replace(".", "__"): {"true": True}.get(value, int(value) if value.isdigit() else value)
            for path, value in pairs
        }

    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    @pytest.mark.parametrize("gib", ["5", "7", "8", "9"])
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"memory__recompute_layers": "none", "memory__per_device_train_batch_size": 8},
            {"model__load_in_4bit": False},
            {"sft__optim": "adamw_torch", "dpo__optim": "adamw_torch", "lora__r": 128},
            {"memory__budget_gib": 3.0},
        ],
        ids=["auto", "pinned", "16bit", "adamw_torch", "budget"],
    )
    def test_each_holds_what_it_says(self, stage, gib, values):
        bad, card = changed(EIGHT_B, **values), cards.card(gib)
        plan = plan_stage(bad, stage, card, 64)
        assert len(plan.fixes) <= 3
        if plan.fits:
            assert plan.fixes == ()
            return
        assert plan.fixes
        for fix in plan.fixes:
            assert "predicted peak" in fix
            if fix.startswith("a larger card"):
                key = fix.removeprefix("a larger card, ").split()[0]
                assert plan_stage(bad, stage, CARDS[key], 64).fits
            else:
                fixed = plan_stage(changed(bad, **self.sets(fix)), stage, card, 64)
                assert fixed.fits is not fix.endswith("not enough alone")
                assert f"{fixed.peak_gib:.2f} of {fixed.budget_gib:.2f} GiB" in fix

    def test_cheapest_first(self):
        pinned = changed(EIGHT_B, memory__recompute_layers="none", memory__per_device_train_batch_size=4)
        fixes = plan_stage(pinned, "sft", RTX4090, 64).fixes
        assert fixes[0].startswith(
            "--set memory.per_device_train_batch_size=auto --set memory.recompute_layers=auto: predicted peak"
        )
        assert fixes[1].startswith("--set sft.max_length=")
        assert fixes[2].startswith("a larger card, a100_40 (39.3 GiB)")


lengths = st.integers(8, 8192)
chunks = st.sampled_from([0.125, 0.25, 0.5, 1.0, 2.0, 4.0])
stages = st.sampled_from(["sft", "dpo"])
any_card = st.one_of(st.none(), st.floats(4, 150).map(lambda gib: Card(f"{gib} GiB", gib)))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of all kinds, with values pinned or left to the plan."""
    architecture = draw(st.sampled_from(list(ARCHITECTURES.values())))
    effective = draw(st.sampled_from([1, 6, 8, 16, 31, 64]))
    divisors = [size for size in range(1, effective + 1) if effective % size == 0]
    layers = st.integers(0, architecture.num_hidden_layers)
    return changed(
        EIGHT_B,
        model__architecture=architecture,
        model__load_in_4bit=draw(st.booleans()),
        lora=lora(
            draw(st.sampled_from([1, 16, 128])),
            draw(st.sampled_from(TARGETS)),
            draw(st.sampled_from([0, 0.1])),
        ),
        **draw(
            st.sampled_from(
                [
                    {"memory__per_device_train_batch_size": rows, "memory__tokens_per_micro_batch": tokens}
                    for rows, tokens in (
                        *(("auto", tokens) for tokens in ("auto", None, 512, 4096)),
                        *((divisor, "auto") for divisor in divisors),
                    )
                ]
            )
        ),
        memory__recompute_layers=draw(st.one_of(st.sampled_from(["auto", "all", "none"]), layers)),
        memory__loss_chunk_gib=draw(st.one_of(st.just("auto"), chunks)),
        memory__budget_gib=draw(st.one_of(st.just("auto"), st.floats(1, 100))),
        **{
            f"{stage}__{name}": value
            for stage in ("sft", "dpo")
            for name, value in {
                "max_length": draw(lengths),
                "effective_batch_size": effective,
                "optim": draw(st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_8bit"])),
                "per_device_eval_batch_size": draw(st.sampled_from([1, 8])),
            }.items()
        },
        dpo__precompute_ref_batch_size=draw(st.sampled_from([1, 4])),
    )


class TestAlwaysHolds:
    @settings(deadline=None)
    @given(recipes(), stages, st.booleans(), lengths, lengths, st.sampled_from([1, 2, 8]), chunks, st.data())
    def test_more_never_needs_less(self, recipe, stage, on_gpu, shorter, longer, micro, chunk, data):
        """Longer rows, more rows at once, more kept layers, a larger loss chunk."""
        shorter, longer = sorted((shorter, longer))
        num_layers = recipe.model.architecture.num_hidden_layers
        layers = data.draw(st.integers(1, num_layers))
        phases, base = Phases(recipe, stage, on_gpu), Settings(micro, 1, layers, chunk)
        peak = phases.peak(base, shorter) * (1 - 1e-9)
        assert phases.peak(base, longer) >= peak
        assert phases.peak(replace(base, per_device_train_batch_size=micro + 1), shorter) >= peak
        assert phases.peak(replace(base, recompute_layers=layers - 1), shorter) >= peak
        assert phases.peak(replace(base, loss_chunk_gib=2 * chunk), shorter) >= peak

    @settings(deadline=None)
    @given(recipes(), stages, lengths, chunks, st.data())
    def test_no_shorter_micro_batch_needs_more(self, recipe, stage, length, chunk, data):
        phases, settings = Phases(recipe, stage, True), Settings(2, 1, 1, chunk)
        tokens = data.draw(st.integers(1, 2 * length * (2 if stage == "dpo" else 1)))
        assert sum(phases.loss(settings, tokens).values()) <= phases.peak(settings, length) * (1 + 1e-9)

    @settings(deadline=None)
    @given(recipes(), stages, any_card)
    def test_plan_is_consistent(self, recipe, stage, card):
        plan = plan_stage(recipe, stage, card, 32)
        chosen, section = plan.settings, recipe.section(stage)
        assert plan.fits == (plan.peak_gib <= plan.budget_gib)
        assert bool(plan.fixes) <= (not plan.fits)
        effective = chosen.per_device_train_batch_size * chosen.gradient_accumulation_steps
        assert effective == section.effective_batch_size
        assert 0 <= chosen.recompute_layers <= recipe.model.architecture.num_hidden_layers
        for name in ("per_device_train_batch_size", "tokens_per_micro_batch", "loss_chunk_gib"):
            if name == "tokens_per_micro_batch" and recipe.memory.per_device_train_batch_size != "auto":
                continue
            assert getattr(recipe.memory, name) in ("auto", getattr(chosen, name))
        assert all(gib >= 0 for gib in plan.items_gib.values())

    @settings(max_examples=40, deadline=None)
    @given(recipes(), stages, any_card)
    def test_auto_fits_when_anything_does(self, recipe, stage, card):
        plan, section = plan_stage(recipe, stage, card, 32), recipe.section(stage)
        assume(plan.budget_gib > 0)
        phases = Phases(recipe, stage, on_gpu=card is not None)
        pinned = recipe.memory
        num_layers = recipe.model.architecture.num_hidden_layers
        words = {"auto": range(num_layers + 1), "all": [num_layers], "none": [0]}
        layers = words.get(str(pinned.recompute_layers), [pinned.recompute_layers])
        anything = any(
            phases.peak(Settings(rows, 1, layer, chunk, tokens), section.max_length) <= plan.budget_gib * GIB
            for (rows, tokens), layer, chunk in itertools.product(
                self.micro_batches(recipe, section, phases.packs),
                [layers[0], layers[-1]],
                LOSS_CHUNKS_GIB if pinned.loss_chunk_gib == "auto" else [pinned.loss_chunk_gib],
            )
        )
        assert plan.fits == anything

    @staticmethod
    def micro_batches(recipe, section, packs):
        rows, tokens = recipe.memory.per_device_train_batch_size, recipe.memory.tokens_per_micro_batch
        effective = section.effective_batch_size
        if rows != "auto":
            return [(rows, None)]
        if isinstance(tokens, int):
            return [(effective, tokens)]
        if tokens is None or packs:
            return [(n, None) for n in range(1, effective + 1) if effective % n == 0]
        return [(effective, 1), (effective, 4096)]

    @settings(deadline=None)
    @given(recipes(), stages, any_card)
    def test_largest_max_length_is_the_largest(self, recipe, stage, card):
        largest = plan_stage(recipe, stage, card, 32).largest_max_length
        assume(largest < LONGEST)
        longer = changed(recipe, **{f"{stage}__max_length": largest + 1})
        assert not plan_stage(longer, stage, card, 32).fits
        if largest:
            assert plan_stage(changed(recipe, **{f"{stage}__max_length": largest}), stage, card, 32).fits


def test_imports_no_torch():
    script = (
        "import sys; from toolkit.memory.plan import plan_stage; from toolkit.recipe.load import load\n"
        "plan_stage(load('tiny'), 'dpo', None, 16); "
        "print([m for m in ('torch', 'unsloth', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_several_processes_share_a_step_and_send_the_gradients_once(size: int) -> None:
    """Worked out by hand for LoRA of rank 16 on all linears of Llama-3.1-8B: 41,943,040 weights in fp32."""
    one = plan_stage(load("llama31_8b"), "sft", RTX4090, 64)
    all_of_them = plan_stage(load("llama31_8b"), "sft", RTX4090, 64, processes=size)
    sharing = all_of_them.sharing
    assert sharing is not None and one.sharing is None
    assert sharing.bytes_per_step == round(2 * (size - 1) / size * 4 * 41_943_040)
    assert sharing.seconds["pcie4"] == pytest.approx(sharing.bytes_per_step / 31.5e9, rel=1e-3)
    assert all_of_them.tokens_per_step == one.tokens_per_step
    assert all_of_them.peak_gib <= one.peak_gib
    alone, shared = one.floor_seconds_per_1000_steps, all_of_them.floor_seconds_per_1000_steps
    assert alone and shared and alone / size < shared < alone
    assert sharing.share is not None and 0 < sharing.share["nvlink4"] < sharing.share["pcie4"] < 0.1
    assert json.loads(json.dumps(all_of_them.to_dict()))["processes"] == size
