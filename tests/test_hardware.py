"""Cards, what is here, and what a machine lacks for a recipe. No GPU is needed: NVML is a stand-in here."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit import cards, hardware
from toolkit.cards import CARDS
from toolkit.errors import UserError
from toolkit.hardware import GIB, Gpu, GpuProcess, Hardware

RTX4090 = Gpu("NVIDIA GeForce RTX 4090", 23.5, 23.2, (8, 9), "580.65.06", (13, 0))
WITH_GPU = Hardware(RTX4090, None, 64, 60, 16)
WITHOUT_GPU = Hardware(None, "no NVIDIA driver is loaded", 16, 12, 2)
CPU_BUILD, CUDA13_BUILD, CUDA12_BUILD = (
    ("2.13.0+cpu", None),
    ("2.13.0+cu130", "13.0"),
    ("2.13.0+cu128", "12.8"),
)


def with_gpu(**changes: object) -> Hardware:
    return replace(WITH_GPU, gpu=replace(RTX4090, **changes))


class Nvml(SimpleNamespace):
    """Two cards, as pynvml tells them."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 2

    def __init__(self, broken: str | None = None):
        super().__init__(broken=broken, asked=[], closed=False)
        self.cards = [("NVIDIA GeForce RTX 4090", "GPU-aaaa", (8, 9)), ("NVIDIA A40", "GPU-bbbb", (8, 6))]

    def nvmlInit(self):
        if self.broken:
            raise self.NVMLError(self.broken)

    def nvmlShutdown(self):
        self.closed = True

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= len(self.cards):
            raise self.NVMLError("Invalid Argument")
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        raise self.NVMLError("Not Found")

    def nvmlDeviceGetMemoryInfo(self, handle, version):
        assert version == self.nvmlMemory_v2
        return SimpleNamespace(total=24 * GIB, reserved=GIB // 2, free=20 * GIB)

    def nvmlDeviceGetName(self, handle):
        return handle[0]

    def nvmlDeviceGetUUID(self, handle):
        return handle[1]

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return handle[2]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=7, usedGpuMemory=None), SimpleNamespace(pid=42, usedGpuMemory=3 * GIB)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        raise self.NVMLError("Not Supported")

    def nvmlSystemGetProcessName(self, pid):
        if pid == 7:
            raise self.NVMLError("Not Found")
        return "/usr/bin/python3 train.py --token=abc"

    def nvmlSystemGetDriverVersion(self):
        return "570.124.06"

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 12080


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(hardware, "DRIVER_FILES", (__file__,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


class TestCards:
    def test_by_name_and_by_gib(self):
        assert cards.card(" RTX4090 ") is CARDS["rtx4090"]
        for text in ("24", "24.0", "24GiB", "24 gib", "24gb", "192", "4090 GiB"):
            card = cards.card(text)
            assert card.total_gib == float(text.lower().rstrip(" gib"))
            assert (card.bf16_tflops, card.bandwidth_gb_s, card.sm) == (None, None, None)

    @pytest.mark.parametrize(
        ("key", "spellings"),
        [
            ("rtx3090", ("3090", "RTX 3090", "nvidia geforce rtx 3090", "rtx-3090 24GB")),
            ("rtx5090", ("5090", "RTX_5090")),
            ("a5000", ("A5000", "RTX A5000")),
            ("a6000", ("a6000", "NVIDIA RTX A6000", "A6000 48GB")),
            ("rtx6000_ada", ("6000 Ada", "RTX 6000 Ada Generation", "rtx6000ada")),
            ("l40s", ("L40S", "NVIDIA L40S")),
            ("a100_40", ("A100 40GB", "a100-40")),
            ("a100_80", ("A100-SXM4-80GB", "A100 80 GB", "A100 PCIe 80GB")),
            ("h100", ("H100", "H100 80GB HBM3", "H100 PCIe", "H100 SXM5")),
            ("b200", ("B200",)),
        ],
    )
    def test_any_usual_spelling_is_known(self, key, spellings):
        assert [cards.card(text) for text in (key, *spellings)] == [CARDS[key]] * (1 + len(spellings))

    @pytest.mark.parametrize(
        ("text", "near"),
        [("A100", "a100_40 or a100_80"), ("6000", "a6000 or rtx6000_ada"), ("3080", "rtx3090"), ("400", "")],
    )
    def test_a_number_that_is_no_memory_and_no_card_is_refused(self, text, near):
        with pytest.raises(UserError, match=f"no card '{text}': did you mean {near}"):
            cards.card(text)

    def test_unknown_name_gets_near_ones(self):
        with pytest.raises(
            UserError, match=r"no card 'rtx4080': did you mean rtx4090.*Known cards: rtx3090, .*GiB"
        ):
            cards.card("rtx4080")

    @pytest.mark.parametrize("text", ["0", "-3", "nan", "inf"])
    def test_memory_must_be_above_0(self, text):
        with pytest.raises(UserError, match="must be above 0"):
            cards.card(text)

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("NVIDIA GeForce RTX 4090", "rtx4090"),
            ("NVIDIA GeForce RTX 3090", "rtx3090"),
            ("NVIDIA A40", "a40"),
            ("NVIDIA L4", "l4"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA A100-SXM4-40GB", "a100_40"),
            ("NVIDIA A100-PCIE-40GB", "a100_40"),
            ("NVIDIA A100 80GB PCIe", "a100_80"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA B200", "b200"),
            ("NVIDIA RTX 6000 Ada Generation", "rtx6000_ada"),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ],
    )
    def test_driver_names_are_known(self, name, key):
        card = replace(RTX4090, name=name).card
        assert card.name == name
        assert card.total_gib == 23.5, "what was found, not what the table says"
        assert card.bf16_tflops == (CARDS[key].bf16_tflops if key else None)


class TestHere:
    def test_without_a_driver(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(hardware, "DRIVER_FILES", ("/no/such/device",))
        monkeypatch.setitem(sys.modules, "pynvml", None)  # not even asked for
        here = hardware.here()
        assert (here.gpu, here.card, here.no_gpu) == (None, None, "no NVIDIA driver is loaded")
        assert here.ram_gib >= here.ram_available_gib > 0
        assert here.cpu_count >= 1

    def test_first_card(self, nvml):
        here = hardware.here()
        assert here.gpu == Gpu("NVIDIA GeForce RTX 4090", 23.5, 20, (8, 9), "570.124.06", (12, 8))
        assert here.no_gpu is None
        assert nvml.closed

    @pytest.mark.parametrize(
        ("visible", "name"), [("1", "NVIDIA A40"), ("1,0", "NVIDIA A40"), ("GPU-bb", "NVIDIA A40")]
    )
    def test_first_visible_card(self, nvml, monkeypatch, visible, name):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpu = hardware.here().gpu
        assert gpu is not None
        assert gpu.name == name

    @pytest.mark.parametrize(
        ("visible", "reason"),
        [("", "is ''"), ("-1", "is '-1'"), ("7", "NVML says: Invalid"), ("GPU-cc", "NVML says: Not Found")],
    )
    def test_no_visible_card(self, nvml, monkeypatch, visible, reason):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        here = hardware.here()
        assert here.gpu is None
        assert here.no_gpu is not None
        assert reason in here.no_gpu

    def test_who_holds_memory(self, nvml):
        processes = hardware.gpu_processes()
        assert processes == [GpuProcess(42, "python3", 3.0), GpuProcess(7, None, None)]
        nvml.broken = "Driver/library version mismatch"
        assert hardware.gpu_processes() == []

    def test_a_broken_driver_is_told(self, nvml):
        nvml.broken = "Driver/library version mismatch"
        assert hardware.here().no_gpu == "NVML says: Driver/library version mismatch"

    def test_container_limit_counts(self, tmp_path, monkeypatch):
        (tmp_path / "limit").write_text(f"{GIB}\n")
        (tmp_path / "used").write_text(f"{GIB // 2}\n")
        (tmp_path / "stat").write_text(f"anon 5\ninactive_file {GIB // 4}\n")
        monkeypatch.setattr(
            hardware, "CGROUPS", (tuple(str(tmp_path / name) for name in ("limit", "used", "stat")),)
        )
        here = hardware.here()
        assert (here.ram_gib, here.ram_available_gib) == (1, 0.75)

    def test_disk_of_a_folder_to_be(self, tmp_path):
        assert hardware.disk_free_gib(tmp_path / "runs" / "x") == pytest.approx(
            hardware.disk_free_gib(tmp_path), rel=0.01
        )


class TestTorchBuild:
    def test_is_the_installed_one(self):
        version, cuda = hardware.torch_build()
        assert version.partition("+")[0] == importlib.metadata.version("torch").partition("+")[0]
        assert cuda is None or cuda[0].isdigit()

    def test_cuda_build(self, tmp_path, monkeypatch):
        (tmp_path / "version.py").write_text(
            "from typing import Optional\n__version__ = '2.13.0+cu130'\ndebug = False\n"
            "cuda: Optional[str] = '13.0'\ngit_version = 'abc'\n"
        )
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        assert hardware.torch_build() == CUDA13_BUILD

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"torch is not installed.*make setup"):
            hardware.torch_build()


class TestCheck:
    @pytest.mark.parametrize(
        ("gpu", "machine", "build"),
        [
            (None, WITHOUT_GPU, CPU_BUILD),
            (None, WITHOUT_GPU, CUDA13_BUILD),
            (None, WITH_GPU, CUDA13_BUILD),
            ("rtx4090", WITH_GPU, CUDA13_BUILD),
            (
                "rtx4090",
                with_gpu(driver="535.104.05", cuda=(12, 2)),
                CUDA12_BUILD,
            ),  # minor versions do not matter
            ("h100", WITH_GPU, CUDA13_BUILD),  # another card will do: whether it fits is the plan's to say
        ],
    )
    def test_nothing_is_wrong(self, gpu, machine, build):
        assert hardware.check(gpu, machine, build) == []

    def test_driver_too_old(self):
        old = with_gpu(driver="570.124.06", cuda=(12, 8))
        (problem,) = hardware.check("rtx4090", old, CUDA13_BUILD)
        for words in (
            "driver 570.124.06",
            "up to 12.8",
            "2.13.0+cu130",
            "580 or newer",
            "pod",
            "for CUDA 12",
        ):
            assert words in problem
        (problem,) = hardware.check("rtx4090", with_gpu(driver="470.1", cuda=(11, 4)), CUDA12_BUILD)
        assert "525 or newer" in problem
        (problem,) = hardware.check("rtx4090", WITH_GPU, ("3.0.0", "14.1"))
        assert "needs driver one for CUDA 14" in problem

    def test_cpu_build_beside_a_gpu(self):
        (problem,) = hardware.check(None, WITH_GPU, CPU_BUILD)
        for words in (
            "RTX 4090 is here",
            "2.13.0+cpu is a CPU build",
            "CUDA up to 13.0",
            "UNSLOTH_FORCE_CPU=1",
        ):
            assert words in problem

    def test_no_gpu_for_a_gpu_recipe(self):
        (problem,) = hardware.check("rtx4090", WITHOUT_GPU, CPU_BUILD)
        for words in ("made for rtx4090", "no NVIDIA driver is loaded", "`--set gpu=null`"):
            assert words in problem

    @pytest.mark.parametrize(
        ("name", "sm", "words"),
        [
            ("Tesla T4", (7, 5), ["7.5", "bf16 needs 8.0"]),
            ("Tesla V100", (7, 0), ["7.0", "bf16 needs 8.0"]),
            ("Tesla P40", (6, 1), ["6.1", "Unsloth needs 7.0"]),
        ],
    )
    def test_card_too_old(self, name, sm, words):
        (problem,) = hardware.check(None, with_gpu(name=name, sm=sm), CUDA12_BUILD)
        for word in (*words, name, "Ampere"):
            assert word in problem

    def test_all_at_once(self):
        assert len(hardware.check("a40", with_gpu(sm=(7, 5)), CPU_BUILD)) == 2


def test_imports_nothing_heavy():
    script = (
        "import sys, toolkit.hardware as h; h.here(); h.torch_build(); "
        "print([m for m in ('torch', 'unsloth', 'transformers', 'pydantic') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
