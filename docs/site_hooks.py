"""
What the site takes from outside docs: README, the changelog and the benchmarks.

Their links to each other are those of the repository, so that they work there and on PyPI.
Here they become links between pages.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_REPOSITORY = "https://github.com/saelens-scaffold/saelens-scaffold"
_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(
    rf"\]\((?:{re.escape(_REPOSITORY)}/(?:blob|raw)/main/|\.\./)([\w./-]+)"
)


def on_files(files: Files, config: Any) -> Files:
    root = Path(config.config_file_path).parent
    for path, page in _PAGES.items():
        text = (root / path).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    def link(match: re.Match[str]) -> str:
        path = match[1]
        if path in _PAGES:
            return f"]({up}{_PAGES[path]}"
        if path.startswith("docs/"):
            return f"]({up}{path.removeprefix('docs/')}"
        return f"]({_REPOSITORY}/blob/main/{path}"

    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(link, markdown)
