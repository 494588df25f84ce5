"""The sections that hold for all stages: the model, its template and LoRA, the comparison, the memory."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from toolkit.recipe.fields import Section, on_machine, only_exports, only_watches, shapes_rows, shapes_weights


def _in_32_bits(value: int) -> int:
    if value >= 2**31:
        raise ValueError(f"at most {2**31 - 1:,}, what 32-bit integers hold")
    return value


Int = Annotated[int, AfterValidator(_in_32_bits)]
PositiveInt = Annotated[Int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Texts = tuple[str, ...]
Prompt = Annotated[str, Field(pattern=r"\S")]
MOST_LAYERS = 1000  # the deepest model has 126: the plan walks over each


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(f"not a regular expression of Python's re: {error}") from None
    return pattern


MeasureName = Annotated[str, Field(pattern=r"^[^\W\d]\w*$")]  # it stands in dotted paths and in tables
RegularExpression = Annotated[str, AfterValidator(_compiles)]
NO_MEASURES: dict[str, str] = {}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# One linear in the place of several, in some families (Phi-3)
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "A train leaves at 14:35 and arrives at 17:10. How long is the journey?",
    "Write a short, friendly note that asks a neighbour to be quiet at night.",
)


class Architecture(Section):
    """The numbers a plan needs, from the model's config.json, so that it can be made offline; checked at load."""

    num_hidden_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS), shapes_weights("decoder layers")]
    hidden_size: Annotated[PositiveInt, shapes_weights("width of the residual stream")]
    intermediate_size: Annotated[PositiveInt, shapes_weights("width of the MLP")]
    num_attention_heads: Annotated[PositiveInt, shapes_weights("query heads")]
    num_key_value_heads: Annotated[PositiveInt, shapes_weights("key and value heads")]
    vocab_size: Annotated[PositiveInt, shapes_weights("rows of the embedding")]
    head_dim: Annotated[
        PositiveInt | None,
        shapes_weights("width of a head", "hidden_size / num_attention_heads, which Gemma's is not"),
    ] = None
    max_position_embeddings: Annotated[
        PositiveInt | None,
        on_machine(
            "positions that the model has; no plan names a longer max_length",
            "a plan looks at the memory alone",
        ),
    ] = None
    tie_word_embeddings: Annotated[
        bool, shapes_weights("one matrix is embedding and head", "Llama's and Mistral's are two")
    ] = False


class Model(Section):
    """The base model."""

    path: Annotated[
        str, shapes_weights("a Hub id, or a folder, looked up beside the recipe first", decides="model")
    ]
    revision: Annotated[
        str | None, shapes_weights("commit, tag or branch on the Hub", "the repository's main", "model")
    ] = None
    base_16bit: Annotated[
        str | None,
        only_exports(
            "the same model in 16 bits, for `run_export.py` to merge onto where `path` is a pre-quantised copy",
            "`path` itself",
        ),
    ] = None
    load_in_4bit: Annotated[
        bool,
        shapes_weights(
            "quantise the base to NF4 as it is loaded (QLoRA)", "an 8B model then fits a 24 GB card"
        ),
    ] = True
    trust_remote_code: Annotated[
        bool,
        shapes_weights("run the Python code that the model's repository brings", "it is someone else's code"),
    ] = False
    architecture: Architecture


class Template(Section):
    """How messages become text."""

    file: Annotated[
        str,
        shapes_rows('a Jinja file beside the recipe, or "tokenizer" for the model\'s own', decides="model"),
    ]
    end_of_turn: Annotated[
        str, shapes_rows("the token that closes every answer; must be one token", decides="model")
    ]
    pad_token: Annotated[
        str,
        shapes_weights(
            "a token of the vocabulary that is no end token; left out of the loss", decides="model"
        ),
    ]


class Lora(Section):
    """The adapter that is trained; all stages share it."""

    r: Annotated[PositiveInt, shapes_weights("rank of each module's update", "Unsloth's notebooks")] = 16
    lora_alpha: Annotated[
        PositiveInt,
        shapes_weights("the update is scaled by lora_alpha / r", "Unsloth's notebooks: alpha = r"),
    ] = 16
    lora_dropout: Annotated[
        float,
        Field(ge=0, lt=1),
        shapes_weights(
            "share of inputs of the adapter set to 0 in training", "Unsloth's fused kernels need 0"
        ),
    ] = 0.0
    use_rslora: Annotated[
        bool, shapes_weights("scale by lora_alpha / sqrt(r) instead", "Unsloth's notebooks")
    ] = False
    target_modules: Annotated[
        Texts,
        Field(min_length=1, strict=False),
        shapes_weights(
            "the linear layers that get an adapter", "all of them, as QLoRA (Dettmers et al. 2023) found best"
        ),
    ] = LINEARS
    trainable_tokens: Annotated[
        Texts,
        Field(strict=False),
        shapes_weights(
            "tokens whose rows of embedding and head are trained too; not on a GPU, where Unsloth freezes them",
            "a template of tokens that the base knows needs none",
        ),
    ] = ()


class Compare(Section):
    """What `run_compare.py` asks base, SFT and DPO, and how they answer; each stage's report asks the same prompts."""

    prompts: Annotated[
        tuple[Prompt, ...],
        Field(min_length=1, strict=False),
        only_watches("prompts that are answered side by side", "three of general use; your own say more"),
    ] = PROMPTS
    questions: Annotated[
        str | None,
        only_watches(
            "a file of rows {messages, answer} that measure correct answers", "nothing is measured so"
        ),
    ] = None
    measures: Annotated[
        dict[MeasureName, RegularExpression],
        only_watches(
            "measures of your own: a name, and a regular expression that is searched for in each answer; the share "
            "of answers that hold it is shown under that name",
            "none",
        ),
    ] = NO_MEASURES
    system: Annotated[str | None, only_watches("a system turn before every prompt", "none")] = None
    max_new_tokens: Annotated[
        PositiveInt, only_watches("tokens of an answer at most", "as the shipped recipes of 7B and 8B models")
    ] = 384
    batch_size: Annotated[
        PositiveInt,
        only_watches("prompts that are answered at once", "as the shipped recipes of 7B and 8B models"),
    ] = 8
    mix_lengths: Annotated[
        bool,
        only_watches(
            "prompts of unlike length go into one batch, padded; false: a batch holds one length only",
            "with few prompts, one length a batch would be one prompt a batch",
        ),
    ] = True
    do_sample: Annotated[
        bool,
        only_watches(
            "draw tokens instead of taking the likeliest", "a difference is the model's, not the dice's"
        ),
    ] = False
    temperature: Annotated[
        PositiveFloat, only_watches("of the draw, with do_sample", "as the shipped recipes")
    ] = 0.7
    top_p: Annotated[
        float,
        Field(gt=0, le=1),
        only_watches(
            "draw from the likeliest tokens that hold this share, with do_sample", "as the shipped recipes"
        ),
    ] = 0.9


class Memory(Section):
    """How the card's memory is spent. `auto` is worked out by the plan and can be pinned by copying it from there."""

    alloc_conf: Annotated[
        str,
        on_machine("settings of the CUDA allocator, set before torch is imported", "Unsloth's own setting"),
    ] = "expandable_segments:True"
    budget_gib: Annotated[
        Literal["auto"] | PositiveFloat,
        on_machine(
            "GiB that a run may allocate", "what the card has, less context and reserve; a share of the RAM"
        ),
    ] = "auto"
    recompute_layers: Annotated[
        Literal["auto", "all", "none"] | Annotated[int, Field(ge=0)],
        on_machine("decoder layers that recompute their activations", "as few as fit: each costs time"),
    ] = "auto"
    per_device_train_batch_size: Annotated[
        Literal["auto"] | PositiveInt,
        on_machine(
            "rows (pairs in DPO) that go through the model at once; must divide effective_batch_size",
            "by tokens_per_micro_batch; packed rows as many as fit, up to about 4,096 tokens",
        ),
    ] = "auto"
    tokens_per_micro_batch: Annotated[
        Literal["auto"] | PositiveInt | None,
        on_machine(
            "tokens that go through the model at once, padding included: the rows of a step run in pieces of so many, "
            "a longer row alone; null: by rows",
            "as many as fit, up to 4,096: more buys no speed; by rows where they are packed or their number is pinned",
        ),
    ] = "auto"
    loss_chunk_gib: Annotated[
        Literal["auto"] | PositiveFloat,
        on_machine(
            "GiB of logits that exist at one time",
            "0.5, less where nothing else fits",
        ),
    ] = "auto"
    compile: Annotated[
        bool,
        on_machine(
            "compile the decoder layers (torch.compile) where batches are not packed; read on a GPU only",
            "not measured here; Unsloth notes some 100 s more at the start with 4-bit weights",
        ),
    ] = False
    price_per_hour: Annotated[
        PositiveFloat | None,
        on_machine(
            "what the machine costs an hour, in any currency: the plan and the first minute of a run say the cost",
            "no cost is said",
        ),
    ] = None
