"""Hooks of mkdocs: README.md as the first page, generated pages, links to files outside docs/, formulas as MathML.

The pages in docs/ are written for the file view of a repository, where links such as `../src/selftrans/flow.py` work. In the
site such a link leads to a page with that file.
"""

from __future__ import annotations

import html
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]

import reference  # noqa: E402 - in this folder

LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.MULTILINE | re.DOTALL)
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
INLINE = re.compile(r"(?<!<span></span>)<code>([^<]+)</code>")  # blocks of code have an empty span before
COMMANDS = re.compile(r'<div class="language-bash highlight">.*?</pre>', flags=re.DOTALL)
OPTION = re.compile(r"(?<=>)--?[\w.-]+(?=[<=\n])")  # a word of a command, between spans
LONG = 24  # characters of a word of code that may be broken after / :: and _
LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".yaml": "yaml", ".json": "json"}
FRONT = "---\nsearch:\n  exclude: true\n---\n\n"  # of pages that show source: kept out of the search


def on_config(config: Any) -> Any:
    """Pages of docs/ that mkdocs.yml does not list join the section `How to`, and those of errors/ theirs."""
    listed = set(_pages(config.nav))
    sections = {name: entries for each in config.nav for name, entries in each.items()}
    docs = Path(config.docs_dir)
    sections["How to"] += sorted(path.name for path in docs.glob("*.md") if path.name not in listed)
    errors = sorted(f"errors/{path.name}" for path in docs.glob("errors/*.md"))
    sections["Errors"] += [page for page in errors if page not in listed]
    return config


def _pages(nav: Any) -> Iterator[str]:
    for each in nav:
        entry = next(iter(each.values())) if isinstance(each, dict) else each
        yield from [entry] if isinstance(entry, str) else _pages(entry)


def on_files(files: Files, config: Any) -> Files:
    """Add README.md as index.md, the generated reference, and a page for each file outside docs/ that a page links to."""
    made = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")} | reference.pages()
    for page in ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for _, link, _ in LINK.findall(text):
            path = _target(page, link)
            if path and not path.startswith("docs/") and path != "README.md":
                made[_site_uri(path)] = _source_page(page, path)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the site, and continued list items as Python-Markdown reads them."""
    uri = page.file.src_uri
    here = "README.md" if uri == "index.md" else f"docs/{uri}"

    def moved(match: re.Match[str]) -> str:
        path = _target(here, match[2])
        if path is None:
            return match[0]
        relative = posixpath.relpath(_site_uri(path), posixpath.dirname(uri) or ".")
        return f"{match[1]}{relative}{match[3] or ''})"

    if uri.startswith(("reference/", "source/")):
        return markdown
    outside = FENCE.split(markdown)[::2]  # FENCE has one group: text, group, text, ...
    blocks = [match[0] for match in FENCE.finditer(markdown)]
    texts = [re.sub(r"(?m)^  (?=\S)", "    ", LINK.sub(moved, text)) for text in outside]
    return "".join(text + block for text, block in zip(texts, [*blocks, ""], strict=True))


def on_page_content(html_text: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw themselves: no script is needed. A number and its deviation stay on one line, as
    does an option: browsers break `--out` after a hyphen."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2]).strip(), display=display))

    text = INLINE.sub(lambda found: f"<code>{' '.join(map(_word, found[1].split(' ')))}</code>", html_text)
    text = COMMANDS.sub(lambda block: OPTION.sub(lambda found: _word(found[0], LONG * 2), block[0]), text)
    return MATH.sub(formula, text).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _word(word: str, long: int = LONG) -> str:
    """A word of code with the places where a line may end: none in short ones."""
    if len(html.unescape(word)) > long:
        return re.sub(r"(::|[/_])(?=.)", r"\1<wbr>", word)
    return f'<span class="word">{word}</span>' if "-" in word else word


def _target(page: str, link: str) -> str | None:
    """The file that a relative link of a page means, named from the root of the repository; None for an address."""
    if "://" in link or link.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _site_uri(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _source_page(page: str, path: str) -> str:
    """A page with a file, or with the files of a folder."""
    found = ROOT / path
    if not found.exists() or not found.resolve().is_relative_to(ROOT):
        raise PluginError(f"{page} links to {path}, which does not exist")
    shown = [found] if found.is_file() else sorted(each for each in found.rglob("*") if each.suffix in LANGUAGES)
    parts = [f"# {path}"]
    for file in shown:
        title = "" if file == found else f"## {file.relative_to(found).as_posix()}\n\n"
        parts.append(f"{title}````{LANGUAGES.get(file.suffix, '')}\n{file.read_text(encoding='utf-8').rstrip()}\n````")
    return FRONT + "\n\n".join(parts) + "\n"
