"""Frozen encoders with a memory: a picture or caption that was seen before is not encoded again."""

from __future__ import annotations

import torch
from torch import Tensor


class Encoder:
    """Pictures to latents, captions to embeddings.

    Args:
        vae: a diffusers AutoencoderKL.
        text_encoder, tokenizer: of CLIP's kind.
        device: where encoding happens and results live.
        memory: at most so many pictures and so many captions are remembered; later ones are encoded each time.
    """

    def __init__(self, vae, text_encoder, tokenizer, device, memory: int = 10_000):
        self.vae = vae.requires_grad_(False).eval().to(device)
        self.text_encoder = text_encoder.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.memory = memory
        self._posteriors: dict[str, Tensor] = {}  # key -> [2, C, H, W], mean and standard deviation
        self._prompts: dict[str, Tensor] = {}  # caption -> [L, D]

    @torch.no_grad()
    def latents(
        self, keys: list[str], pixels: Tensor, draw: Tensor | None = None, remember: list[bool] | None = None
    ) -> Tensor:
        """Scaled latents, [B, 3, H, W] -> [B, C, h, w].

        Args:
            keys: names under which the posteriors are remembered.
            draw: standard normal [B, C, h, w] with which the posterior is sampled; None for its mean.
            remember: which samples are worth a place in memory, because they come again; None for all.
        """

        def encode(rows: list[int]) -> Tensor:
            posterior = self.vae.encode(pixels[rows].to(self.device, self.vae.dtype)).latent_dist
            return torch.stack([posterior.mean, posterior.std], 1).float()  # [b, 2, C, h, w]

        mean, std = self._remembered(self._posteriors, keys, encode, remember).unbind(1)
        sample = mean if draw is None else mean + std * draw.to(self.device)
        return sample * self.vae.config.scaling_factor

    @torch.no_grad()
    def prompts(self, captions: list[str], remember: list[bool] | None = None) -> Tensor:
        """Embeddings of captions, [B, L, D]; what is longer than the text encoder takes is cut.

        Args:
            remember: as for `latents`.
        """

        def encode(rows: list[int]) -> Tensor:
            tokens = self.tokenizer(
                [captions[row] for row in rows], padding="max_length", truncation=True, return_tensors="pt"
            )
            return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.float()

        return self._remembered(self._prompts, captions, encode, remember)

    def _remembered(self, memory: dict[str, Tensor], names: list[str], encode, remember: list[bool] | None) -> Tensor:
        found = {name: memory[name] for name in names if name in memory}
        rows = {name: row for row, name in enumerate(names) if name not in found}  # one row for every new name
        if rows:
            found |= zip(rows, encode(list(rows.values())), strict=True)
            for name, row in rows.items():
                if len(memory) < self.memory and (remember is None or remember[row]):
                    memory[name] = found[name].clone()  # a view would hold its whole batch
        return torch.stack([found[name] for name in names])
