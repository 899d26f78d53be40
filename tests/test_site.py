"""The documentation as a site: built as `make docs` builds it, with a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def build(docs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Sphinx, with the options that the Makefile gives it."""
    recipe = re.search(r"-m sphinx (.*) docs artifacts/docs$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    options = recipe[1].replace("artifacts/docs/.doctrees", f"{out}.doctrees").split()
    return subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(docs), str(out)], capture_output=True, text=True, timeout=120
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site."""
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(DOCS, out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out


class Loads(HTMLParser):
    """What a page makes a browser load, and the addresses that it links to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self.linked: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster", "action") or (name == "href" and tag != "a"):
                self.loaded.add(value or "")
            elif name == "href":
                self.linked.add(value or "")


def outside(addresses: set[str]) -> set[str]:
    return {address for address in addresses if re.match(r"(https?:)?//", address)}


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    assert {page for page in pages if not (site / page).is_file()} == set()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    theme = {
        "https://pradyunsg.me",
        "https://github.com/pradyunsg/furo",
    }  # who made it, at the foot of each page
    source = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        loads = Loads(page.read_text())
        assert outside(loads.loaded) == set(), page
        assert {a for a in outside(loads.linked) - theme if a not in source} == set(), page
    for style in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//|@import", style.read_text()) == [], style
    for script in site.rglob("*.js"):
        # of the addresses in scripts, those in comments, and the names of XML's namespaces
        code = re.sub(r"/\*.*?\*/|^\s*(?://|\*).*$", "", script.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert re.findall(r"(?:fetch|import|src ?=)[^;\n]{0,40}https?://", code) == [], script


def test_the_navigation_is_by_user(site: Path) -> None:
    page = (site / "index.html").read_text()
    captions = re.findall(r'<p class="caption"[^>]*><span class="caption-text">(.*?)</span>', page)
    headings = re.findall(r"^## (.+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert captions == headings
    assert captions[:4] == ["Release engineer", "Deployer", "Kernel developer", "Measurer"]
    for link in re.findall(r'class="reference internal" href="([^"#]+)"', page):
        assert (site / link).exists(), link


def test_what_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    docs = small(tmp_path)
    wrong = {
        "no-such-page.md": "[nowhere](no-such-page.md)",
        "no-such-heading": "[nowhere](other.md#no-such-heading)",
        "no-heading-here": "[nowhere](#no-heading-here)",
        "no-such-picture": "![nothing](images/no-such-picture.png)",
    }
    (docs / "index.md").write_text("\n\n".join([(docs / "index.md").read_text(), *wrong.values()]))
    (docs / "forgotten.md").write_text("# A page that the index does not name\n")
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    complaints = "\n".join(line for line in done.stderr.splitlines() if "WARNING" in line)
    assert [name for name in (*wrong, "forgotten.md") if name not in complaints] == [], done.stderr


def small(directory: Path) -> Path:
    """Two pages and the real configuration: fine as they are."""
    docs = directory / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    (docs / "index.md").write_text("# Index\n\n## One user\n\n[other](other.md), [a part](other.md#a-part)\n")
    (docs / "other.md").write_text("# Other\n\n## A part\n")
    return docs


def test_two_pages_that_are_fine_are_built(tmp_path: Path) -> None:
    done = build(small(tmp_path), tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_pages_are_no_wider_than_a_telephone(site: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    # headless Chromium makes no window that narrow, but a frame may be; what is wide scrolls by itself
    pages = [
        "index.html",
        "quick-start.html",
        "howto/measurer.html",
        "reference/recipes.html",
        "classic-howto.html",
    ]
    frames = "".join(f'<iframe width="390" height="800" src="{(site / p).as_uri()}"></iframe>' for p in pages)
    script = (
        "<script>onload = () => document.title = [...document.querySelectorAll('iframe')].map(f => "
        "f.contentDocument.documentElement).map(e => e.scrollWidth - e.clientWidth).join(' ')</script>"
    )
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><title></title>{frames}{script}")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
         f"--user-data-dir={tmp_path}/profile", "--window-size=800,900", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    measured = re.search(r"<title>([\d ]+)</title>", done.stdout)
    assert measured, done.stderr
    assert measured[1].split() == ["0"] * len(pages)
