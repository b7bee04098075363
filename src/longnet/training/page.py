"""A self-contained HTML page: text, tables, and PNG figures embedded in it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 960px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 10px; }
p { margin: 8px 0; max-width: 76ch; }
.soft { color: #616e7c; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 26px 0 18px; }
.card { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: #616e7c; font-size: 13.5px; }
.card.main { background: #2563eb; border-color: #2563eb; color: #fff; }
.card.main span { color: #dbe6ff; }
.verdict { border-left: 4px solid #2563eb; padding: 2px 0 2px 14px; font-size: 17px; }
figure { margin: 14px 0; background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 12px; }
img { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e4e7eb; font-size: 14.5px; }
th, td { text-align: left; padding: 5px 18px 5px 12px; border-bottom: 1px solid #eef1f4; vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { font-weight: 500; color: #52606d; white-space: nowrap; }
.wide { overflow: auto; max-height: 480px; margin: 12px 0; }
.grid td { white-space: nowrap; }
pre { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 14px 16px; font-size: 13px; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre i { font-style: normal; color: #9aa5b1; }
"""


class Page:
    """Collects the parts of a page in order; every text is escaped."""

    def __init__(self, title: str, subtitle: str) -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(subtitle)}</p>']

    def cards(self, cards: Iterable[tuple[str, str]]) -> None:
        """Numbers with labels under them; the first one stands out."""
        boxes = [
            f'<div class="card{"" if number else " main"}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
            for number, (value, label) in enumerate(cards)
        ]
        self._parts.append(f'<div class="cards">{"".join(boxes)}</div>')

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """A paragraph; ``kind`` is ``""``, ``"soft"`` or ``"verdict"``."""
        self._parts.append(f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")

    def picture(self, png: Path, description: str) -> None:
        """A PNG file, embedded."""
        data = base64.b64encode(png.read_bytes()).decode("ascii")
        self._parts.append(f'<figure><img alt="{escape(description)}" src="data:image/png;base64,{data}"></figure>')

    def sample(self, prompt: str, continuation: str) -> None:
        """Generated text, its prompt in grey."""
        self._parts.append(f"<pre><i>{escape(prompt)}</i>{escape(continuation)}</pre>")

    def table(self, rows: Iterable[tuple[str, object]]) -> None:
        """Names, whose underscores are shown as spaces, and values."""
        cells = ((escape(name.replace("_", " ")), escape(str(value))) for name, value in rows)
        body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
        self._parts.append(f"<table>{body}</table>")

    def grid(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table with named columns, which scrolls where it is wider than the page."""
        names = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        self._parts.append(f'<div class="wide"><table class="grid"><tr>{names}</tr>{body}</table></div>')

    def html(self) -> str:
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(self._title)}</title>'
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n'
            f"<body><main>\n{body}\n</main></body></html>\n"
        )
