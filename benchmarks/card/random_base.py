"""A base model with the architecture of a recipe and random weights, quantised to NF4 layer by layer.

Speed and memory do not depend on the values, so no download is needed to measure them. Llama-3.1-8B takes 5.4 GiB
on the disk and never more than one linear in 16 bit in memory. Embedding and head have rows of unlike length, none
zero and none repeated: what the toolkit looks at before it trains.

python benchmarks/card/random_base.py RECIPE FOLDER
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import bitsandbytes.functional as bnb  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from toolkit.memory.terms import head_dim, linears  # noqa: E402
from toolkit.recipe.load import load  # noqa: E402
from toolkit.recipe.schema import Architecture  # noqa: E402

NORM_SPREAD = 0.25  # of the logarithm of a row's norm
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PARTS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}


def build(folder: Path, architecture: Architecture, tokenizer: Path) -> None:
    """Writes a Llama checkpoint that needs no quantising at load; the tokenizer is copied from a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(architecture), indent=2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / file)
        where.update(dict.fromkeys(tensors, file))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.02

    def table(*shape: int) -> torch.Tensor:
        spread = NORM_SPREAD * torch.randn(shape[0], 1, generator=generator, device=device)
        return (random(*shape) * spread.exp()).to(torch.bfloat16)

    wide, vocab = architecture.hidden_size, architecture.vocab_size
    write(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": table(vocab, wide),
            "lm_head.weight": table(vocab, wide),
            "model.norm.weight": torch.ones(wide, dtype=torch.bfloat16),
        },
    )
    for layer in range(architecture.num_hidden_layers):
        prefix, tensors = f"model.layers.{layer}", {}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(wide, dtype=torch.bfloat16)
        for name, (inputs, outputs) in linears(architecture).items():
            weight = f"{prefix}.{PARTS.get(name, 'mlp')}.{name}.weight"
            packed, state = bnb.quantize_4bit(
                random(outputs, inputs), quant_type="nf4", compress_statistics=True
            )
            tensors[weight] = packed
            tensors |= {f"{weight}.{key}": value for key, value in state.as_dict(packed=True).items()}
        write(f"layer_{layer}.safetensors", tensors)
    index = {
        "metadata": {"total_size": sum(f.stat().st_size for f in folder.glob("*.safetensors"))},
        "weight_map": where,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(architecture: Architecture) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 8192,
        **architecture.model_dump(exclude_none=True),
        "head_dim": head_dim(architecture),
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            # most CPUs only emulate bf16
            "bnb_4bit_compute_dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        },
    }


if __name__ == "__main__":
    name, target = sys.argv[1], Path(sys.argv[2])
    made = target.with_name(f".{target.name}.tmp")
    build(made, load(name).model.architecture, ROOT / "recipes/tiny/base")
    made.rename(target)
