"""What tells models apart."""

import torch

from memfilter.pipelines import add_lora, weights_digest


def test_digest_is_that_of_the_weights_in_whatever_precision_and_before_adapters_do_anything(tiny_unet):
    unet = tiny_unet(0)
    digest = weights_digest(unet)
    assert digest == weights_digest(tiny_unet(0)) and digest != weights_digest(tiny_unet(1))
    assert digest == weights_digest(tiny_unet(0).to(torch.bfloat16))
    adapted = tiny_unet(0)
    add_lora(adapted, 2, 2.0, ["to_q", "to_v"], torch.float32, seed=0)
    assert weights_digest(adapted) == digest
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).fill_(0.1)
    assert weights_digest(adapted) != digest
    assert weights_digest(unet, None, unet) not in (digest, weights_digest(unet, adapted))


def test_digest_tells_how_strong_adapters_are_set_and_nothing_of_compiling(tiny_unet):
    unet = tiny_unet(0)
    plain = weights_digest(unet)
    assert weights_digest(torch.compile(unet, backend="eager")) == plain
    add_lora(unet, 2, 4.0, ["to_q", "to_v"], torch.float32, seed=0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    whole = weights_digest(unet)
    assert weights_digest(torch.compile(unet, backend="eager")) == whole != plain
    unet.set_adapters("default", 0.5)
    assert weights_digest(unet) not in (whole, plain)
    unet.set_adapters("default", 1.0)
    assert weights_digest(unet) == whole
    other = tiny_unet(0)
    add_lora(other, 2, 2.0, ["to_q", "to_v"], torch.float32, seed=0)  # another alpha
    other.load_state_dict(unet.state_dict())
    assert weights_digest(other) != whole
    unet.disable_adapters()
    assert weights_digest(unet) == plain
