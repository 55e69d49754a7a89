import math
from types import SimpleNamespace

import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import nn

from memfilter.preflight import UnsuitableModel, validate

PAPER = (4, 64, 64)
CLEAN = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Dropout(0.0))


def reasons(*args, **settings) -> list[str]:
    with pytest.raises(UnsuitableModel) as caught:
        validate(*args, **settings)
    return str(caught.value).splitlines()


def test_every_reason_is_named_at_once():
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5), nn.BatchNorm2d(4))
    unet = nn.ModuleDict({"down": nn.ModuleDict({"block": inner}), "late": nn.AlphaDropout(0.1), "fine": CLEAN})
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Embedding(2, 2)
    scheduler = DDPMScheduler(prediction_type="velocity")
    dropout, norm, encoder, kind = reasons(unet, scheduler=scheduler, text_encoders=(frozen, None, trained))
    assert "down.block.1, late of the denoiser" in dropout
    assert "down.block.2 of the denoiser are BatchNorm" in norm
    assert "Embedding is trained" in encoder
    assert "'velocity'" in kind and "epsilon, v_prediction, sample" in kind


def test_many_layers_are_named_in_part():
    (reason,) = reasons(nn.Sequential(*(nn.Dropout(0.1) for _ in range(5))))
    assert reason.startswith("0, 1, 2 and 2 more of the denoiser")


def test_dropout_of_diffusers_is_refused_where_it_drops(tiny_unet):
    (reason,) = reasons(tiny_unet(dropout=0.1))
    assert "down_blocks.0.resnets.0.dropout" in reason
    unet = tiny_unet(dropout=0.0)
    assert any(isinstance(m, nn.Dropout) for m in unet.modules())
    assert validate(unet, scheduler=DDPMScheduler(), text_encoders=(None,), latent_shape=PAPER, tau=4.0) == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_of_lora_is_refused_where_it_drops(tiny_unet, dropout):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=dropout))
    if dropout:
        assert "lora_dropout" in reasons(unet)[0]
    else:
        assert validate(unet) == []


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norm_of_every_kind_is_refused(kind):
    assert "BatchNorm" in reasons(nn.Sequential(kind(4)))[0]


def test_one_trained_weight_of_a_text_encoder_is_enough():
    encoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    assert validate(CLEAN, text_encoders=(encoder,)) == []
    encoder[1].bias.requires_grad_()
    assert "Sequential is trained" in reasons(CLEAN, text_encoders=(None, encoder))[0]


def test_variance_that_is_learned_along_is_a_reason(tiny_unet):
    unet = tiny_unet()
    assert validate(unet) == []
    unet.register_to_config(out_channels=2 * unet.config.in_channels)
    with pytest.raises(UnsuitableModel, match="the denoiser has 8 output channels for 4"):
        validate(unet)


def test_scheduler_without_alphas_or_prediction_type_is_refused():
    (reason,) = reasons(CLEAN, scheduler=SimpleNamespace(config={"prediction_type": "epsilon"}))
    assert reason == "SimpleNamespace has no alphas_cumprod: pass the DDPMScheduler of training"
    assert "prediction_type is None" in reasons(CLEAN, scheduler=FlowMatchEulerDiscreteScheduler())[0]


@pytest.mark.parametrize("shape", [(4, 96, 96), (4, 32, 32), (16, 64, 64)])
def test_l2_tau_on_other_latents_than_the_papers_gives_a_hint(shape):
    (hint,) = validate(CLEAN, latent_shape=shape, tau=4.0)
    assert "tau=4 " in hint and "x".join(map(str, shape)) in hint and "4x64x64" in hint and "filter.unit=rms" in hint


@pytest.mark.parametrize(
    "settings",
    [{"latent_shape": PAPER}, {"unit": "rms"}, {"tau": math.inf}, {"tau": None}, {"latent_shape": None}],
    ids=["paper", "rms", "inf", "off", "unknown"],
)
def test_there_is_no_hint_where_tau_means_what_the_paper_says(settings):
    assert validate(CLEAN, **{"latent_shape": (4, 96, 96), "tau": 4.0} | settings) == []


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_timestep_without_signal_gives_a_hint_that_names_it(kind):
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=kind)
    (hint,) = validate(CLEAN, scheduler=scheduler)
    assert hint.startswith("timesteps 999 have no signal") and kind in hint
    assert validate(CLEAN, scheduler=DDPMScheduler(prediction_type=kind)) == []


def test_noise_prediction_without_signal_is_refused():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon")
    (reason,) = reasons(CLEAN, scheduler=scheduler)
    assert "zero terminal SNR" in reason and "v_prediction" in reason


def test_dropout_inside_attention_is_a_reason_too():
    attention = nn.MultiheadAttention(8, 2, dropout=0.1)
    with pytest.raises(UnsuitableModel, match="drop activations"):
        validate(nn.Sequential(attention))
    validate(nn.Sequential(nn.MultiheadAttention(8, 2)))
