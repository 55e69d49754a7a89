"""CLIP score: how well pictures fit their captions, by a CLIP of transformers (Hessel et al., EMNLP 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from memfilter.pipelines import is_hub_id


class Clip:
    """A CLIP with its tokenizer and its preprocessing.

    Args:
        source: directory with weights in safetensors, or hub id.
        device: where it runs.

    Raises:
        ValueError: it cannot be loaded, or is no CLIP.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        where = {"local_files_only": not is_on_hub(source)}
        try:
            if (kind := AutoConfig.from_pretrained(source, **where).model_type) != "clip":
                raise ValueError(f"it is a {kind}")
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **where)
            self.tokenizer = AutoTokenizer.from_pretrained(source, **where)
            self.processor = AutoImageProcessor.from_pretrained(source, backend="pil", **where)
        except Exception as error:  # noqa: BLE001  transformers, safetensors and the hub each have their own
            raise ValueError(f"clip: {source} cannot be loaded as a CLIP: {' '.join(str(error).split())}") from error
        self.model.to(device).eval()
        self.device, self.source = torch.device(device), source

    @torch.no_grad()
    def image_features(self, pictures: np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Projected, not normalised: uint8 [N, H, W, 3] -> float32 [N, D]."""

        def features(batch: np.ndarray) -> Tensor:
            shown = self.processor([Image.fromarray(picture) for picture in batch], return_tensors="pt")
            found = self.model.vision_model(shown["pixel_values"].to(self.device))
            return self.model.visual_projection(found.pooler_output)

        return _in_batches(features, pictures, batch_size)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Projected, not normalised: N texts, cut where the model ends -> float32 [N, D]."""

        def features(batch: Sequence[str]) -> Tensor:
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(list(batch), padding=True, truncation=True, max_length=length, return_tensors="pt")
            found = self.model.text_model(tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device))
            return self.model.text_projection(found.pooler_output)

        return _in_batches(features, texts, batch_size)

    def score(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 max(cos, 0) of each picture with its text: uint8 [N, H, W, 3], N texts -> float32 [N] in [0, 100]."""
        images, captions = (torch.from_numpy(x) for x in (self.image_features(pictures), self.text_features(texts)))
        return 100 * F.cosine_similarity(images, captions).clamp(min=0).numpy()


def is_on_hub(source: str) -> bool:
    """Whether a CLIP is named by a hub id; ValueError where it is no directory either."""
    if not (hub := is_hub_id(source)) and not Path(source).is_dir():
        raise ValueError(f"clip: {source} is no directory, nor does it look like a hub id")
    return hub


def _in_batches(features, rows, batch_size: int) -> np.ndarray:
    return torch.cat([features(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]).cpu().numpy()
