"""Headless Chromium for the tests of pages; a window that notes errors, and what is asked of other servers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.processes import LONGEST

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests of a module; they are skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def window(browser: Any, own: str) -> Iterator[Any]:
    """A new window; afterwards: no error was logged, and nothing was asked but of addresses that begin with `own`."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    found, errors, others = context.new_page(), [], []
    found.set_default_timeout(LONGEST * 1000)
    found.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on("request", lambda request: None if request.url.startswith((own, "data:")) else others.append(request.url))
    yield found
    context.close()
    assert not errors and not others, f"errors: {errors}; other addresses: {others}"
