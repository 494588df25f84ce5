"""The machine: Python, torch, driver, GPU and who holds its memory, attention, RAM, disk. Imports no torch."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from toolkit import hardware
from toolkit.doctor.check import Check, judged, ok, warn
from toolkit.errors import UserError
from toolkit.hardware import Gpu, Hardware

PYTHONS = ((3, 11), (3, 13))  # oldest and newest that the pinned packages have wheels for
HELD = 0.1  # share of the card that others hold before it is worth a warning
LOW_DISK_GIB = 1.0  # where nothing is known of what will be written


def python() -> Check:
    found, (oldest, newest) = f"{platform.python_version()}, {sys.executable}", PYTHONS
    is_right = oldest <= sys.version_info[:2] <= newest
    fix = "Python 3.11 to 3.13 is needed: `make setup PYTHON=/path/to/python3.12`, then .venv/bin/python"
    return judged("python", found, None if is_right else fix)


def torch(gpu: Gpu | None) -> Check:
    """Whether the installed torch can use the GPU; without one any build will do."""
    try:
        build = hardware.torch_build()
    except UserError as error:
        return judged("torch", "not installed", str(error))
    found = f"{build[0]}, {f'for CUDA {build[1]}' if build[1] else 'a CPU build'}"
    return judged("torch", found, hardware.unfit_build(gpu, build) if gpu else None)


def unsloth() -> Check:
    try:
        return ok("unsloth", version("unsloth"))
    except PackageNotFoundError:
        return judged("unsloth", "not installed", "run `make setup`")


def driver(machine: Hardware) -> Check:
    if machine.gpu is None:
        return ok("driver", machine.no_gpu or "none")
    cuda = ".".join(map(str, machine.gpu.cuda))
    return ok("driver", f"{machine.gpu.driver}, CUDA up to {cuda}")


def gpu(machine: Hardware, recipe_gpu: str | None) -> Check:
    if machine.gpu is None:
        return judged("gpu", "none, so the CPU", hardware.missing_gpu(recipe_gpu, machine))
    found, sm = machine.gpu, ".".join(map(str, machine.gpu.sm))
    return ok("gpu", f"{found.name}, {found.total_gib:.1f} GiB, compute capability {sm}")


def bf16(gpu: Gpu | None) -> Check:
    if gpu is None:
        return ok("bf16", "asked of a GPU only")
    problem = hardware.old_card(gpu)
    return judged("bf16", "not supported" if problem else "supported", problem)


def vram(gpu: Gpu, needed_gib: float | None) -> Check:
    """What is free, who holds the rest, and whether that leaves what a recipe is predicted to need."""
    holders = [
        f"{process.name or 'a process'} ({process.pid})"
        + (f" {process.held_gib:.1f} GiB" if process.held_gib is not None else "")
        for process in hardware.gpu_processes()
    ]
    found = f"{gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free"
    is_held = gpu.total_gib - gpu.free_gib > HELD * gpu.total_gib
    if holders:
        found += f"; held by {', '.join(holders)}"
    elif is_held:
        found += "; the driver does not say who holds the rest, as in a container"
    end = "end what holds it: `nvidia-smi` on the host shows the processes"
    if needed_gib is not None and needed_gib > gpu.free_gib:
        return judged("vram", found, f"{needed_gib:.1f} GiB are predicted to be needed: {end}")
    return warn("vram", found, f"a run plans with all of it: {end}") if is_held else ok("vram", found)


def attention() -> Check:
    """Which kernels Unsloth takes for attention on a GPU (unsloth/utils/attention_dispatch.py)."""
    packed = "packed rows by torch's variable-length kernels"
    if find_spec("flash_attn"):
        return ok("attention", "FlashAttention")
    if not hardware.has_xformers():
        return ok("attention", f"torch's SDPA, {packed}; no xFormers")
    built, (_, cuda) = hardware.xformers_cuda(), hardware.torch_build()
    found = f"xFormers {version('xformers')} for CUDA {built or 'unknown'}"
    if built and cuda and built.partition(".")[0] == cuda.partition(".")[0]:
        return ok("attention", f"{found}, {packed}")
    fix = "torch's SDPA runs instead; the memory plan counts xFormers in: `pip uninstall xformers`"
    return warn("attention", f"{found}, which does not load beside torch for CUDA {cuda}", fix)


def ram(machine: Hardware) -> Check:
    """What is free; and whether this process may have as much as the libraries take."""
    found = f"{machine.ram_available_gib:.1f} of {machine.ram_gib:.1f} GiB free, {machine.cpu_count} CPUs"
    return judged("ram", found, " ".join(hardware.check_limits()) or None)


def disk(name: str, path: Path, needed_gib: float | None = None) -> Check:
    """Room where `path` lies, or will."""
    free = hardware.disk_free_gib(path)
    found = f"{free:.1f} GiB free for {path}"
    if needed_gib is not None and free < needed_gib:
        return judged(name, found, f"at least {needed_gib:.1f} GiB will be written: {_elsewhere(name)}")
    return warn(name, found, _elsewhere(name)) if free < LOW_DISK_GIB else ok(name, found)


def _elsewhere(name: str) -> str:
    where = {"disk of runs": "--runs DIR", "disk of the Hub": "HF_HOME"}.get(name, "XDG_CACHE_HOME")
    return f"make room there, or point {where} at a larger volume"
