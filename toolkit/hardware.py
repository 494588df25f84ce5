"""What is here: NVIDIA GPU and driver, RAM, CPUs, disk, the installed torch.

Nothing here imports torch. Without a driver every question still has an answer: there is no GPU, and why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from toolkit.cards import CARDS, Card, known_card
from toolkit.errors import UserError

GIB = 2**30

# Oldest driver branch for each CUDA major version; minor versions are compatible within a major one.
# NVIDIA, "CUDA Compatibility", table of minimum driver versions.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# PyTorch's own wheel index with the pinned torch for CUDA 12.6; PyPI's is for CUDA 13. The Makefile takes it by itself.
CUDA12_INDEX = "https://download.pytorch.org/whl/cu126"
OLDEST_SM = (7, 0)  # Unsloth and Triton refuse older ones (unsloth README, "GPU requirements")
BF16_SM = (8, 0)  # bf16 tensor cores begin with Ampere (NVIDIA A100 white paper)

# Of the tiny recipe on a CPU: 2.5 GiB ended in any of a dozen ways, 3.3 sufficed. A GPU's driver takes more.
LEAST_ADDRESS_SPACE_GIB = 3.3

# Device files of a loaded driver (Linux; WSL). Without one the 30 ms of importing pynvml are saved.
DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")

# Limit, use and statistics of a container's memory: cgroup v2, then v1.
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True)
class Gpu:
    """The GPU that a run would use. `cuda` is the highest CUDA version that `driver` supports."""

    name: str
    total_gib: float
    free_gib: float
    sm: tuple[int, int]
    driver: str
    cuda: tuple[int, int]

    @property
    def card(self) -> Card:
        """As a card to plan for: the memory found here, and the rates of a card in CARDS that it is."""
        known = known_card(self.name) or Card(self.name, self.total_gib)
        return replace(known, name=self.name, total_gib=self.total_gib, sm=self.sm)


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of the GPU; what the driver does not tell (to a container, say) is None."""

    pid: int
    name: str | None
    held_gib: float | None


@dataclass(frozen=True)
class Hardware:
    """This machine as this process may use it. `no_gpu` says why `gpu` is None; RAM is what the container may
    use.
    """

    gpu: Gpu | None
    no_gpu: str | None
    ram_gib: float
    ram_available_gib: float
    cpu_count: int

    @property
    def card(self) -> Card | None:
        """The GPU as a card to plan for, None without one."""
        return self.gpu.card if self.gpu else None


def here() -> Hardware:
    """The machine this runs on. Never raises for want of a GPU or a driver."""
    gpu, no_gpu = _gpu()
    total, available = _ram_gib()
    return Hardware(gpu, no_gpu, total, available, _cpu_count())


def gpu_processes() -> list[GpuProcess]:
    """Who holds memory of the GPU that a run would use, the largest first; empty where the driver does not tell."""
    found, _ = _on_device(_processes)
    return found or []


def disk_free_gib(path: str | Path) -> float:
    """GiB free where `path` lies or would be created."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / GIB


def torch_build() -> tuple[str, str | None]:
    """(version, CUDA version or None) of the installed torch, read from its version.py without importing it.

    Raises UserError when torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UserError("torch is not installed in this environment: run `make setup`")
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= *'([^']*)'", text, re.MULTILINE))
    return values["__version__"], values.get("cuda")


def has_xformers() -> bool:
    """Whether xFormers is installed, which Unsloth then takes for the attention of batches that are not packed."""
    return importlib.util.find_spec("xformers") is not None


def xformers_cuda() -> str | None:
    """CUDA version that the installed xFormers is built for, from its own record; None where there is none."""
    spec = importlib.util.find_spec("xformers")
    if spec is None or spec.origin is None:
        return None
    try:
        record = json.loads((Path(spec.origin).parent / "cpp_lib.json").read_text(encoding="utf-8"))
        cuda = int(record["version"]["cuda"])  # 1208 is 12.8
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"{cuda // 100}.{cuda % 100}"


def check(recipe_gpu: str | None, hardware: Hardware, torch_build: tuple[str, str | None]) -> list[str]:
    """What keeps this machine from running a recipe made for `recipe_gpu` (null: any); empty when nothing
    does.

    Whether the memory suffices is `memory.plan`'s to say.
    """
    if hardware.gpu is None:
        found = [missing_gpu(recipe_gpu, hardware)]
    else:
        found = [old_card(hardware.gpu), unfit_build(hardware.gpu, torch_build)]
    return [problem for problem in found if problem]


def missing_gpu(recipe_gpu: str | None, hardware: Hardware) -> str | None:
    """That a recipe made for a card has none here."""
    if recipe_gpu is None or hardware.gpu is not None:
        return None
    return (
        f"the recipe is made for {recipe_gpu}, but there is no NVIDIA GPU here ({hardware.no_gpu}): "
        "run it on a machine with one, or take `--set gpu=null` to run on the CPU anyway"
    )


def old_card(gpu: Gpu) -> str | None:
    """That the card is of a generation on which bf16, or Unsloth, does not run."""
    if gpu.sm >= BF16_SM:
        return None
    what = "bf16" if gpu.sm >= OLDEST_SM else "Unsloth"
    limit = BF16_SM if gpu.sm >= OLDEST_SM else OLDEST_SM
    return (
        f"{gpu.name} has compute capability {_dotted(gpu.sm)}, {what} needs {_dotted(limit)} or more: "
        f"take a card of the Ampere generation or newer ({', '.join(CARDS)})"
    )


def unfit_build(gpu: Gpu, torch_build: tuple[str, str | None]) -> str | None:
    """That the installed torch cannot use the card: a CPU build, or one for a newer CUDA than the driver's."""
    torch, cuda = torch_build
    runs_12 = gpu.cuda[0] >= 12
    index = CUDA12_INDEX if gpu.cuda[0] == 12 else ""
    if cuda is None:
        return (
            f"{gpu.name} is here, but torch {torch} is a CPU build: install the CUDA build of the same "
            f"version (this driver supports CUDA up to {_dotted(gpu.cuda)}), `make setup TORCH_INDEX={index}`, or "
            "set CUDA_VISIBLE_DEVICES= (empty) and UNSLOTH_FORCE_CPU=1 to run on the CPU anyway"
        )
    major = int(cuda.partition(".")[0])
    if major <= gpu.cuda[0]:
        return None
    oldest = f"{OLDEST_DRIVER[major]} or newer" if major in OLDEST_DRIVER else f"one for CUDA {major}"
    other = (
        f", or install the same torch for CUDA 12.6, `make setup TORCH_INDEX={CUDA12_INDEX}`"
        if runs_12
        else ""
    )
    return (
        f"driver {gpu.driver} supports CUDA up to {_dotted(gpu.cuda)}, but torch {torch} is built for "
        f"CUDA {cuda}, which needs driver {oldest}: take a machine (a pod) with a newer driver{other}"
    )


def check_limits() -> list[str]:
    """What this process is not allowed that it needs; empty when it is allowed all."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or limit >= LEAST_ADDRESS_SPACE_GIB * GIB:
        return []
    return [
        f"`ulimit -v` allows this process {limit / GIB:.1f} GiB of address space, and PyTorch and Unsloth take "
        f"{LEAST_ADDRESS_SPACE_GIB:g} before there is a model: raise it, or `ulimit -v unlimited`"
    ]


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _gpu() -> tuple[Gpu | None, str | None]:
    return _on_device(_ask)


_T = TypeVar("_T")


def _on_device(ask: Callable[[Any, Any], _T]) -> tuple[_T | None, str | None]:
    """What NVML says of the first GPU that CUDA_VISIBLE_DEVICES leaves visible, or why there is none.

    NVML counts in PCI order and CUDA fastest first: on a machine with several kinds of cards, a UUID is
    exact.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first in ("", "-1", "NoDevFiles"):
        return None, f"CUDA_VISIBLE_DEVICES is {visible!r}"
    if os.name == "posix" and not any(map(os.path.exists, DRIVER_FILES)):
        return None, "no NVIDIA driver is loaded"
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdigit() else _by_uuid(pynvml, first)
            )
            return ask(pynvml, handle), None
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return None, f"NVML says: {error}"


def _ask(nvml: Any, handle: Any) -> Gpu:
    # Version 2 tells the driver's own share, which torch does not see either; drivers have it since 510.
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is 13.0
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=nvml.nvmlDeviceGetName(handle),
        total_gib=(memory.total - memory.reserved) / GIB,
        free_gib=memory.free / GIB,
        sm=(major, minor),
        driver=nvml.nvmlSystemGetDriverVersion(),
        cuda=(cuda // 1000, cuda % 1000 // 10),
    )


def _processes(nvml: Any, handle: Any) -> list[GpuProcess]:
    found = {}
    for of_kind in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with contextlib.suppress(nvml.NVMLError):
            found.update({process.pid: process.usedGpuMemory for process in of_kind(handle)})
    processes = [
        GpuProcess(pid, _process_name(nvml, pid), None if held is None else held / GIB)
        for pid, held in found.items()
    ]
    return sorted(processes, key=lambda process: process.held_gib or 0, reverse=True)


def _process_name(nvml: Any, pid: int) -> str | None:
    """The program alone: what stands behind it on its command line is nobody's business, and may be a token."""
    try:
        return Path(nvml.nvmlSystemGetProcessName(pid).partition(" ")[0]).name or None
    except nvml.NVMLError:
        return None


def _by_uuid(nvml: Any, uuid: str) -> Any:
    """CUDA takes any unambiguous beginning of a UUID, NVML only the whole."""
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if nvml.nvmlDeviceGetUUID(handle).startswith(uuid):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(uuid)


def _ram_gib() -> tuple[float, float]:
    """(total, available) GiB, within the memory limit of the container if it has one."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    meminfo = _read("/proc/meminfo")
    if found := re.search(r"^MemAvailable: *(\d+) kB", meminfo, re.MULTILINE):
        available = int(found[1]) * 1024  # counts the page cache that can be given back; sysconf does not
    for limit, used, stat in CGROUPS:
        bytes_limit = _read(limit).strip()
        if bytes_limit.isdigit() and int(bytes_limit) < total:
            total = int(bytes_limit)
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(stat), re.MULTILINE)
            held = int(_read(used).strip() or 0) - (int(cache[1]) if cache else 0)
            available = max(0, min(available, total - held))
    return total / GIB, available / GIB


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _cpu_count() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
