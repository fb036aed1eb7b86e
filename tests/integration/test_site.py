"""The documentation site: it builds strictly, loads nothing from elsewhere, and quotes the code rightly."""

from __future__ import annotations

import ast
import html
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from selftrans.cli.commands import COMMANDS
from selftrans.cli.main import main
from selftrans.cli.parse import blank, option_names
from selftrans.library import __all__ as offered
from tests.support import captioned
from tests.support.pages import ROOT, blocks
from tests.support.pictures import encoded, noise, write

SRC = ROOT / "src" / "selftrans"
ERRORS = sorted(path.stem for path in (ROOT / "docs" / "errors").glob("*.md") if path.stem != "index")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings of mkdocs (links, anchors, pages that are nowhere) are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "SITE_URL": "https://host.invalid/a/path/"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe|source|audio|video)\b[^>]*\ssrc=[\"']?((?:https?:)?//[^\"'\s>]+)", text
        )
        links = re.findall(r"<link\b[^>]*>", text)
        loaded += [link for link in links if "canonical" not in link and re.search(r"href=[\"']?(?:https?:)?//", link)]
        assert not loaded, f"{page.name}: {loaded}"
        assert 'class="mermaid"' not in text  # the theme would fetch a script for it
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_page_of_a_wrong_address_has_its_styles_under_a_path(site: Path) -> None:
    """It is served at any depth, so its addresses are not relative."""
    text = (site / "404.html").read_text(encoding="utf-8")
    sheets = re.findall(r"<link\b[^>]*href=[\"']?([^\"'\s>]+\.css)", text)
    assert sheets and all(sheet.startswith("/a/path/") for sheet in sheets)


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "method.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50 and text.count('display="block"') >= 7
    assert "arithmatex" not in text and "$$" not in text and not re.search(r"<merror|\\\\(frac|mathbb|text)\b", text)


def test_options_are_not_broken_and_commands_are_as_written(site: Path) -> None:
    text = (site / "clusters.html").read_text(encoding="utf-8")
    assert "<code>train.timeout</code>" in text, "no hyphen"
    assert '<span class="word">--link-gbps</span></code> between' in text
    assert '(<code><span class="word">--train.shard</span> True</code>' in text
    found = re.findall(r'<div class="language-bash highlight"><pre>(.*?)</pre>', text, flags=re.DOTALL)
    shown = [html.unescape(re.sub(r"<[^>]+>", "", block)).strip() for block in found]
    source = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert '<span class="word">--num</span>' in found[0]
    assert shown == [each.strip() for each in re.findall(r"```bash\n(.*?)```", source, flags=re.DOTALL)]
    assert 'sets <code><span class="word">--data.path</span></code>' in (site / "reference/commands.html").read_text(
        "utf-8"
    )
    tested = (site / "backbones.html").read_text(encoding="utf-8")
    assert "<code>tests/<wbr>unit/<wbr>models/<wbr>test_<wbr>sit.py</code>" in tested, "long names may be broken"


def test_first_page_is_the_readme_and_its_links_lead_to_pages(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorial.html"' in text and 'href="errors/index.html"' in text and 'src="quickstart.png"' in text
    source = site / "source" / "src" / "selftrans" / "methods" / "self_transcendence.py.html"
    assert f'href="{source.relative_to(site).as_posix()}"' in text
    assert "guided_features" in source.read_text(encoding="utf-8")


def test_reference_has_every_command_option_setting_name_and_module(site: Path) -> None:
    def page(name: str) -> str:
        text = (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
        return re.sub(r'<wbr>|<span class="word">(.*?)</span>', r"\1", text)  # where lines may end

    commands, settings, library = page("commands"), page("settings"), page("library") + page("contracts")
    for name, kind in COMMANDS.items():
        assert f'id="{name}"' in commands
        options = [option for option in option_names(blank(kind)) if option not in ("config", "typed")]
        assert [option for option in options if f"<code>--{option}</code>" not in commands] == []
    for section in json.loads((SRC / "cli" / "settings.json").read_text(encoding="utf-8"))["sections"].values():
        assert [name for name in section["types"] if f".{name.replace('_', '-')}</code>" not in settings] == []
    assert [name for name in offered if not re.search(rf'id="selftrans\.[\w.]*\.{name}"', library)] == []
    assert "features after each block of" in library or "with the features after each block" in library
    assert "channels of a token" in library  # the comment `#:` of Backbone.width
    listed = page("modules")
    assert [path.name for path in SRC.rglob("*.py") if f"<code>{path.name}</code>" not in listed] == []


# ---- pages of errors


@cache
def templates() -> list[str]:
    """Every text of the source, with … where an f-string has an expression."""
    found = []
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(page: str) -> str:
    """The message that a page of an error quotes, … where it differs from case to case."""
    (block, *_) = [block for block in blocks(f"docs/errors/{page}.md") if block.language == "text"]
    return block.text.strip()


def pattern(message: str) -> str:
    return ".*".join(re.escape(part) for part in message.split("…"))


def of_the_code(part: str) -> bool:
    """Whether a fixed part of a message is in a text of the code, or goes over from one text to another put in there."""
    cuts = [(part, "")] + [(part[:at], part[at:]) for at in range(4, len(part) - 3)]
    return any(all(any(piece in text for text in templates()) for piece in pieces) for pieces in cuts)


@pytest.mark.parametrize("page", ERRORS)
def test_message_of_a_page_is_one_of_the_code(page: str) -> None:
    message = quoted(page)
    whole = re.compile(pattern(message), flags=re.DOTALL)
    if not any(whole.fullmatch(text) for text in templates()):
        parts = message.split("…")
        assert max(map(len, parts)) > 12 and [part for part in parts if not of_the_code(part)] == []
    text = (ROOT / "docs" / "errors" / f"{page}.md").read_text(encoding="utf-8")
    assert "**Cause.**" in text and "**Remedy.**" in text
    assert f"({page}.md)" in (ROOT / "docs" / "errors" / "index.md").read_text(encoding="utf-8")


def test_messages_are_what_the_commands_print(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pictures, here = tmp_path / "pictures", str(tmp_path)
    write(pictures, {f"{name}/{k}.png": encoded(noise(8, k)) for name in ("cat", "dog") for k in range(2)})
    write(tmp_path / "two", {"a/0.png": encoded(noise(8)), "a/1.png": encoded(noise(12))})
    write(tmp_path / "cut", {"a/0.png": encoded(noise(8)), "a/1.png": encoded(noise(8))[:60]})
    captioned.pictures(tmp_path / "captioned", count=2)
    (tmp_path / "captioned" / "000.txt").unlink()
    (tmp_path / "empty").mkdir()
    assert main(["prepare", str(pictures), "--out", f"{here}/data"]) == 0
    write(tmp_path / "hollow", {"cat/0.png": encoded(noise(8)), "none/.keep": b""})
    data = f"--data {here}/data --out {here}/run"
    provoked = {
        "empty-class-folder": f"prepare {here}/hollow --out {here}/a",
        "pictures-of-two-sizes": f"prepare {here}/two --out {here}/b",
        "unreadable-picture": f"prepare {here}/cut --out {here}/c --resolution 8",
        "begun-with-other-settings": f"prepare {pictures} --out {here}/data --resolution 4",
        "no-such-source": f"prepare {here}/nowhere --out {here}/d",
        "needs-data": f"train imagefolder --out {here}/run",
        "not-prepared": f"train imagefolder --data {here}/empty --out {here}/run",
        "batch-does-not-divide": f"train imagefolder {data} --train.batch-size 8 --train.accumulate 3",
        "labels-need-a-label-model": f"train imagefolder_t2i {data}",
        "unknown-name": f"train imagefoldr --out {here}/run",
        "not-a-run": f"sample {here}/empty --out {here}/samples",
    }
    for page, command in provoked.items():
        capsys.readouterr()
        assert main(command.split()) != 0, command
        line = capsys.readouterr().err.strip().splitlines()[-1].removeprefix("selftrans: ")
        assert re.match(pattern(quoted(page)), line), f"{page}: {line}"
