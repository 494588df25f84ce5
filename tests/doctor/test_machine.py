"""What is said of a machine; the GPU is a stand-in, as toolkit.hardware tells of one."""

import json
import sys
from pathlib import Path

import pytest

from tests.test_hardware import CUDA12_BUILD, CUDA13_BUILD, RTX4090, WITH_GPU, WITHOUT_GPU, with_gpu
from toolkit import hardware
from toolkit.doctor import machine
from toolkit.errors import UserError
from toolkit.hardware import GpuProcess


def test_an_old_python_is_named_with_the_command_that_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.python().status == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    check = machine.python()
    assert check.status == "fail" and "make setup PYTHON=" in str(check.fix)


def test_torch_is_held_against_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "torch_build", lambda: CUDA13_BUILD)
    assert machine.torch(RTX4090).status == "ok"
    check = machine.torch(with_gpu(driver="550.90.07", cuda=(12, 4)).gpu)
    assert check.status == "fail" and f"TORCH_INDEX={hardware.CUDA12_INDEX}" in str(check.fix)
    assert "13.0" in check.found


def test_no_torch_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[str, str | None]:
        raise UserError("torch is not installed: run `make setup`")

    monkeypatch.setattr(hardware, "torch_build", missing)
    check = machine.torch(None)
    assert (check.status, check.fix) == ("fail", "torch is not installed: run `make setup`")


def test_the_card_and_its_driver() -> None:
    assert (
        machine.gpu(WITH_GPU, "rtx4090").found == "NVIDIA GeForce RTX 4090, 23.5 GiB, compute capability 8.9"
    )
    assert machine.driver(WITH_GPU).found == "580.65.06, CUDA up to 13.0"
    assert machine.gpu(WITHOUT_GPU, None).status == "ok"
    assert machine.gpu(WITHOUT_GPU, "rtx4090").status == "fail"
    assert machine.driver(WITHOUT_GPU).found == "no NVIDIA driver is loaded"


def test_bf16_begins_with_ampere() -> None:
    assert machine.bf16(RTX4090).status == "ok"
    assert machine.bf16(with_gpu(name="Tesla T4", sm=(7, 5)).gpu).status == "fail"


class TestVram:
    @pytest.fixture
    def held(self, monkeypatch: pytest.MonkeyPatch) -> list[GpuProcess]:
        processes: list[GpuProcess] = []
        monkeypatch.setattr(hardware, "gpu_processes", lambda: processes)
        return processes

    def test_a_free_card(self, held: list[GpuProcess]) -> None:
        check = machine.vram(RTX4090, needed_gib=21.0)
        assert (check.status, check.found) == ("ok", "23.2 of 23.5 GiB free")

    def test_who_holds_the_rest(self, held: list[GpuProcess]) -> None:
        held += [GpuProcess(4242, "python3", 12.5), GpuProcess(7, None, None)]
        gpu = with_gpu(free_gib=10.7).gpu
        assert gpu is not None
        check = machine.vram(gpu, needed_gib=8.0)
        assert check.status == "warn"
        assert check.found == "10.7 of 23.5 GiB free; held by python3 (4242) 12.5 GiB, a process (7)"
        assert machine.vram(gpu, needed_gib=21.0).status == "fail"

    def test_a_container_does_not_see_them(self, held: list[GpuProcess]) -> None:
        gpu = with_gpu(free_gib=10.7).gpu
        assert gpu is not None
        assert "does not say who" in machine.vram(gpu, None).found


class TestAttention:
    @pytest.fixture
    def xformers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """xFormers as PyPI has it: built for CUDA 12.8."""
        package = tmp_path / "xformers"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "cpp_lib.json").write_text(
            json.dumps({"version": {"cuda": 1208, "torch": "2.10.0+cu128"}})
        )
        info = tmp_path / "xformers-0.0.35.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    def test_without_xformers(self) -> None:
        assert machine.attention().found.startswith("torch's SDPA")

    def test_a_build_for_the_same_cuda(self, xformers: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "torch_build", lambda: CUDA12_BUILD)
        check = machine.attention()
        assert check.status == "ok" and check.found.startswith("xFormers 0.0.35 for CUDA 12.8")

    def test_a_build_for_another_cuda(self, xformers: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "torch_build", lambda: CUDA13_BUILD)
        check = machine.attention()
        assert check.status == "warn" and "SDPA runs instead" in str(check.fix)


def test_a_disk_without_room_names_what_moves_it(tmp_path: Path) -> None:
    assert machine.disk("disk of runs", tmp_path / "runs").status == "ok"
    check = machine.disk("disk of the Hub", tmp_path, needed_gib=1e9)
    assert check.status == "fail" and "HF_HOME" in str(check.fix)
