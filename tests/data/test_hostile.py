"""One data set of everything that is out to do harm, and good samples among it, through every command that reads data:
what is good comes out as it is, what is not is named with its reason, nothing appears outside of the output folder, and
no command takes more memory or time than is said here."""

import gzip
import hashlib
import html
import inspect
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from clouds import cloud, encoded, sample, write_tar
from datasets import Dataset, Features, Value
from datasets import Image as Picture
from PIL import Image
from safetensors.torch import load_file

from memfilter.cli import main as command
from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.data import saved as saved_module
from memfilter.data.experiment import Experiment
from memfilter.data.manifest import MANIFEST, SCHEMA, read_manifest
from memfilter.data.sampler import SampleDataset, SampleStream, View, to_pixels
from memfilter.data.saved import SavedDataset
from memfilter.data.shards import MAX_CAPTION, ShardError, Shards
from memfilter.data.streaming.tars import TarStream
from memfilter.train.loop import train

SECONDS = 30  # but for those in which others have the cores, for a command, of which each takes some 5
HANGS = 600  # seconds after which a command has hung
MEGABYTES = 300  # by which a process may grow: the largest picture file that is read has 192
HUGE = 2**31
LINK = "no file but a link, a pipe or a device"

# names of pictures that can be read, in shards and in a folder
NAMES = ["new\nline", "tab\t", "\x1b[31mred", "\u202ethgir", "<script>alert(1)", "<img src=x>", "'; DROP TABLE", "#1",
         "%00", "--help", "$(touch planted)", "Case", "case", "\\xe9", "é" * 50]  # fmt: skip
SHARD_NAMES = ["../../planted", "a/../../../below", "/planted_root", "x" * 10_000, "nul\0"]
ODD = b"caf\xff".decode("utf-8", "surrogateescape")


def png_of(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG of zeros, of which the first million pixels are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(min(10**6, (width + 1) * height)))
    parts = [chunk(b"IHDR", header), *(chunk(b"zTXt", data) for data in extra), chunk(b"IDAT", pixels)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def scanned(scans: int) -> bytes:
    """A progressive JPEG with the last of its scans over and over."""
    content = encoded(Image.new("RGB", (3000, 3000)), "jpeg", progressive=True)
    last, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[last:end] * scans + content[end:]


# what is no picture that can be used, in shards and in a folder; key -> (name of the file, bytes, loss, reason)
BROKEN = {
    "text": ("text.jpg", b"<html>not found</html>", "unreadable", "no picture of a known kind"),
    "empty": ("empty.png", b"", "unreadable", "no picture of a known kind"),
    "cut": ("cut.png", encoded(90)[:900], "unreadable", "truncated"),
    "bomb": ("bomb.png", png_of(9000, 9000), "too large", "9000 x 9000 pixels are more than"),
    "claim": ("claim.png", png_of(2**31 - 1, 2**31 - 1), "too large", "exceeds limit"),
    "words": ("words.png", png_of(8, 8, b"a\0\0" + zlib.compress(bytes(2**24))), "unreadable", "too large"),
    "scans": ("scans.jpg", scanned(4000), "too large", "4,010 scans of 3000 x 3000 pixels"),
}
DEEP = b'{"url": ' * 100_000
LIE = json.dumps({"key": "other", "shard": "../../secret.tar", "url": "http://x/", "repeats": 10**9}).encode()


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, claim: int | None = None, **pax) -> bytes:
    """A member of a shard; it may claim another size, and PAX may say whatever."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, "../secret.png" if kind in (b"1", b"2") else "", pax
    info.size = len(content) if claim is None else claim
    form = tarfile.PAX_FORMAT if pax or "\0" in name else tarfile.GNU_FORMAT
    if "\0" in name:
        info.name, info.pax_headers = "short", pax | {"path": name}
    return info.tobuf(form, errors="surrogateescape") + content + bytes(-len(content) % 512)


def write_members(path: Path, *parts: bytes | int) -> None:
    """A tar file of members and holes, which take no room."""
    with path.open("wb") as file:
        for part in parts:
            file.seek(part, 1) if isinstance(part, int) else file.write(part)
        file.write(bytes(1024))


def write_hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


def write_shards(out: Path) -> dict[str, int]:
    """Readable shards; key -> number of the cloud for the pictures that are good."""
    good, parts = {}, []
    for number, name in enumerate([*NAMES, *SHARD_NAMES, ODD]):
        content = encoded(number)
        parts += [member(f"{name}.png", content), member(f"{name}.txt", f"cloud {number}".encode())]
        good[{ODD: "caf\\xff"}.get(name, name.rpartition("/")[2])] = number
    write_members(out / "0names.tar", *parts)

    bad = [(name, content) for name, content, *_ in BROKEN.values()]
    texts = [(f"{key}.txt", b"said") for key in BROKEN]
    kinds = {"link": b"2", "hard": b"1", "pipe": b"6", "device": b"3"}
    links = [member(f"{key}.png", kind=kind) + member(f"{key}.txt", b"said") for key, kind in kinds.items()]
    links += [member("folder.png", kind=b"5"), member("linked.png", encoded(91)), member("linked.txt", kind=b"2")]
    write_tar(out / "1broken.tar", [*bad, *texts])
    content = (out / "1broken.tar").read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    (out / "1broken.tar").write_bytes(content + b"".join(links) + bytes(1024))

    said = {"long.txt": b"word " * (2**20 // 5), "bytes.txt": b"\xff\xfe\xff", "lie.json": LIE, "deep.json": DEEP}
    members = [m for n, key in enumerate(("long", "bytes", "lie", "deep"), 30) for m in sample(key, n)
               if m[0] not in said]  # fmt: skip
    good |= {"long": 30, "bytes": 31, "lie": 32, "deep": 33}
    write_tar(out / "2said.tar", [*members, *said.items()])

    good |= {"large": 34, "last": 35}
    write_members(
        out / "3huge.tar", member("huge.png", claim=HUGE), HUGE, member("large.txt", claim=HUGE), HUGE,
        member("large.json", claim=HUGE), HUGE, member("large.png", encoded(34)), member("huge.txt", b"said"),
        member("last.png", encoded(35)), member("last.txt", b"cloud 35"),
    )  # fmt: skip

    good |= {"chained": 36}
    pax, rest = member("", comment="x")[:1024], member("chained.png", encoded(36)) + member("chained.txt", b"cloud 36")
    write_members(out / "4headers.tar", pax * 3000, rest, b"".join(member(f"{n}.txt") for n in range(20_000)))
    return good


def write_folder(out: Path) -> dict[str, int]:
    good = {}
    for number, name in enumerate([*NAMES, ODD], 40):
        (out / f"{name}.png").write_bytes(encoded(number))
        (out / f"{name}.txt").write_text(f"cloud {number}")
        good[{ODD: "caf\\xff"}.get(name, name)] = number
    for key, (name, content, *_) in BROKEN.items():
        (out / name).write_bytes(content)
        (out / f"{key}.txt").write_text("said")
    for key, number in (("long", 70), ("bytes", 71), ("lie", 72), ("deep", 73), ("large", 74), ("linked", 75)):
        (out / f"{key}.png").write_bytes(encoded(number))
        (out / f"{key}.txt").write_text(f"cloud {number}")
        good[key] = number
    del good["linked"]
    (out / "long.txt").write_bytes(b"word " * (2**20 // 5))
    (out / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (out / "lie.json").write_bytes(LIE)
    (out / "deep.json").write_bytes(DEEP)
    for name in ("huge.png", "large.txt", "large.json"):
        (out / name).unlink(missing_ok=True)
        write_hole(out / name)
    (out / "linked.txt").unlink()
    os.mkfifo(out / "linked.txt")
    os.mkfifo(out / "pipe.png")
    (out / "link.png").symlink_to("nowhere")
    (out / "device.png").symlink_to("/dev/zero")
    (out / "hard.png").symlink_to("hard.png")
    (out / "folder.png").mkdir()
    (out / "outside.png").symlink_to("../../secret.png")  # the user's own
    (out / "outside.txt").write_text("cloud 80")
    return good | {"outside": 80}


def write_broken(out: Path) -> dict[str, str]:
    """Shards that cannot be gone through; name -> reason."""
    whole = member("a.png", encoded(1)) + member("a.txt", b"said")
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, HUGE
    pax = tarfile.TarInfo("././@PaxHeader")
    pax.type, pax.size = tarfile.XHDTYPE, HUGE

    def records(content: bytes) -> bytes:
        pax.size = len(content)
        return pax.tobuf() + content + bytes(-len(content) % 512) + whole

    parts = {
        "negative": ((whole, member("b.png", claim=-2048), whole), "unexpected end"),
        "backwards": ((whole, member("b.png", size="-2048")), "unexpected end"),
        "lying": ((whole, member("b.png", b"x" * 2000, claim=2**40)), "unexpected end"),
        "said": ((whole, member("b.png", b"x" * 2000, size=f"{2**62}")), "unexpected end"),
        "name": ((whole, long.tobuf(), HUGE, whole), "header of 2,147,483,648 bytes"),
        "header": ((whole, pax.tobuf(), HUGE, whole), "header of 2,147,483,648 bytes"),
        "digits": ((records(b"1" * 60_000) * 50,), "not found"),  # CVE-2024-6232
        "standing": ((records(b"0 path=x\n"),), "makes no sense"),
        "number": ((records(b"99999999999999999999 path=x\n"),), "makes no sense"),
        "sparse": ((member("b.png", b"x" * 512, kind=tarfile.GNUTYPE_SPARSE),), "sparse"),
        "map": ((member("b.png", b"x" * 512, **{"GNU.sparse.map": "0,512", "GNU.sparse.size": f"{2**40}"}),), "sparse"),
        "gzip": ((gzip.compress(random.randbytes(2000) + whole),), "it is compressed"),
        "twice": ((whole, whole), "'a' stands twice"),
        "case": ((whole, member("a.PNG", encoded(2))), "'a' stands twice"),
        "\x1b[31m\nerror: lie\udcff": ((b"no tar file" * 100,), "bad checksum|header"),
    }  # fmt: skip
    for name, (content, _) in parts.items():
        write_members(out / f"{name}.tar", *content)
    (out / "cut.tar").write_bytes(whole[:2000])
    (out / "empty.tar").write_bytes(b"")
    os.mkfifo(out / "pipe.tar")
    (out / "dangling.tar").symlink_to("nowhere")
    (out / "zero.tar").symlink_to("/dev/zero")
    (out / "folder.tar").mkdir()
    more = {"cut": "end of file|header", "empty": "unexpected end", **dict.fromkeys(("pipe", "dangling", "zero"), "nothing to")}
    return {name: reason for name, (_, reason) in parts.items()} | more


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(directory with all of it, key -> number of the good pictures by folder, broken shards with their reasons)."""
    root = tmp_path_factory.mktemp("hostile")
    for name in ("data/tars", "data/folder", "data/broken", "out", "here"):
        (root / name).mkdir(parents=True)
    cloud(80).save(root / "secret.png")
    good = {"tars": write_shards(root / "data" / "tars"), "folder": write_folder(root / "data" / "folder")}
    return root, good, write_broken(root / "data" / "broken")


@pytest.fixture(autouse=True)
def out(request, world, monkeypatch):
    """A directory of the test's own; nothing else may change, and nothing hang."""
    root = world[0]
    (place := root / "out" / request.node.name).mkdir()
    monkeypatch.chdir(root / "here")

    def late(*_):
        pytest.fail(f"not done after {HANGS} s")  # which no code takes for an error of its own

    before, former = listing(root), signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS)
    try:
        yield place
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    assert listing(root) == before


def listing(root: Path) -> dict:
    """What stands where, of which kind, size and date, but for what is in folders under out."""
    found = {}
    for folder, below, names in os.walk(root):
        if Path(folder).parent == root / "out":
            below.clear()
            continue
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            facts = os.lstat(path)
            found[path] = (facts.st_mode, facts.st_nlink, facts.st_size, facts.st_mtime_ns)
    return found


def own_time() -> float:
    """Seconds, but for those in which others had the cores."""
    return time.perf_counter() - int(open("/proc/self/schedstat").read().split()[1]) / 1e9


MEASURED = """
import json, re, sys, time
{imports}

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

{own_time}
before, start = peak(), own_time()
{body}
print(json.dumps({{"found": found, "megabytes": peak() - before, "seconds": own_time() - start}}))
"""


def measured(imports: str, body: str):
    """What a script of its own calls ``found``, after a look at its memory and time; and what it prints."""
    script = MEASURED.format(imports=imports, body=body, own_time=inspect.getsource(own_time))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    facts = json.loads(last)
    assert facts["megabytes"] < MEGABYTES and facts["seconds"] < SECONDS, last[-80:]
    return facts["found"], lines, done.stderr


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def reasons(folder: str) -> dict[str, str]:
    """Of the samples that training cannot use."""
    links = dict.fromkeys(("link", "hard", "pipe", "device", "linked"), LINK)
    return {key: reason for key, (*_, reason) in BROKEN.items()} | links | {"huge": "2,147,483,648 bytes are more than"}


def digest(number: int) -> str:
    return hashlib.sha256(to_pixels(cloud(number), 64)[0].numpy().tobytes()).hexdigest()


READ = """
found = {}
for folder in ("tars", "folder"):
    shards = Shards.open(f"../data/{folder}")
    experiment = Experiment.of_shards(shards)
    dataset = SampleDataset(shards, experiment, SampleStream(experiment.virtual(), 0), View(64))
    for position in range(len(experiment.keys)):
        sample = dataset[position]
        try:
            facts = shards.facts(sample["key"])
        except ShardError as error:
            facts = str(error)
        pixels = hashlib.sha256(sample["pixels"].numpy().tobytes()).hexdigest()
        found[f"{folder}/{sample['key']}"] = sample["bad"], pixels, sample["caption"], facts
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory in /proc")
def test_samples_as_training_reads_them(world):
    root, good, _ = world
    found, _, _ = measured(
        "import hashlib\nfrom memfilter.data.experiment import Experiment\n"
        "from memfilter.data.sampler import SampleDataset, SampleStream, View\n"
        "from memfilter.data.shards import ShardError, Shards",
        READ,
    )
    expected = {f"{folder}/{key}" for folder in good for key in (*good[folder], *reasons(folder))}
    assert found.keys() == expected
    for folder in good:
        for key, reason in reasons(folder).items():
            bad = found[f"{folder}/{key}"][0]
            assert bad and reason in bad and repr(key) in bad and printable(bad), key
        for key, number in good[folder].items():
            bad, pixels, caption, _ = found[f"{folder}/{key}"]
            assert bad is None and pixels == digest(number), key
            if key not in ("long", "bytes", "lie", "deep", "large"):
                assert caption == f"cloud {number}"
        captions = {key: found[f"{folder}/{key}"][2] for key in ("long", "bytes", "large")}
        assert captions["bytes"] == "\ufffd" * 3 and len(captions["large"]) == MAX_CAPTION
        assert captions["long"] == ("word " * MAX_CAPTION)[:MAX_CAPTION].strip()
        facts = {key: found[f"{folder}/{key}"][3] for key in ("lie", "deep", "large")}
        assert facts["lie"] == json.loads(LIE)
        assert "'deep'" in facts["deep"] and "recursion" in facts["deep"]
        assert "'large'" in facts["large"] and "2,147,483,648 bytes are more than 1,048,576" in facts["large"]


def test_broken_shards_are_refused_by_name_and_reason(world, out):
    root, _, broken = world
    start = own_time()
    for name, reason in broken.items():
        with pytest.raises(ShardError, match=reason) as caught:
            Shards.open(root / "data" / "broken" / f"{name}.tar")
        assert printable(str(caught.value)), name
    with pytest.raises(ShardError, match="broken"):
        Shards.open(root / "data" / "broken")
    os.mkfifo(out / "pipe.tar")
    with pytest.raises(ShardError, match="pipe.tar cannot be read .it is not there, or no file"):
        Shards.open(out)
    assert own_time() - start < 5


def test_streams_of_broken_shards_are_refused_by_the_same_reasons(world):
    root, _, broken = world
    start = own_time()
    for name, reason in broken.items():
        path = root / "data" / "broken" / f"{name}.tar"
        if path.is_file() and "twice" not in reason:  # of what stands twice in a stream the first counts
            with pytest.raises(ShardError, match=reason) as caught:
                TarStream(str(path), 1)
            assert printable(str(caught.value)), name
    assert own_time() - start < 5


def sparse_shards(out: Path) -> list[Path]:
    """As GNU tar writes them, in every form that it knows: some kB that say they are a picture of 2 GB."""
    write_hole(out / "b.png")
    (out / "a.png").write_bytes(encoded(1))
    forms = {"gnu": ["--format=gnu"]} | {
        version: ["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")
    }
    for name, form in forms.items():
        command = ["tar", "--create", "--sparse", f"--file={name}.tar", *form, "a.png", "b.png"]
        subprocess.run(command, cwd=out, check=True)
    tars = [out / f"{name}.tar" for name in forms]
    assert all(path.stat().st_size < 50_000 for path in tars)
    return tars


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory in /proc")
def test_streams_take_no_more_memory_than_limits_allow(world, out):
    if "GNU tar" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("needs GNU tar for sparse shards")
    compressed = out / "gzip.tar"
    with tarfile.open(compressed, "w:gz") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(content := encoded(2) + bytes(2**29))
        tar.addfile(info, io.BytesIO(content))
    del content
    shards = [*map(str, sparse_shards(out)), str(compressed)]
    found, _, _ = measured(
        "from memfilter.data.shards import ShardError\nfrom memfilter.data.streaming.tars import TarStream",
        f"found = {{}}\nfor path in {shards!r}:\n"
        "    try: TarStream(path, 1)\n    except ShardError as error: found[path] = str(error)\n"
        "stream = TarStream('../data/tars/3huge.tar', 1)\n"
        "found['huge'] = [(f.key, len(f.picture), f.caption, f.bad) for f in stream.read(0, 0, 0, 1)]",
    )
    huge = {key: facts for key, *facts in found.pop("huge")}
    assert found.keys() == set(shards)
    for path, reason in found.items():
        assert f"shard {path} cannot be read (" in reason
        assert ("it is compressed" if path == str(compressed) else "a sparse member") in reason
    assert "'huge.png': 2,147,483,648 bytes are more than 192,000,000" in huge["huge"][-1]
    assert huge["large"] == [len(encoded(34)), "\0" * MAX_CAPTION, None]
    assert huge["last"] == [len(encoded(35)), "cloud 35", None] and len(huge) == 3


def write_anyhow(path: Path, rows: list[dict]) -> Path:
    """A manifest that `write_manifest` might refuse."""
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({b"memfilter": b"{}"}), path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory in /proc")
def test_prepare_experiment_and_verify(world, out, capsys):
    root, good, broken = world
    arguments = ["prepare", "experiment", "../data", str(out), "--duplicates=3", "--repeats=2", "--distinct=500",
                 "--allow_fewer=true", "--processes=1"]  # fmt: skip
    _, lines, errors = measured(
        "from memfilter.cli import main\nfrom memfilter.data import builder", f"found = main({arguments!r})"
    )
    counts = {name: int(number) for name, number in (line.rsplit(maxsplit=1) for line in lines[:-1])}
    lost = [json.loads(line) for line in (out / "lost.jsonl").read_text().splitlines()]
    found = {row.get("key", row["shard"]): row for row in lost}
    expected = {f"{folder}/{key}": ("too large" if key == "huge" else "unreadable", reason)
                for folder in good for key, reason in reasons(folder).items()}  # fmt: skip
    expected |= {f"{folder}/{key}": (loss, reason) for folder in good for key, (*_, loss, reason) in BROKEN.items()}
    expected["folder/caf\\xff"] = "unreadable", "no UTF-8"
    names = {name: name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in broken}
    expected |= {f"broken/{names[name]}.tar": ("broken shard", reason) for name, reason in broken.items()}
    assert found.keys() == expected.keys() and len(lost) == len(found)
    for key, (loss, reason) in expected.items():
        assert found[key]["reason"] == loss and re.search(reason, found[key]["detail"]), found[key]
    assert all(printable(row["detail"]) for row in lost) and printable(errors.replace("\r", ""))

    table, header = read_manifest(out / MANIFEST)
    rows = {row["key"]: row for row in table.to_pylist()}
    numbers = {f"{folder}/{key}": number for folder in good for key, number in good[folder].items()}
    del numbers["folder/caf\\xff"]
    assert {key: row["sha256"] for key, row in rows.items()} == {
        key: hashlib.sha256(encoded(number)).digest() for key, number in numbers.items()
    }
    assert counts["broken_shards".replace("_", " ")] == len(broken)
    assert counts["candidates"] == len(expected) - len(broken) + len(numbers) and counts["chosen"] == len(numbers)
    assert counts["unreadable"] + counts["too large"] == len(expected) - len(broken) and counts["not needed"] == 0
    assert header["counts"] == {name.replace(" ", "_"): number for name, number in counts.items()}

    assert command(["prepare", "verify", str(out / MANIFEST), "--data=../data"]) == 0
    assert capsys.readouterr().out == f"{len(numbers)} samples are as they were\n"
    row = next(row for row in rows.values() if row["shard"] == "tars/3huge.tar")
    places = [*(f"folder/{name}.png" for name in ("pipe", "link", "folder", "new\nline")), "no\x1b[31m\nwhere.tar"]
    lies = [row | {"key": f"<b>\n{n}", "shard": shard, "offset": 0, "size": 99} for n, shard in enumerate(places)]
    lies = write_anyhow(out / "lies.parquet", lies)
    assert command(["prepare", "verify", str(lies), "--data=../data"]) == 1
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.startswith("error:")]
    assert len(lines) == len(places) + 2 and all(map(str.isprintable, lines))
    outside = [row | {"shard": shard} for shard in ("../secret.png", "/etc/passwd")] + [row | {"size": HUGE}]
    outside = [row | {"key": str(n)} for n, row in enumerate(outside)]
    outside = write_anyhow(out / "outside.parquet", outside)
    assert command(["prepare", "verify", str(outside), "--data=../data"]) == 1
    text = capsys.readouterr().err
    assert "2 rows have a shard outside the data directory" in text and "1 rows have a size outside" in text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("model") / "sd1", "sd1")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory in /proc")
def test_cache(world, out, model, tmp_path, capsys):
    root, good, _ = world
    made = {folder: [f"--data.path=../data/{folder}", f"--data.cache={out / folder}", "--data.max_bad_share=0.9",
                     f"--model.path={model}", "--data.workers=0"] for folder in good}  # fmt: skip
    measured(
        "from memfilter.cli import main\nfrom memfilter.pipelines import load_pipeline\n"
        f"load_pipeline({str(model)!r})",
        f"found = [main(['cache', *settings]) for settings in {list(made.values())!r}]\nassert found == [0, 0]",
    )
    for folder in good:
        rows = {row["key"]: row for row in pq.read_table(out / folder / "index.parquet").to_pylist()}
        assert rows.keys() == {*good[folder], *reasons(folder)}
        for key, reason in reasons(folder).items():
            assert reason in rows[key]["bad"] and repr(key) in rows[key]["bad"] and printable(rows[key]["bad"])
        assert {key for key, row in rows.items() if row["bad"] is None} == good[folder].keys()
        (out / folder / "cache.json").unlink()
        assert command(["cache", *made[folder], "--data.max_bad_share=0.1"]) == 1
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        first, *others = (line for line in lines if line.startswith("error:"))
        assert f"{len(reasons(folder))} samples could not be read" in first and len(others) == 11
        assert all(map(str.isprintable, others)) and "and 3 more" in others[-1]
        assert all(any(f"{key!r} in" in line for key in reasons(folder)) for line in others[:-1])
    # the same as of a folder of nothing but good pictures
    (tmp_path / "clean").mkdir()
    for number in good["tars"].values():
        (tmp_path / "clean" / f"{number:02d}.png").write_bytes(encoded(number))
    arguments = [f"--data.path={tmp_path / 'clean'}", f"--data.cache={out / 'clean'}", *made["tars"][2:]]
    assert command(["cache", *arguments]) == 0
    clean, mixed = (load_file(out / name / "pictures-00000.safetensors")["posterior"] for name in ("clean", "tars"))
    index = {row["key"]: row["row"] for row in pq.read_table(out / "tars" / "index.parquet").to_pylist()}
    for row, (key, _) in enumerate(sorted(good["tars"].items(), key=lambda item: item[1])):
        assert torch.equal(clean[row], mixed[index[key]]), key


def test_training_and_its_gallery(world, out, model):
    root, good, _ = world
    total = len(good["tars"]) + len(reasons("tars"))

    def config(name: str, share: float) -> Config:
        return Config(
            run_dir=str(out / name),
            model=ModelConfig(path=str(model)),
            data=DataConfig(path="../data/tars", max_bad_share=share, workers=0, caption_dropout=0),
            filter=FilterConfig(tau=1e-9),
            train=TrainConfig(samples=total, batch_size=1, ema_half_life=0),
            log=LogConfig(gallery=100),
        )

    train(config("run", 0.6), progress=False)
    listed = [json.loads(line) for line in (out / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(row["key"] for row in listed) == sorted(reasons("tars"))
    assert all(reasons("tars")[row["key"]] in row["bad"] and printable(row["bad"]) for row in listed)
    summary = json.loads((out / "run" / "summary.json").read_text())
    assert summary["filter/excluded"] == len(listed)

    assert set(pq.read_table(out / "run" / "audit.parquet")["key"].to_pylist()) == good["tars"].keys()

    text = (out / "run" / "dropped.html").read_text()
    assert printable(text.replace("\ufffd", "").replace("\0", "")), "names and captions"
    tags = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)
    parser.feed(text)
    assert "script" not in tags and "img" in tags
    for key in good["tars"].keys() - {"bytes", "large"}:  # whose captions are nothing to the tokenizer: norm 0
        shown = html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in key))
        assert shown.replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text, key

    with pytest.raises(ShardError, match="more than data.max_bad_share") as caught:
        train(config("strict", 0.05), progress=False)
    first, *others = str(caught.value).splitlines()
    assert others and all(line.isprintable() for line in others)
    assert all(any(repr(key) in line and reason in line for key, reason in reasons("tars").items()) for line in others)


def test_saved_dataset(world, out, monkeypatch):
    bomb, large = BROKEN["bomb"][1], encoded(81) + bytes(200_000)
    pictures = [encoded(80), bomb, b"", large, encoded(82), encoded(83), encoded(84)]
    captions = [b"cloud 80", b"a", b"b", b"c", b"\xff\xfe", b"word " * 2**18, b"<script>\x1b[31m"]
    features = Features({"image": Picture(), "text": Value("string")})
    cells = pa.StructArray.from_arrays([pa.array(pictures), pa.array(["../secret.png"] * 7)], ["bytes", "path"])
    text = pa.array(captions, pa.binary()).view(pa.string())  # unlike a cast, without a look at the bytes
    rows = Dataset(pa.table({"image": cells, "text": text}).cast(features.arrow_schema, safe=False))
    rows.save_to_disk(out / "saved")
    monkeypatch.setattr(saved_module, "MAX_BYTES", 100_000)
    saved = SavedDataset(out / "saved")
    experiment = Experiment.of_shards(saved)
    dataset = SampleDataset(saved, experiment, SampleStream(experiment.virtual(), 0), View(64))
    found = {int(sample["key"]): sample for sample in map(dataset.__getitem__, range(7))}
    bad = {row: sample["bad"] for row, sample in found.items() if sample["bad"]}
    expected = {1: "9000 x 9000 pixels", 2: "no bytes of the picture", 3: "bytes are more than 100,000",
                4: "Invalid UTF8"}  # fmt: skip
    assert bad.keys() == expected.keys()
    assert all(reason in bad[row] and f"row {row} of " in bad[row] for row, reason in expected.items())
    for row, number in ((0, 80), (5, 83), (6, 84)):
        assert torch.equal(found[row]["pixels"], to_pixels(cloud(number), 64)[0])
    assert found[0]["caption"] == "cloud 80" and len(found[5]["caption"]) <= MAX_CAPTION
    (out / "saved" / "state.json").unlink()
    os.mkfifo(out / "saved" / "state.json")
    with pytest.raises(ShardError, match=f"'state.json': it is {LINK}"):
        SavedDataset(out / "saved")
