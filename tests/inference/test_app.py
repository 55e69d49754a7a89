"""The page in a real browser, against a real server on loopback."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import launching
import numpy as np
import psutil
import pytest

from memfilter.arguments import parse
from memfilter.cli import main
from memfilter.inference import Sampling
from memfilter.inference import app
from memfilter.inference.app import Studio, build, pieces, without_word
from memfilter.inference.models import Model
from memfilter.inference.significance import Word
from memfilter.train.loop import train

CHROMIUM = shutil.which("chromium")
PATIENCE = 1000 * launching.PATIENCE  # ms
needs_chromium = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium")
HOSTILE = "<img src=x onerror=alert(1)> a <script>alert(1)</script> cat"


@contextmanager
def served(*settings, **environment):
    command = [sys.executable, "-m", "memfilter.cli", "app", *map(str, settings), "--port=0"]
    process = subprocess.Popen(command, cwd=launching.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | environment)  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield line.rpartition(" ")[2].strip(), process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def page_of(run, tmp_path_factory):
    """A run's, few steps, a false positive rate of 20%."""
    folder = tmp_path_factory.mktemp("clean")
    clean = folder / "clean.txt"
    clean.write_text("\n".join(f"a cat on a {colour} background" for colour in ("red", "blue", "green", "pink")))
    with served(run, f"--clean={clean}", "--steps=3", "--seeds=2", "--false_positive_rate=0.2", XDG_CACHE_HOME=str(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def run(scenes_dir, tmp_path_factory):
    """A fine-tune of the embedded model, which is over after two steps, on data of its own."""
    out = tmp_path_factory.mktemp("run")
    shutil.copytree(scenes_dir, out / "data")
    train(parse([f"--run_dir={out / 'run'}", "--model.path=scenes", f"--data.path={out / 'data'}", "--train.samples=8",
                 "--train.batch_size=4", "--filter.tau=null", "--log.gallery=0"]), progress=False)  # fmt: skip
    return out / "run"


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield opened
        opened.close()


@needs_chromium
def test_prompt_is_judged_a_word_dropped_and_a_mitigation_tried(page_of, browser, tmp_path):
    address, process = page_of
    page, console, asked = browser.new_page(viewport={"width": 1200, "height": 1500}), [], []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: console.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("dialog", lambda dialog: console.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)

    page.locator("#prompt textarea").fill("a cat on a red background")
    page.locator("#go").click()
    page.wait_for_selector("#verdict >> text=clean prompts")
    page.wait_for_selector("#plot .js-plotly-plot, #plot svg.main-svg")
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 2")
    words = page.locator("#words [data-testid='highlighted-text:textfield']").inner_text()
    assert words.split() == "a cat on a red background".split()
    assert re.search(r"(none|\d) of 4", page.locator("#verdict").inner_text())
    before = page.locator("#verdict").inner_text()

    page.locator("#words").get_by_text("red", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a cat on a background'")
    page.wait_for_function("before => document.querySelector('#verdict').innerText != before", arg=before)

    page.locator("#mitigate").click()
    page.wait_for_selector("#told >> text=of clean prompts it is")
    assert "p = " not in page.locator("#told").inner_text()  # the embedding was moved to lower the norm
    page.wait_for_function("document.querySelectorAll('#mitigated img').length >= 2")
    page.locator("#kind").get_by_text("random tokens").click()
    page.locator("#mitigate").click()
    page.wait_for_selector("#instead textarea")
    assert "cat" in page.locator("#instead textarea").input_value()

    page.locator("#kind").get_by_text("prompt embedding").click()
    page.locator("#target input").fill("")
    page.locator("#mitigate").click()
    page.wait_for_selector("text=Name a norm above 0")

    page.locator("#picked input").click()
    page.locator("[role=option]").first.click()
    page.wait_for_selector("#pictures >> text=training picture")
    page.wait_for_function("document.querySelectorAll('#pictures img').length >= 3")
    page.screenshot(path=tmp_path / "run.png", full_page=True)

    page.locator("#prompt textarea").fill(HOSTILE)
    page.locator("#go").click()
    page.wait_for_function("document.querySelector('#words').innerText.includes('onerror')")
    assert page.locator("#words script, #words img").count() == 0
    page.screenshot(path=tmp_path / "page.png", full_page=True)

    page.locator("#prompt textarea").fill(" ")
    page.locator("#go").click()
    page.wait_for_selector("text=Type a prompt first")
    host = re.escape(address.rstrip("/"))
    assert console == [] and all(re.match(rf"{host}|data:|blob:", url) for url in asked), (console, asked)
    listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_run_shows_its_training_pictures_for_as_long_as_they_are_there(run, tmp_path, monkeypatch):
    moved = shutil.copytree(run, tmp_path / "run")
    sampling, clean = Sampling(2, 2, 5.0), tmp_path / "clean.txt"
    clean.write_text("\n".join(f"a cat on a {colour} background" for colour in ("red", "blue", "green", "pink")))
    model = Model(str(run))
    studio = Studio(model, model.clean_norms(clean, sampling, tmp_path / "kept.json"), sampling, 0.2)
    duplicates = [p.text for p in model.run.prompts(3) if p.duplicate]
    assert studio.examples[: len(duplicates)] == duplicates
    look = studio.look(duplicates[0])
    (picture, told), *made = studio.shown(duplicates[0], look)
    np.testing.assert_array_equal(picture, model.run.picture(model.run.prompts(0)[0].key, 32))
    assert told == "training picture" and [text for _, text in made] == ["seed 0", "seed 1"]
    early = Studio(model, studio.clean, sampling, 0.2, 1)
    assert look.metric == pytest.approx(look.made.norms.mean()) and early.look(duplicates[0]).metric == look.made.norms[:, 0].mean()
    assert early.threshold == studio.clean.threshold(0.2, 1, 2) != studio.threshold
    assert "at the first step" in app.in_words(early.look(duplicates[0]), early)
    assert len(studio.shown("something else", look)) == 2
    with monkeypatch.context() as fewer:
        fewer.setattr(app, "EXAMPLES", 1)
        few = Studio(model, studio.clean, sampling, 0.2)
        assert few.examples == [duplicates[0], few.examples[1]]
        assert [told for _, told in few.shown(duplicates[-1], look)][0] == "training picture"

    summary = json.loads((moved / "summary.json").read_text())
    summary["config"]["data"]["path"] = str(tmp_path / "gone")
    (moved / "summary.json").write_text(json.dumps(summary))
    model = Model(str(moved))
    studio = Studio(model, model.clean_norms(clean, sampling, tmp_path / "kept.json"), sampling, 0.2)
    assert len(studio.examples) == 12 and len(studio.shown(duplicates[0], look)) == 2


def test_what_a_run_was_shown_is_no_clean_prompt_and_is_offered_whatever_is_known_of_it(run, tmp_path, monkeypatch):
    model = Model(str(run))
    shown = {p.text for p in model.run.prompts(len(model.run.experiment.keys))}
    assert shown & set(Model("scenes").clean_prompts(None, 2000)) and not shown & set(model.clean_prompts(None, 2000))
    first = model.run.prompts(3)
    again = replace(first[0], key="another", duplicate=False)
    for duplicate, asked in ((True, [*first, again]), (None, [replace(p, duplicate=None) for p in first])):
        monkeypatch.setattr(model.run, "prompts", lambda *_, asked=asked: asked)
        clean = SimpleNamespace(threshold=lambda *_: 1.0)
        studio = Studio(model, clean, Sampling(2, 2, 5.0))
        assert sorted(studio.examples) == sorted({p.text for p in first})
        picture = studio.shown(first[0].text, SimpleNamespace(made=SimpleNamespace(pictures=np.zeros((1, 32, 32, 3)))))[0]
        assert picture[1] == "training picture"


def test_wrong_model_gives_a_message_and_no_trace(tmp_path, capfd):
    assert main(["app", str(tmp_path)]) == 1
    told = capfd.readouterr().err
    assert f"error: model.path: {tmp_path} is not a pipeline directory" in told and "Traceback" not in told


def test_port_that_is_taken_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clean = tmp_path / "clean.txt"
    clean.write_text("\n".join(f"a cat on a {colour} background" for colour in ("red", "blue", "green", "pink")))
    settings = ["app", "scenes", f"--clean={clean}", "--steps=1", "--seeds=1", "--false_positive_rate=0.2"]
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        assert main([*settings, f"--port={held.getsockname()[1]}"]) == 1
        assert f"127.0.0.1:{held.getsockname()[1]} cannot be listened at" in capsys.readouterr().err


@pytest.mark.parametrize(("usual", "shown"), [(12.3456, 12.3), (0.00123456, 0.00123)])
def test_page_offers_the_usual_norm_and_keeps_no_picture_for_good(usual, shown):
    page = build(SimpleNamespace(examples=[], clean=SimpleNamespace(usual=usual)))
    (target,) = (block for block in page.blocks.values() if block.elem_id == "target")
    assert target.value == shown
    assert page.delete_cache == (3600, 3600)


def test_words_and_spaces_and_what_is_left_without_one():
    words = [Word("a", 1.0, ()), Word("red", 4.0, ()), Word("dog", None, ())]
    assert pieces(words) == [("a", 0.25), (" ", None), ("red", 1.0), (" ", None), ("dog", 0.0)]
    assert pieces([]) == []
    assert [without_word(" a  red dog", place) for place in range(5)] == ["red dog", " a  red dog", "a dog", " a  red dog", "a red"]
