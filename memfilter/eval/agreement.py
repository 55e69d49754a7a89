"""Agreement of picture and caption on clipart scenes, by a small scorer of the project. It is not a CLIP score.

    python -m memfilter.eval.agreement --out memfilter/assets/scenes-scorer

A classifier of a scene's object and background colours, trained on a stream of scenes of its own, with blur, noise and
changes of brightness, so that it reads the pictures of a diffusion model.
"""

from __future__ import annotations

import argparse
import json
import logging
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from memfilter.data import scenes

SEED = 20261122
log = logging.getLogger(__name__)


class SceneScorer(nn.Module):
    """[B, 3, 32, 32] in [0, 1] -> logits of the object [B, 150] and of every background colour [B, 10]."""

    def __init__(self, width: int = 48):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((width, 1), (width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 1), (4 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.object = nn.Linear(2 * channels, len(scenes.objects()))
        self.colours = nn.Linear(2 * channels, len(scenes.COLOURS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pooled(pixels)
        return self.object(pooled), self.colours(pooled)

    def pooled(self, pixels: Tensor) -> Tensor:
        """[B, 3, 32, 32] in [0, 1] -> what the classifiers see, [B, 2 C]."""
        maps = self.features(pixels)  # [B, C, 4, 4]
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)


@lru_cache
def load_scorer() -> SceneScorer:
    """The scorer that comes with the package."""
    model = SceneScorer()
    path = files("memfilter") / "assets" / "scenes-scorer" / "model.safetensors"
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(str(path)).items()})
    return model.eval()


@torch.no_grad()
def agreement(pictures: np.ndarray, wanted: list[scenes.Scene], scorer: SceneScorer | None = None) -> np.ndarray:
    """Probability that a picture shows the object and exactly the background colours of its caption.

    Args:
        pictures: uint8 [N, 32, 32, 3].
        wanted: the scene whose caption was asked for, one for each picture.

    Returns:
        float [N] in [0, 1].
    """
    scorer = scorer or load_scorer()
    labels, colours = targets(wanted)
    found = []
    for start in range(0, len(pictures), 500):
        rows = slice(start, start + 500)
        object_logits, colour_logits = scorer(_as_input(pictures[rows]))
        p_object = object_logits.softmax(1).gather(1, labels[rows, None])[:, 0]
        p_colours = F.binary_cross_entropy_with_logits(colour_logits, colours[rows], reduction="none").neg().sum(1).exp()
        found.append(p_object * p_colours)
    return torch.cat(found).numpy()


@torch.no_grad()
def scorer_features(pictures: np.ndarray) -> np.ndarray:
    """The scorer's pooled features: uint8 [N, 32, 32, 3] -> float32 [N, 384]."""
    return load_scorer().pooled(_as_input(pictures)).numpy()


def targets(wanted: list[scenes.Scene]) -> tuple[Tensor, Tensor]:
    """Index of the object [N], and which colours the background has, float [N, 10]."""
    names, palette = list(scenes.objects()), list(scenes.COLOURS)
    labels = torch.tensor([names.index(scene.object) for scene in wanted])
    colours = torch.tensor([[float(colour in scene.colours) for colour in palette] for scene in wanted])
    return labels, colours


def _as_input(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def _augment(pixels: Tensor) -> Tensor:
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = torch.lerp(pixels, blurred, torch.rand(count, 1, 1, 1))
    pixels = pixels * torch.empty(count, 1, 1, 1).uniform_(0.9, 1.1) + torch.empty(count, 3, 1, 1).uniform_(-0.06, 0.06)
    return pixels + torch.randn_like(pixels) * torch.empty(count, 1, 1, 1).uniform_(0, 0.08)


def train_scorer(count: int = 40_000, steps: int = 2500, batch_size: int = 96) -> tuple[SceneScorer, dict]:
    """A new scorer and its accuracy on scenes that it has not seen."""
    torch.manual_seed(SEED)
    drawn = [scenes.draw(SEED, scenes.SCORER, i) for i in range(count)]
    pictures, (labels, colours) = scenes.pixels(drawn), targets(drawn)
    model = SceneScorer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(count, (batch_size,))
        object_logits, colour_logits = model(_augment(_as_input(pictures[rows.numpy()])))
        loss = F.cross_entropy(object_logits, labels[rows], label_smoothing=0.05)
        loss = loss + F.binary_cross_entropy_with_logits(colour_logits, colours[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0:
            log.info("scorer step %d loss %.3f", step, loss.item())
    model.eval()
    unseen = [scenes.draw(SEED, scenes.SCORER_VALIDATION, i) for i in range(2000)]
    labels, colours = targets(unseen)
    with torch.no_grad():
        object_logits, colour_logits = model(_as_input(scenes.pixels(unseen)))
    figures = {
        "object_accuracy": (object_logits.argmax(1) == labels).float().mean().item(),
        "background_accuracy": ((colour_logits > 0) == colours.bool()).all(1).float().mean().item(),
        "mean_agreement": float(agreement(scenes.pixels(unseen), unseen, model).mean()),
        "mean_agreement_with_another_caption": float(
            agreement(scenes.pixels(unseen), unseen[1:] + unseen[:1], model).mean()
        ),
    }
    return model, figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for model.safetensors and figures.json")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model, figures = train_scorer()
    args.out.mkdir(parents=True, exist_ok=True)
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(halves, args.out / "model.safetensors")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
