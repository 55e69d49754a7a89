"""The page in a real browser, against a real server on loopback."""

import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager

import launching
import psutil
import pytest

from memfilter.cli import main
from memfilter.inference.app import pieces, without_word
from memfilter.inference.significance import Word

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium")
HOSTILE = "<img src=x onerror=alert(1)> a <script>alert(1)</script> cat"


@contextmanager
def served(*settings):
    command = [sys.executable, "-m", "memfilter.cli", "app", *map(str, settings), "--port=0"]
    process = subprocess.Popen(command, cwd=launching.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield line.rpartition(" ")[2].strip(), process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """The embedded model, few steps, a false positive rate of 20%."""
    clean = tmp_path_factory.mktemp("clean") / "clean.txt"
    clean.write_text("\n".join(f"a cat on a {colour} background" for colour in ("red", "blue", "green", "pink")))
    with served("scenes", f"--clean={clean}", "--steps=3", "--seeds=2", "--false_positive_rate=0.2") as found:
        yield found


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@needs_chromium
def test_prompt_is_judged_a_word_dropped_and_a_mitigation_tried(page_of, browser, tmp_path):
    address, process = page_of
    page, console, asked = browser.new_page(viewport={"width": 1200, "height": 1500}), [], []
    page.on("console", lambda message: console.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("dialog", lambda dialog: console.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)

    page.locator("#prompt textarea").fill("a cat on a red background")
    page.locator("#go").click()
    page.wait_for_selector("#verdict >> text=clean prompts", timeout=60_000)
    page.wait_for_selector("#plot .js-plotly-plot, #plot svg.main-svg")
    assert page.locator("#pictures img").count() >= 2
    words = page.locator("#words [data-testid='highlighted-text:textfield']").inner_text()
    assert words.split() == "a cat on a red background".split()
    assert re.search(r"(none|\d) of 4", page.locator("#verdict").inner_text())
    before = page.locator("#verdict").inner_text()

    page.locator("#words").get_by_text("red", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a cat on a background'", timeout=60_000)
    page.wait_for_function("before => document.querySelector('#verdict').innerText != before", arg=before, timeout=60_000)

    page.locator("#mitigate").click()
    page.wait_for_selector("#told >> text=clean prompts", timeout=60_000)
    assert page.locator("#mitigated img").count() >= 2
    page.locator("#kind").get_by_text("random tokens").click()
    page.locator("#mitigate").click()
    page.wait_for_selector("#instead textarea", timeout=60_000)
    assert "cat" in page.locator("#instead textarea").input_value()

    page.locator("#prompt textarea").fill(HOSTILE)
    page.locator("#go").click()
    page.wait_for_function("document.querySelector('#words').innerText.includes('onerror')", timeout=60_000)
    assert page.locator("#words script, #words img").count() == 0
    page.screenshot(path=tmp_path / "page.png", full_page=True)

    page.locator("#prompt textarea").fill(" ")
    page.locator("#go").click()
    page.wait_for_selector("text=Type a prompt first", timeout=60_000)
    host = re.escape(address.rstrip("/"))
    assert console == [] and all(re.match(rf"{host}|data:|blob:", url) for url in asked), (console, asked)
    listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_wrong_model_gives_a_message_and_no_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "memfilter.cli", "app", tmp_path], capture_output=True, text=True, cwd=launching.ROOT
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: model.path: {tmp_path} is not a pipeline directory" in done.stderr


def test_port_that_is_taken_is_named(tmp_path, capsys):
    clean = tmp_path / "clean.txt"
    clean.write_text("\n".join(f"a cat on a {colour} background" for colour in ("red", "blue", "green", "pink")))
    settings = ["app", "scenes", f"--clean={clean}", "--steps=1", "--seeds=1", "--false_positive_rate=0.2"]
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        assert main([*settings, f"--port={held.getsockname()[1]}"]) == 1
        assert f"127.0.0.1:{held.getsockname()[1]} cannot be listened at" in capsys.readouterr().err


def test_words_and_spaces_and_what_is_left_without_one():
    words = [Word("a", 1.0, ()), Word("red", 4.0, ()), Word("dog", None, ())]
    assert pieces(words) == [("a", 0.25), (" ", None), ("red", 1.0), (" ", None), ("dog", 0.0)]
    assert pieces([]) == []
    assert [without_word(" a  red dog", place) for place in range(5)] == ["red dog", " a  red dog", "a dog", " a  red dog", "a red"]
