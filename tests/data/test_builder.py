import json
import random
from collections import Counter
from itertools import combinations

import imagehash
import numpy as np
import pytest
from clouds import cloud, encoded, sample, write_clouds, write_tar
from PIL import Image, ImageOps

from memfilter.cli import main
from memfilter.data.builder import LOST, choose, prepare_experiment, report
from memfilter.data.candidates import candidates
from memfilter.data.experiment import Experiment
from memfilter.data.manifest import MANIFEST, ManifestShards, read_manifest, require_unchanged
from memfilter.data.plan import Plan

SMALL = Plan(duplicates=5, repeats=4, distinct=30)


def prepare(data, out, plan=SMALL, **options):
    """Manifest's rows by key, counts, and what is in lost.jsonl."""
    counts = prepare_experiment(data, out, plan, processes=1, **options)
    rows = {row["key"]: row for row in read_manifest(out / MANIFEST)[0].to_pylist()}
    return rows, counts, lost_of(out)


def lost_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / LOST).read_text().splitlines()]


def keys_of(rows: dict, role: str) -> list[str]:
    return [key for key, row in rows.items() if row["role"] == role]


@pytest.fixture(scope="module")
def clouds(tmp_path_factory):
    """80 samples that are all good and all distinct."""
    return write_clouds(tmp_path_factory.mktemp("clouds") / "data", range(80))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """60 good samples, and of everything that is of no use a known number."""
    data = write_clouds(tmp_path_factory.mktemp("mixed") / "data", range(60))
    copies = [m for n in range(7) for m in sample(f"exact{n}", n, f"exact copy of {n}")]
    copies += [m for n in range(10, 16) for m in sample(f"jpeg{n}", n, f"JPEG of {n}", "jpeg", quality=60)]
    copies += [m for n in range(20, 25) for m in sample(f"mirror{n}", ImageOps.mirror(cloud(n)), f"mirror of {n}")]
    useless = [(f"broken{n}.png", encoded(n)[:300]) for n in range(4)] + [(f"broken{n}.txt", b"x") for n in range(4)]
    useless += [(f"mute{n}.png", encoded(100 + n)) for n in range(3)]
    useless += [m for n in range(2) for m in sample(f"{n:05d}", 200 + n, "its key is taken")]
    equal = [m for n in range(5) for m in sample(f"equal{n}", 300 + n, "five samples say this")]
    for shard, members in enumerate((copies, useless, equal), 6):
        write_tar(data / f"{shard:05d}.tar", members)
    (data / "00009.tar").write_bytes(b"broken")
    return data


KNOWN = {"candidates": 92, "broken_shards": 1, "unreadable": 4, "too_large": 0, "without_caption": 3, "key_taken": 2,
         "exact_duplicate": 7, "near_duplicate": 11, "equal_caption": 0, "not_needed": 0}  # fmt: skip
EVERYTHING = Plan(duplicates=5, repeats=4, distinct=1000, allow_fewer=True)


def test_counts_are_what_is_known_of_the_data(mixed, tmp_path, capsys):
    rows, counts, lost = prepare(mixed, tmp_path, EVERYTHING)
    assert {name: counts[name] for name in KNOWN} == KNOWN
    assert counts["chosen"] == 65 == len(rows) and counts["duplicates"] == 5 and counts["distinct"] == 60
    assert counts["missing_duplicates"] == 0 and counts["missing_distinct"] == 940
    assert counts["virtual_samples"] == 5 * 4 + 60 and counts["sharing_a_caption"] == 5
    said = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert {name.strip().replace(" ", "_"): int(n.replace(",", "")) for name, n in said.items()} == counts
    reasons = Counter(facts["reason"] for facts in lost)
    assert reasons == {"unreadable": 4, "without caption": 3, "key taken": 2, "exact duplicate": 7,
                       "near duplicate": 11, "broken shard": 1}  # fmt: skip
    for facts in lost:
        assert facts["shard"].endswith(".tar")
        if facts["reason"].endswith("duplicate"):  # one of a pair is chosen, the other one names it
            pair = {facts["key"], facts["of"]}
            assert len({int(key.strip("exactjpgmiro")) for key in pair}) == 1 and facts["of"] in rows


def test_header_says_what_it_was_made_from(mixed, tmp_path):
    _, counts, _ = prepare(mixed, tmp_path, EVERYTHING)
    header = read_manifest(tmp_path / MANIFEST)[1]
    assert header["seed"] == 0 and header["counts"] == counts
    assert header["conditions"]["distinct"] == 1000 and header["conditions"]["allow_fewer"] is True
    assert set(header["conditions"]) == set(EVERYTHING.__dataclass_fields__)
    assert header["versions"]["imagehash"] == imagehash.__version__ and "memfilter" in header["versions"]
    assert str(tmp_path) not in json.dumps(header)


def test_manifest_is_what_was_asked_for_and_is_read_by_training(clouds, tmp_path):
    rows, counts, lost = prepare(clouds, tmp_path)
    assert lost == [] and counts["not_needed"] == 45 and counts["chosen"] == 35
    assert {row["repeats"] for row in rows.values() if row["role"] == "duplicate"} == {4}
    assert {row["repeats"] for row in rows.values() if row["role"] == "distinct"} == {1}
    assert len(keys_of(rows, "duplicate")) == 5 and len(keys_of(rows, "distinct")) == 30
    shards, experiment = ManifestShards(tmp_path / MANIFEST, clouds), Experiment.read(tmp_path / MANIFEST)
    experiment.require(shards)
    assert len(experiment.virtual()) == 50 and experiment.duplicate.sum() == 5
    for key in shards.keys():
        np.testing.assert_array_equal(np.asarray(shards.image(key)), np.asarray(cloud(int(key))))
        assert shards.caption(key) == f"cloud {int(key)}"
    assert require_unchanged(tmp_path / MANIFEST, clouds) == 35


def test_no_two_chosen_pictures_are_near_each_other(tmp_path):
    # a crowd: pictures in which one cloud turns into another, so that neighbours are near and ends are not
    members = []
    for pair in range(6):
        for step in range(9):
            members += sample(f"{pair}-{step}", Image.blend(cloud(2 * pair), cloud(2 * pair + 1), step / 8), "x")
    write_tar(tmp_path / "data" / "a.tar", members)
    plan = Plan(duplicates=3, repeats=2, distinct=99, max_bits=8, allow_fewer=True)
    rows, counts, lost = prepare(tmp_path / "data", tmp_path / "out", plan)
    shards = ManifestShards(tmp_path / "out" / MANIFEST, tmp_path / "data")
    hashes = {key: imagehash.phash(shards.image(key)) for key in rows}
    assert all(hashes[a] - hashes[b] > 8 for a, b in combinations(hashes, 2)) and len(hashes) >= 12
    assert counts["near_duplicate"] == 54 - len(rows) == len(lost) > 20
    everything = Plan(duplicates=3, repeats=2, distinct=51, max_bits=None)
    assert prepare(tmp_path / "data", tmp_path / "all", everything)[1]["near_duplicate"] == 0


def test_mirror_images_may_be_let_in(mixed, tmp_path):
    plan = Plan(duplicates=5, repeats=4, distinct=1000, allow_fewer=True, mirrored=False)
    assert prepare(mixed, tmp_path, plan)[1]["near_duplicate"] == 6


def test_equal_captions_may_be_refused(mixed, tmp_path):
    plan = Plan(duplicates=5, repeats=4, distinct=1000, allow_fewer=True, unique_captions=True)
    rows, counts, lost = prepare(mixed, tmp_path, plan)
    assert counts["equal_caption"] == 4 and counts["sharing_a_caption"] == 0 and counts["chosen"] == 61
    assert len({row["caption"] for row in rows.values()}) == 61
    assert sum(facts["reason"] == "equal caption" for facts in lost) == 4


def test_choice_is_a_function_of_the_seed(clouds, tmp_path):
    found = []
    for seed, processes in ((0, 1), (0, 2), (1, 1)):
        out = tmp_path / f"{seed}-{processes}"
        plan = Plan(seed=seed, duplicates=5, repeats=4, distinct=30)
        prepare_experiment(clouds, out, plan, processes=processes)
        found.append((out / MANIFEST).read_bytes())
    assert found[0] == found[1]
    a, b = (read_manifest(tmp_path / name / MANIFEST)[0] for name in ("0-1", "1-1"))
    assert set(a["key"].to_pylist()) != set(b["key"].to_pylist())
    assert a["key"].to_pylist()[:5] != b["key"].to_pylist()[:5]


def test_choice_does_not_depend_on_where_the_samples_stand(clouds, tmp_path):
    numbers = list(range(80))
    random.Random(1).shuffle(numbers)
    write_clouds(tmp_path / "other", numbers, per_shard=17)
    (tmp_path / "folder").mkdir()
    for number in numbers:
        for name, content in sample(f"{number:05d}", number):
            (tmp_path / "folder" / name).write_bytes(content)
    found = [prepare(data, tmp_path / f"out{n}")[0] for n, data in
             enumerate((clouds, tmp_path / "other", tmp_path / "folder"))]  # fmt: skip
    plain = [[(row["key"], row["role"], row["sha256"], row["caption"]) for row in rows.values()] for rows in found]
    assert plain[0] == plain[1] == plain[2]


def test_one_candidate_more_changes_the_choice_by_one_at_most(clouds, tmp_path):
    before = prepare(clouds, tmp_path / "before")[0]
    write_clouds(tmp_path / "more", range(80))
    write_tar(tmp_path / "more" / "00099.tar", sample("99999", 999))
    after = prepare(tmp_path / "more", tmp_path / "after")[0]
    assert len(set(before) - set(after)) <= 1 and len(set(after) - set(before)) <= 1


def test_choice_is_fair(tmp_path, clouds):
    usable, times = candidates(clouds, tmp_path / "hashes", 1), Counter()
    for seed in range(60):
        times.update(choose(usable, Plan(seed=seed, duplicates=8, distinct=0), []).duplicates)
    # 480 draws among 80: six times each, give or take five standard deviations of sqrt(6 * 0.9)
    assert len(times) > 70 and max(times.values()) < 6 + 5 * 2.4


def test_duplicates_come_from_a_list_of_keys(clouds, tmp_path):
    (tmp_path / "keys.txt").write_text("00007\n00003\n\n00070\n00003\n")
    plan = Plan(duplicates=3, repeats=4, distinct=30, keys=str(tmp_path / "keys.txt"))
    rows, counts, _ = prepare(clouds, tmp_path / "out", plan)
    assert keys_of(rows, "duplicate") == ["00003", "00007", "00070"]
    assert counts["listed_not_found"] == 0 and len(rows) == 33


def test_first_of_a_list_are_taken_and_the_rest_is_as_good_as_any(clouds, tmp_path):
    (tmp_path / "keys.txt").write_text("\n".join(f"{n:05d}" for n in range(79, -1, -1)))
    plan = Plan(duplicates=4, repeats=4, distinct=76, keys=str(tmp_path / "keys.txt"))
    rows, _, _ = prepare(clouds, tmp_path / "out", plan)
    assert keys_of(rows, "duplicate") == ["00076", "00077", "00078", "00079"] and len(rows) == 80


def test_duplicates_come_from_a_list_of_captions_one_for_each(mixed, tmp_path):
    (tmp_path / "captions.txt").write_text("five  samples say\tthis\ncloud 33\n")
    plan = Plan(duplicates=2, repeats=4, distinct=63, captions=str(tmp_path / "captions.txt"))
    rows, counts, _ = prepare(mixed, tmp_path / "out", plan)
    duplicates = keys_of(rows, "duplicate")
    assert duplicates[0] == "00033" and duplicates[1].startswith("equal")
    assert sum(key.startswith("equal") for key in keys_of(rows, "distinct")) == 4


def test_duplicates_come_from_a_ready_list_of_prompts_by_url_and_else_by_caption(tmp_path):
    members = [m for n in range(30) for m in sample(f"{n:03d}", n, f"caption {n % 10}")]
    members += [(f"{n:03d}.json", json.dumps({"url": f"http://x/{n}"}).encode()) for n in range(30)]
    write_tar(tmp_path / "data" / "a.tar", members)
    listed = [{"caption": "caption 3", "url": "http://x/23"}, {"caption": "caption 4", "url": "http://gone"},
              {"caption": "never seen", "index": 5}, {"caption": "elsewhere", "url": "http://x/11"}]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, listed)))
    plan = Plan(duplicates=4, repeats=2, distinct=20, prompts=str(tmp_path / "prompts.jsonl"))
    with pytest.raises(ValueError, match="duplicates: 3 pictures were found and 4 asked for"):
        prepare(tmp_path / "data", tmp_path / "out", plan)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert {"listed": {"caption": "never seen"}, "reason": "not among the candidates"} in lost_of(tmp_path / "out")
    plan = Plan(**plan.__dict__ | {"allow_fewer": True})
    rows, counts, _ = prepare(tmp_path / "data", tmp_path / "out", plan)
    duplicates = keys_of(rows, "duplicate")
    assert len(duplicates) == 3 and {"023", "011"} < set(duplicates)
    assert (set(duplicates) - {"023", "011"}) < {"004", "014", "024"}
    assert counts["listed_not_found"] == 1 == counts["missing_duplicates"]


def test_listed_copies_of_listed_pictures_are_not_shown_twice_as_often(mixed, tmp_path):
    (tmp_path / "keys.txt").write_text("exact3\n00003\njpeg12\n00012\n00040\n")
    plan = Plan(duplicates=5, repeats=4, distinct=50, keys=str(tmp_path / "keys.txt"), allow_fewer=True)
    rows, counts, lost = prepare(mixed, tmp_path / "out", plan)
    assert keys_of(rows, "duplicate") == ["00040", "exact3", "jpeg12"] and counts["missing_duplicates"] == 2
    assert {(f["key"], f["reason"], f["of"]) for f in lost if f.get("key") in ("00003", "00012")} == {
        ("00003", "exact duplicate", "exact3"), ("00012", "near duplicate", "jpeg12")
    }  # fmt: skip


def test_distinct_pictures_are_no_copies_of_the_duplicates(mixed, tmp_path):
    kinds = {"exact": range(7), "jpeg": range(10, 16), "mirror": range(20, 25)}
    listed = [f"{kind}{n}" for kind, numbers in kinds.items() for n in numbers]
    (tmp_path / "keys.txt").write_text("\n".join(listed))
    plan = Plan(duplicates=18, repeats=4, distinct=1000, keys=str(tmp_path / "keys.txt"), allow_fewer=True)
    rows, _, _ = prepare(mixed, tmp_path / "out", plan)
    assert sorted(keys_of(rows, "duplicate")) == sorted(listed)
    originals = {f"{n:05d}" for numbers in kinds.values() for n in numbers}
    assert originals.isdisjoint(rows) and len(keys_of(rows, "distinct")) == 47


def test_every_copy_gets_another_caption(clouds, tmp_path):
    plan = Plan(duplicates=5, repeats=6, distinct=30, variant="other_captions")
    rows, counts, _ = prepare(clouds, tmp_path, plan)
    copies = {key: row for key, row in rows.items() if row["role"] == "duplicate"}
    assert len(copies) == 30 and len(rows) == 60 and counts["virtual_samples"] == 60
    assert list(Counter(key.partition("#")[0] for key in copies).values()) == [6] * 5
    for name in {key.partition("#")[0] for key in copies}:
        mine = [copies[f"{name}#{number}"] for number in range(6)]
        captions = {row["caption"] for row in mine}
        assert len(captions) == 6 and f"cloud {int(name)}" not in captions
        assert captions <= {f"cloud {n}" for n in range(80)}
        assert {row["repeats"] for row in mine} == {1} and len({row["offset"] for row in mine}) == 1
    assert len(Experiment.read(tmp_path / MANIFEST).virtual()) == 60
    shards = ManifestShards(tmp_path / MANIFEST, clouds)
    key = next(iter(copies))
    assert shards.image(key).tobytes() == cloud(int(key.partition("#")[0])).tobytes()
    assert shards.caption(key) == copies[key]["caption"]
    assert require_unchanged(tmp_path / MANIFEST, clouds) == 60
    again = prepare(clouds, tmp_path / "again", plan)[0]
    other = prepare(clouds, tmp_path / "other", Plan(**plan.__dict__ | {"seed": 1}))[0]
    assert again == rows and other != rows


def test_every_other_caption_may_be_drawn_and_never_its_own(clouds, tmp_path):
    plan = Plan(duplicates=2, repeats=79, distinct=10, variant="other_captions")
    rows, _, _ = prepare(clouds, tmp_path, plan)
    for name in {key.partition("#")[0] for key in keys_of(rows, "duplicate")}:
        captions = {rows[f"{name}#{number}"]["caption"] for number in range(79)}
        assert captions == {f"cloud {n}" for n in range(80)} - {f"cloud {int(name)}"}


def test_other_captions_come_from_a_file(clouds, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(f"a caption, {n}" for n in range(6)))
    plan = Plan(duplicates=5, repeats=6, distinct=30, variant="other_captions",
                other_captions=str(tmp_path / "captions.txt"))  # fmt: skip
    rows, _, _ = prepare(clouds, tmp_path / "out", plan)
    for key in keys_of(rows, "duplicate"):
        assert rows[key]["caption"].startswith("a caption, ")
    assert {rows[key]["caption"] for key in keys_of(rows, "distinct")} <= {f"cloud {n}" for n in range(80)}
    short = Plan(**plan.__dict__ | {"repeats": 7})
    with pytest.raises(ValueError, match="needs 7 other captions for each duplicate, found 6"):
        prepare(clouds, tmp_path / "short", short)
    assert not (tmp_path / "short" / MANIFEST).exists()


def test_weighted_variant_shows_a_twentieth_five_times(clouds, tmp_path):
    rows, counts, _ = prepare(clouds, tmp_path, Plan(distinct=76, variant="weighted"))
    assert len(keys_of(rows, "duplicate")) == 4 == 0.05 * len(rows)
    assert [row["repeats"] for row in rows.values()] == [5] * 4 + [1] * 76 and counts["virtual_samples"] == 96


def test_embeddings_find_copies_that_hashes_do_not(clouds, tmp_path):
    # 3 and 4, and 50 and 51 show the same to the model
    vectors = np.eye(80, dtype=np.float32)
    vectors[4], vectors[51] = 2 * vectors[3], vectors[50] + 0.1 * vectors[51]
    keys = np.array([f"{n:05d}" for n in range(80)])
    order = np.random.default_rng(0).permutation(80)
    np.savez(tmp_path / "e.npz", keys=keys[order], embeddings=vectors[order])
    plan = Plan(duplicates=5, repeats=4, distinct=1000, allow_fewer=True, embeddings=str(tmp_path / "e.npz"))
    rows, counts, lost = prepare(clouds, tmp_path / "file", plan)
    assert counts["near_duplicate"] == 2 and len(rows) == 78
    assert {tuple(sorted((f["key"], f["of"]))) for f in lost} == {("00003", "00004"), ("00050", "00051")}

    def embed(pictures):
        return np.stack([vectors[numbers[picture.tobytes()]] for picture in pictures])

    numbers = {cloud(n).tobytes(): n for n in range(80)}
    plan = Plan(**plan.__dict__ | {"embeddings": None})
    assert prepare(clouds, tmp_path / "call", plan, embed=embed)[0] == rows


@pytest.mark.parametrize(
    "arrays, message",
    [({"keys": np.array(["00000"]), "embeddings": np.ones((1, 4))}, "lacks 79 candidates, such as '00001'"),
     ({"keys": np.array(["00000"]), "embeddings": np.ones((2, 4))}, r"1 keys and embeddings of shape \(2, 4\)"),
     ({"keys": np.array(["00000"]), "embeddings": np.ones(1)}, "expected"),
     ({"keys": np.array([{"a": 1}], object), "embeddings": np.ones((1, 4))}, "is no .npz file"),
     ({"names": np.array(["00000"])}, "is no .npz file"), (b"hello", "is no .npz file"), (b"", "is no .npz file")],
)  # fmt: skip
def test_embeddings_that_do_not_fit_are_refused(clouds, tmp_path, arrays, message):
    if isinstance(arrays, bytes):
        (tmp_path / "e.npz").write_bytes(arrays)
    else:
        np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(ValueError, match=rf"embeddings .*e\.npz.*{message}|e\.npz {message}"):
        prepare(clouds, tmp_path / "out", Plan(duplicates=5, distinct=30, embeddings=str(tmp_path / "e.npz")))


def test_fewer_than_asked_for_is_an_error_that_says_everything(mixed, tmp_path, capsys):
    with pytest.raises(ValueError) as caught:
        prepare(mixed, tmp_path / "out", Plan(duplicates=66, repeats=2, distinct=10))
    said = str(caught.value).splitlines()
    assert len(said) == 2 and "duplicates: 65 pictures were found and 66 asked for" in said[0]
    assert "distinct: 0 pictures were found and 10 asked for" in said[1] and "--allow_fewer" in said[1]
    assert not (tmp_path / "out" / MANIFEST).exists() and len(lost_of(tmp_path / "out")) == 28
    assert "near duplicate" in capsys.readouterr().out


def test_nothing_at_all_is_an_error_even_where_fewer_will_do(tmp_path):
    write_tar(tmp_path / "data" / "a.tar", [("x.png", b"broken"), ("x.txt", b"x")])
    with pytest.raises(ValueError, match="nothing is left to choose: .*lost.jsonl"):
        prepare(tmp_path / "data", tmp_path / "out", Plan(allow_fewer=True))


def test_manifest_that_is_there_is_never_written_over(clouds, tmp_path):
    prepare(clouds, tmp_path)
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(FileExistsError, match="manifest.parquet exists"):
        prepare(clouds, tmp_path, Plan(seed=9, duplicates=1, distinct=3))
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_settings_and_lists_are_looked_at_before_any_picture(tmp_path):
    for plan, error in ((Plan(repeats=0), "repeats must be"), (Plan(keys="/nowhere/keys.txt"), "nowhere")):
        with pytest.raises((ValueError, OSError), match=error):
            prepare(tmp_path / "no data", tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_command_prepares_and_tells(clouds, tmp_path, capsys):
    argv = ["prepare", "experiment", str(clouds), str(tmp_path / "out"), "--duplicates=5", "--repeats=4",
            "--distinct=30", "--processes=1"]  # fmt: skip
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert report(read_manifest(tmp_path / "out" / MANIFEST)[1]["counts"]) in said
    assert said.splitlines()[-1] == str(tmp_path / "out" / MANIFEST)
    plain = tmp_path / "plain"
    prepare(clouds, plain)
    assert (plain / MANIFEST).read_bytes() == (tmp_path / "out" / MANIFEST).read_bytes()
    assert main(argv) == 1 and "error: " in capsys.readouterr().err
    assert main([*argv[:3], str(tmp_path / "two"), "--duplicates=5", "--max_bits=null", "--distinct=300"]) == 1
    assert "error: distinct: 75 pictures were found and 300 asked for" in capsys.readouterr().err


def test_hashes_may_be_kept_elsewhere_and_shared(clouds, tmp_path):
    prepare(clouds, tmp_path / "a", hashes=tmp_path / "hashes")
    assert len(list((tmp_path / "hashes").iterdir())) == 8
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [LOST, MANIFEST]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "hashes").iterdir()}
    prepare(clouds, tmp_path / "b", Plan(seed=1, duplicates=5, distinct=30), hashes=tmp_path / "hashes")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "hashes").iterdir()} == times


def test_keys_that_end_like_a_copys_are_refused_in_words(tmp_path):
    data = write_clouds(tmp_path / "data", range(12))
    write_tar(data / "00099.tar", sample("00003#1", 99))
    (tmp_path / "keys.txt").write_text("00003")
    plan = Plan(duplicates=1, repeats=3, distinct=12, variant="other_captions", keys=str(tmp_path / "keys.txt"))
    with pytest.raises(ValueError, match=r"2 rows share a key with another, the first is '00003#1'"):
        prepare(data, tmp_path / "out", plan)
    assert not (tmp_path / "out" / MANIFEST).exists()
