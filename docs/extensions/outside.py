"""Pages that live outside docs, and links to them: the same files read well in a checkout and on the site."""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

# The page that shows a document of the checkout's root.
PAGES = {"DESIGN.md": "design", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
_SHOWN = {page: name for name, page in PAGES.items()}
_LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    root = Path(app.srcdir).parent
    if docname in _SHOWN:
        source[0] = (root / _SHOWN[docname]).read_text(encoding="utf-8")
        base = root
    else:
        base = (Path(app.srcdir) / docname).parent

    def link(match: re.Match[str]) -> str:
        target = (base / match["path"]).resolve()
        name = target.relative_to(root).as_posix() if target.is_relative_to(root) else ""
        if name in PAGES:
            target = Path(app.srcdir) / f"{PAGES[name]}.md"
        elif docname not in _SHOWN:
            return match[0]
        # As it would be written at the place of this page.
        return f"]({os.path.relpath(target, (Path(app.srcdir) / docname).parent)}{match['anchor'] or ''})"

    source[0] = _LINK.sub(link, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
