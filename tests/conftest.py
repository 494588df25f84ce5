"""The environment is prepared before any test module can import torch, as the scripts do."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that reaches nothing outside; the test that needs it skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium, and there is none here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found,
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()
