"""The process environment, set before torch is imported: allocator, telemetry, where Unsloth writes.

The only place that writes to `os.environ`. `prepare` runs first in every script; `toolkit.engine` refuses to be
imported without it, because the allocator reads its variable once and Unsloth must patch before trl is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from toolkit.errors import UserError
from toolkit.world import ALONE, NAMES, World

TOO_LATE = ("torch", "unsloth", "transformers", "trl", "peft")
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# GiB of logits at one time in Unsloth's fused head, which makes SFT's loss and DPO's log-probs alike (unsloth_zoo
# fused_losses/fused_linear.py, _CHUNK_GB; read once, at import). UNSLOTH_CE_LOSS_TARGET_GB is never set: it would send
# SFT to an older cross entropy with 16 bytes a logit (cross_entropy_loss.py, _use_chunked_ce).
LOSS_CHUNK_VARIABLE = "UNSLOTH_LOGPROB_CHUNK_GB"

# What a launcher says of its processes. Each trains as if it were alone on its GPU, and what they share is summed by
# engine/base/ranks.py: libraries that see these variables wrap models, split rows and average in ways of their own.
LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_")

TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"  # read at every batch

_prepared: Environment | None = None
_exported_threads: str | None = None


@dataclass(frozen=True)
class Environment:
    """What was set, for the report. `alloc_source` is "recipe" or the name of the variable the user exported."""

    alloc_variable: str
    alloc_conf: str
    alloc_source: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def allocator_variable(torch_version: str) -> str:
    """The one variable this torch reads: 2.9 still ignores the new name silently, 2.10 and later prefer it."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return "PYTORCH_ALLOC_CONF" if (major, minor) >= (2, 10) else "PYTORCH_CUDA_ALLOC_CONF"


def keep_apart(world: World) -> None:
    """Leaves this process its own GPU, and none of the launcher's variables. Before anything asks for a GPU.

    Raises UserError where it has none of its own.
    """
    for name in [name for name in os.environ if name in NAMES or name.startswith(LAUNCHERS)]:
        del os.environ[name]
    if world.is_alone:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        devices = visible.split(",")
        if world.local_rank >= len(devices):
            raise UserError(
                f"{world.local_size} processes were started on this machine and CUDA_VISIBLE_DEVICES={visible} leaves "
                f"{len(devices)} GPU{'s' * (len(devices) != 1)}: start one process for each"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[world.local_rank]
    elif visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(world.local_rank)


def prepare(
    alloc_conf: str,
    use_gpu: bool,
    loss_chunk_gib: float | None = None,
    compile_layers: bool = False,
    world: World = ALONE,
) -> Environment:
    """Sets the environment of a training process; an exported allocator setting wins over `alloc_conf`.

    `loss_chunk_gib` bounds the logits that Unsloth makes at one time, in SFT's loss and in DPO's log-probs; None
    leaves it to Unsloth. `compile_layers` lets it compile the decoder layers; an exported UNSLOTH_BLOCK_COMPILE wins.
    Raises UserError naming
    the offender when torch or a library that imports it is already loaded.
    """
    global _prepared, _exported_threads
    if _prepared is not None:
        return _prepared
    loaded = [name for name in TOO_LATE if name in sys.modules]
    if loaded:
        raise UserError(
            f"{', '.join(loaded)} was imported before the allocator could be set: call toolkit.env.prepare() first, "
            "or run the scripts run_sft.py, run_dpo.py, run_compare.py as they are"
        )
    variable = allocator_variable(version("torch"))
    exported = next((name for name in (variable, *ALLOCATOR_VARIABLES) if os.environ.get(name)), None)
    value = os.environ[exported] if exported else alloc_conf
    for name in ALLOCATOR_VARIABLES:
        os.environ.pop(name, None)
    os.environ[variable] = value
    if not use_gpu:
        os.environ["UNSLOTH_FORCE_CPU"] = "1"  # also where a driver is loaded but its GPU is hidden
    if use_gpu and loss_chunk_gib is not None:
        os.environ.setdefault(LOSS_CHUNK_VARIABLE, f"{loss_chunk_gib:g}")
    if use_gpu:  # read at import (unsloth/models/_block_compile.py); on by default there
        os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", str(int(compile_layers)))
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # else: a download at import
    os.environ["UNSLOTH_LLAMA_CPP_OFFLINE"] = "1"  # else: GGUF export may clone and install unattended
    compiled = os.environ.get("UNSLOTH_COMPILE_LOCATION") or str(cache_folder() / "unsloth_compiled_cache")
    own = f".{world.rank}" if world.rank else ""  # no two processes write one
    os.environ["UNSLOTH_COMPILE_LOCATION"] = compiled + own
    # Threads that spin long at a barrier starve each other where cores are shared (a pod, a laptop): beside other
    # work an earlier tiny model fell from 3,600 to 250 tokens/s. Not to spin at all costs half on idle cores:
    # 40 steps took 8.7 s, 5.8 s with this, 5.2 s spinning on; beside two busy loops 9.7 and 16.3 s.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _exported_threads = os.environ.get(TOKENIZER_THREADS)
    _prepared = Environment(variable, value, exported or "recipe")
    return _prepared


def require_prepared() -> Environment:
    """The prepared environment; an error of ours when `prepare` has not run."""
    assert _prepared is not None, "toolkit.engine was imported before toolkit.env.prepare()"
    return _prepared


@contextmanager
def tokenizer_threads() -> Iterator[None]:
    """Lets the tokenizer encode a batch on all cores, which Unsloth's import switches off; an exported setting wins.

    Only inside: a process that is forked with it on has none of the threads, and would wait for them.
    """
    before = os.environ.get(TOKENIZER_THREADS)
    os.environ[TOKENIZER_THREADS] = _exported_threads or "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TOKENIZER_THREADS]
        else:
            os.environ[TOKENIZER_THREADS] = before


def cache_folder() -> Path:
    """Where the toolkit keeps what can be made again; may be deleted at any time."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-toolkit"
    except RuntimeError:  # HOME is not set, and this user has no entry in /etc/passwd
        raise UserError("no home directory: set HOME, or XDG_CACHE_HOME, to a folder to write to") from None
