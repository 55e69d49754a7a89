"""From LAION-style metadata to pictures: a web server on loopback, selection, and the real img2dataset.

The server knows what becomes of each of its 300 addresses and writes down what it is asked for; all else is held
against that.
"""

import gzip
import http.server
import io
import json
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import launching
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from memfilter.data import scenes
from memfilter.data.laion.download import find_command
from memfilter.data.manifest import MANIFEST, read_manifest
from memfilter.data.shards import Shards

ROOT = Path(__file__).resolve().parents[2]
SIZE, PER_SHARD, SHARDS = 64, 50, 6
GOOD = "a picture"
# what the server does -> (addresses where it does so, what becomes of them)
BEHAVIOURS = {
    "jpg": (65, GOOD),
    "recompressed": (5, GOOD),
    "png": (60, GOOD),
    "webp": (30, GOOD),
    "redirect": (14, GOOD),
    "redirects": (6, GOOD),
    "slow": (6, GOOD),
    "fails_once": (6, GOOD),
    "same_bytes": (10, GOOD),
    "large": (4, GOOD),
    "missing": (25, "HTTP 404"),
    "error": (8, "HTTP 500"),
    "talks": (3, "HTTP 403"),
    "html": (8, "Image decoding error"),
    "svg": (4, "Image decoding error"),
    "text": (4, "Image decoding error"),
    "gzip": (2, "Image decoding error"),
    "half": (3, "Image decoding error"),
    "empty": (4, "empty"),
    "cut": (5, "cut off"),
    "bomb": (3, "too many pixels"),
    "noai": (6, "not allowed by X-Robots-Tag"),
    "terabytes": (3, "too large"),
    "endless": (3, "too large"),
    "stalls": (1, "too slow"),
    "drips": (1, "too slow"),
    "drips_headers": (1, "too slow"),
    "loops": (3, "HTTP 302"),
    "to_file": (2, "HTTP 302"),
    "to_ftp": (1, "unknown url type: ftp"),
    "to_nobody": (2, "Connection refused"),
    "hangs_up": (2, "Remote end closed connection without response"),
}
# behaviour -> the scene that it shows whatever its address
COPIES = {"same_bytes": 0, "recompressed": 1}


@pytest.fixture(scope="session")
def img2dataset():
    try:
        return find_command(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def scene(number: int) -> scenes.Scene:
    return scenes.draw(21, scenes.DISTINCT, number, specific=1)


def encoded(picture: Image.Image, form: str, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": quality} if form != "png" else {}))
    return buffer.getvalue()


@lru_cache(maxsize=None)  # the server shares a process with the test, and has eighty callers
def photograph(number: int) -> bytes:
    return encoded(scenes.render(scene(number), SIZE), "jpeg")


def black_png(width: int, height: int) -> bytes:
    """A small file of very many pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 1)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Site:
    """A web server on 127.0.0.1. ``outcomes``: address -> what becomes of it; ``asked``: address -> how often."""

    def __init__(self, behaviours: dict[str, tuple[int, str]], delay: float = 0):
        self.delay, self.asked, self.lock = delay, Counter(), threading.Lock()
        self.ended = threading.Event()
        bombs = black_png(20_000, 20_000)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                with self.lock:
                    self.asked[self.address(handler.path)] += 1
                time.sleep(self.delay)
                behaviour, number = handler.path[1:].split("/")[:2]
                try:
                    self.answer(handler, behaviour, int(number), bombs)
                except OSError:
                    pass  # the other side had enough

            def log_message(handler, *arguments):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        numbers = count()
        self.outcomes, self.numbers = {}, {}
        for behaviour, (addresses, outcome) in behaviours.items():
            for _ in range(addresses):
                number = next(numbers)
                address = self.address(f"/{behaviour}/{number}/picture.jpg?a=1&b=%20")
                self.outcomes[address], self.numbers[address] = outcome, number

    def close(self):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def picture(self, address: str) -> Image.Image:
        copied = next((n for name, n in COPIES.items() if f"/{name}/" in address), None)
        number = self.numbers[address] if copied is None else copied
        return scenes.render(scene(number), SIZE)

    def answer(self, handler, behaviour: str, number: int, bomb: bytes) -> None:
        def send(body=b"", status=200, kind="image/jpeg", **headers):
            handler.send_response(status)
            for name, value in {"Content_Type": kind, "Content_Length": len(body), **headers}.items():
                handler.send_header(name.replace("_", "-"), str(value))
            handler.end_headers()
            handler.wfile.write(body)

        def redirect(to):
            send(status=302, Location=to)

        def drip(content):
            while not self.ended.wait(0.3):
                handler.wfile.write(content)

        jpg = photograph(number)
        match behaviour:
            case "jpg":
                send(jpg)
            case "png" | "webp":
                send(encoded(scenes.render(scene(number), SIZE), behaviour), kind=f"image/{behaviour}")
            case "redirect":
                redirect(self.address(f"/jpg/{number}/there"))
            case "redirects":
                redirect(f"/redirect/{number}/there")
            case "slow":
                time.sleep(1)
                send(jpg)
            case "fails_once":
                again = self.asked[self.address(handler.path)] > 1
                send(jpg if again else b"", 200 if again else 503)
            case "same_bytes":
                send(encoded(scenes.render(scene(COPIES[behaviour]), SIZE), "jpeg"))
            case "recompressed":
                send(encoded(scenes.render(scene(COPIES[behaviour]), SIZE), "jpeg", quality=30 + number % 40))
            case "large":
                send(encoded(scenes.render(scene(number), SIZE).resize((5 * SIZE, 5 * SIZE)), "jpeg"))
            case "missing":
                send(jpg, 404)  # many a 404 is a picture
            case "error":
                send(status=500)
            case "talks":
                handler.wfile.write(b"HTTP/1.0 403 \x1b[2Jyour terminal\xff" + b"x" * 10_000 + b"\r\n\r\n")
            case "html":
                send(b"<html>This picture has moved</html>", kind="text/html")
            case "svg":
                send(
                    b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>", kind="image/svg+xml"
                )
            case "text":
                send(b"no picture at all")
            case "gzip":
                send(gzip.compress(jpg), Content_Encoding="gzip")
            case "half":
                send(encoded(scenes.render(scene(number), SIZE), "png")[:30], kind="image/png")
            case "empty":
                send()
            case "cut":
                send(jpg[: len(jpg) // 2], Content_Length=len(jpg))
            case "bomb":
                send(bomb, kind="image/png")
            case "noai":
                send(jpg, X_Robots_Tag="noai")
            case "terabytes":
                send(jpg, Content_Length=10**13)
            case "endless":
                handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
                while not self.ended.is_set():
                    handler.wfile.write(bytes(1 << 16))
            case "stalls":
                self.ended.wait(60)
            case "drips":
                handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
                drip(b"\xff")
            case "drips_headers":
                handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Name: ")
                drip(b"x")
            case "loops":
                redirect(handler.path)
            case "to_file":
                redirect(Path(__file__).as_uri())
            case "to_ftp":
                redirect("ftp://127.0.0.1/picture.jpg")
            case "to_nobody":
                redirect("http://127.0.0.1:1/picture.jpg")
            case "hangs_up":
                pass


@pytest.fixture(scope="module")
def site():
    site = Site(BEHAVIOURS)
    assert len(site.outcomes) == 300
    yield site
    site.close()


def write_metadata(folder: Path, site: Site) -> SimpleNamespace:
    """Parquet files of two spellings; beside the site's addresses rows that must not be asked for.

    Gives captions: address -> caption, and counts: what `select` says of all the rows.
    """
    captions = {address: scene(number).caption for address, number in site.numbers.items()}
    special = iter(address for address, outcome in site.outcomes.items() if outcome == GOOD)
    for text in (
        "æøå 東京 🙂",
        "two\nlines\tand \\ \" ' {}",
        "a NUL \0 in it",
        "x" * 16_384,
        "null",
        "[1, 2]",
        "../../etc",
    ):
        captions[next(special)] = text
    fine = [(address, caption, 1024, 0.01) for address, caption in captions.items()]
    first, second = fine[::2], fine[1::2]
    again = [(address, "another caption", 800, 0.02) for address, *_ in first[:20]]
    missed = [(site.address(f"/jpg/{900 + n}/x"), "c", width, punsafe) for n, (width, punsafe) in enumerate(
        [(511, 0.0), (1024, 0.5), (None, 0.0), (1024, None), (1024, float("nan")), (-1, 0.0)]
    )]  # fmt: skip
    picture = folder / "secret.jpg"
    scenes.render(scene(0), SIZE).save(picture)
    nowhere = [
        picture.as_uri(), str(picture), "ftp://127.0.0.1/a.jpg", "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "javascript:1",
        "http://127.0.0.1/a b", "http://127.0.0.1/a\nb", "http://127.0.0.1/\0", "http://127.0.0.1/é", "http://", "", None,
        "http://127.0.0.1/" + "a" * 5000,
    ]  # fmt: skip
    bad = [(address, "c", 2**62, 0.0) for address in nowhere]  # so wide
    silent = [(site.address(f"/jpg/{950 + n}/x"), text, 1024, 0.0) for n, text in enumerate([None, "", " "])]
    long = [(site.address("/jpg/990/x"), "y" * 2**20, 1024, 0.0), (site.address("/jpg/991/x"), "z" * 16_385, 1024, 0.0)]
    names = ["URL", "TEXT", "WIDTH", "punsafe", "hash"], ["url", "caption", "original_width", "punsafe", "key"]
    for number, (rows, columns) in enumerate(
        zip((first + again + missed + silent, second + bad + long), names, strict=True)
    ):
        values = [*zip(*rows, strict=True), range(len(rows)) if number == 0 else map(str, range(len(rows)))]
        pq.write_table(pa.table(dict(zip(columns, values, strict=True))), folder / f"part-{number}.parquet")
    counts = {
        "rows": 300 + 20 + 6 + 13 + 3 + 2, "conditions not met": 6, "no http(s) address": 13, "no caption": 3,
        "caption too long": 2, "address comes again": 20, "not drawn": 0, "selected": 300,
    }  # fmt: skip
    return SimpleNamespace(captions=captions, counts=counts)


def command(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "memfilter.cli", "prepare", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def run(*arguments, code: int = 0) -> str:
    process = command(*arguments)
    try:
        output, _ = process.communicate(timeout=launching.PATIENCE)
    finally:
        end(process)
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


def end(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it started, as when the power fails."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    launching.wait_for_end_of(family)


def done_shards(out: Path) -> set[str]:
    return {path.name.partition("_")[0] for path in out.glob("*_stats.json")}


def rows_of(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


DOWNLOAD = [
    f"--image_size={SIZE}", f"--samples_per_shard={PER_SHARD}", "--processes=2", "--threads=40", "--timeout=5",
    "--max_seconds=8", "--max_megabytes=20", "--private_addresses=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def downloaded(img2dataset, site, tmp_path_factory):
    """The whole way, killed once in the middle of the download."""
    folder = tmp_path_factory.mktemp("laion")
    (folder / "metadata").mkdir()
    metadata = write_metadata(folder / "metadata", site)
    selection, out = folder / "selection", folder / "shards"
    run("laion", "select", folder / "metadata", selection, "--where=width >= 512 and punsafe < 0.1", "--seed=3")
    process = command("laion", "download", selection, out, *DOWNLOAD)
    launching.wait_until(lambda: len(done_shards(out)) >= 2, process, every=0.02)
    end(process)
    before = SimpleNamespace(asked=site.asked.copy(), shards=done_shards(out), files=contents(out))
    assert 2 <= len(before.shards) < SHARDS
    output = run("laion", "download", selection, out, *DOWNLOAD)
    return SimpleNamespace(selection=selection, out=out, before=before, output=output, metadata=metadata)


def test_selection_counts_what_it_leaves_out(downloaded):
    header = json.loads((downloaded.selection / "selection.json").read_text())
    assert header["counts"] == downloaded.metadata.counts


def test_every_address_ends_as_the_server_knows(downloaded, site):
    rows = rows_of(downloaded.out)
    assert {row["url"] for row in rows if row["status"] == "success"} == {
        address for address, outcome in site.outcomes.items() if outcome == GOOD
    }
    expected = Counter(site.outcomes.values())
    report = json.loads((downloaded.out / "_download" / "report.json").read_text())
    assert report == {"rows": 300, "downloaded": expected.pop(GOOD), "lost": dict(expected)}
    for name, number in {"downloaded": report["downloaded"], **{f"lost: {n}": c for n, c in expected.items()}}.items():
        assert f"{number:15,} {name}\n" in downloaded.output
    assert downloaded.output.isprintable() or "\x1b" not in downloaded.output


def test_nothing_else_is_asked_for(downloaded, site):
    assert {address for address in site.asked if not address.endswith("/there")} == site.outcomes.keys()


def test_pictures_and_captions_are_those_of_their_addresses(downloaded, site):
    shards = Shards.open(downloaded.out)
    assert len(shards.keys()) == Counter(site.outcomes.values())[GOOD]
    for key in shards.keys():
        facts, picture = shards.facts(key), shards.image(key)
        assert picture.size == (SIZE, SIZE)
        difference = np.abs(np.asarray(picture, int) - np.asarray(site.picture(facts["url"]), int))
        assert difference.mean() < 12
        assert shards.caption(key) == downloaded.metadata.captions[facts["url"]].strip()
        assert facts["punsafe"] < 0.1 and facts["hash"].isdigit()


def test_killed_download_goes_on_without_losing_or_repeating_anything(downloaded, site):
    rows, before = rows_of(downloaded.out), downloaded.before
    assert len(rows) == 300 == len({row["key"] for row in rows}) == len({row["url"] for row in rows})
    assert done_shards(downloaded.out) == {f"{number:05d}" for number in range(SHARDS)}
    finished = {row["url"] for row in rows if row["key"][:5] in before.shards}
    assert len(finished) == PER_SHARD * len(before.shards)
    assert all(site.asked[address] == before.asked[address] for address in finished)
    after = contents(downloaded.out)
    kept = {name for name in before.files if name[:5] in before.shards}
    assert len(kept) == 3 * len(before.shards) and all(after[name] == before.files[name] for name in kept)
    members = [name for tar in downloaded.out.glob("*.tar") for name in tarfile.open(tar).getnames()]
    assert len(members) == len(set(members)) == 3 * sum(row["status"] == "success" for row in rows)


def test_finished_download_is_not_done_again(downloaded, site):
    asked, files = site.asked.copy(), contents(downloaded.out)
    assert run("laion", "download", downloaded.selection, downloaded.out, *DOWNLOAD).endswith(downloaded.output[-200:])
    assert site.asked == asked and contents(downloaded.out) == files


def test_other_settings_are_refused(downloaded):
    files = contents(downloaded.out)
    settings = [*DOWNLOAD, "--image_size=32", "--timeout=3"]
    output = run("laion", "download", downloaded.selection, downloaded.out, *settings, code=1)
    assert output == (
        f"error: {downloaded.out} was begun with another image_size: set it back, or choose another directory\n"
    )
    assert contents(downloaded.out) == files


def test_what_is_ended_leaves_no_process_and_no_half_shard_and_what_goes_on_is_not_disturbed(img2dataset, tmp_path):
    site = Site({"jpg": (20, GOOD), "stalls": (4, "too slow")})
    table = {"url": list(site.outcomes), "caption": ["c"] * 24}
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    run("laion", "select", tmp_path / "metadata.parquet", tmp_path / "selection")
    arguments = ["laion", "download", tmp_path / "selection", tmp_path / "out", *DOWNLOAD, "--timeout=60", "--max_seconds=60"]

    def all_asked():
        return len(site.asked) == 24

    process = command(*arguments)
    launching.wait_until(all_asked, process, every=0.02)
    orphans = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert (
        run(*arguments, code=1)
        == f"error: another download still writes to {tmp_path / 'out'}: wait for it or end it\n"
    )
    for orphan in orphans:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
    launching.wait_for_end_of(orphans)

    site.asked.clear()
    process = command(*arguments)
    launching.wait_until(all_asked, process, every=0.02)
    assert list((tmp_path / "out").glob("*.tar"))
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.terminate()
    assert process.wait(launching.PATIENCE) == 128 + signal.SIGTERM
    launching.wait_for_end_of(family, seconds=5)
    assert not list((tmp_path / "out").glob("*.tar"))
    site.close()


# the experiment

# all that are no copies
DUPLICATES, REPEATS, DISTINCT, BATCH, STEPS = 20, 40, 171, 4, 200


@pytest.fixture(scope="module")
def manifest(downloaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("experiment") / "out"
    sizes = [f"--duplicates={DUPLICATES}", f"--repeats={REPEATS}", f"--distinct={DISTINCT}", "--seed=1"]
    output = run("experiment", downloaded.out, out, *sizes)
    assert output.endswith(f"{out / MANIFEST}\n")
    return out / MANIFEST


def test_manifest_counts_what_the_server_knows(manifest, downloaded, site):
    _, header = read_manifest(manifest)
    shown = [address for address, outcome in site.outcomes.items() if outcome == GOOD]
    copies = Counter(next((name for name in COPIES if f"/{name}/" in address), None) for address in shown)
    # every scene once more as it is: scene 0 in the same bytes, scene 1 as a JPEG of another quality
    counts = {
        "broken_shards": 0, "candidates": len(shown), "unreadable": 0, "without_caption": 0, "key_taken": 0,
        "exact_duplicate": copies["same_bytes"], "near_duplicate": copies["recompressed"],
        "chosen": DUPLICATES + DISTINCT, "duplicates": DUPLICATES, "distinct": DISTINCT,
        "virtual_samples": DUPLICATES * REPEATS + DISTINCT,
    }  # fmt: skip
    assert {name: header["counts"][name] for name in counts} == counts
    assert header["conditions"]["seed"] == 1 and header["conditions"]["distinct"] == DISTINCT


def test_manifest_names_what_was_downloaded(manifest, downloaded, site):
    rows = read_manifest(manifest)[0].to_pylist()
    address_of = {row["key"]: row["url"] for row in rows_of(downloaded.out) if row["status"] == "success"}
    pictures = Counter(site.picture(address_of[row["key"]]).tobytes() for row in rows)
    assert pictures.most_common(1)[0][1] == 1
    assert all(row["caption"] == downloaded.metadata.captions[address_of[row["key"]]].strip() for row in rows)
    assert "samples are as they were" in run("verify", manifest, f"--data={downloaded.out}")


def test_filtered_training_sees_the_virtual_samples(manifest, downloaded, tmp_path):
    base, out = tiny.save_pipeline(tmp_path / "base", "sd1"), tmp_path / "run"
    settings = {  # tau is about the median norm: which noise a sample gets depends on the port of the site
        "run_dir": out, "model.path": base, "data.path": downloaded.out, "data.index": manifest, "data.order": "spread",
        "filter.tau": 1.4, "train.samples": STEPS * BATCH, "train.batch_size": BATCH, "train.learning_rate": 1e-4,
    }  # fmt: skip
    launching.run([f"--{name}={value}" for name, value in settings.items()], processes=None)
    rows = {row["key"]: row for row in read_manifest(manifest)[0].to_pylist()}
    audit = pq.read_table(out / "audit.parquet").to_pylist()
    assert [row["position"] for row in audit] == list(range(STEPS * BATCH))
    seen = Counter(row["key"] for row in audit)
    assert seen.keys() <= rows.keys() and all(seen[key] <= rows[key]["repeats"] for key in seen)
    assert all(row["duplicate"] == (rows[row["key"]]["role"] == "duplicate") for row in audit)
    share = STEPS * BATCH / (DUPLICATES * REPEATS + DISTINCT)  # of an epoch, over which copies are spread evenly
    assert all(abs(seen[key] - share * REPEATS) <= 1 for key, row in rows.items() if row["role"] == "duplicate")
    dropped = sum(not row["keep"] for row in audit)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["filter/seen"] == STEPS * BATCH and summary["filter/dropped"] == dropped
    assert 0 < dropped < STEPS * BATCH
