"""The documentation as a site: `make docs` has Sphinx make `artifacts/docs/` of these pages, strictly.

The pages stay plain Markdown, which a git forge shows as it is. So their order is no Sphinx directive in them: it is
that of the links on two pages, `index.md` and `decisions/README.md`, under whose headings they stand. A page that
none of these names is an error, as every link is that leads nowhere.
"""

from __future__ import annotations

import re
from typing import Any

from pygments.lexers.configs import IniLexer

project = "virt-rt"
html_title = "virt-rt"
root_doc = "index"
extensions = ["myst_parser"]
exclude_patterns = ["conf.py"]
#: Headings can be linked to, as on a forge.
myst_heading_anchors = 6
nitpicky = True

html_theme = "furo"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}

#: Pages whose links are the navigation.
NAVIGATION = ("index", "decisions/README")

_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#:\s]+)\.md\)")


def add_navigation(app: Any, docname: str, content: list[str]) -> None:
    """Put tables of contents, which are not shown, at the end of a page: one for each heading with links."""
    if docname not in NAVIGATION:
        return
    head, *parts = _HEADING.split(content[0])
    seen: set[str] = set()
    for caption, text in [("", head), *zip(parts[::2], parts[1::2], strict=True)]:
        pages = [page for page in dict.fromkeys(_LINK.findall(text)) if page not in seen]
        seen.update(pages)
        if pages:
            options = ["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else [])]
            content[0] += "\n".join(["", *options, "", *pages, "```", ""])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_navigation)
    app.add_lexer("config", IniLexer)  # kernel configuration
