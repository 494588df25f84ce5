"""The board in a real browser: curves that grow without a reload, votes that stay, nothing asked of others."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.board.test_server import Served, runs  # noqa: F401
from tests.engine.conftest import start
from tests.in_browser import CANVASES, wait_until

POINTS = """() => Bokeh.documents.flatMap((made) => [...made.all_models])
  .filter((model) => model.name === NAME).map((source) => source.data.step.length)[0] ?? 0"""


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a board's page; gives the page and the addresses that it asked for."""
    contexts = []

    def open_page(served: Served, chosen: str = "") -> tuple[Any, list[str]]:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        contexts.append(context)
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: pytest.fail(str(error)))
        page.goto(f"{served.url}/#{chosen}")
        return page, asked

    yield open_page
    for context in contexts:
        context.close()


def points(name: str) -> str:
    return POINTS.replace("NAME", json.dumps(name))


@pytest.mark.long
def test_curves_grow_while_a_run_trains_and_votes_stay_without_a_reload(opened: Any, runs: Path) -> None:  # noqa: F811
    served = Served(runs)
    training = start("sft", runs, "sft.max_steps=24", "sft.max_rows=384")
    try:
        page, asked = opened(served, "run=tiny/sft")
        wait_until(page, f"() => globalThis.Bokeh && ({points('loss')})() >= 3", 200)
        page.evaluate("window.loaded_once = true")
        seen, drawn = page.evaluate(points("loss")), page.evaluate(CANVASES)
        assert drawn and "running" in page.locator("tr", has_text="tiny/sft").inner_text()
        wait_until(page, f"() => ({points('loss')})() > {seen}", 100)
        assert training.wait(300) == 0, training.said()
        wait_until(page, f"() => ({points('loss')})() === 24", 60)
        wait_until(
            page, "() => /tiny.sftfinished/.test(document.querySelector('#list tbody').textContent)", 60
        )

        page.get_by_role("checkbox", name="tiny/sft").click()
        for name in ("big/dpo", "big/dpo-beta02"):
            page.get_by_role("checkbox", name=name, exact=True).click()
        wait_until(page, f"() => ({points('big/dpo-beta02 loss')})() === 40", 100)
        assert "run=big%2Fdpo" in page.url, "what is chosen stands in the address"
        page.get_by_role("tab", name="What differs").click()
        wait_until(page, "() => document.querySelector('#differences td')?.textContent === 'dpo.beta'", 60)
        page.get_by_role("tab", name="Answers").click()
        page.frame_locator("iframe").get_by_role("button", name="dpo-beta02 is better").first.click()
        end = time.monotonic() + 60
        while not (votes := list((runs / "big" / "votes").glob("*.jsonl"))):
            assert time.monotonic() < end
            page.wait_for_timeout(50)
        assert "Of course. It rains.0.2" in votes[0].read_text()
        page.get_by_role("tab", name="Details").click()
        wait_until(page, "() => document.querySelector('#details h1')", 60)
        assert page.evaluate("window.loaded_once"), "without a reload"
        assert all(url.startswith((served.url, "data:")) for url in asked), "nothing is asked of anyone else"
    finally:
        training.kill()
        served.close()
