"""Every family of models: what is kept, and what the exported model does in the stock pipeline."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from memfilter.config import Config, DataConfig, FilterConfig, LogConfig, ModelConfig, TrainConfig
from memfilter.train.loop import Trainer

STEPS, BATCH = 20, 4
CASES = [
    ("sd1", "epsilon", None),
    ("sd1", "sample", None),
    ("sd2", "v_prediction", None),
    ("sd2", "epsilon", None),
    ("sdxl", "epsilon", None),
    ("sdxl", "v_prediction", None),
    ("sdxl", "epsilon", 4),
    ("sd1", "v_prediction", 4),
]
# between the norms of random tiny models, so that some samples are kept and some are not
TAU = {"epsilon": 0.9, "sample": 1.0, "v_prediction": 0.4}
PROMPTS = ["a ladybug on a blue background", "a cat"]


@pytest.mark.parametrize(("family", "prediction_type", "lora_rank"), CASES)
def test_family_is_filtered_by_the_norm_in_noise_space_and_exported_for_the_stock_pipeline(
    tmp_path, scenes_dir, family, prediction_type, lora_rank
):
    base = tiny.save_pipeline(tmp_path / "base", family, prediction_type)
    trainer = Trainer(
        Config(
            run_dir=str(tmp_path / "run"),
            model=ModelConfig(path=str(base), lora_rank=lora_rank),
            data=DataConfig(path=str(scenes_dir), caption_dropout=0.0),
            filter=FilterConfig(tau=TAU[prediction_type]),
            train=TrainConfig(samples=STEPS * BATCH, batch_size=BATCH, learning_rate=1e-3, ema_half_life=20),
            log=LogConfig(every=STEPS * BATCH),
        )
    )
    passes, timesteps = [], []

    def record(module, args, kwargs, output):
        if module.training:
            passes.append((output[0].detach().double().numpy(), kwargs["encoder_hidden_states"].detach()))
            timesteps.append(args[1].numpy())

    hook = trainer.pipeline.unet.register_forward_hook(record, with_kwargs=True)
    trainer.run(progress=False)
    hook.remove()

    # the null pass comes first; its prompt is what the pipeline guides away from
    null, cond = passes[0::2], passes[1::2]
    stock = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    embeds = stock.encode_prompt([""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)[1]
    assert all(torch.allclose(prompt, embeds.expand_as(prompt), atol=1e-6) for _, prompt in null)

    # kept sets, by hand: the paper's norm with the conversion of design's formulas
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    abar = alphas_cumprod[np.concatenate(timesteps[0::2])]
    factor = {
        "epsilon": np.ones_like(abar),
        "v_prediction": np.sqrt(abar),
        "sample": np.sqrt(abar / (1 - abar)),
    }[prediction_type]
    difference = np.concatenate([c - n for (c, _), (n, _) in zip(cond, null, strict=True)])
    norm = factor * np.sqrt((difference**2).sum((1, 2, 3)))
    audit = pq.read_table(tmp_path / "run" / "audit.parquet").to_pydict()
    assert len(norm) == STEPS * BATCH
    np.testing.assert_allclose(audit["text_norm"], norm, rtol=1e-4)
    assert audit["keep"] == (norm < TAU[prediction_type]).tolist()
    assert 0 < sum(audit["keep"]) < len(norm)

    # same picture from the trained object and from what was exported
    if lora_rank is None:
        reloaded = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", use_safetensors=True)
    else:
        reloaded = stock
        reloaded.load_lora_weights(tmp_path / "run" / "lora")
    assert type(reloaded) is type(trainer.pipeline)
    np.testing.assert_allclose(picture(reloaded), picture(trainer.pipeline), atol=1e-5)
    untrained = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    assert np.abs(picture(reloaded) - picture(untrained)).max() > 1e-3


def picture(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipeline(
        PROMPTS, generator=generator, num_inference_steps=4, height=16, width=16, output_type="np"
    ).images
