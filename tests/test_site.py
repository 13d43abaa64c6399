"""The documentation as its readers see it: no page shows its source, and none needs what is not in the site."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="the documentation's tools are not installed: make docs")
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # the site is built first

ROOT = Path(__file__).parents[1]
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
NOT_PROSE = {"code", "pre", "script", "style", "title"}

# What no reader should see, and what it would have become.
SOURCE = {
    "a fence": r"^\s*(```|~~~)",
    "code": r"`",
    "a row of a table": r"^\s*\|.*\|\s*$",
    "mathematics": r"\$\$|\\\(|\\\[|\\frac|\\sum",
    "a reference": r"\]\(|\]\[|^\s*:::|:(py:)?\w+:`|\{\w+\}`|\{[#.]\w+",
    "emphasis": r"\*\*[^*\n]+\*\*",
    "a message of the generator": r"Traceback|system message|problematic",
}


class Page(HTMLParser):
    """What a page says outside of code, what it links to, what it consists of, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.prose: list[str] = []
        self.links: list[str] = []
        self.parts: list[str] = []
        self.places: set[str] = set()
        self.open: list[tuple[str, bool]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.places |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("img", "link", "script", "source"):
            self.parts += [values[name] for name in ("href", "src") if name in values]
        if tag not in VOID:
            self.open.append((tag, tag in NOT_PROSE or "math" in values.get("class", "").split()))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not any(hidden for _, hidden in self.open):
            self.prose.append(data)


class Site:
    """The pages of a folder, by their path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages = {path: Page(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}

    def missing(self, path: Path, link: str) -> bool:
        """Whether what a page links to in the site is not there; links from the root begin with a slash."""
        parts = urlsplit(link)
        base = self.folder if parts.path.startswith("/") else path.parent
        target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
        place = unquote(parts.fragment)
        return not target.exists() or bool(place and target in self.pages and place not in self.pages[target].places)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = ROOT / os.environ["SITE"] if "SITE" in os.environ else tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", ROOT / "docs", folder]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return Site(folder)


def test_no_page_shows_its_source(site: Site) -> None:
    found = [
        f"{path.relative_to(site.folder)} shows {what}: {match[0].strip()!r}"
        for path, page in site.pages.items()
        for what, pattern in SOURCE.items()
        for match in re.finditer(pattern, "".join(page.prose), re.MULTILINE)
    ]
    assert len(site.pages) > 15
    assert not found


def test_every_link_within_the_site_leads_somewhere(site: Site) -> None:
    inside = [(path, link) for path, page in site.pages.items() for link in page.links if not urlsplit(link).scheme]
    assert len(inside) > 500
    assert not [f"{path.name}: {link}" for path, link in inside if site.missing(path, link)]


def test_no_page_needs_the_network(site: Site) -> None:
    parts = [(path, part) for path, page in site.pages.items() for part in page.parts if not part.startswith("data:")]
    assert any("tex-" in part for _, part in parts)  # mathematics
    assert not [f"{path.name}: {part}" for path, part in parts if urlsplit(part).netloc or site.missing(path, part)]


def test_a_page_that_is_not_there_says_where_to_go(site: Site) -> None:
    links = site.pages[site.folder / "404.html"].links
    assert {"/index.html", "/search.html"} <= set(links)


# What a dark page hides at its right edge, of tables and code or of the whole page, and what it shows on white.
SEEN = """
document.documentElement.dataset.theme = "dark";
const cut = [...document.querySelectorAll("article table, article pre")].filter((part) => {
  const box = part.tagName === "PRE" ? part : part.parentElement;
  return box.scrollWidth > box.clientWidth + 1;
});
const page = document.documentElement;
return {
  cut: cut.map((part) => part.innerText.slice(0, 60)),
  white: [...document.querySelectorAll("article img")]
    .filter((picture) => getComputedStyle(picture).backgroundColor !== "rgba(0, 0, 0, 0)")
    .map((picture) => picture.src),
  wide: page.scrollWidth > page.clientWidth + 1,
  formulas: document.querySelectorAll(".math").length,
  drawn: document.querySelectorAll("mjx-container").length,
};
"""


@pytest.mark.slow
def test_a_browser_shows_all_of_each_page(site: Site) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    service = webdriver.chrome.service.Service(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        for width, path in itertools.product((1400, 400), site.pages):
            browser.set_window_size(width, 1200)
            browser.get(path.as_uri())
            found = wait_until_drawn(browser)
            assert not found["wide"], (path.name, width)
            assert not found["white"], path.name
            assert found["drawn"] == found["formulas"], path.name
            assert width < 1000 or not found["cut"], (path.name, found["cut"])


def wait_until_drawn(browser: Any) -> dict[str, Any]:
    """What is seen of a page, as soon as all of its formulas are drawn, or after ten seconds."""
    for _ in range(50):
        found = browser.execute_script(SEEN)
        if found["drawn"] == found["formulas"]:
            break
        time.sleep(0.2)
    return found
