"""The frame of every HTML page that the toolkit writes: one file, dark and light, that asks nobody for anything."""

from html import escape

PALETTE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --quiet: #5d6670; --line: #d9dee3; --panel: #f6f8f9;
  --accent: #0b5cad; --bad: #b3261e; --good: #1f7a45; --warn: #8a5a00; --shade: #0004; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e8eb; --quiet: #98a2ab; --line: #30363c;
  --panel: #1b1f23; --accent: #7ab7f5; --bad: #ff8a80; --good: #6fd396; --warn: #e0b35a; --shade: #fff4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0 0; }
h2 { font-size: 1.05rem; margin: 0; }
p { margin: .25rem 0; }
/* A table that is wider than its place scrolls; a shadow lies on the side where there is more of it. */
.wide { overflow-x: auto; background: linear-gradient(to right, var(--paper) 40%, transparent) left / 3rem 120% local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 120% local,
  linear-gradient(to right, var(--shade), transparent) left / 1.2rem 100% scroll,
  linear-gradient(to left, var(--shade), transparent) right / 1.2rem 100% scroll; background-repeat: no-repeat; }
.wide :is(th, td):first-child { position: sticky; left: 0; background: var(--paper); }
"""


def document(
    title: str, body: str, style: str = "", head: str = "", scripts: bool = False, sends: bool = False
) -> str:
    """A whole page. `body` and `head` are HTML already; nothing is loaded from elsewhere, whatever they contain.

    Only a page with `scripts` runs any, and then only those written into it; one that `sends` may, to where it is from.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if scripts:
        policy += "; script-src 'unsafe-inline'"
    if sends:
        policy += "; connect-src 'self'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title><style>{PALETTE}{style}</style>{head}</head><body>\n{body}\n</body></html>\n"
    )
