"""What a page looks like in a real browser, and what it asked for."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bokeh draws inside shadow roots: walk them all. A pixel of a figure counts once it is not transparent.
CANVASES = """() => {
  const wanted = document.createElement("i");
  wanted.style.color = "var(--curve-1)";
  document.body.append(wanted);
  const [r, g, b] = getComputedStyle(wanted).color.match(/\\d+/g).map(Number);
  const found = [];
  const walk = (node) => {
    for (const child of node.children ?? []) {
      if (child.tagName === "CANVAS" && child.width * child.height > 10000) {  // a legend has small ones
        const copy = new OffscreenCanvas(child.width, child.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(child, 0, 0);
        const { data } = copy.getImageData(0, 0, child.width, child.height);
        let drawn = 0, curve = 0;
        for (let at = 0; at < data.length; at += 4) if (data[at + 3]) {
          drawn++;
          if (Math.hypot(data[at] - r, data[at + 1] - g, data[at + 2] - b) < 12) curve++;
        }
        if (drawn) found.push({ width: child.width, height: child.height, drawn, curve });
      }
      if (child.shadowRoot) walk(child.shadowRoot);
      walk(child);
    }
  };
  walk(document.body);
  return found;
}"""


def wait_until(page: Any, condition: str, seconds: float = 20) -> None:
    """Playwright's own waiting evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not within {seconds} s: {condition[-200:]}"
        page.wait_for_timeout(50)


@dataclass
class Seen:
    """`figures` are the canvases with something on them: width, height, pixels drawn, those of a curve's colour."""

    page: Any
    requests: list[str]
    complaints: list[str]
    figures: list[dict[str, int]]
    overflow: int


def look_at(
    browser: Any, file: Path, num_figures: int, width: int = 1280, scheme: str = "light", **device: Any
) -> Seen:
    """Opens the file and waits until so many figures are drawn. The caller closes `page.context`."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **device)
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.goto(file.absolute().as_uri())
    wait_until(page, f"() => ({CANVASES})().length >= {num_figures}")
    overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return Seen(page, requests, complaints, page.evaluate(CANVASES), overflow)
