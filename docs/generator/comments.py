"""An extension of griffe: comments `#: text`, after an attribute or above it, are its description."""

from __future__ import annotations

import re
from typing import Any

import griffe

AFTER = re.compile(r"#: ?(.*)$")


class Comments(griffe.Extension):
    """Gives attributes without a docstring the text of their `#:` comment."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno and (text := self._text(attr)):
            attr.docstring = griffe.Docstring(text, lineno=attr.lineno, parent=attr)

    def _text(self, attr: griffe.Attribute) -> str:
        lines = attr.lines_collection[attr.filepath]
        first, last = (attr.lineno or 1) - 1, attr.endlineno or attr.lineno or 1
        for line in lines[first:last]:
            if found := AFTER.search(line):
                return found[1].strip()
        above = first
        while above and lines[above - 1].strip().startswith("#:"):
            above -= 1
        return " ".join(line.strip()[2:].strip() for line in lines[above:first])
