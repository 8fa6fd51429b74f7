"""A hook of MkDocs: pages that lie outside docs/ (README, ledger) become pages of the site, links included."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# a file of the repository -> its page on the site
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/LEDGER.md": "ledger.md",
    "tests/README.md": "tests.md",
}
_LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    place = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == place), f"docs/{place}")

    def relink(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        page_of = PAGES.get(target, target.removeprefix("docs/"))
        if target not in PAGES and not target.startswith("docs/"):
            return match[0]  # a file that the site does not have: MkDocs says so
        return (
            match[1]
            + posixpath.relpath(page_of, posixpath.dirname(place) or ".")
            + (match[3] or "")
            + match[4]
        )

    return _LINK.sub(relink, markdown)
