"""Real runs of tiny models, evaluated; what is written is redone by other means."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image
from scipy.stats import scoreatpercentile

from memfilter.cli import main
from memfilter.data import scenes
from memfilter.data.shards import ShardError, Shards
from memfilter.eval import evaluate
from memfilter.eval import nearest as nearest_module
from memfilter.eval.copies import PIXELS, PixelCorrelation, copy_similarity
from memfilter.eval.evaluate import evaluate_run
from memfilter.eval.generate import generate
from memfilter.eval.measuring import measured, training_pictures
from memfilter.eval.parts import Parts
from memfilter.eval.runs import FinishedRun, Prompt
from memfilter.eval.sscd import Sscd
from memfilter.files import held
from memfilter.pipelines import load_trained
from memfilter.processes import from_main, processes

SHORT = {"distinct": 3, "seeds": 2, "steps": 1, "batch_size": 3, "progress": False}
FILES = ("evaluation.json", "evaluation.npz")


@pytest.fixture
def scenes_copy(scenes_run, tmp_path):
    """A run that a test may write into."""
    return shutil.copytree(scenes_run, tmp_path / "run")


@pytest.fixture
def folder_copy(folder_run, tmp_path):
    return shutil.copytree(folder_run, tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(scenes_run, tmp_path_factory):
    """(directory, result), with the nearest training pictures and distances."""
    run = shutil.copytree(scenes_run, tmp_path_factory.mktemp("runs") / "run")
    return run, evaluate_run(run, nearest=True, frechet="measure", **SHORT)


def contents(run) -> list[bytes]:
    return [(run / name).read_bytes() for name in FILES]


def error_of(capsys, *arguments) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "not finished"),
        (["--seeds=1"], "seeds must be at least 2"),
        (["--steps=0"], "steps must be at least 1, found 0"),
        (["--batch_size=0"], "batch_size must be at least 1, found 0"),
        (["--near_copies=0"], "near_copies must be at least 1, found 0"),
        (["--near_copies=-1"], "near_copies must be at least 1, found -1"),
        (["--distinct=-1"], "distinct must be at least 0, found -1"),
        (["--frechet=clip"], "frechet=clip needs clip"),
        (["--clip=absent"], "clip: absent is no directory"),
    ],
)
def test_what_cannot_be_evaluated_is_named_in_one_line_before_there_is_a_run(tmp_path, capsys, arguments, message):
    assert message in error_of(capsys, tmp_path, *arguments)


def test_pictures_are_those_of_the_pipeline_and_figures_their_means_and_percentiles(evaluated, scenes_dir):
    run, result = evaluated
    assert json.loads((run / "evaluation.json").read_text()) == result
    with np.load(run / "evaluation.npz") as pictures:
        generations, training = pictures["generations"], pictures["training"]
    captions = [prompt["caption"] for prompt in result["prompts"]]
    expected = generate(load_trained(run), captions, range(2), steps=1, batch_size=3, progress=False)
    assert np.array_equal(generations, expected) and generations.shape == (7, 2, 16, 16, 3)
    shards = Shards.open(scenes_dir)
    for prompt, picture in zip(result["prompts"], training, strict=True):
        assert prompt["caption"] == shards.caption(prompt["key"])
        small = shards.image(prompt["key"]).resize((16, 16), Image.Resampling.LANCZOS)
        assert np.array_equal(picture, np.asarray(small))
    for kind, rows in (("duplicates", slice(0, 4)), ("distinct", slice(4, 7))):
        assert {prompt["duplicate"] for prompt in result["prompts"][rows]} == {kind == "duplicates"}
        similarity = copy_similarity(generations[rows], training[rows, None])
        assert similarity == pytest.approx(np.array([p["similarity"] for p in result["prompts"][rows]]), abs=1e-6)
        figures = result[kind]
        assert figures["copy_similarity"] == pytest.approx(similarity.mean(), abs=1e-6)
        assert figures["memorization_rate"] == (similarity > result["memorized_above"]).mean()
        for percent in (75, 90, 95):
            at = scoreatpercentile(similarity.ravel(), percent)
            assert figures[f"copy_similarity_p{percent}"] == pytest.approx(at, abs=1e-6)
    assert result["unknown"] == {} and result["filter"]["whole"]["norm"]["duplicates"] > 0
    assert not (run / "evaluation.parts").exists()


def test_nearest_training_pictures_are_those_that_brute_force_finds(evaluated, scenes_dir):
    run, result = evaluated
    found, shards = FinishedRun(run), Shards.open(scenes_dir)
    training = np.stack([found.picture(key, 16) for key in shards.keys()])
    with np.load(run / "evaluation.npz") as pictures:
        generations = pictures["generations"]
    for prompt, made in zip(result["prompts"], generations, strict=True):
        similarity = copy_similarity(made[:, None], training[None])
        assert prompt["nearest_similarity"] == pytest.approx(similarity.max(1), abs=1e-5)
        assert prompt["nearest_key"] == [shards.keys()[place] for place in similarity.argmax(1)]
        assert np.all(np.array(prompt["nearest_similarity"]) > np.array(prompt["similarity"]) - 1e-5)
    every = [value for prompt in result["prompts"][:4] for value in prompt["nearest_similarity"]]
    assert result["duplicates"]["nearest_similarity"] == pytest.approx(np.mean(every), abs=1e-6)
    assert result["training_unreadable"] == 0


def test_share_of_nearest_pictures_above_a_limit_is_told_only_where_the_limit_is_not_one_of_pairs(evaluated):
    run, result = evaluated
    assert not any("nearest_memorization_rate" in result[kind] for kind in ("duplicates", "distinct"))
    found = FinishedRun(run)
    asked = found.prompts(SHORT["distinct"])
    with np.load(run / "evaluation.npz") as pictures:
        generations = pictures["generations"]
    nearest = np.array([prompt["nearest_similarity"] for prompt in result["prompts"]])  # [P, S]
    closest = nearest.ravel(), np.zeros(nearest.size, int), 0
    fixed = measured(found, asked, generations, training_pictures(found, asked, 16), Quick(), closest)
    assert fixed["duplicates"]["nearest_memorization_rate"] == (nearest[:4] > 0.7).mean()
    assert fixed["duplicates"]["nearest_similarity"] == pytest.approx(result["duplicates"]["nearest_similarity"])


@pytest.fixture
def own_folder(folder_copy, tmp_path):
    """The pictures of `folder_copy`, which a test may spoil."""
    folder = shutil.copytree(FinishedRun(folder_copy).config.data.path, tmp_path / "folder")
    summary = json.loads((folder_copy / "summary.json").read_text())
    summary["config"]["data"]["path"] = str(folder)
    (folder_copy / "summary.json").write_text(json.dumps(summary))
    return folder


def test_prompt_whose_training_picture_cannot_be_read_is_without_similarity(folder_copy, own_folder):
    whole = evaluate_run(folder_copy, **SHORT)
    (own_folder / "01.png").write_bytes(b"no picture")
    again = evaluate_run(folder_copy, **SHORT)
    assert (whole["training_unreadable"], again["training_unreadable"]) == (0, 1)
    similarity = [prompt["similarity"] for prompt in again["prompts"]]
    assert similarity[1] == [None, None]
    assert [similarity[i] for i in (0, 2)] == [whole["prompts"][i]["similarity"] for i in (0, 2)]
    assert again["unknown"]["copy_similarity"] == pytest.approx(np.mean([similarity[0], similarity[2]]))
    with np.load(folder_copy / "evaluation.npz") as pictures:
        assert pictures["training"].any((1, 2, 3)).tolist() == [True, False, True]


def test_blocks_and_unreadable_pictures_change_nothing_for_the_others(folder_copy, own_folder, monkeypatch):
    whole = evaluate_run(folder_copy, nearest=True, **SHORT)
    least = whole["prompts"][0]["nearest_key"][0]
    (own_folder / f"{least}.png").write_bytes(b"no picture")
    monkeypatch.setattr(nearest_module, "BLOCK", 5)
    again = evaluate_run(folder_copy, nearest=True, **SHORT)
    assert again["training_unreadable"] == 1
    for before, after in zip(whole["prompts"], again["prompts"], strict=True):
        for seed in range(2):
            if before["nearest_key"][seed] != least:
                assert after["nearest_key"][seed] == before["nearest_key"][seed]
            assert after["nearest_key"][seed] != least


def test_run_on_pictures_of_which_nothing_is_known(folder_copy):
    result = evaluate_run(folder_copy, **SHORT)
    assert result["duplicates"] == result["distinct"] == {} and result["filter"] is None
    assert [prompt["duplicate"] for prompt in result["prompts"]] == [None] * 3
    assert result["prompts"][1]["caption"] == "<script>alert(1)</script>\nno 1"
    assert "agreement" not in result["prompts"][0] and "agreement" not in result["unknown"]
    run = FinishedRun(folder_copy)
    pictures = np.stack([run.picture(f"{i:02d}", 16) for i in range(12)])
    pairs = [copy_similarity(pictures[i], pictures[j]) for i in range(12) for j in range(i)]
    assert result["memorized_above"] == pytest.approx(np.quantile(pairs, 0.999), abs=1e-6)
    assert result["memorized_above_is"] == "the 99.9% quantile of the same measure over pairs of distinct training pictures"


def test_copies_that_no_index_tells_do_not_set_the_limit(folder_copy, own_folder):
    before = evaluate_run(folder_copy, **SHORT)["memorized_above"]
    for i in range(8):  # each a little different, as files saved again are
        rng, whole = np.random.default_rng(i), np.asarray(Image.open(own_folder / "00.png").convert("RGB")).astype(int)
        noisy = (whole + rng.integers(-2, 3, whole.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(own_folder / f"copy{i}.png")
        (own_folder / f"copy{i}.txt").write_text("a copy")
    run = FinishedRun(folder_copy)
    copies = [run.picture(f"copy{i}", 16) for i in range(8)]
    assert min(copy_similarity(copies[0], other) for other in copies) > before
    assert evaluate_run(folder_copy, **SHORT)["memorized_above"] == pytest.approx(before, abs=0.02)


def test_caption_that_cannot_be_read_is_passed_over(folder_copy, own_folder, caplog):
    (own_folder / "01.txt").unlink()
    (own_folder / "01.txt").symlink_to(own_folder / "gone.txt")
    found = evaluate_run(folder_copy, **SHORT)
    assert [prompt["caption"] for prompt in found["prompts"]] == ["caption 0", "caption 2", "caption 3"]
    assert "no prompt: sample '01'" in caplog.text


@pytest.mark.parametrize("change", [{"object": "weapon"}, {"object": None}, {"colours": None}, {"colours": [1]}, {"colours": []},
                                    {"x": "left"}, {"poster": "7"}])  # fmt: skip
def test_metadata_of_no_scene_are_no_error(folder_copy, own_folder, change):
    facts = scenes.draw(9, scenes.DISTINCT, 0).facts()
    (own_folder / "00.json").write_text(json.dumps(facts))
    run = FinishedRun(folder_copy)
    assert run.scenes(["00"]) == [scenes.draw(9, scenes.DISTINCT, 0)]
    assert not run.of_scenes  # the others say nothing
    (own_folder / "00.json").write_text(json.dumps(facts | change))
    assert run.scenes(["00"]) is None and not FinishedRun(folder_copy).of_scenes


def test_picture_under_several_captions_is_asked_for_by_the_first(scenes_copy):
    run = FinishedRun(scenes_copy)
    plain, experiment = run.prompts(2), run.experiment
    first, *_ = rows = np.flatnonzero(experiment.duplicate)
    names = [experiment.keys[first] if row in rows[:3] else key for row, key in enumerate(experiment.keys)]
    run.data = (run.data[0], replace(experiment, pictures=names))
    assert run.prompts(2) == [plain[0], *plain[3:]]
    assert run.captions() > {prompt.text for prompt in plain}  # under whatever caption it was shown


def test_prompts_of_a_file_with_and_without_keys(scenes_copy, tmp_path):
    key = FinishedRun(scenes_copy).experiment.keys[1]
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "my own words", "key": key}, {"prompt": "<img src=x onerror=alert(1)>"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    result = evaluate_run(scenes_copy, prompts=file, **SHORT)
    first, second = result["prompts"]
    assert (first["key"], first["duplicate"], first["caption"]) == (key, True, "my own words")
    assert (second["key"], second["duplicate"], second["similarity"]) == (None, None, [None, None])
    assert result["duplicates"]["copy_similarity"] == pytest.approx(np.mean(first["similarity"]))
    assert result["unknown"].keys() == {"seed_agreement"}


class Quick(PixelCorrelation):
    """With a limit of its own, which needs no calibration."""

    def memorized_above(self, side):
        return 0.7


def test_agreement_is_judged_by_the_scene_of_the_key_only_where_the_prompt_is_its_caption(scenes_run):
    run = FinishedRun(scenes_run)
    asked = run.prompts(1)
    made = np.stack([[run.picture(prompt.key, 32)] * 2 for prompt in asked])  # what they ask for: [5, 2, 32, 32, 3]
    known = training_pictures(run, asked, 32)
    found = measured(run, asked, made, known, Quick())
    assert found["duplicates"]["agreement"] > 0.8 and found["distinct"]["agreement"] > 0.5
    for other in ("a cat", asked[1].text):
        found = measured(run, [replace(asked[0], text=other), *asked[1:]], made, known, Quick())
        assert not any("agreement" in figures for figures in (found["duplicates"], found["distinct"], *found["prompts"]))


def test_plain_prompts_need_no_data(scenes_copy, tmp_path, capsys):
    summary = json.loads((scenes_copy / "summary.json").read_text())
    summary["config"]["data"]["path"] = str(tmp_path / "gone")
    (scenes_copy / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    result = evaluate_run(scenes_copy, prompts=tmp_path / "prompts.txt", **SHORT)
    assert [prompt["caption"] for prompt in result["prompts"]] == ["a cat", "a dog"]
    assert result["memorized_above"] is None
    assert "gone" in error_of(capsys, scenes_copy)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds none"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("absent.txt", None, "cannot be read"),
        ("a.txt", b"x" * 20_000, "line 1: a prompt of 20,000 characters, more than 16,384"),
        ("a.jsonl", b'{"prompt": "a"}\n{', "line 2"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: expected"),
        ("a.jsonl", b'["prompt"]', "line 1: expected"),
        ("a.jsonl", b'{"prompt": "a", "key": "\\u001b[31m"}', r"no sample '\x1b[31m'"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_prompts_that_cannot_be_used_are_named_in_one_line(scenes_run, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in error_of(capsys, scenes_run, f"--prompts={tmp_path / name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frechet=scorer", "--steps=1"], "needs pictures of 32 px, found 16 px"),
        (["--frechet=measure", "--distinct=0"], "one kind is missing"),
        (["--measure=wen"], "measure wen needs sscd"),
    ],
)
def test_what_is_asked_for_and_not_there_is_named_in_one_line_before_pictures_are_made(scenes_copy, capsys, arguments, message):
    assert message in error_of(capsys, scenes_copy, *arguments)
    assert not (scenes_copy / "evaluation.parts").exists()


def test_distance_by_more_features_than_it_can_be_had_of_is_refused(scenes_copy, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "MOST_FEATURES", 767)
    assert "pixel correlation has 768 features of pictures of 16 px" in error_of(capsys, scenes_copy, "--frechet=measure")
    assert not (scenes_copy / "evaluation.parts").exists()


def test_mirrored_copies_are_found_where_the_run_has_shown_mirrored_pictures(scenes_copy):
    summary = json.loads((scenes_copy / "summary.json").read_text())
    for flip in (False, True):
        summary["config"]["data"]["random_flip"] = flip
        (scenes_copy / "summary.json").write_text(json.dumps(summary))
        run = FinishedRun(scenes_copy)
        asked = run.prompts(3)
        known = training_pictures(run, asked, 16)
        mirrored = np.stack([known[i][:, ::-1] for i in range(len(asked))])[:, None]
        made = np.concatenate([mirrored, np.stack([known[i] for i in range(len(asked))])[:, None]], axis=1)
        parts = Parts(scenes_copy / "parts", "nearest", {"flip": flip}, processes())
        closest = nearest_module.nearest(made.reshape(-1, 16, 16, 3), run, PIXELS, parts, progress=False)
        found = measured(run, asked, made, known, PIXELS, closest)
        for name in ("similarity", "nearest_similarity"):
            similarity = np.array([prompt[name] for prompt in found["prompts"]])
            assert similarity[:, 1] == pytest.approx(1, abs=1e-5)
            assert (similarity[:, 0] > 0.999).all() == flip
        assert found["training_unreadable"] == 0


def test_run_on_a_stream_takes_prompts_of_a_file_only(scenes_copy, tmp_path, capsys):
    summary = json.loads((scenes_copy / "summary.json").read_text())
    summary["config"]["data"]["streaming"] = "webdataset"
    (scenes_copy / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "prompts.txt").write_text("a cat")
    assert "was trained on a stream" in error_of(capsys, scenes_copy)
    assert evaluate_run(scenes_copy, prompts=tmp_path / "prompts.txt", **SHORT)["unknown"]["seed_agreement"]


def test_command_with_distances_prints_what_it_writes(scenes_copy, capsys):
    settings = ["--distinct=3", "--seeds=2", "--steps=1", "--frechet=measure"]
    assert main(["evaluate", str(scenes_copy), *settings]) == 0
    result = json.loads((scenes_copy / "evaluation.json").read_text())
    assert (result["frechet"]["generated"], result["frechet"]["training"]) == (6, 100)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["duplicates", "distinct", "frechet"]
    assert f"frechet_distance {result['frechet']['frechet_distance']:.4g}" in lines[2]


class Averages(torch.nn.Module):
    """Stands for SSCD: 1024 features, averages of the picture's parts."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, [18, 19]).flatten(1)[:, :1024]


def test_dcr_looks_for_the_nearest_by_the_users_network_and_writes_down_its_sum(folder_copy, tmp_path, capsys):
    file = tmp_path / "net.pt"
    torch.jit.script(Averages()).save(str(file))
    settings = ["--distinct=2", "--seeds=2", "--steps=1", "--measure=dcr", f"--sscd={file}"]
    assert main(["evaluate", str(folder_copy), *settings]) == 0
    result = json.loads((folder_copy / "evaluation.json").read_text())
    assert (result["measure"], result["sha256"]) == ("SSCD (dcr)", hashlib.sha256(file.read_bytes()).hexdigest())
    run, measure = FinishedRun(folder_copy), Sscd(file, "dcr")
    with np.load(folder_copy / "evaluation.npz") as pictures:
        made = measure.features(pictures["generations"])  # [2, 2, 1024]
    known = measure.features(np.stack([run.picture(f"{i:02d}", 16) for i in range(12)]))
    similarity = np.einsum("psd,nd->psn", made, known)
    for prompt, row, own in zip(result["prompts"], similarity, (0, 1), strict=True):
        assert prompt["nearest_similarity"] == pytest.approx(row.max(-1), abs=1e-5)
        assert prompt["nearest_key"] == [f"{i:02d}" for i in row.argmax(-1)]
        assert prompt["similarity"] == pytest.approx(row[:, own], abs=1e-5)
    figures = result["unknown"]
    assert figures["nearest_similarity_above_0.5"] == (similarity.max(-1) > 0.5).mean()
    assert "memorization_rate" in figures and "nearest_memorization_rate" not in figures  # the limit is one of pairs
    pairs = (known @ known.T)[np.triu_indices(12, 1)]
    assert result["memorized_above"] == pytest.approx(np.quantile(pairs, 0.999), abs=1e-5)  # of 16 px: not 0.7
    assert "nearest_similarity_above_0.5" in capsys.readouterr().out


def unreadable():
    raise ShardError("it cannot be read")


def test_likest_of_near_copies_counts(scenes_copy, monkeypatch):
    run = FinishedRun(scenes_copy)
    alone, together = run.prompts(0), run.prompts(0, near_copies=2)
    assert together == [replace(alone[i], copies=(alone[i + 1].key,)) for i in (0, 2)]
    assert run.prompts(1)[-1] == Prompt(run.data[0].caption(run.experiment.keys[4]), run.experiment.keys[4], False)
    result = evaluate_run(scenes_copy, near_copies=2, **SHORT)
    with np.load(scenes_copy / "evaluation.npz") as pictures:
        generations = pictures["generations"]
    own, other = (PIXELS.similarity(generations[0], run.picture(alone[i].key, 16)[None]) for i in (0, 1))
    assert result["prompts"][0]["similarity"] == pytest.approx(np.maximum(own, other), abs=1e-6)
    gone = [replace(together[0], copies=(alone[1].key, "gone")), *together[1:]]
    picture = FinishedRun.picture
    monkeypatch.setattr(FinishedRun, "picture", lambda run, key, side: picture(run, key, side) if key != "gone" else unreadable())
    found = measured(run, gone, generations[:2], training_pictures(run, gone, 16), Quick())
    assert found["training_unreadable"] == 1 and found["prompts"][0]["similarity"] == result["prompts"][0]["similarity"]


def evaluate_with(run, seconds: float = 0) -> None:
    """In a process of its own; ``seconds`` are lost before each batch."""
    AcceleratorState._reset_state(reset_partial_state=True)  # what the fork has brought along
    make = evaluate.generate_batch

    def slow(*arguments, **settings):
        time.sleep(seconds)
        return make(*arguments, **settings)

    evaluate.generate_batch = slow
    evaluate.evaluate_run(run, nearest=True, frechet="measure", **SHORT)


def test_two_processes_write_what_one_does(evaluated, scenes_run, tmp_path, monkeypatch):
    run = shutil.copytree(scenes_run, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    debug_launcher(evaluate_with, args=(run,), num_processes=2)
    assert contents(run) == contents(evaluated[0])


def evaluate_apart(run) -> None:
    """`evaluate_with` where every process sees files of other dates."""
    stamp = FinishedRun.stamp
    FinishedRun.stamp = lambda run: stamp(run) | {"rank": torch.distributed.get_rank()}
    evaluate_with(run)


def test_main_process_decides_which_pictures_are_made_and_whether(evaluated, scenes_run, tmp_path, monkeypatch):
    run = shutil.copytree(scenes_run, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for _ in range(2):  # the second time they are there, for all processes
        debug_launcher(evaluate_apart, args=(run,), num_processes=2)
        assert json.loads((run / "evaluation.json").read_text()) == evaluated[1]
        assert not (run / "evaluation.parts").exists()


def fail_in_main(out) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    state = processes()
    found = from_main(state, lambda: {"rank": state.process_index})
    with pytest.raises(OSError if state.is_main_process else ValueError) as error:
        from_main(state, lambda: (out / "missing").read_text())
    (out / str(state.process_index)).write_text(f"{found} {error.value}")


def test_error_of_what_the_main_process_decides_reaches_all(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    debug_launcher(fail_in_main, args=(tmp_path,), num_processes=2)
    first, second = ((tmp_path / name).read_text() for name in "01")
    assert first == second and first.startswith("{'rank': 0} ") and "No such file or directory" in first


def test_killed_evaluation_goes_on_where_it_was(evaluated, scenes_run, tmp_path, monkeypatch):
    run = shutil.copytree(scenes_run, tmp_path / "run")
    child = multiprocessing.get_context("fork").Process(target=evaluate_with, args=(run, 0.3))
    child.start()
    end = time.monotonic() + 600
    while len(parts := list((run / "evaluation.parts").glob("generate-*/[0-9]*.npz"))) < 2 and time.monotonic() < end:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert 2 <= len(parts) < 5 and not (run / "evaluation.json").exists()
    (parts[0].parent / ".000004.npz.partial").write_bytes(b"half")
    made = []
    make = evaluate.generate_batch
    monkeypatch.setattr(evaluate, "generate_batch", lambda *a, **s: made.append(a[1]) or make(*a, **s))
    evaluate_run(run, nearest=True, frechet="measure", **SHORT)
    assert len(made) == 5 - len(parts)
    assert contents(run) == contents(evaluated[0])
    assert not (run / "evaluation.parts").exists()


def test_pictures_that_are_there_are_measured_again_without_being_made(scenes_copy, monkeypatch):
    first = evaluate_run(scenes_copy, **SHORT)
    before = contents(scenes_copy)
    monkeypatch.setattr(evaluate, "load_trained", None)
    assert evaluate_run(scenes_copy, **SHORT) == first and contents(scenes_copy) == before
    with pytest.raises(TypeError):  # other pictures are asked for
        evaluate_run(scenes_copy, **SHORT | {"steps": 2})
    monkeypatch.undo()
    pictures = scenes_copy / "evaluation.npz"
    pictures.write_bytes(pictures.read_bytes()[:-100])  # cut
    assert evaluate_run(scenes_copy, **SHORT) == first and contents(scenes_copy) == before


def test_parts_of_other_settings_and_half_written_ones_are_removed(tmp_path):
    state = processes()
    old = Parts(tmp_path, "generate", {"steps": 1}, state)
    old.run(2, lambda number: {"x": np.array([number])}, progress=False)
    Parts(tmp_path, "nearest", {"steps": 1}, state).run(1, lambda number: {"x": np.array([7])}, progress=False)
    new = Parts(tmp_path, "generate", {"steps": 2}, state)
    assert new.due(2) == [0, 1]
    new.run(1, lambda number: {"x": np.array([5])}, progress=False)
    (directory,) = tmp_path.glob("generate-*")
    (directory / ".000001.npz.partial").write_bytes(b"half")
    found = Parts(tmp_path, "generate", {"steps": 2}, state).run(2, lambda number: {"x": np.array([6])}, progress=False)
    assert [part["x"].item() for part in found] == [5, 6]
    assert sorted(path.name for path in directory.iterdir()) == ["000000.npz", "000001.npz"]
    assert len(list(tmp_path.glob("nearest-*/*.npz"))) == 1


def test_run_is_evaluated_by_one_call_at_a_time(scenes_copy):
    with held(scenes_copy / ".evaluation.lock"):
        if not (other := os.fork()):
            try:
                evaluate_run(scenes_copy, **SHORT)
            except BlockingIOError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7
    assert not list(scenes_copy.glob("evaluation*"))


def test_parts_are_of_one_call_at_a_time(tmp_path):
    held = Parts(tmp_path, "generate", {"steps": 1}, processes())
    held.run(1, lambda number: {"x": np.array([number])}, progress=False)
    before = sorted(tmp_path.rglob("*"))
    if not (other := os.fork()):
        try:
            Parts(tmp_path, "generate", {"steps": 2}, held._state)
        except BlockingIOError as error:
            os._exit(7 if f"{tmp_path}/.generate.lock is held by another process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 7
    assert sorted(tmp_path.rglob("*")) == before
    held.remove()
    assert not tmp_path.exists()


@pytest.mark.parametrize("left", [b"", b"nothing that numpy knows", 0.5, "holes"])
def test_part_that_is_cut_is_made_again_and_no_other(tmp_path, caplog, left):
    def parts():
        return Parts(tmp_path, "generate", {"steps": 1}, processes())

    parts().run(3, lambda number: {"x": np.full(100, number)}, progress=False)
    path = next(tmp_path.glob("generate-*/000001.npz"))
    whole = path.read_bytes()
    if left == "holes":  # as long as it was, without what it held
        left = whole[:200] + bytes(400) + whole[600:]
    path.write_bytes(left if isinstance(left, bytes) else whole[: int(left * len(whole))])
    assert parts().due(3) == [1] and f"{path} is made again" in caplog.text
    found = parts().run(3, lambda number: {"x": np.full(100, number + 10)}, progress=False)
    assert [part["x"][0] for part in found] == [0, 11, 2]
