"""A preview as one HTML file that asks nobody for anything: no script, no font, no picture from elsewhere."""

from html import escape

from toolkit.report.html import document
from toolkit.report.preview import Example, Part, Piece, Preview

STYLE = """
:root { --masked: #5d6670; --masked-1: transparent; --masked-2: #e9edf0; --special: #d5dbe1;
  --trained: #0b3d1e; --trained-1: #c9efd5; --trained-2: #aee3bf; --end: #2f8f54; --end-ink: #fff; }
@media (prefers-color-scheme: dark) { :root { --masked: #98a2ab; --masked-1: transparent; --masked-2: #252b30;
  --special: #39424a; --trained: #d6f7e1; --trained-1: #174a2b; --trained-2: #1f5d37; --end: #49b874;
  --end-ink: #08140c; } }
.about, .size { color: var(--quiet); font-size: .9rem; }
.legend { position: sticky; top: 0; padding: .6rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
article { margin: 1.5rem 0; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; }
.checks { list-style: none; margin: .4rem 0; padding: 0; font-size: .9rem; }
.ok::before { content: "\u2713 "; color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.bad::before { content: "\u2717 "; }
.tokens, .row { margin: .4rem 0 0; padding: .6rem .7rem; background: var(--panel); border-radius: .35rem;
  font: .85rem/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.pair { display: grid; gap: .75rem; grid-template-columns: 1fr 1fr; margin-top: .6rem; }
.pair > :first-child { grid-column: 1 / -1; border-left: .25rem solid var(--line); padding-left: .6rem; }
.pair > * { min-width: 0; }
@media (max-width: 44rem) { body { padding: .6rem; } article { padding: .7rem; } .pair { grid-template-columns: 1fr; } }
i, b { font-style: normal; font-weight: inherit; border-radius: .2rem; padding: .1rem 0; }
i { color: var(--masked); background: var(--masked-1); }
i:nth-of-type(even) { background: var(--masked-2); }
b { color: var(--trained); background: var(--trained-1); }
b:nth-of-type(even) { background: var(--trained-2); }
i.special { background: var(--special); font-size: .78rem; padding: .1rem .3rem; }
b.special { background: var(--end); color: var(--end-ink); font-size: .78rem; padding: .1rem .3rem; }
.break { opacity: .55; }
"""


def page(preview: Preview) -> str:
    """The whole file."""
    about = "".join(f'<p class="about">{escape(line)}</p>' for line in preview.about)
    body = (
        f"<h1>{escape(preview.title)}</h1>{about}\n"
        '<p class="legend"><b>trained</b> <b class="special">&lt;|end|&gt;</b> counts in the loss \u00b7 '
        '<i>masked</i> <i class="special">&lt;|start|&gt;</i> is only read</p>\n'
        + "\n".join(map(_article, preview.examples))
    )
    return document(preview.title, body, STYLE)


def _article(example: Example) -> str:
    checks = "".join(
        f'<li class="{"ok" if check.passed else "bad"}">{escape(check.text)}</li>' for check in example.checks
    )
    body = "".join(map(_part, example.parts))
    if len(example.parts) > 1:
        body = f'<div class="pair">{body}</div>'
    if example.text:
        body += f'<div class="row">{escape(example.text)}</div>'
    return f'<article><h2>{escape(example.title)}</h2><ul class="checks">{checks}</ul>{body}</article>'


def _part(part: Part) -> str:
    tokens = "".join(map(_piece, part.pieces))
    return f'<section><p class="size">{escape(part.title)}</p><div class="tokens">{tokens}</div></section>'


def _piece(piece: Piece) -> str:
    tag = "b" if piece.trained else "i"
    ids = " ".join(map(str, piece.ids))
    if piece.special:
        return f'<{tag} class="special" title="{ids}">{escape(piece.text)}</{tag}>'
    text = escape(piece.text).replace("\n", '<span class="break">\u21b5</span>\n')
    return f'<{tag} title="{ids}">{text}</{tag}>'
