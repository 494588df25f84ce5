"""Tokenizers small enough to build in a test, each of a family that real models use."""

from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
TEXT = [
    "the answer is an apple, the question was an answer",
    "def f(x):\n        return x + 1",
    "Answer: the",
] * 4


@cache
def byte_level() -> Tokenizer:
    """Llama-3's family: byte-level BPE, with a post-processor that trims offsets and adds a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*LLAMA3, *CHATML, *GEMMA, "<s>", "</s>"],
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    bos = LLAMA3[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


@cache
def metaspace(prepends: bool) -> Tokenizer:
    """Gemma's family, or Llama-2's (`prepends` a space): BPE with "▁" for spaces and bytes as a fallback."""
    words = ["▁", *"thenaAswr:\n", "th", "the", "▁the", "an", "▁a", "▁an"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "n"), ("▁", "a"), ("▁", "an")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prepends else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepends else steps)
    tokenizer.add_special_tokens([AddedToken(token) for token in ["<s>", "</s>", *CHATML, *GEMMA]])
    return tokenizer
