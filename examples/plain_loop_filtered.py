"""examples/plain_loop.py with the memorization filter in it: five lines differ.

    python examples/plain_loop_filtered.py PIPELINE_DIR DATA_DIR OUT_DIR
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

from memfilter import MemFilter

pipeline_dir, data_dir, out_dir = sys.argv[1:4]
torch.manual_seed(0)
pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
vae, unet = pipeline.vae.requires_grad_(False), pipeline.unet.train()
side = unet.config.sample_size * pipeline.vae_scale_factor


@torch.no_grad()
def embed(captions):
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids).last_hidden_state


@torch.no_grad()
def encode(paths):
    pictures = [np.array(Image.open(path).convert("RGB").resize((side, side))) for path in paths]
    pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    return vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor


mem_filter = MemFilter(tau=4.0)
unet = mem_filter.wrap(unet, null=embed([""])[0], scheduler=scheduler)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
paths = sorted(Path(data_dir).glob("*.png"))
for epoch in range(2):
    order = torch.randperm(len(paths)).tolist()
    for start in range(0, len(paths), 8):
        batch = [paths[i] for i in order[start : start + 8]]
        latents = encode(batch)
        prompt_embeds = embed([path.with_suffix(".txt").read_text() for path in batch])
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch),))
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        out = unet(noisy_latents, timesteps, prompt_embeds)
        loss = mem_filter.loss(out.sample, noise)
        loss.backward()
        if mem_filter.before_step(optimizer): optimizer.step()  # noqa: E701
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}")

pipeline.save_pretrained(out_dir)
