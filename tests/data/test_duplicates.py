import hashlib

import imagehash
import numpy as np
import pytest
from clouds import cloud, encoded
from PIL import Image, ImageOps

from memfilter.data.duplicates import CAPTION, EXACT, NEAR, Distinct, EmbeddingLikeness, HashLikeness, perceptual_hashes


def as_hash(code: np.ndarray) -> imagehash.ImageHash:
    return imagehash.ImageHash(np.unpackbits(code).reshape(8, 8).astype(bool))


def crowd(seed: int, count: int = 300) -> np.ndarray:
    """Hashes [N, 8] around a few centres, 0 to 14 bits away from them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (12, 64), dtype=np.uint8)[rng.integers(12, size=count)]
    for row in bits:
        row[rng.choice(64, rng.integers(15), replace=False)] ^= 1
    return np.packbits(bits, axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, m], counted bit by bit."""
    return (np.unpackbits(a, axis=1)[:, None] != np.unpackbits(b, axis=1)).sum(-1)


def files(count: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(count)]


def greedy(near, sha256, captions, order, limit):
    """What `Distinct` is to do, one picture after the other."""
    admitted, found = [], []
    for row in order:
        if len(admitted) == limit:
            break
        if any(sha256[row] == sha256[other] for other in admitted):
            reason = EXACT
        elif any(near[row, other] for other in admitted):
            reason = NEAR
        elif captions and any(captions[row] == captions[other] for other in admitted):
            reason = CAPTION
        else:
            reason = None
            admitted.append(row)
        found.append((row, reason))
    return found


@pytest.mark.parametrize("form", ["RGB", "L", "RGBA", "P"])
def test_hashes_are_imagehashs_own_of_the_picture_and_of_its_mirror_image(form):
    picture = cloud(3, 200).crop((0, 0, 200, 130)).convert(form)
    found = [as_hash(np.frombuffer(code, np.uint8)) for code in perceptual_hashes(picture)]
    assert found[0] == imagehash.phash(picture)
    assert found[1] - imagehash.phash(ImageOps.mirror(picture)) <= 2 < found[0] - found[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_pictures_of_odd_shapes_have_hashes(size):
    assert [len(code) for code in perceptual_hashes(Image.new("RGB", size))] == [8, 8]


def test_bits_between_hashes_are_what_imagehash_counts():
    hashes = crowd(3, 12)
    expected = [[as_hash(a) - as_hash(b) for b in hashes] for a in hashes]
    np.testing.assert_array_equal(distances(hashes, hashes), expected)


@pytest.mark.parametrize("max_bits", [0, 3, 9])
def test_hashes_are_near_up_to_max_bits(max_bits):
    hashes = crowd(0)
    likeness = HashLikeness(hashes, max_bits)
    rows, known = np.arange(50), np.arange(50, 300)
    expected = distances(hashes[rows], hashes[known])
    assert (likeness.known(rows) == -1).all()
    likeness.add(known[:100]), likeness.add(known[100:])
    nearest = likeness.known(rows)
    assert ((nearest >= 0) == (expected.min(1) <= max_bits)).all() and 0 < (nearest >= 0).sum() < 50
    for row, other in enumerate(nearest):
        assert other < 0 or expected[row, other - 50] == expected[row].min()
    np.testing.assert_array_equal(likeness.among(known), distances(hashes[known], hashes[known]) <= max_bits)


def test_mirror_images_are_near_where_they_are_looked_for():
    pictures = [cloud(0), cloud(1), ImageOps.mirror(cloud(0))]
    hashes, mirrored = (np.frombuffer(b"".join(c), np.uint8).reshape(-1, 8)
                        for c in zip(*map(perceptual_hashes, pictures), strict=True))  # fmt: skip
    for likeness, found in ((HashLikeness(hashes, 2, mirrored), [-1, 0]), (HashLikeness(hashes, 2), [-1, -1])):
        likeness.add(np.array([0]))
        assert likeness.known(np.array([1, 2])).tolist() == found
        assert likeness.among(np.array([0, 1, 2]))[2].tolist() == [found[1] == 0, False, True]


def test_embeddings_are_near_from_a_cosine_on_whatever_their_lengths():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, 8))[rng.integers(5, size=80)] + 0.6 * rng.normal(size=(80, 8))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    asked = []

    def embed(rows):
        asked.append(list(rows))
        return vectors[rows] * (1 + rows[:, None])

    likeness, rows, known = EmbeddingLikeness(embed, 0.7), np.arange(30), np.arange(30, 80)
    assert (likeness.known(rows) == -1).all()
    likeness.add(known)
    cosines = units[rows] @ units[known].T
    found = likeness.known(rows)
    assert ((found >= 0) == (cosines.max(1) >= 0.7)).all() and 0 < (found >= 0).sum() < 30
    assert (found[found >= 0] == 30 + cosines.argmax(1)[found >= 0]).all()
    np.testing.assert_array_equal(likeness.among(rows), units[rows] @ units[rows].T >= 0.7)
    likeness.add(rows[::2])
    assert len(asked) == 2  # what was embedded last is not embedded again


@pytest.mark.parametrize("vector", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_embedding_without_direction_is_refused(vector):
    with pytest.raises(ValueError, match="zero or not finite"):
        EmbeddingLikeness(lambda rows: np.array([vector] * len(rows)), 0.5).add(np.arange(2))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("limit", [0, 5, 1000])
def test_first_come_first_served_whatever_is_compared_at_once(chunk, limit):
    hashes, rng = crowd(1), np.random.default_rng(2)
    vectors = rng.normal(size=(300, 4))
    sha256 = [files(250)[number] for number in rng.integers(250, size=300)]
    captions = [f"caption {number}" for number in rng.integers(150, size=300)]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = (distances(hashes, hashes) <= 4) | (units @ units.T >= 0.98)
    order = rng.permutation(300)
    likenesses = [HashLikeness(hashes, 4), EmbeddingLikeness(lambda rows: vectors[rows], 0.98)]
    distinct = Distinct(sha256, likenesses, captions, chunk)
    verdicts = [v for part in (order[:120], order[120:]) for v in distinct.sift(part, limit)]
    first = greedy(near, sha256, captions, order[:120], limit)
    taken = [row for row, reason in first if reason is None]
    # the second part goes on from what the first one admitted
    second = greedy(near, sha256, captions, taken + list(order[120:]), len(taken) + limit)[len(taken) :]
    assert [(v.row, v.reason) for v in verdicts] == first + second
    if limit == 1000:
        assert {v.reason for v in verdicts} == {None, EXACT, NEAR, CAPTION}
    admitted = {v.row for v in verdicts if v.reason is None}
    for row, reason, like in verdicts:
        assert like is None if reason is None else like in admitted
        assert reason != EXACT or sha256[like] == sha256[row]
        assert reason != NEAR or near[row, like]
        assert reason != CAPTION or captions[like] == captions[row]


def test_refused_pictures_refuse_nobody():
    # 0 and 1 are near, 1 and 2 are near, 0 and 2 are not
    hashes = np.packbits(np.array([[0] * 64, [1] * 3 + [0] * 61, [1] * 6 + [0] * 58], np.uint8), axis=1)
    for chunk in (1, 3):
        verdicts = Distinct(files(3), [HashLikeness(hashes, 3)], chunk=chunk).sift(np.arange(3), 3)
        assert [v.reason for v in verdicts] == [None, NEAR, None]


def test_embeddings_are_asked_for_only_of_what_is_no_copy_already():
    hashes, asked = np.zeros((4, 8), np.uint8), []
    hashes[3] = 255

    def embed(rows):
        asked.extend(rows.tolist())
        return np.eye(4)[rows]

    distinct = Distinct(files(4), [HashLikeness(hashes, 3), EmbeddingLikeness(embed, 0.9)], chunk=1)
    assert [v.reason for v in distinct.sift(np.arange(4), 4)] == [None, NEAR, NEAR, None]
    assert sorted(set(asked)) == [0, 3]


def test_thousands_of_the_same_picture_are_no_trouble():
    hashes = np.zeros((20_000, 8), np.uint8)
    reasons = [v.reason for v in Distinct(files(20_000), [HashLikeness(hashes, 6, hashes)]).sift(np.arange(20_000), 9)]
    assert reasons == [None] + [NEAR] * 19_999


def test_copies_in_jpeg_are_near_and_other_clouds_are_not():
    import io

    copies = [Image.open(io.BytesIO(encoded(number, "jpeg", quality=50))) for number in range(40)]
    pictures = [cloud(number) for number in range(80)] + copies
    hashes = np.frombuffer(b"".join(perceptual_hashes(p)[0] for p in pictures), np.uint8).reshape(-1, 8)
    verdicts = list(Distinct(files(120), [HashLikeness(hashes, 6)]).sift(np.arange(120), 120))
    assert [v.reason for v in verdicts] == [None] * 80 + [NEAR] * 40
    assert [v.like for v in verdicts[80:]] == list(range(40))
