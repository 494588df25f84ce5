"""The environment is prepared before any test module can import torch, as the scripts do."""

from pathlib import Path

import pytest

from toolkit import env, hardware

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = hardware.here().gpu is not None

env.prepare("expandable_segments:True", use_gpu=HAS_GPU)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none here")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)
