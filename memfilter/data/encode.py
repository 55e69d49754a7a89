"""Frozen encoders with a memory: a picture or caption that was seen before is not encoded again."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor


class Encoder:
    """Pictures to latents, captions to what the denoiser takes.

    Captions go through the pipeline's own ``encode_prompt``, so that training sees what generation will; the empty
    prompt is what the pipeline guides away from: for SDXL, where its configuration says so, all zeros.

    The last bits of an encoding depend on how many are made at once, so it is always ``rows``, filled up where fewer are
    new: an encoding does not depend on what was seen before, and a run that goes on from a checkpoint makes the same.

    Args:
        pipeline: a StableDiffusionPipeline or StableDiffusionXLPipeline. Its VAE and text encoders are frozen.
        device: where encoding happens and results live.
        memory: bytes of encodings that are remembered; what does not fit is encoded each time.
        rows: so many are encoded at once.
        cache: a `memfilter.data.cache.Cache`; what it holds is read and not encoded.
    """

    def __init__(self, pipeline, device, memory: int = 1 << 30, rows: int = 8, cache=None):
        self.pipeline, self.vae, self.device = pipeline, pipeline.vae, device
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if (part := getattr(pipeline, name, None)) is not None:
                part.requires_grad_(False).eval().to(device)
        self._free, self._rows = memory, rows
        pictures, prompts = (cache.pictures, cache.prompts) if cache else ({}, {})
        # what is remembered goes before what is in the cache: view -> posterior [2, C, H, W], time_ids [6]
        self._pictures: MutableMapping[tuple, tuple[Tensor, ...]] = ChainMap({}, pictures)
        self._prompts: MutableMapping[str, tuple[Tensor, ...]] = ChainMap({}, prompts)  # caption -> [L, D], [P] of SDXL
        null = self._encode([""], empty=True)
        self._prompts[""] = tuple(part[0] for part in null)

    @property
    def remembered(self):
        """Views of pictures that need not be decoded again."""
        return self._pictures.keys()

    @property
    def null(self) -> dict:
        """Keyword arguments of the denoiser for the empty prompt, for one sample."""
        return self._named(tuple(part[None] for part in self._prompts[""]))

    @torch.no_grad()
    def pictures(self, batch: dict, draw: Tensor, remember: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Scaled latents [B, C, h, w] and SDXL's time_ids [B, 6] (original size, crop's top left, target size).

        Args:
            batch: lists view, pixels, original_size and crop_top_left, see `SampleDataset`.
            draw: standard normal [B, C, h, w] with which the VAE's posterior is sampled.
            remember: which samples are worth a place in memory, because they come again; None for all.
        """
        posteriors, time_ids = self.posteriors(batch, remember)
        mean, std = posteriors.unbind(1)
        return (mean + std * draw.to(self.device, non_blocking=True)) * self.vae.config.scaling_factor, time_ids

    @torch.no_grad()
    def posteriors(self, batch: dict, remember: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's posterior, not scaled [B, 2, C, h, w], and time_ids [B, 6]; arguments
        as for `pictures`."""

        def encode(rows: list[int]) -> tuple[Tensor, ...]:
            pixels = torch.stack([batch["pixels"][row] for row in rows])
            pixels = pixels.to(self.device, self.vae.dtype, non_blocking=True)
            posterior = self.vae.encode(pixels).latent_dist
            facts = [(*batch["original_size"][r], *batch["crop_top_left"][r], *pixels.shape[-2:]) for r in rows]
            time_ids = torch.tensor(facts, dtype=torch.float32).to(self.device, non_blocking=True)
            return torch.stack([posterior.mean, posterior.std], 1).float(), time_ids  # [b, 2, C, h, w], [b, 6]

        return self._look_up(self._pictures, batch["view"], encode, remember)

    @torch.no_grad()
    def prompts(
        self, captions: Sequence[str], remember: Sequence[bool] | None = None, time_ids: Tensor | None = None
    ) -> dict:
        """Keyword arguments of the denoiser: ``encoder_hidden_states`` [B, L, D] and, for SDXL, ``added_cond_kwargs``.

        What is longer than the text encoder takes is cut; an empty caption is the empty prompt.

        Args:
            remember: as for `pictures`.
            time_ids: [B, 6] of `pictures`.
        """
        return self._named(self.embeddings(captions, remember), time_ids)

    def embeddings(self, captions: Sequence[str], remember: Sequence[bool] | None = None) -> tuple[Tensor, ...]:
        """[B, L, D] and, for SDXL, the pooled ones [B, P]; arguments as for `prompts`."""

        def encode(rows: list[int]) -> tuple[Tensor, ...]:
            return self._encode([captions[row] for row in rows])

        return self._look_up(self._prompts, captions, encode, remember)

    def _encode(self, captions: list[str], empty: bool = False) -> tuple[Tensor, ...]:
        with torch.no_grad():
            encoded = self.pipeline.encode_prompt(
                captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=empty
            )
        positive, negative = encoded[0::2], encoded[1::2]  # SDXL: embeddings, then pooled ones
        return tuple(part.float() for part in (negative if empty else positive))

    def _named(self, encoded: tuple[Tensor, ...], time_ids: Tensor | None = None) -> dict:
        if len(encoded) == 1:
            return {"encoder_hidden_states": encoded[0]}
        added = {"text_embeds": encoded[1]} | ({} if time_ids is None else {"time_ids": time_ids})
        return {"encoder_hidden_states": encoded[0], "added_cond_kwargs": added}

    def _look_up(
        self, memory: MutableMapping, names: Sequence, encode: Callable, remember: Sequence[bool] | None
    ) -> tuple[Tensor, ...]:
        known = [name for name in dict.fromkeys(names) if name in memory]
        found = {name: tuple(part.to(self.device, non_blocking=True) for part in memory[name]) for name in known}
        rows = {name: row for row, name in enumerate(names) if name not in found}  # one row for every new name
        new = list(rows)
        for chunk in (new[start : start + self._rows] for start in range(0, len(new), self._rows)):
            filled = chunk + chunk[-1:] * (self._rows - len(chunk))
            for name, *parts in zip(chunk, *encode([rows[name] for name in filled]), strict=False):
                found[name] = tuple(parts)
                size = sum(part.numel() * part.element_size() for part in parts)
                if size <= self._free and (remember is None or remember[rows[name]]):
                    memory[name] = tuple(part.clone() for part in parts)  # a view would hold its whole batch
                    self._free -= size
        return tuple(torch.stack(parts) for parts in zip(*(found[name] for name in names), strict=True))
