"""For mkdocs: files of the repository that pages link to, `../path`, are pages of the site too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(\.\./([\w./-]+)\)")
_SHOWN = {".py", ".proto", ".toml", ".yaml", ".service", ".sh"}


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file or folder that is linked to."""
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({path for page in pages for path in _LINK.findall(page)}):
        hidden = f"---\nsearch:\n  exclude: true\n---\n{_text(path)}"
        page = File.generated(config, _page(path), content=hidden)
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Has links lead to those pages."""
    return _LINK.sub(lambda link: f"]({_page(link[1])})", markdown)


def _page(path: str) -> str:
    return f"repository/{path}.md"


def _text(path: str) -> str:
    if path.endswith(".md"):
        return (ROOT / path).read_text()
    return "\n".join([f"# {path}\n", *map(_block, _files(ROOT / path))])


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in found if file.suffix in _SHOWN]


def _block(file: Path) -> str:
    language = file.suffix[1:].replace("service", "ini")
    return f"## {file.name}\n\n````{language}\n{file.read_text()}````\n"
