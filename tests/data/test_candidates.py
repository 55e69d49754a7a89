import errno
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from clouds import cloud, encoded, sample, write_clouds, write_tar
from PIL import Image

from memfilter.data import candidates as module
from memfilter.data.candidates import SCHEMA, candidates
from memfilter.data.shards import MAX_CAPTION, ShardError, Shards


def png_of(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG of zeros, in few bytes however many they are; of a very large one only the first rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze, row = zlib.compressobj(9), bytes(width + 1)
    pixels = b"".join(squeeze.compress(row) for _ in range(min(height, 9000 * 9000 // width))) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(b"zTXt", data) for data in extra), chunk(b"IDAT", pixels)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tree(path) -> dict:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


def by_key(table: pa.Table) -> dict[str, dict]:
    return {row["key"]: row for row in table.to_pylist()}


def test_every_sample_is_found_with_its_place_hashes_and_caption(tmp_path):
    data = write_clouds(tmp_path / "data", range(25))
    table = candidates(data, tmp_path / "kept", processes=1)
    assert table.schema.equals(SCHEMA) and len(table) == 25
    for number, row in enumerate(table.to_pylist()):
        content = encoded(number)
        assert row["key"] == f"{number:05d}" and row["caption"] == f"cloud {number}" and row["lost"] is None
        assert (data / row["shard"]).read_bytes()[row["offset"] :][: row["size"]] == content
        assert row["sha256"] == hashlib.sha256(content).digest() and row["url"] is None
        assert row["hash"] == np.packbits(imagehash.phash(cloud(number)).hash).tobytes()


def test_two_processes_find_what_one_finds(tmp_path):
    data = write_clouds(tmp_path / "data", range(40))
    one, two = (candidates(data, tmp_path / f"kept{n}", processes=n) for n in (1, 2))
    assert one.equals(two) and len(one) == 40
    assert tree(tmp_path / "kept1") == tree(tmp_path / "kept2")


def test_form_that_is_shown_is_the_one_that_is_hashed(tmp_path):
    members = [("x.webp", encoded(1, "webp")), ("x.jpg", encoded(2, "jpeg")), ("x.txt", b"x")]
    write_tar(tmp_path / "data" / "a.tar", members)
    row = candidates(tmp_path / "data", tmp_path / "kept", 1).to_pylist()[0]
    assert row["sha256"] == hashlib.sha256(encoded(2, "jpeg")).digest()


def test_urls_are_read_from_the_metadata_where_they_make_sense(tmp_path):
    facts = {"a": b'{"url": "http://x/1.jpg", "key": "lie", "shard": "../../etc"}', "b": b"{broken", "c": b"[1, 2]",
             "d": b'{"url": 3}', "e": b"[" * 100_000, "f": b'{"url": "\\ud800"}', "g": b"9" * 5000,
             "h": b'{"url": "x"' + b" " * 2**20 + b"}"}  # fmt: skip
    members = [m for n, (key, text) in enumerate(facts.items()) for m in [*sample(key, n), (f"{key}.json", text)]]
    write_tar(tmp_path / "data" / "a.tar", members)
    rows = by_key(candidates(tmp_path / "data", tmp_path / "kept", 1))
    urls = {key: row["url"] for key, row in rows.items()}
    assert urls == dict.fromkeys("bcdegh") | {"a": "http://x/1.jpg", "f": "\\ud800"}
    assert all(row["lost"] is None and row["shard"] == "a.tar" for row in rows.values())


def test_layouts_of_img2dataset_are_found_alike(tmp_path):
    for number in range(6):
        folder = tmp_path / "files" / f"{number // 3:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in sample(f"{number:09d}", number, form="jpeg"):
            (folder / name).write_bytes(content)
    for shard in range(2):
        members = [m for n in range(3 * shard, 3 * shard + 3) for m in sample(f"{n:09d}", n, form="jpeg")]
        write_tar(tmp_path / "tars" / f"{shard:05d}.tar", members)
        (tmp_path / "tars" / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / "tars" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    files, tars = (candidates(tmp_path / kind, tmp_path / "kept", 1) for kind in ("files", "tars"))
    for name in ("sha256", "hash", "caption", "size"):
        assert files[name].to_pylist() == tars[name].to_pylist(), name
    assert files["key"].to_pylist() == [f"{n // 3:05d}/{n:09d}" for n in range(6)]
    assert files["shard"][4].as_py() == "00001/000000004.jpg" and files["offset"][4].as_py() == 0
    assert tars["key"].to_pylist() == [f"{n:09d}" for n in range(6)]


def test_shards_of_several_downloads_keep_their_keys_apart(tmp_path):
    for folder in ("a", "b/c"):
        write_clouds(tmp_path / folder, range(3))
    (tmp_path / ".hidden").mkdir()
    write_clouds(tmp_path / ".hidden", range(3))
    (tmp_path / "a" / "._00000.tar").write_bytes(b"left behind")
    keys = candidates(tmp_path, tmp_path / "kept", 1)["key"].to_pylist()
    assert keys == ["a/00000", "a/00001", "a/00002", "b/c/00000", "b/c/00001", "b/c/00002"]


def test_links_to_directories_are_followed_and_each_counts_once(tmp_path):
    data, disk = tmp_path / "data", tmp_path / "disk"
    write_clouds(disk / "shards" / "deep", range(3))
    write_clouds(data / "own", range(3, 5))
    (data / "part0").symlink_to(disk / "shards")
    (data / "part1").symlink_to(disk / "shards" / "deep")  # which is in part0
    (disk / "shards" / "deep" / "around").symlink_to(disk / "shards")
    (data / "own" / "back").symlink_to("..")
    table = candidates(data, tmp_path / "kept", 1)
    assert table["key"].to_pylist() == ["own/00003", "own/00004", *(f"part0/deep/0000{n}" for n in range(3))]
    assert set(table["shard"].to_pylist()) == {"own/00000.tar", "part0/deep/00000.tar"}
    linked = tmp_path / "linked"
    linked.symlink_to(data)
    assert candidates(linked, tmp_path / "kept", 1).equals(table)


def test_folder_of_many_pictures_is_hashed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FOLDER_CHUNK", 4)
    (tmp_path / "data").mkdir()
    for number in range(10):
        for name, content in sample(f"{number:02d}", number):
            (tmp_path / "data" / name).write_bytes(content)
    assert len(candidates(tmp_path / "data", tmp_path / "kept", 1)) == 10
    before = tree(tmp_path / "kept")
    assert len(before) == 3
    (tmp_path / "data" / "05.txt").write_text("another")
    rows = by_key(candidates(tmp_path / "data", tmp_path / "kept", 1))
    assert rows["05"]["caption"] == "another" and len(tree(tmp_path / "kept").keys() - before.keys()) == 1


@pytest.mark.parametrize(
    "make, message",
    [(lambda p: None, "No such file"), (lambda p: p.mkdir(), "has neither tar files nor pictures"),
     (lambda p: p.write_text("x"), "Not a directory")],
    ids=["missing", "empty", "file"],
)  # fmt: skip
def test_nothing_to_read_is_an_error_that_names_the_place(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ShardError, match=f"nothing to read: .*data .*{message}"):
        candidates(tmp_path / "data", tmp_path / "kept", 1)


def test_folder_of_both_tars_and_pictures_is_refused(tmp_path):
    write_clouds(tmp_path / "data" / "sub", range(2))
    (tmp_path / "data" / "sub" / "x.png").write_bytes(encoded(1))
    with pytest.raises(ShardError, match="sub holds tar files and pictures"):
        candidates(tmp_path / "data", tmp_path / "kept", 1)


def test_what_is_of_no_use_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    whole = encoded(0)
    broken = {"cut.png": whole[: len(whole) // 2], "text.jpg": b"<html>not found</html>", "empty.png": b"",
              "gif.png": encoded(0, "gif"), "bomb.png": png_of(9000, 9000), "claim.png": png_of(20_000, 20_000),
              "wide.png": png_of(64_000_001, 1), "narrow.png": png_of(60_000_000, 1),
              "ztxt.png": png_of(8, 8, b"x\0\0" + zlib.compress(bytes(70_000_000), 9)),
              "large.png": encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))),
              "mute.png": encoded(1), "blank.png": encoded(2), "good.png": encoded(3)}  # fmt: skip
    captions = [(f"{name[:-4]}.txt", b"said") for name in broken if name not in ("mute.png", "blank.png")]
    write_tar(tmp_path / "data" / "a.tar", [*broken.items(), *captions, ("blank.txt", b" \n")])
    rows = by_key(candidates(tmp_path / "data", tmp_path / "kept", 1))
    lost = {key: row["lost"] for key, row in rows.items()}
    unreadable = dict.fromkeys(("cut", "text", "empty", "gif", "ztxt"), "unreadable")
    assert lost == unreadable | dict.fromkeys(("bomb", "claim", "wide", "narrow", "large"), "too large") | {
        "mute": "without caption", "blank": "without caption", "good": None
    }  # fmt: skip
    assert rows["text"]["detail"] == "no picture of a known kind" and "pixels" in rows["wide"]["detail"]
    assert "bytes are more than 100,000" in rows["large"]["detail"]
    assert not any("0x" in (row["detail"] or "") or str(tmp_path) in (row["detail"] or "") for row in rows.values())


def test_member_of_two_gigabytes_is_passed_over_unread(tmp_path):
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "a.tar", "wb") as file:  # of holes: it takes no room
        for name, size in (("huge.png", 2**31), ("big.txt", 2**31)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            file.seek(size, 1)
        for name, content in [*sample("good", 1), ("big.png", encoded(2))]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.write(info.tobuf() + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    start = time.perf_counter()
    rows = by_key(candidates(tmp_path / "data", tmp_path / "kept", 1))
    assert time.perf_counter() - start < 10
    assert {key: row["lost"] for key, row in rows.items()} == {"huge": "too large", "good": None, "big": None}
    assert len(rows["big"]["caption"]) == MAX_CAPTION


def test_broken_shards_are_named_and_the_others_are_read(tmp_path):
    data = write_clouds(tmp_path / "data", range(30))
    content = (data / "00001.tar").read_bytes()
    (data / "00001.tar").write_bytes(content[:20_000])
    (data / "00003.tar").write_bytes(b"\xff" * 5000)
    (data / "00004.tar").write_bytes(b"")
    (data / "00005.tar").symlink_to("nowhere")
    os.mkfifo(data / "00006.tar")
    write_tar(data / "00007.tar", [*sample("twice", 1), *sample("twice", 2)])
    table = candidates(data, tmp_path / "kept", 1)
    rows = [row for row in table.to_pylist() if row["lost"]]
    assert [row["shard"] for row in rows] == [f"{n:05d}.tar" for n in (1, 3, 4, 5, 6, 7)]
    assert all(row["lost"] == "broken shard" and row["key"] is None and row["detail"] for row in rows)
    assert len(table) == 20 + 6


def test_hostile_shard_leads_nowhere(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    data, odd = tmp_path / "data", b"caf\xe9".decode("utf-8", "surrogateescape")
    names = [str(tmp_path / "planted"), "../../up", "a/../../../deep", odd, "new\nline", "tab\t", "\x1b[31mred",
             "\u202eright to left", "x" * 5000, "'; DROP TABLE", "é" * 50, "#1", "%00"]  # fmt: skip
    members = [(f"{name}.png", encoded(n)) for n, name in enumerate(names)]
    members += [(f"{name}.txt", text) for name, text in zip(names, [b"x" * 2**20, b"\xff\xfe", b"a\0b"] + [b"x"] * 99)]
    members += [(f"{name}.json", b'{"key": "../../x", "shard": "/etc/passwd"}') for name in names]
    write_tar(data / "a.tar", members)
    with tarfile.open(data / "a.tar", "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.FIFOTYPE, "pipe.png"),
                           (tarfile.CHRTYPE, "device.png"), (tarfile.DIRTYPE, "folder.png")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = tree(tmp_path)
    table = candidates(data, tmp_path / "kept", 1)
    after = {name: content for name, content in tree(tmp_path).items() if not name.startswith("kept")}
    assert after == before and len(tree(tmp_path / "kept")) == 1
    rows = by_key(table)
    links = {key: rows.pop(key)["detail"] for key in ("link", "hard", "pipe", "device")}
    assert set(links.values()) == {"it is no file but a link, a pipe or a device"}
    assert set(rows) == {"planted", "up", "deep", "caf\\xe9", *names[4:]}
    assert not any(row["lost"] for row in rows.values()) and set(table["shard"].to_pylist()) == {"a.tar"}
    assert len(rows["planted"]["caption"]) == MAX_CAPTION and rows["up"]["caption"] == "\ufffd\ufffd"


def test_names_of_files_that_are_no_utf8_are_counted(tmp_path):
    data = os.fsencode(tmp_path / "data")
    os.mkdir(data)
    os.mkdir(data + b"/tars\xff")
    for name, content in (*sample("good", 1), ("good2.png", encoded(2)), ("good2.txt", b"x")):
        with open(data + b"/" + name.encode(), "wb") as file:
            file.write(content)
    with open(data + b"/caf\xe9.png", "wb") as file:
        file.write(encoded(3))
    write_tar(tmp_path / "a.tar", sample("x", 4)).rename(os.fsdecode(data + b"/tars\xff/a.tar"))
    rows = by_key(candidates(tmp_path / "data", tmp_path / "kept", 1))
    assert {key: row["lost"] for key, row in rows.items()} == {
        "good": None, "good2": None, "caf\\xe9": "unreadable", "tars\\xff/x": "unreadable"
    }  # fmt: skip


def test_pipes_and_dangling_links_in_a_folder_are_named_and_folders_are_passed_over(tmp_path):
    (tmp_path / "data" / "folder.png").mkdir(parents=True)
    with pytest.raises(ShardError, match="nothing to read"):
        candidates(tmp_path / "data", tmp_path / "kept", 1)
    os.mkfifo(tmp_path / "data" / "pipe.png")
    os.mkfifo(tmp_path / "data" / "said.txt")
    (tmp_path / "data" / "dangling.png").symlink_to("nowhere")
    for name, content in [*sample("a", 1), ("said.png", encoded(2))]:
        (tmp_path / "data" / name).write_bytes(content)
    rows = by_key(candidates(tmp_path / "data", tmp_path / "kept", 1))
    assert {key: row["lost"] for key, row in rows.items()} == {"a": None} | dict.fromkeys(
        ("pipe", "said", "dangling"), "unreadable"
    )
    assert {row["detail"] for row in rows.values()} == {None, "it is no file but a link, a pipe or a device"}


def test_finished_shards_are_not_read_again_and_changed_ones_are(tmp_path, monkeypatch):
    data, opened, really = write_clouds(tmp_path / "data", range(30)), [], Shards.open
    monkeypatch.setattr(Shards, "open", lambda path: opened.append(path.name) or really(path))
    first = candidates(data, tmp_path / "kept", 1)
    assert opened == ["00000.tar", "00001.tar", "00002.tar"]
    assert candidates(data, tmp_path / "kept", 1).equals(first) and len(opened) == 3
    write_tar(data / "00001.tar", sample("new", 77))
    table = candidates(data, tmp_path / "kept", 1)
    assert opened[3:] == ["00001.tar"] and "new" in table["key"].to_pylist() and len(table) == 21
    os.utime(data / "00002.tar", ns=(1, 1))
    candidates(data, tmp_path / "kept", 1)
    assert opened[4:] == ["00002.tar"]
    monkeypatch.setattr(module, "versions", lambda: {"imagehash": "99"})
    candidates(data, tmp_path / "kept", 1)
    assert len(opened) == 8  # another library may hash otherwise


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 999])
def test_result_that_is_not_whole_is_made_again(tmp_path, content):
    data = write_clouds(tmp_path / "data", range(20))
    first = candidates(data, tmp_path / "kept", 1)
    path = sorted((tmp_path / "kept").iterdir())[0]
    path.write_bytes(content)
    assert candidates(data, tmp_path / "kept", 1).equals(first)


def test_search_that_was_killed_goes_on_where_it_was(tmp_path):
    data = write_clouds(tmp_path / "data", range(600), per_shard=60)
    script = (f"from pathlib import Path; from memfilter.data.candidates import candidates; "
              f"candidates(Path({str(data)!r}), Path({str(tmp_path / 'kept')!r}), 1)")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list((tmp_path / "kept").glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = tree(tmp_path / "kept")
    whole = {name for name in done if name.endswith(".parquet") and not name.startswith(".")}
    assert 3 <= len(whole) < 10
    times = {name: (tmp_path / "kept" / name).stat().st_mtime_ns for name in whole}
    table = candidates(data, tmp_path / "kept", 1)
    assert {name: (tmp_path / "kept" / name).stat().st_mtime_ns for name in whole} == times
    assert table.equals(candidates(data, tmp_path / "fresh", 1))
    for path, age in ((tmp_path / "kept" / ".a.1-2.partial", 2 * module.LEFT_FOR), (tmp_path / "kept" / ".b.1-2.partial", 0)):
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    candidates(data, tmp_path / "kept", 1)
    left = {path.name for path in (tmp_path / "kept").iterdir()}
    assert ".a.1-2.partial" not in left and ".b.1-2.partial" in left  # whoever writes it may be at work


def test_what_could_not_be_read_once_is_tried_again(tmp_path, monkeypatch):
    data, kept = write_clouds(tmp_path / "data", range(6), per_shard=3), tmp_path / "kept"
    read, failing = module.read_bytes, sorted(data.glob("*.tar"))[1]

    def ill(path, offset, size):
        if path == failing:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, offset, size)

    with monkeypatch.context() as disk:
        disk.setattr(module, "read_bytes", ill)
        lost = candidates(data, kept, 1).column("lost").to_pylist()
    assert lost == [None] * 3 + ["unreadable"] * 3
    whole = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    table = candidates(data, kept, 1)
    assert table.column("lost").null_count == 6 and table.equals(candidates(data, tmp_path / "fresh", 1))
    assert sum(path.stat().st_mtime_ns != whole[path.name] for path in kept.iterdir()) == 1


def test_killed_process_is_an_error_in_words(tmp_path, monkeypatch):
    data, kept = write_clouds(tmp_path / "data", range(400), per_shard=5), tmp_path / "kept"
    script = f"""
import os, signal, threading, time
from pathlib import Path
from multiprocessing import active_children
from memfilter.data.candidates import candidates
def kill():
    while not list(Path({str(kept)!r}).glob("*.parquet")):  # until they are at work
        time.sleep(0.01)
    os.kill(active_children()[0].pid, signal.SIGKILL)
if __name__ == "__main__":
    threading.Thread(target=kill, daemon=True).start()
    candidates(Path({str(data)!r}), Path({str(kept)!r}), 2)
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "was killed, perhaps for want of memory" in done.stderr.splitlines()[-1]


def test_flipped_bytes_anywhere_in_a_shard_end_in_words(tmp_path):
    data, rng = write_clouds(tmp_path / "data", range(6), per_shard=6), random.Random(0)
    whole, seen = (data / "00000.tar").read_bytes(), set()
    for attempt in range(60):
        content = bytearray(whole)
        for _ in range(8):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (data / "00000.tar").write_bytes(content)
        table = candidates(data, tmp_path / f"kept{attempt}", 1)
        seen |= set(table["lost"].to_pylist())
        json.dumps(table["key"].to_pylist() + table["detail"].to_pylist())
    assert {None, "unreadable", "broken shard"} <= seen
