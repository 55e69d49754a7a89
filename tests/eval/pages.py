"""Pages of the package, as a parser and as a browser see them."""

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium")
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Elements as (tag, attributes, own text), and all table rows as lists of cell texts."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.rows, self._open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": ""}
        self.elements.append(element)
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        element = self._open.pop()
        assert element["tag"] == tag, f"<{element['tag']}> closed by </{tag}>"
        text = " ".join(element["text"].split())
        if tag in ("td", "th"):
            self.rows[-1].append(text)
        if self._open:
            self._open[-1]["text"] += element["text"]

    def handle_data(self, data):
        if self._open:
            self._open[-1]["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]


def browse(path, work) -> tuple[str, list[str], list[str]]:
    """Opens a page in Chromium: (elements after all scripts, messages of the console, addresses that it asked for)."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --virtual-time-budget=5000 --dump-dom"
    )
    files = f"--user-data-dir={work / 'profile'}", f"--log-net-log={work / 'net.json'}"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), *files, path.as_uri()], capture_output=True, text=True, timeout=600
    )
    requests = [event.get("params", {}) for event in json.loads((work / "net.json").read_text())["events"]]
    # what the browser asks for on its own account has no origin
    asked = {r["url"] for r in requests if r.get("initiator", "not an origin") != "not an origin"}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, sorted(url for url in asked if url.startswith(("http:", "https:", "ws:", "wss:")))
