import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from memfilter import MemFilter
from memfilter.agc import LossRule
from memfilter.keys import Step
from memfilter.reference import SIGNALS

NULL = torch.zeros(5, 16)


def test_loss_is_the_mean_over_those_whose_own_loss_reaches_the_running_mean(tiny_unet, tiny_batch):
    rule = LossRule(ratio=1.1, decay=0.6)
    mem_filter = MemFilter(evidence=rule)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    means, dropped = dict.fromkeys((5, 700, 9), 0.0), 0
    for i in range(6):
        x, _, e, target = tiny_batch(i, 8)
        timesteps = [5, 5, 5, 700, 700, 9, 5, 700]
        excluded = [j == 4 for j in range(8)]
        mem_filter.batch(keys=[f"{8 * i + j}" for j in range(8)], excluded=excluded, duplicate=[j < 4 for j in range(8)])
        out = unet(x, torch.tensor(timesteps), e)
        loss = mem_filter.loss(out.sample, target)
        losses = ((out.sample - target).detach().double() ** 2).flatten(1).mean(1).numpy()
        keep = [not bad and 1.1 * own >= means[t]
                for t, own, bad in zip(timesteps, losses, excluded, strict=True)]  # fmt: skip
        assert mem_filter.verdict.keep.tolist() == keep
        assert loss.item() == pytest.approx(losses[keep].mean(), rel=1e-5)
        assert mem_filter.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        for t, own, bad in zip(timesteps, losses, excluded, strict=True):  # after the step, kept or not
            if not bad:
                means[t] = 0.6 * means[t] + 0.4 * own
        dropped += sum(not kept and not bad for kept, bad in zip(keep, excluded, strict=True))
    assert 0 < dropped < 36
    found = {t: rule.means[t].item() for t in rule.means.nonzero().flatten().tolist()}
    assert found == pytest.approx(means, rel=1e-5)
    metrics = mem_filter.metrics()
    assert metrics["filter/dropped"] == dropped and metrics["filter/excluded"] == 6
    assert "filter/pass_share" not in metrics  # no pass was made


def test_forward_without_a_loss_keeps_all_and_leaves_the_means_alone(tiny_unet, tiny_batch):
    rule = LossRule()
    mem_filter = MemFilter(evidence=rule)
    unet = mem_filter.wrap(tiny_unet(), null=NULL)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    x, t, e, target = tiny_batch()
    mem_filter.batch(keys="abcd")
    mse_loss(unet(x, t, e).sample, target).backward()
    assert mem_filter.before_step(optimizer)
    assert not rule.means.any() and mem_filter.verdict.keep.all()
    assert mem_filter.metrics()["filter/dropped"] == 0


def test_state_goes_on_where_it_was():
    def step(seed: int) -> Step:
        draw = torch.Generator().manual_seed(seed)
        signals = torch.rand(6, len(SIGNALS), generator=draw)
        timesteps = torch.randint(4, (6,), generator=draw)
        return Step(torch.zeros(6, dtype=torch.long), timesteps, signals, torch.zeros(6, dtype=torch.bool))

    whole, first, second = LossRule(), LossRule(), LossRule()
    for i in range(4):
        whole.update(step(i), 6)
    for i in range(2):
        first.update(step(i), 6)
    second.load_state_dict(first.state_dict())
    for i in (2, 3):
        second.update(step(i), 6)
    np.testing.assert_array_equal(second.means, whole.means)
    assert second.clock == whole.clock == 24 and (whole.means > 0).sum() == 4


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ratio": 0}, "filter.loss_ratio must be above 0, found 0"),
        ({"decay": 1}, "filter.loss_decay must be at least 0 and below 1, found 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        LossRule(**settings)
