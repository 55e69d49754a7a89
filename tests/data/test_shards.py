import io
import json
import os
import random
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import webdataset
from clouds import write_tar
from PIL import Image, ImageOps

from memfilter.data.shards import MAX_CAPTION, MAX_PIXELS, ShardError, Shards, decode, write_shards


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def encoded(seed: int, form: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def directory(tmp_path):
    """Seven samples in three shards."""
    out = tmp_path / "shards"
    write_shards(((f"{i:03d}", picture(i), f"caption é {i}", {"number": i}) for i in range(7)), out, per_shard=3)
    return out


def test_random_access_gives_what_webdataset_reads(directory):
    tars = sorted(directory.glob("*.tar"))
    assert len(tars) == 3
    samples = {s["__key__"]: s for s in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)}
    shards = Shards.open(directory)
    assert shards.keys() == sorted(samples) and len(samples) == 7
    for key in random.Random(0).sample(shards.keys(), 7):
        expected = np.asarray(Image.open(io.BytesIO(samples[key]["png"])))
        np.testing.assert_array_equal(np.asarray(shards.image(key)), expected)
        assert shards.caption(key) == samples[key]["txt"].decode()
        assert shards.facts(key) == json.loads(samples[key]["json"])


def test_one_tar_file_is_a_source_too(directory):
    assert Shards.open(directory / "00001.tar").keys() == ["003", "004", "005"]


def test_same_samples_give_the_same_bytes(directory, tmp_path):
    again = tmp_path / "again"
    write_shards(((f"{i:03d}", picture(i), f"caption é {i}", {"number": i}) for i in range(7)), again, per_shard=3)
    for tar in directory.glob("*.tar"):
        assert tar.read_bytes() == (again / tar.name).read_bytes()


@pytest.mark.parametrize("form, suffix", [("png", "png"), ("jpeg", "jpg"), ("jpeg", "jpeg"), ("webp", "webp")])
def test_every_form_of_picture_is_decoded(tmp_path, form, suffix):
    content = encoded(1, form)
    shards = Shards.open(write_tar(tmp_path / "a.tar", [(f"x.{suffix}", content)]))
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(shards.image("x")), expected)


def decoded(picture: Image.Image, **options) -> np.ndarray:
    """As `decode` gives it; must be RGB."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", **options)
    found = decode(buffer.getvalue(), "x")
    assert found.mode == "RGB"
    return np.asarray(found)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_picture_of_another_mode_comes_out_as_rgb(mode):
    converted = picture(0).convert(mode)
    np.testing.assert_array_equal(decoded(converted), np.asarray(converted.convert("RGB")))


def test_grey_of_16_bits_keeps_its_range():
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(decoded(Image.fromarray(grey)), np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_what_is_transparent_is_seen_on_white():
    shape = np.zeros((1, 3, 4), np.uint8)  # black, of which nothing, a part and everything covers what is behind
    shape[0, :, 3] = 0, 51, 255
    assert decoded(Image.fromarray(shape))[0, :, 0].tolist() == [255, 204, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putdata([0, 1])
    assert decoded(palette, transparency=0)[0].tolist() == [[255, 255, 255], [200, 0, 0]]


@pytest.mark.parametrize("orientation", range(10))
def test_picture_is_turned_as_its_exif_has_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.open(io.BytesIO(encoded(0, exif=exif.tobytes())))
    expected = np.asarray(ImageOps.exif_transpose(upright))
    np.testing.assert_array_equal(np.asarray(decode(encoded(0, exif=exif.tobytes()), "x")), expected)


def test_picture_is_turned_whatever_else_is_odd_in_its_exif():
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 2, 4, b"abc\0")]  # orientation; a resolution in letters
    odd = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    odd += b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries) + bytes(4)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(0, "jpeg", exif=odd))))
    assert decode(encoded(0, "jpeg", exif=odd), "x").size == picture(0).size[::-1]


def test_mark_of_a_texts_byte_order_is_not_part_of_the_caption(tmp_path):
    shards = Shards.open(write_tar(tmp_path / "a.tar", [("x.png", encoded(0)), ("x.txt", b"\xef\xbb\xbfa cat")]))
    assert shards.caption("x") == "a cat"


def test_sample_without_caption_or_facts_has_empty_ones(tmp_path):
    shards = Shards.open(write_tar(tmp_path / "a.tar", [("x.png", encoded(0)), ("alone.txt", b"no picture")]))
    assert shards.keys() == ["x"]
    assert shards.caption("x") == "" and shards.facts("x") == {}


def test_suffixes_are_found_in_capitals_as_webdataset_finds_them(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.PNG", encoded(0)), ("x.Txt", b"hello")])
    sample = next(iter(webdataset.WebDataset(str(path), shardshuffle=False)))
    assert sample["txt"] == b"hello"
    shards = Shards.open(path)
    assert shards.keys() == ["x"] and shards.caption("x") == "hello"


def test_shard_that_is_cut_anywhere_in_its_samples_is_an_error_that_names_it(directory):
    tar = directory / "00001.tar"
    with tarfile.open(tar) as whole:
        whole.getmembers()
        end = whole.offset  # zeros follow
    content = tar.read_bytes()
    for cut in range(0, end + 1, 64):
        tar.write_bytes(content[:cut])
        with pytest.raises(ShardError, match="00001.tar"):
            Shards.open(directory)
    tar.write_bytes(content)
    assert len(Shards.open(directory).keys()) == 7


def test_shard_with_a_broken_header_in_the_middle_is_an_error_that_names_it(directory):
    tar = directory / "00001.tar"
    with tarfile.open(tar) as whole:
        offset = whole.getmembers()[4].offset
    content = bytearray(tar.read_bytes())
    content[offset : offset + 512] = b"\xff" * 512
    tar.write_bytes(content)
    with pytest.raises(ShardError, match="00001.tar"):
        Shards.open(directory)


@pytest.mark.parametrize("how", ["zeroed header", "joined"])
def test_what_follows_the_end_of_a_shard_is_an_error_that_names_it(directory, how):
    tar = directory / "00001.tar"
    with tarfile.open(tar) as whole:
        offset = whole.getmembers()[4].offset
    content = bytearray(tar.read_bytes())
    if how == "joined":
        content += (directory / "00000.tar").read_bytes()
    else:
        content[offset : offset + 512] = bytes(512)
    tar.write_bytes(content)
    with pytest.raises(ShardError, match="00001.tar.*broken header, or several archives"):
        Shards.open(directory)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 5000, encoded(0)], ids=["empty", "text", "bytes", "png"])
def test_file_that_is_no_tar_is_an_error_that_names_it(directory, content):
    (directory / "00009.tar").write_bytes(content)
    with pytest.raises(ShardError, match="00009.tar"):
        Shards.open(directory)


@pytest.mark.parametrize("source", ["missing", "missing.tar", "empty"])
def test_missing_source_is_an_error_that_names_it(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=f"nothing to read.*{source}"):
        Shards.open(tmp_path / source)


def test_dangling_link_is_an_error_that_names_it(directory):
    (directory / "00009.tar").symlink_to("nowhere")
    with pytest.raises(ShardError, match="00009.tar"):
        Shards.open(directory)


@pytest.mark.parametrize("read", [Shards.image, Shards.caption, Shards.facts])
def test_shard_that_vanished_meanwhile_is_an_error_that_names_it(directory, read):
    shards = Shards.open(directory)
    (directory / "00001.tar").unlink()
    with pytest.raises(ShardError, match="00001.tar"):
        read(shards, "004")


def test_key_that_stands_twice_is_an_error_that_names_it_and_both_shards(directory):
    write_tar(directory / "00009.tar", [("004.png", encoded(0))])
    with pytest.raises(ShardError, match="'004'.*00001.tar.*00009.tar"):
        Shards.open(directory)
    path = write_tar(directory.parent / "one.tar", [("x.png", encoded(0)), ("x.png", encoded(1))])
    with pytest.raises(ShardError, match="'x' stands twice"):
        Shards.open(path)


def test_hidden_files_are_no_samples_as_for_webdataset(tmp_path):
    tars = [
        write_tar(tmp_path / f"{x}.tar", [(".DS_Store", b"x"), (f"._{x}.png", b"x"), (f"{x}.png", encoded(0))])
        for x in "ab"
    ]
    expected = [s["__key__"] for s in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)]
    assert Shards.open(tmp_path).keys() == expected == ["a", "b"]


def test_names_that_point_outside_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    tar = write_tar(
        inside / "a.tar",
        [("../../up.png", encoded(1)), (str(secret), b"harmless"), (f"{tmp_path}/planted.png", encoded(2))],
    )
    with tarfile.open(tar, "a") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.SYMTYPE, "up.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    shards = Shards.open(inside)
    assert shards.keys() == ["hard", "link", "planted", "up"]
    np.testing.assert_array_equal(np.asarray(shards.image("up")), np.asarray(picture(1)))
    np.testing.assert_array_equal(np.asarray(shards.image("planted")), np.asarray(picture(2)))
    assert shards.caption("secret") == "harmless"  # of the archive, not of the file
    for key, read in (("hard", shards.image), ("link", shards.image), ("up", shards.caption)):
        with pytest.raises(ShardError, match=f"'{key}' in .*a.tar cannot be read .it is no file but a link"):
            read(key)
    assert sorted(tmp_path.rglob("*")) == before and secret.read_text() == "secret"


def test_picture_that_cannot_be_decoded_is_an_error_that_names_sample_and_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.png", b"no picture"), ("y.jpg", encoded(0, "jpeg")[:200])])
    for key in "xy":
        with pytest.raises(ShardError, match=f"'{key}' in .*a.tar"):
            Shards.open(path).image(key)


def test_picture_with_flipped_bytes_is_decoded_or_a_shard_error(tmp_path):
    rng = random.Random(0)
    whole = encoded(0)
    contents = [bytearray(whole) for _ in range(300)]
    for content in contents[1:]:
        content[rng.randrange(len(content))] = rng.randrange(256)
    chunk = whole.index(b"IDAT")
    length = int.from_bytes(whole[chunk - 4 : chunk], "big")
    for less in range(1, 200, 10):  # the next chunk begins in the middle of this one: a SyntaxError of Pillow's
        contents.append(bytearray(whole[: chunk - 4] + (length - less).to_bytes(4, "big") + whole[chunk:]))
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", bytes(content)) for i, content in enumerate(contents)])
    shards, outcomes = Shards.open(path), set()
    for key in shards.keys():
        try:
            outcomes.add(shards.image(key).mode)
        except ShardError as error:
            assert f"'{key}'" in str(error)
            outcomes.add("error")
    assert outcomes == {"RGB", "error"}


def test_facts_that_are_no_json_are_an_error_that_names_sample_and_shard(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x.png", encoded(0)), ("x.json", b"{broken")])
    with pytest.raises(ShardError, match="'x' in .*a.tar"):
        Shards.open(path).facts("x")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_reading_leaves_no_file_open(directory):
    shards = Shards.open(directory)
    before = len(os.listdir("/proc/self/fd"))
    for key in shards.keys():
        shards.image(key), shards.caption(key)
    assert len(os.listdir("/proc/self/fd")) == before


def write_folder(path, files: dict[str, bytes]):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_flat_folder_is_a_source_too(tmp_path):
    form = {"a.png": "png", "holiday 1.2.JPG": "jpeg", "é.JPEG": "jpeg", "b.webp": "webp", "alone.png": "png"}
    files = {name: encoded(i, f) for i, (name, f) in enumerate(form.items())}
    texts = {"a.txt": b" first\n", "holiday 1.2.TXT": "zweites Bild: schön".encode(), "é.txt": b"", "orphan.txt": b"x",
             "b.json": b'{"number": 7}'}  # fmt: skip
    hidden = {".hidden.png": encoded(7), "._a.png": b"x", ".DS_Store": b"x", ".png": encoded(8)}
    other = {"notes.md": b"x", "clip.mp4": b"x", "a.png.bak": b"x", "png": b"x"}
    folder = write_folder(tmp_path / "folder", files | texts | hidden | other)
    (folder / "directory.png").mkdir()
    shards = Shards.open(folder)
    assert shards.keys() == ["a", "alone", "b", "holiday 1.2", "é"]
    for name, content in files.items():
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(shards.image(name.rpartition(".")[0])), expected)
    captions = {key: shards.caption(key) for key in shards.keys()}
    assert captions == {"a": "first", "alone": "", "b": "", "holiday 1.2": "zweites Bild: schön", "é": ""}
    assert shards.facts("b") == {"number": 7} and shards.facts("a") == {}


def test_folder_gives_what_a_tar_of_its_files_gives(tmp_path):
    files = {f"{i}.{suffix}": content for i in range(3)
             for suffix, content in (("png", encoded(i)), ("txt", f"caption {i}".encode()))}  # fmt: skip
    tar = Shards.open(write_tar(tmp_path / "a.tar", list(files.items())))
    folder = Shards.open(write_folder(tmp_path / "folder", files))
    assert folder.keys() == tar.keys() == ["0", "1", "2"]
    for key in tar.keys():
        assert folder.caption(key) == tar.caption(key) and folder.image(key).tobytes() == tar.image(key).tobytes()


def test_folder_with_one_name_twice_is_an_error_that_names_both_files(tmp_path):
    folder = write_folder(tmp_path / "folder", {"x.png": encoded(0), "x.PNG": encoded(1)})
    with pytest.raises(ShardError, match=r"'x' stands twice: .*x\.PNG.*x\.png"):
        Shards.open(folder)


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {".a.png": b"x"}, {"a.gif": b"x"}])
def test_folder_without_pictures_is_an_error_that_names_it(tmp_path, files):
    with pytest.raises(ShardError, match=r"nothing to read: .*folder is neither.*png, jpg, jpeg, webp"):
        Shards.open(write_folder(tmp_path / "folder", files))


def test_picture_that_vanished_from_a_folder_is_an_error_that_names_it(tmp_path):
    shards = Shards.open(write_folder(tmp_path / "folder", {"x.png": encoded(0)}))
    (tmp_path / "folder" / "x.png").unlink()
    with pytest.raises(ShardError, match=r"x\.png cannot be read"):
        shards.image("x")


def claimed(width: int, height: int) -> bytes:
    """A PNG that says how large it is and breaks off where its pixels would begin."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("width, height", [(8001, 8000), (1, 64_000_001), (10_000, 10_000), (20_000, 20_000)])
def test_picture_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, width, height):
    # Pillow itself warns from 89 million pixels on and refuses from 179 million
    shards = Shards.open(write_tar(tmp_path / "a.tar", [("x.png", claimed(width, height))]))
    with warnings.catch_warnings(action="error"), pytest.raises(ShardError, match=r"'x' in .*\.tar.*pixels") as caught:
        shards.image("x")
    if width < 20_000:
        assert f"{width} x {height} pixels are more than 64,000,000" in str(caught.value)


def test_picture_of_as_many_pixels_as_are_allowed_is_decoded(tmp_path):
    assert 8000 * 8000 == MAX_PIXELS
    shards = Shards.open(write_tar(tmp_path / "a.tar", [("x.png", claimed(8000, 8000))]))
    with pytest.raises(ShardError, match="truncated|broken"):  # what is missing was looked for
        shards.image("x")


@pytest.mark.parametrize("character", ["x", "é", "→", "🐈"])
@pytest.mark.parametrize("shift", range(4))
def test_caption_is_cut_where_it_is_too_long_for_any_text_encoder(tmp_path, character, shift):
    text = "s" * shift + character * 2**18
    shards = Shards.open(write_tar(tmp_path / "a.tar", [("x.png", encoded(0)), ("x.txt", text.encode())]))
    found = shards.caption("x").removesuffix("\ufffd")  # what is left of a character at the cut
    assert text.startswith(found)
    assert MAX_CAPTION - 4 < len(found.encode()) <= MAX_CAPTION


def test_caption_of_the_longest_length_is_whole_and_another_one_is_not_run_into(tmp_path):
    text = "x" * MAX_CAPTION
    members = [("a.png", encoded(0)), ("a.txt", text.encode()), ("b.png", encoded(0)), ("b.txt", b"short")]
    shards = Shards.open(write_tar(tmp_path / "a.tar", members))
    assert shards.caption("a") == text and shards.caption("b") == "short"


def test_caption_that_is_no_utf8_is_read_as_far_as_it_goes(tmp_path):
    shards = Shards.open(write_tar(tmp_path / "a.tar", [("x.png", encoded(0)), ("x.txt", b"caf\xe9 au lait")]))
    assert shards.caption("x") == "caf\ufffd au lait"


@pytest.mark.parametrize("content", [b"", b"x" * 300, encoded(0, "gif"), encoded(0, "tiff")])
def test_file_of_another_form_than_any_suffix_says_is_an_error_that_names_it(tmp_path, content):
    shards = Shards.open(write_folder(tmp_path / "folder", {"x.jpg": content}))
    with pytest.raises(ShardError, match=r"'x' in .*x\.jpg"):
        shards.image("x")


def test_picture_is_shown_upright_as_its_camera_says(tmp_path):
    picture = Image.new("RGB", (8, 4))
    picture.getexif()[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=picture.getexif())
    assert Shards.open(tmp_path).image("a").size == (4, 8)


def test_two_pictures_of_one_name_in_a_folder_are_refused(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (8, 4)).save(tmp_path / name)
    with pytest.raises(ShardError, match="'a' stands twice"):
        Shards.open(tmp_path)


def test_folder_of_both_tars_and_pictures_is_refused_and_hidden_tars_are_passed_over(tmp_path):
    write_shards([("x", Image.new("RGB", (4, 4)), "x", {})], tmp_path)
    (tmp_path / "._00000.tar").write_bytes(b"left behind")
    assert Shards.open(tmp_path).keys() == ["x"]
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    with pytest.raises(ShardError, match="which are meant"):
        Shards.open(tmp_path)
