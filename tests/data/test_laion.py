import hashlib
import http.client
import http.server
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memfilter.data.laion import download as downloading
from memfilter.data.laion import guard
from memfilter.data.laion import select as selecting
from memfilter.data.laion.select import read_captions
from memfilter.data.laion.settings import Download, Selection

ADDRESS = "https://cdn.example/{}.jpg"


def select(metadata, out, where: str = "", **options) -> dict:
    return selecting.select(metadata, out, Selection(where, **options))


@pytest.fixture
def metadata(tmp_path):
    """Three files of 1,000 rows in LAION's spelling, with addresses that come again, and values that are not there."""
    rng = np.random.default_rng(0)
    (tmp_path / "metadata" / "deeper").mkdir(parents=True)
    rows = []
    for number, place in enumerate(("a.parquet", "deeper/b.parquet", "c'c.parquet")):
        size = 1000
        part = {
            "URL": [ADDRESS.format(n) for n in rng.integers(0, 1500, size)],
            "TEXT": [f"caption {n}" for n in rng.integers(0, 500, size)],
            "WIDTH": rng.choice([256, 512, 1024, None], size).tolist(),
            "punsafe": rng.choice([0.01, 0.09, 0.2, math.nan, None], size).tolist(),
            "AESTHETIC_SCORE": rng.normal(5, 1, size).tolist(),
            "hash": rng.integers(-(2**63), 2**63 - 1, size).tolist(),
            "SAMPLE_ID": list(range(number * size, (number + 1) * size)),
        }
        pq.write_table(pa.table(part), tmp_path / "metadata" / place, row_group_size=300)
        rows += [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
    return tmp_path / "metadata", sorted(rows, key=lambda row: row["SAMPLE_ID"])


def write(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def place_in_draw(address: str, seed: int) -> int:
    return int.from_bytes(hashlib.md5(f"{seed} {address}".encode()).digest(), "little")


def test_selection_is_what_python_makes_of_the_conditions(metadata, tmp_path):
    folder, rows = metadata
    met = [row for row in rows if (row["WIDTH"] or 0) >= 512 and (row["punsafe"] or 0) > 0.05]
    # of the rows of an address the first in the order of the files
    met.sort(key=lambda row: ((0, 2, 1)[row["SAMPLE_ID"] // 1000], row["SAMPLE_ID"]))
    first = {}
    for row in met:
        first.setdefault(row["URL"], row)
    expected = sorted(first.values(), key=lambda row: place_in_draw(row["URL"], 7))[:100]

    header = select(str(folder), tmp_path / "out", "width >= 512 AND punsafe > 0.05", samples=100, seed=7)
    found = read(tmp_path / "out")
    assert [row["url"] for row in found] == [row["URL"] for row in expected]
    assert [row["SAMPLE_ID"] for row in found] == [row["SAMPLE_ID"] for row in expected]
    assert [row["caption"] for row in found] == [row["TEXT"] for row in expected]
    assert [row["width"] for row in found] == [row["WIDTH"] for row in expected]
    assert [row["hash"] for row in found] == [row["hash"] for row in expected]
    assert [row["aesthetic"] for row in found] == [row["AESTHETIC_SCORE"] for row in expected]
    assert header["counts"] == {
        "rows": 3000, "conditions not met": 3000 - len(met), "no http(s) address": 0, "no caption": 0,
        "caption too long": 0, "address comes again": len(met) - len(first), "not drawn": len(first) - 100, "selected": 100,
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "selection.json").read_text()) == header
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rows_are_the_same_with_any_threads_memory_and_file_names(metadata, tmp_path, monkeypatch):
    folder, _ = metadata
    whole = None
    for number, options in enumerate(({}, {"threads": 1}, {"threads": 8, "memory": 0.1})):
        select(str(folder), tmp_path / f"out{number}", "aesthetic > 4.5", **options)
        whole = whole or read(tmp_path / f"out{number}")
        assert read(tmp_path / f"out{number}") == whole
    select(str(folder), tmp_path / "fewer", "aesthetic > 4.5", samples=50)
    assert read(tmp_path / "fewer") == whole[:50]
    select(str(folder), tmp_path / "other", "aesthetic > 4.5", samples=50, seed=1)
    assert {row["url"] for row in read(tmp_path / "other")} != {row["url"] for row in whole[:50]}
    monkeypatch.setattr(selecting, "ROWS_PER_FILE", 300)
    monkeypatch.setattr(selecting, "ROWS_PER_SORT", 170)
    header = select(str(folder), tmp_path / "split", "aesthetic > 4.5")
    assert read(tmp_path / "split") == whole
    assert [file["rows"] for file in header["files"]][:-1] == [300] * (len(whole) // 300)


@pytest.mark.parametrize(
    "names",
    [
        ("URL", "TEXT", "WIDTH", "AESTHETIC_SCORE"),  # LAION-5B
        ("url", "caption", "width", "aesthetic"),
        ("url", "text", "original_width", "aesthetic_score_laion_v2"),  # DataComp, COYO
        ("Url", "Caption", "ORIGINAL_WIDTH", "Aesthetic"),
    ],
)
def test_usual_spellings_are_known(tmp_path, names):
    columns = dict(zip(names, (["http://a/1", "http://a/2"], ["one", "two"], [100, 600], [4.0, 6.0]), strict=True))
    table = write(tmp_path / "m.parquet", **columns)
    select(table, tmp_path / "out", f"width > 500 and aesthetic > 5 and {names[2]} > 500")
    (row,) = read(tmp_path / "out")
    assert row == {"url": "http://a/2", "caption": "two", "width": 600, "aesthetic": 6.0}


def test_files_of_several_spellings_and_types_are_one_table(tmp_path):
    (tmp_path / "m").mkdir()
    write(tmp_path / "m" / "1.parquet", URL=["http://a/1"], TEXT=["one"], WIDTH=pa.array([600], pa.int32()), hash=[1])
    write(tmp_path / "m" / "2.parquet", url=["http://a/2"], caption=["two"], original_width=[700.0], key=["x"])
    write(tmp_path / "m" / "3.parquet", url=["http://a/3"], caption=["three"], width=[100.0])
    select(str(tmp_path / "m"), tmp_path / "out", "width > 500")
    rows = sorted(read(tmp_path / "out"), key=lambda row: row["url"])
    assert [(row["url"], row["caption"], row["width"], row["hash"]) for row in rows] == [
        ("http://a/1", "one", 600, "1"),
        ("http://a/2", "two", 700, "x"),
    ]


def test_columns_can_be_named(tmp_path):
    table = write(tmp_path / "m.parquet", link=["http://a/1"], url=["no"], caption=["alt"], llava=["described"])
    select(table, tmp_path / "out", url_column="link", caption_column="LLAVA")
    assert read(tmp_path / "out") == [{"url": "http://a/1", "caption": "described"}]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("widht > 5", 'Referenced column "widht" not found in FROM clause. Columns: AESTHETIC_SCORE, SAMPLE_ID, TEXT'),
        ("width >", "syntax error"),
        ("true) UNION SELECT * FROM files --", "syntax error"),
        ("true; DROP VIEW files", "more than one statement"),
        ("width > 5, true", "found 2 expressions"),
        ("count(*) > 1", "aggregates"),
        ("EXISTS (SELECT * FROM read_text('{secret}'))", "file system operations are disabled"),
        ("width IN (SELECT 512 FROM read_parquet('{secret}'))", "file system operations are disabled"),
        ("EXISTS (SELECT * FROM glob('/*'))", "file system operations are disabled"),
        ("caption > 5", "caption"),
    ],
)
def test_condition_that_is_none_or_reads_files_is_refused_in_one_line(metadata, tmp_path, where, message):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with pytest.raises(ValueError, match="^(where|metadata): ") as caught:
        select(str(metadata[0]), tmp_path / "out", where.format(secret=secret))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"TEXT": ["a"]}, "no column is called url or image_url: set url_column. Columns: TEXT"),
        ({"URL": ["http://a"], "x": ["a"]}, "no column is called caption or text or alt_text: set caption_column. Columns: URL, x"),
        ({"URL": ["http://a"], "TEXT": [""]}, "no row is left: rows 1, conditions not met 0, no http(s) address 0, no caption 1"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_used_says_what_was_found(tmp_path, columns, message):
    with pytest.raises(ValueError, match="^(metadata: )?no ") as caught:
        select(write(tmp_path / "m.parquet", **columns), tmp_path / "out")
    assert message in str(caught.value)


def test_files_that_are_not_whole_are_named(metadata, tmp_path):
    folder, _ = metadata
    whole = (folder / "a.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-100], whole[:5000]):
        (folder / "broken.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"^metadata: .*broken\.parquet") as caught:
            select(str(folder), tmp_path / "out")
        assert "\n" not in str(caught.value)
    for nothing in (tmp_path / "nowhere", str(folder / "*.csv")):
        with pytest.raises(ValueError, match="^metadata: no Parquet file is at"):
            select(str(nothing), tmp_path / "out")
    odd = tmp_path / "odd[1].parquet"
    odd.write_bytes(whole)
    with pytest.raises(ValueError, match="rename it"):
        select(str(tmp_path / "odd*"), tmp_path / "out")


def test_value_that_is_no_number_is_explained(tmp_path):
    table = write(tmp_path / "m.parquet", url=["http://a/1", "http://a/2"], text=["a", "b"], width=["600", "wide"])
    with pytest.raises(ValueError, match=r"^where: .*try_cast"):
        select(table, tmp_path / "out", "width::INT > 500")
    select(table, tmp_path / "out", "try_cast(width AS DOUBLE) > 500")
    assert [row["url"] for row in read(tmp_path / "out")] == ["http://a/1"]


def test_hostile_rows_are_counted_or_passed_on_whole(tmp_path):
    nowhere = ["file:///etc/passwd", "/etc/passwd", "ftp://a/b", "data:,x", "http://a/ b", "http://a/\n", "http://a/\0", "http://é",
               "https://", "", None, "http://a/" + "a" * 5000]  # fmt: skip
    fine = {
        " HTTPS://a/1 ": "NUL \0 in it",
        "http://a/2": "two\nlines",
        "http://a/3": "x" * 16_384,
        "http://a/4": "' \" \\ 🙂",
    }
    silent, long = {"http://a/5": None, "http://a/6": "  "}, {"http://a/7": "y" * 2**20, "http://a/8": "é" * 8193}
    addresses, captions = nowhere + [*fine, *silent, *long], ["c"] * len(nowhere) + [*(fine | silent | long).values()]
    size = len(addresses)
    table = write(
        tmp_path / "m.parquet", URL=addresses, TEXT=captions, WIDTH=[-(2**63) + n for n in range(size)],
        HEIGHT=pa.array([2**64 - 1] * size, pa.uint64()), **{'a"; DROP TABLE x; --': ["x"] * size},
        row=["r"] * size, draw=["d"] * size, lost=["l"] * size, prompt=["p"] * size, metadata=["m"] * size, url_1=["u"] * size,
        nested=[{"deep": [1, None]}] * size, blob=[b"\xff\0"] * size, date=pa.array([0] * size, pa.timestamp("s")),
    )  # fmt: skip
    header = select(table, tmp_path / "out", "row = 'r' and lost = 'l' and draw = 'd'")
    assert header["counts"] == {
        "rows": size, "conditions not met": 0, "no http(s) address": len(nowhere), "no caption": 2, "caption too long": 2,
        "address comes again": 0, "not drawn": 0, "selected": 4,
    }  # fmt: skip
    assert header["columns left out"] == ['a"; DROP TABLE x; --']
    rows = {row["url"]: row for row in read(tmp_path / "out")}
    assert {url: row["caption"] for url, row in rows.items()} == {url.strip(): text for url, text in fine.items()}
    row = rows["http://a/2"]
    assert row["height"] == 2**64 - 1 and row["width"] < -(2**62)
    assert [row[name] for name in ("row", "draw", "lost", "prompt", "metadata", "url_1")] == [
        "r",
        "d",
        "l",
        "p",
        "m",
        "u",
    ]
    json.dumps(row)  # as img2dataset does


def test_bytes_that_are_no_utf_8_are_replaced(tmp_path):
    texts = pa.array([b"caf\xe9", b"fine"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, texts.buffers())
    write(tmp_path / "m.parquet", url=["http://a/1", "http://a/2"], text=texts)
    select(str(tmp_path / "m.parquet"), tmp_path / "out")
    assert sorted(row["caption"] for row in read(tmp_path / "out")) == ["caf?", "fine"]
    # columns of old Spark and Impala are bytes
    write(tmp_path / "m.parquet", url=[b"http://a/1", b"http://a/2"], text=[b"caf\xc3\xa9", b"\xff"])
    select(str(tmp_path / "m.parquet"), tmp_path / "bytes")
    assert sorted(row["caption"] for row in read(tmp_path / "bytes")) == ["?", "café"]


def test_rows_of_listed_captions_are_found_in_upper_and_lower_case(tmp_path):
    table = write(
        tmp_path / "m.parquet", url=[f"http://a/{n}" for n in range(6)], prompt=["own"] * 6,
        TEXT=["The <i>Long</i> Dark", " the <I>long</I> dark ", "The Long Dark", "Foyer painted in WHITE", "other", "Café"],
    )  # fmt: skip
    listed = tmp_path / "memorized.jsonl"
    captions = ["The <i>Long</i> Dark", "Foyer painted in WHITE", "CAFÉ", "never seen"]
    listed.write_text("".join(json.dumps({"caption": c, "index": 1, "url": "u"}) + "\n" for c in captions))
    header = select(table, tmp_path / "out", "prompt = 'own'", captions=listed)
    found = {row["url"]: row["prompt"] for row in read(tmp_path / "out")}
    assert found == {
        "http://a/0": captions[0],
        "http://a/1": captions[0],
        "http://a/3": captions[1],
        "http://a/5": captions[2],
    }
    assert header["counts"]["captions listed"] == 4 and header["counts"]["captions found"] == 3


def test_lists_of_captions_come_in_several_forms(tmp_path):
    forms = {
        "a.txt": "one\n\ntwo\n", "b.json": '["one", "two"]', "c.json": '[{"prompt": "one"}, {"TEXT": "two", "id": 3}]',
        "d.jsonl": '"one"\n\n{"caption": "two", "text": "no"}\n',
    }  # fmt: skip
    for name, text in forms.items():
        for mark in ("utf-8", "utf-8-sig"):
            (tmp_path / name).write_text(text, encoding=mark)
            assert read_captions(tmp_path / name) == ["one", "two"]
    (tmp_path / "one.jsonl").write_text('"a\u2028b"\n"c\x85d"', encoding="utf-8")  # of which neither ends a line
    assert read_captions(tmp_path / "one.jsonl") == ["a\u2028b", "c\x85d"]
    bad = {"e.jsonl": '{"caption": "a"}\n{"capt": "b"}', "f.json": "{", "g.txt": "\n", "h.json": "[1]", "i.jsonl": "{]",
           "j.json": '{"captions": ["a"]}'}  # fmt: skip
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="^captions: .*" + name):
            read_captions(tmp_path / name)


def test_nothing_is_written_over(metadata, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="remove it or choose another"):
        select(str(metadata[0]), tmp_path / "out")
    with pytest.raises(ValueError, match="samples must be at least 1"):
        select(str(metadata[0]), tmp_path / "new", samples=0)


# what img2dataset's interpreters run first


@pytest.fixture
def fetch(tmp_path):
    """Factory: fetch(address, proxies, **limits) opens it as img2dataset does, in an interpreter with the guard: what came
    of it. ``proxies`` are variables of its environment."""
    (tmp_path / "sitecustomize.py").write_text(Path(guard.__file__).read_text())
    code = (
        "import sys, urllib.request\n"
        "try: print(len(urllib.request.urlopen(sys.argv[1], timeout=5).read()))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def fetch(address, proxies=MappingProxyType({}), **limits):
        limits = {"MEMFILTER_PRIVATE_ADDRESSES": "1", **{f"MEMFILTER_{name}": value for name, value in limits.items()}}
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        command = [sys.executable, "-c", code, address]
        environment |= limits | proxies | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    return fetch


@pytest.fixture
def server():
    """A server whose path says how many bytes it sends, and whether it says so first; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            size, said = self.path.split("/")[-2:]  # of a proxy the whole address is asked
            self.send_response(200)
            if said == "said":
                self.send_header("Content-Length", size)
            self.end_headers()
            self.wfile.write(b"x" * int(size))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_guard_lets_what_is_within_the_limits_pass(fetch, server):
    for said in ("said", "unsaid"):
        assert fetch(f"{server}/3000000/{said}", MAX_MEGABYTES="3.1") == "3000000"
        assert "larger than 2.9 MB" in fetch(f"{server}/3000000/{said}", MAX_MEGABYTES="2.9")
    assert "longer than 0 s" in fetch(f"{server}/10/said", MAX_SECONDS="0")


def test_guard_is_for_the_processes_of_img2dataset_alone():
    assert http.client.HTTPConnection.response_class is http.client.HTTPResponse
    assert http.client.HTTPConnection.connect is not guard.connect_to_public


def test_guard_speaks_to_public_addresses_by_http_alone(fetch, server, tmp_path):
    assert "address is not public" in fetch(f"{server}/10/said", PRIVATE_ADDRESSES="0")
    (tmp_path / "secret").write_text("secret")
    for address in ((tmp_path / "secret").as_uri(), "data:,secret", "ftp://127.0.0.1/x"):
        assert "unknown url type" in fetch(address)


def test_guard_trusts_a_proxy_with_what_goes_through_it_and_nothing_else(fetch, server):
    port = server.rpartition(":")[2]
    for proxy in (server, f"127.0.0.1:{port}", f"http://LOCALHOST:{port}", f"http://user:word@127.0.0.1:{port}/"):
        assert fetch("http://pictures.test/10/said", {"http_proxy": proxy}, PRIVATE_ADDRESSES="0") == "10"
    https, proxy = f"https://127.0.0.1:{port}/10/said", f"http://localhost:{port}"
    for address, around in (
        (f"{server}/10/said", {"no_proxy": "intranet.test"}),
        (f"{server}/10/said", {"all_proxy": proxy, "ftp_proxy": proxy}),
        (f"{server}/10/said", {"http_proxy": proxy, "no_proxy": "127.0.0.1"}),
        (f"{server}/10/said", {"https_proxy": proxy}),
        (f"{server}/10/said", {"https_proxy": "http://127.0.0.1:1"}),  # another port of the proxy's host
        (https, {"http_proxy": proxy}),
    ):
        assert "address is not public" in fetch(address, around, PRIVATE_ADDRESSES="0"), (address, around)


# around img2dataset


@pytest.fixture
def selection(tmp_path):
    table = write(tmp_path / "m.parquet", url=[ADDRESS.format(n) for n in range(5)], text=["c"] * 5)
    select(table, tmp_path / "selection")
    return tmp_path / "selection"


def download(selection, out, **options):
    return downloading.download(selection, out, Download(samples_per_shard=2, **options))


def test_img2dataset_that_fails_is_reported_in_one_line(selection, tmp_path):
    with pytest.raises(ValueError, match=r"^img2dataset ended with code 3: .*log\.txt$"):
        download(selection, tmp_path / "out", img2dataset="sh -c 'echo broken; exit 3'")
    assert "broken" in (tmp_path / "out" / "_download" / "log.txt").read_text()
    with pytest.raises(ValueError, match="^3 of 3 shards are not done: run the same command again"):
        download(selection, tmp_path / "out", img2dataset="true")
    with pytest.raises(FileNotFoundError, match="^img2dataset: nothing/here is no command"):
        download(selection, tmp_path / "out", img2dataset="nothing/here")
    with pytest.raises(ValueError, match="^options: image_size, url_list cannot be set there"):
        download(selection, tmp_path / "out", img2dataset="true", options={"url_list": "x", "image_size": 3})


def test_places_that_are_something_else_are_refused(selection, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no selection\.json"):
        download(tmp_path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds something else"):
        download(selection, selection)
    monkeypatch.delenv("MEMFILTER_IMG2DATASET", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(downloading, "ROOT", root := tmp_path / "the project")
    with pytest.raises(FileNotFoundError, match=r"bash launch/img2dataset\.sh"):
        download(selection, tmp_path / "out")
    (command := root / downloading.ENVIRONMENT).parent.mkdir(parents=True)
    command.touch(0o755)
    assert downloading.find_command(None) == [str(command)]  # from whatever directory


def test_shard_that_is_not_whole_is_made_anew(tmp_path):
    for name in ("00000.tar", "00000.parquet", "00001.tar", "00001.parquet", "00002.tar", "00002.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "00000_stats.json").write_text('{"count": 2}')
    (tmp_path / "00001_stats.json").write_text('{"count": ')
    users = {"index.parquet", "manifest.parquet", "mine.tar"}
    for name in users:
        (tmp_path / name).touch()
    downloading.drop_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"00000.tar", "00000.parquet", "00000_stats.json"} | users


def test_losses_are_counted_by_what_they_have_in_common(tmp_path):
    messages = ["HTTP Error 404: Not Found", "HTTP Error 404: gone\x1b[2J", "<urlopen error [Errno -2] Name or service not known>",
                "timed out", "<urlopen error timed out>", "\x1b[31m" + "a" * 200, ""]  # fmt: skip
    table = {"status": ["success"] * 3 + ["failed_to_download"] * 7, "error_message": [None] * 3 + messages}
    write(tmp_path / "00000.parquet", **table)
    (tmp_path / "00000_stats.json").write_text('{"count": 12, "successes": 5}')
    assert downloading.count(tmp_path) == {
        "rows": 12, "downloaded": 3,
        "lost": {"HTTP 404": 2, "too slow": 2, "not written by img2dataset": 2, "Name or service not known": 1,
                 " [31m" + "a" * 75: 1, "no reason given": 1},
    }  # fmt: skip
    many = {"status": ["failed_to_download"] * 50, "error_message": [f"reason {n}" for n in range(50)]}
    write(tmp_path / "00001.parquet", **many)
    (tmp_path / "00001_stats.json").write_text('{"count": 50}')
    report = downloading.count(tmp_path)
    assert sum(report["lost"].values()) == 59 and len(report["lost"]) == downloading.KINDS + 1
