"""The commands, on real files and tiny pipelines."""

import json
import os
import re
import sys
from pathlib import Path
from typing import get_args

import launching
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from memfilter.cli import main
from memfilter.eval.generate import Job, generate_batch
from memfilter.files import held
from memfilter.inference import CleanNorms, Sampling, detection, generating, measure_prompts, token_significance
from memfilter.inference.models import SHIPPED, SHIPPED_PROMPTS, Model
from memfilter.inference.significance import Of
from memfilter.pipelines import load_pipeline, model_dir

SHIPPED_FILE = model_dir("scenes") / SHIPPED

HOSTILE = ["<script>alert(1)</script>", "\x1b[31mred", "a\tcat", "$x^2$ and \\alpha"]
SMALL = ["--steps=3", "--guidance_scale=5", "--size=16"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("model") / "sd1", "sd1")


@pytest.fixture(scope="module")
def clean_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("clean") / "clean.txt"
    file.write_text("\n".join(f"picture no {i}" for i in range(19)))
    return file


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(HOSTILE)))
    return tmp_path


def detect(directory, clean, out, *more):
    return ["detect", str(directory), f"--prompts={out.parent / 'prompts.jsonl'}", f"--clean={clean}", f"--out={out}",
            "--seeds=2", "--first=2", "--false_positive_rate=0.1", *SMALL, *more]  # fmt: skip


def test_detections_are_those_of_the_library(directory, clean_file, files, capsys):
    out = files / "detections.parquet"
    assert main(detect(directory, clean_file, out, "--rivals=[loss,anisotropy]")) == 0
    rows = pq.read_table(out).to_pylist()
    assert [(row["prompt"], row["id"]) for row in rows] == list(zip(HOSTILE, range(4), strict=True))
    ground, sampling = CleanNorms.load(files / "detections.clean.json"), Sampling(2, 3, 5.0, 16)
    signals = measure_prompts(load_pipeline(str(directory)), HOSTILE, sampling, rivals=("loss", "anisotropy"), progress=False)
    for name, expected in (("metric_first_step", signals.metric(1)), ("metric_first_2", signals.metric(2)),
                           ("metric_all", signals.metric()), ("loss", signals.rival("loss")),
                           ("anisotropy", signals.rival("anisotropy", clean=ground))):  # fmt: skip
        assert [row[name] for row in rows] == pytest.approx(expected, rel=1e-4), name
    p = ground.p_values(signals.metric(2), 2, 2)
    assert [row["p_value"] for row in rows] == pytest.approx(p)
    assert [row["memorized"] for row in rows] == (p <= 0.1 + 1e-9).tolist()
    np.testing.assert_allclose([row["norms"] for row in rows], signals.norms.mean(1), rtol=1e-4)
    assert "of 4 prompts are memorized" in (told := capsys.readouterr().out) and "\x1b" not in told
    assert not list(files.glob(".*.parts"))


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_commands_are_the_same_for_every_family(family, clean_file, files, capsys):
    model = tiny.save_pipeline(files / family, family)
    assert main(detect(model, clean_file, files / "out.jsonl", "--rivals=[density_l2,density_copies,anisotropy,loss]")) == 0
    for row in launching.lines(files / "out.jsonl"):
        assert all(isinstance(row[name], float) for name in ("metric_all", "density_l2", "density_copies", "anisotropy", "loss"))
    assert main(["explain", str(model), "a red dog", "--seeds=2", *SMALL]) == 0
    assert main(generate(model, files / "none", "--prompt=a red dog")) == 0
    before = [row["first_norm"] for row in launching.lines(files / "none" / "pictures.jsonl")]
    mitigated = ["--prompt=a red dog", "--mitigation=prompt", "--when=always", f"--target={min(before) * 0.9}"]
    assert main(generate(model, files / "moved", *mitigated)) == 0
    after = [row["norms"][0] for row in launching.lines(files / "moved" / "pictures.jsonl")]
    assert all(a < b for a, b in zip(after, before, strict=True))


def test_saved_norms_serve_again_and_only_for_what_is_alike(directory, clean_file, files, capsys):
    assert main(detect(directory, clean_file, files / "a.jsonl")) == 0
    assert main(detect(directory, files / "a.clean.json", files / "b.jsonl")) == 0
    assert (files / "a.jsonl").read_text() == (files / "b.jsonl").read_text()
    assert main(detect(directory, files / "a.clean.json", files / "c.jsonl", "--steps=4")) == 1
    assert "generated otherwise: steps 3 and 4" in capsys.readouterr().err
    assert main(detect(directory, files / "a.clean.json", files / "c.jsonl", "--seeds=3")) == 1
    assert "2 seeds each, fewer than 3" in capsys.readouterr().err


def test_quick_detection_says_the_same_of_the_first_steps(directory, clean_file, files, capsys):
    assert main(detect(directory, clean_file, files / "whole.jsonl")) == 0
    assert main(detect(directory, clean_file, files / "quick.jsonl", "--quick=true")) == 0
    whole, quick = (launching.lines(files / f"{name}.jsonl") for name in ("whole", "quick"))
    for one, other in zip(whole, quick, strict=True):
        assert "metric_all" not in other and len(other["norms"]) == 2
        assert other["metric_first_2"] == pytest.approx(one["metric_first_2"], rel=1e-5)
        assert other["p_value"] == one["p_value"]
    assert main(detect(directory, files / "quick.clean.json", files / "c.jsonl", "--first=0")) == 1
    assert "broken off after 2 steps, all are asked" in capsys.readouterr().err
    assert main(detect(directory, files / "quick.clean.json", files / "c.jsonl", "--rivals=[anisotropy]")) == 1
    assert "anisotropy asks for whole ones" in capsys.readouterr().err
    assert not list(files.glob(".c.parts"))  # nothing was begun


def test_two_processes_find_what_one_does(directory, clean_file, files):
    assert main(detect(directory, clean_file, files / "one.jsonl", "--batch_size=2")) == 0
    words = ["memfilter.cli", *detect(directory, clean_file, files / "two.jsonl", "--batch_size=2")]
    launching.run(words, processes=2, script="-m")
    assert (files / "one.jsonl").read_text() == (files / "two.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clean=absent.txt"], "absent.txt cannot be read"),
        (["--clean=absent.json"], "no norms of clean prompts"),
        (["--false_positive_rate=0.01"], "needs 99 clean prompts at least, there are 19"),
        (["--false_positive_rate=1"], "between 0 and 1, found 1"),
        (["--first=4"], "first is 4, more than steps, which is 3"),
        (["--guidance_scale=1"], "guidance_scale must be above 1"),
        (["--rivals=[magic]"], "unknown rival magic"),
        (["--rivals=[density_l2]", "--seeds=1"], "density_l2 compares the pictures of a prompt"),
        (["--rivals=[density_copies]", "--measure=wen"], "measure wen needs sscd"),
        (["--batch_size=0"], "batch_size must be at least 1, found 0"),
        (["--first=-3"], "first must be at least 0, found -3"),
        (["--quick=true", "--rivals=[loss]"], "rivals need whole generations"),
        (["--out=found.txt"], "must end in one of .parquet, .jsonl"),
        (["--prompts=absent.csv"], "absent.csv cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(directory, clean_file, files, capsys, more, message):
    assert main([*detect(directory, clean_file, files / "out.jsonl"), *more]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and message in errors[0]
    assert not (files / "out.jsonl").exists()


def test_wrong_model_is_said_in_one_line(files, capsys):
    for command in (["detect", "absent", f"--prompts={files / 'prompts.jsonl'}"], ["explain", "absent", "a cat"],
                    ["generate", "absent", str(files / "out"), "--prompt=a cat"]):  # fmt: skip
        assert main(command) == 1
        assert "absent is not a pipeline directory" in capsys.readouterr().err
    for content in ("{}", "[]", "no JSON", '{"config": {"data": []}}', '{"config": {"data": {}}}'):
        (files / "summary.json").write_text(content)
        assert main(["explain", str(files), "a cat"]) == 1
        assert f"error: {files}: its summary.json is not that of a run" in capsys.readouterr().err


def test_words_of_the_command_line_that_cannot_be_used_are_said_in_one_line(directory, tmp_path, capsys):
    prompt = os.fsdecode(b"\xff cat")  # as a shell hands it over
    for command in (["explain", str(directory), prompt], generate(directory, tmp_path / "out", f"--prompt={prompt}")):
        assert main(command) == 1
        assert "error: prompt: a prompt with half of a character" in capsys.readouterr().err
    for port in (-1, 65536):
        assert main(["app", str(directory), f"--port={port}"]) == 1
        assert f"error: port must be among 0 ... 65535, found {port}" in capsys.readouterr().err


@pytest.mark.parametrize("of", get_args(Of))
def test_words_are_shown_in_every_form(directory, tmp_path, capsys, of):
    prompt = "$x^2$ \x1b[31mred dog"
    words = token_significance(load_pipeline(str(directory)), prompt, Sampling(2, 3, 5.0, 16), of=of)
    for out in (tmp_path / "w.json", tmp_path / "w.png"):
        assert main(["explain", str(directory), prompt, f"--out={out}", "--seeds=2", f"--of={of}", "--colour=always", *SMALL]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"\033\[48;5;\d+m\033\[38;5;\d+m(.*?)\033\[0m", told)[:3] == ["$x^2$", "\\x1b[31mred", "dog"]
    content = json.loads((tmp_path / "w.json").read_text())
    assert content["prompt"] == prompt
    assert [(w["text"], pytest.approx(w["score"])) for w in content["words"]] == [(w.text, w.score) for w in words]
    assert [[t["text"] for t in w["tokens"]] for w in content["words"]] == [[t for t, _ in w.tokens] for w in words]
    assert np.asarray(Image.open(tmp_path / "w.png").convert("RGB")).std() > 1
    assert main(["explain", str(directory), prompt, "--out=w.txt", *SMALL]) == 1
    assert main(["explain", str(directory), " ", *SMALL]) == 1


def test_package_that_is_not_there_is_named_with_what_installs_it(directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["explain", str(directory), "a dog", f"--out={tmp_path / 'w.png'}", "--seeds=1", *SMALL]) == 1
    assert "this needs the package matplotlib.figure: pip install '.[eval]'" in capsys.readouterr().err


def test_help_says_all_that_a_command_says_of_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["detect", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "What was interrupted goes on when it is run again." in told
    assert "share of clean prompts that may be called memorized." in told


def test_without_a_terminal_there_are_brackets_and_no_colours(directory, capfd):
    assert main(["explain", str(directory), "a red dog", "--seeds=1", *SMALL]) == 0
    told = capfd.readouterr().out
    first = told.splitlines()[0]
    assert "[" in first and "\033" not in told
    assert first.replace("[", "").replace("]", "") == "a red dog"


def generate(directory, out, *more):
    return ["generate", str(directory), str(out), "--seeds=2", *SMALL, *more]


def test_pictures_without_mitigation_are_those_of_the_pipeline(directory, files):
    assert main(generate(directory, files / "out", f"--prompts={files / 'prompts.jsonl'}")) == 0
    rows = launching.lines(files / "out" / "pictures.jsonl")
    assert [row["prompt"] for row in rows[::2]] == HOSTILE and len({row["file"] for row in rows}) == 8
    expected = generate_batch(load_pipeline(str(directory)), [Job(2, HOSTILE[2], seed) for seed in (0, 1)], 3, 5.0, 16)
    for row, picture in zip(rows[4:6], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(files / "out" / row["file"])), picture)
        assert row["mitigation"] == "none" and row["norms"][0] == pytest.approx(row["first_norm"])


def test_mitigation_lowers_the_first_norm_and_is_written_down(directory, tmp_path, capsys):
    kept = tmp_path / "none"
    assert main(generate(directory, kept, "--prompt=a red dog")) == 0
    before = [row["first_norm"] for row in launching.lines(kept / "pictures.jsonl")]
    target = min(before) * 0.9
    assert main(generate(directory, tmp_path / "p", "--prompt=a red dog", "--mitigation=prompt", "--when=always",
                         f"--target={target}")) == 0  # fmt: skip
    for row, norm in zip(launching.lines(tmp_path / "p" / "pictures.jsonl"), before, strict=True):
        assert row["first_norm"] == pytest.approx(norm, rel=1e-3) and row["norms"][0] < norm
        assert row["mitigation"] == "prompt" and row["shown"] == "a red dog"
    assert main(generate(directory, tmp_path / "r", "--prompt=a red dog", "--mitigation=rta", "--when=always", "--tokens=3")) == 0
    for row in launching.lines(tmp_path / "r" / "pictures.jsonl"):
        assert row["mitigation"] == "rta" and len(row["shown"]) > len("a red dog")
    assert "prompts changed for 1 of 1" in capsys.readouterr().out


def test_mitigation_is_for_prompts_that_are_detected(directory, clean_file, tmp_path, capsys):
    settings = ["--prompt=picture no 3", "--mitigation=prompt", f"--clean={clean_file}"]
    assert main(generate(directory, tmp_path / "all", *settings, "--false_positive_rate=0.95")) == 0
    ground = CleanNorms.load(tmp_path / "all" / "clean.json")
    first = np.mean([row["first_norm"] for row in launching.lines(tmp_path / "all" / "pictures.jsonl")])
    p = ground.p_values(np.array([first]), 1, 2)[0]
    assert p > 0.06
    assert main(generate(directory, tmp_path / "few", *settings, f"--false_positive_rate={p - 0.01}")) == 0
    changed = [int(re.search(r"changed for (\d)", line)[1]) for line in capsys.readouterr().out.splitlines() if "changed" in line]
    assert changed == [1, 0]
    kinds = [row["mitigation"] for row in launching.lines(tmp_path / "few" / "pictures.jsonl")]
    assert kinds == ["none", "none"]


def test_mitigation_of_every_prompt_needs_no_false_positive_rate(directory, clean_file, tmp_path):
    always = ["--prompt=a red dog", "--mitigation=prompt", "--when=always", f"--clean={clean_file}"]  # 19, too few for 1%
    assert main(generate(directory, tmp_path / "out", *always)) == 0
    assert len(CleanNorms.load(tmp_path / "out" / "clean.json").norms) == 19


def test_generate_asks_for_one_kind_of_prompts(directory, tmp_path, capsys):
    for more in ([], ["--prompt=a", "--prompts=b.txt"]):
        assert main(generate(directory, tmp_path / "out", *more)) == 1
        assert "name one of them" in capsys.readouterr().err
    assert main(generate(directory, tmp_path / "out", "--prompt=a", "--mitigation=rta")) == 1
    assert "clean: name a file" in capsys.readouterr().err


def test_norms_of_clean_prompts_are_measured_once_for_one_model_and_its_prompts(directory, clean_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "clean.txt"
    prompts.write_text(clean_file.read_text())
    model, sampling = Model(str(directory)), Sampling(2, 3, 5.0, 16)
    measured = model.clean_norms(prompts, sampling)
    (kept,) = (tmp_path / "cache" / "memfilter" / "clean_norms").iterdir()
    content = json.loads(kept.read_text())
    content["norms"][0][0][0] = 77.0  # tells whether it was read
    kept.write_text(json.dumps(content))
    assert model.clean_norms(prompts, sampling).norms[0, 0, 0] == 77.0
    again = model.clean_norms(prompts, Sampling(3, 3, 5.0, 16), kept)  # more seeds than were kept
    assert again.norms.shape == (19, 3, 3)
    np.testing.assert_allclose(again.norms[:, :2], measured.norms, rtol=1e-4)
    assert model.clean_norms(prompts, sampling, kept).norms.shape == (19, 3, 3)  # more than are asked
    with pytest.raises(ValueError, match="generated otherwise"):
        model.clean_norms(kept, Sampling(2, 4, 5.0, 16))
    with pytest.raises(ValueError, match="clean: name a file"):
        model.clean_norms(None, sampling)
    prompts.write_text("another\nof two\n")
    assert model.clean_norms(prompts, sampling, kept).norms.shape == (2, 2, 3)
    other = Model(str(tiny.save_pipeline(tmp_path / "other", "sd1", seed=1)))
    with pytest.raises(ValueError, match="generated otherwise: weights"):
        other.clean_norms(kept, sampling)
    assert not np.allclose(other.clean_norms(prompts, sampling, kept).norms, again.norms[:2, :2])


def test_embedded_model_comes_with_norms_that_are_its_own():
    model = Model("scenes")
    sampling = Sampling(4, 20, 7.5, model.size)  # those of the page
    before = SHIPPED_FILE.read_bytes()
    shipped = model.clean_norms(None, sampling, Path("absent") / "kept.json", count=SHIPPED_PROMPTS)
    assert shipped.norms.shape == (99, 4, 20) and shipped.threshold(0.01, seeds=4) > shipped.metric(seeds=4).max()
    again = measure_prompts(model.pipeline, model.clean_prompts(None, 2), sampling, until=3, progress=False)
    np.testing.assert_allclose(shipped.norms[:2, :, :3], again.norms, rtol=1e-3)
    assert SHIPPED_FILE.read_bytes() == before and not Path("absent").exists()


def test_columns_are_carried_along_and_those_of_their_own_refused(directory, clean_file, files, capsys):
    half = "\ud800"  # which JSON has and UTF-8 has not
    lines = [{"prompt": "a", "big": 2**70, "share": 1, "url": half}, {"prompt": "b", "note": 1, "share": float("nan"), half: 2},
             {"prompt": "c", "note": "x", "share": 0.5, "more": {"y": [1]}}]  # fmt: skip
    (files / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(detect(directory, clean_file, files / "out.parquet")) == 0
    rows = pq.read_table(files / "out.parquet").to_pylist()
    assert [(row["note"], row["more"]) for row in rows] == [(None, None), ("1", None), ("x", "{'y': [1]}")]
    assert [row["share"] for row in rows] == [1.0, None, 0.5] and rows[0]["big"] == str(2**70)
    assert rows[0]["url"] == r"\ud800" and rows[1][r"\ud800"] == 2
    (files / "prompts.jsonl").write_text('{"prompt": "a", "p_value": 1}\n')
    assert main(detect(directory, clean_file, files / "other.jsonl")) == 1
    assert "has a column p_value, which is a name of what is measured" in capsys.readouterr().err


def interrupted_after(count, monkeypatch, target, name):
    """Makes a function raise KeyboardInterrupt at its n-th call; returns the list of its calls."""
    real, calls = getattr(target, name), []

    def call(*arguments, **more):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(target, name, call)
    return calls


def test_detection_that_was_interrupted_goes_on(directory, clean_file, files, monkeypatch):
    assert main(detect(directory, clean_file, files / "whole.jsonl", "--batch_size=2")) == 0
    (files / "out.clean.json").write_bytes((files / "whole.clean.json").read_bytes())
    calls = interrupted_after(3, monkeypatch, detection, "_measure_batch")
    assert main(detect(directory, clean_file, files / "out.jsonl", "--batch_size=2")) == 130
    assert main(detect(directory, clean_file, files / "out.jsonl", "--batch_size=2")) == 0
    assert len(calls) == 5  # of four prompts; the third was begun twice
    assert (files / "out.jsonl").read_text() == (files / "whole.jsonl").read_text()
    assert not list(files.glob(".*.parts"))


def test_generation_that_was_interrupted_goes_on(directory, files, monkeypatch):
    settings = [f"--prompts={files / 'prompts.jsonl'}", "--batch_size=1"]
    assert main(generate(directory, files / "whole", *settings)) == 0
    calls = interrupted_after(3, monkeypatch, generating, "generate_prompt")
    assert main(generate(directory, files / "out", *settings)) == 130
    assert not (files / "out" / "pictures.jsonl").exists()
    assert main(generate(directory, files / "out", *settings)) == 0
    assert len(calls) == 5
    names = sorted(path.name for path in (files / "whole").iterdir())
    assert names == sorted(path.name for path in (files / "out").iterdir()) and len(names) == 9
    for name in names:
        assert (files / "out" / name).read_bytes() == (files / "whole" / name).read_bytes()


def test_mitigation_that_was_interrupted_goes_on(directory, clean_file, files, monkeypatch):
    settings = [f"--prompts={files / 'prompts.jsonl'}", "--mitigation=prompt", f"--clean={clean_file}",
                "--false_positive_rate=0.5"]  # fmt: skip
    assert main(generate(directory, files / "whole", *settings)) == 0
    calls = interrupted_after(3, monkeypatch, generating, "generate_prompt")
    assert main(generate(directory, files / "out", *settings)) == 130
    assert main(generate(directory, files / "out", *settings)) == 0
    assert len(calls) == 5  # of four prompts; the third was begun twice
    assert (files / "out" / "pictures.jsonl").read_text() == (files / "whole" / "pictures.jsonl").read_text()


def test_generation_beside_another_in_the_same_directory_is_refused_and_touches_nothing(directory, files, capsys):
    out = files / "out"
    assert main(generate(directory, out, "--prompt=a dog")) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / ".parts").mkdir()
    with held(out / ".parts" / ".generate.lock"):
        if not (other := os.fork()):
            os._exit(main(generate(directory, out, "--prompt=a cat", "--seeds=1")) + 6)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7
    (out / ".parts").rmdir()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_pictures_of_a_call_that_was_interrupted_give_way_too(directory, files, monkeypatch):
    out = files / "out"
    interrupted_after(3, monkeypatch, generating, "generate_prompt")
    assert main(generate(directory, out, f"--prompts={files / 'prompts.jsonl'}", "--seeds=1")) == 130
    assert {path.name for path in out.glob("*.png")} == {"00000-00.png", "00001-00.png"}
    assert main(generate(directory, out, "--prompt=a cat", "--seeds=1")) == 0
    assert {path.name for path in out.iterdir()} == {"00000-00.png", "pictures.jsonl"}


def test_detection_does_not_write_over_what_it_reads(directory, clean_file, files, capsys):
    prompts = files / "prompts.jsonl"
    before = prompts.read_bytes()
    assert main(detect(directory, clean_file, prompts)) == 1
    assert f"prompts: {prompts} would be written over" in capsys.readouterr().err
    assert main(detect(directory, prompts, prompts.with_name("other.jsonl"), f"--out={prompts}", f"--prompts={clean_file}")) == 1
    assert f"clean: {prompts} would be written over" in capsys.readouterr().err
    assert prompts.read_bytes() == before and sorted(path.name for path in files.iterdir()) == ["prompts.jsonl"]


def test_text_of_files_does_not_reach_the_terminal_as_it_is(directory, clean_file, files, capsys):
    hostile = "\x1b]0;owned\x07\x1b[2J"
    (files / "prompts.csv").write_text(f"{hostile},other\n1,2\n")
    assert main(detect(directory, clean_file, files / "out.jsonl", f"--prompts={files / 'prompts.csv'}")) == 1
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "has no column prompt, it has \\x1b]0;owned" in told and told.isprintable()


def test_pictures_of_another_call_give_way_and_no_other_file(directory, files, monkeypatch):
    out, listed = files / "out", files / "out" / "pictures.jsonl"
    assert main(generate(directory, out, f"--prompts={files / 'prompts.jsonl'}")) == 0
    (out / "own.png").touch()
    (out / "00009-00.png").touch()  # not listed
    names = ["own.png", "../prompts.jsonl", str(files / "prompts.jsonl"), "../out/00009-00.png", 3]
    hostile = "".join(json.dumps({"file": name}) + "\n" for name in names)
    listed.write_bytes(b"\xff{\n" + hostile.encode() + listed.read_bytes())
    interrupted_after(1, monkeypatch, generating, "generate_prompt")
    assert main(generate(directory, out, "--prompt=a cat", "--seeds=1")) == 130
    kept = {"00000-00.png", "00009-00.png", "own.png"}
    assert {path.name for path in out.iterdir()} == kept | {".parts", ".pictures.txt"} and (files / "prompts.jsonl").exists()
    assert main(generate(directory, out, "--prompt=a cat", "--seeds=1")) == 0
    assert {path.name for path in out.iterdir()} == kept | {"pictures.jsonl"}
    assert [row["prompt"] for row in launching.lines(listed)] == ["a cat"]
