"""The environment is prepared before any test module can import torch, as the scripts do."""

import os
import tempfile
from pathlib import Path

import pytest

from toolkit import env, hardware

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = hardware.here().gpu is not None

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")  # nothing of a test outlives it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core a worker: the tiny model gains little from a second
env.prepare("expandable_segments:True", use_gpu=HAS_GPU)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none here")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)
