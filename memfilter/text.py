"""Text that came from elsewhere, for people to read."""

from __future__ import annotations


def printable(text: object) -> str:
    """For messages and pages: what ends a line, or could steer a terminal, is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
