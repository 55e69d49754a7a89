"""kept_global: the gradients of an optimizer step do not depend on how its samples are split; of the other reductions they
are the mean over the parts. The weights of all ranks stay the same."""

import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, debug_launcher
from torch.nn.parallel import DistributedDataParallel

from memfilter import MemFilter

BATCH = 8
# of the norms of the samples below: all kept; some; only one rank's and only one micro-batch's; none
KEEPS = ("all", "some", "one side", "none")


def thresholds(make_unet, make_batch) -> dict[str, float]:
    mem_filter, (latents, timesteps, embeds, _) = MemFilter(math.inf), make_batch(7, BATCH)
    mem_filter.wrap(make_unet(), null=torch.zeros(5, 16))(latents, timesteps, embeds)
    norms = mem_filter.verdict.text_norm
    left, right = norms[: BATCH // 2].sort().values, norms[BATCH // 2 :].sort().values
    lowest = min(left[0], right[0])
    return {
        "all": 1e6,
        "some": norms.sort().values[BATCH // 2].item(),
        "one side": (lowest + (max(left[0], right[0]) - lowest) / 2).item(),
        "none": lowest.item() / 2,
    }


def gradients(unet, mem_filter, optimizer, parts, backward) -> list[torch.Tensor | None]:
    """Of one optimizer step over these micro-batches, after `before_step`."""
    for latents, timesteps, embeds, target in parts:
        backward(mem_filter.loss(unet(latents, timesteps, embeds).sample, target))
    stepped = mem_filter.before_step(optimizer)
    found = [p.grad for p in unet.parameters()]
    assert stepped == (found[0] is not None)
    return found


def judged(unet, batch, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By hand, in one process: prediction for the whole batch, and which samples are kept."""
    latents, timesteps, embeds, _ = batch
    with torch.no_grad():
        null = unet(latents, timesteps, torch.zeros(len(latents), 5, 16)).sample
    pred = unet(latents, timesteps, embeds).sample
    return pred, (pred.detach() - null).flatten(1).norm(dim=1) < tau


def expected(make_unet, batch, tau: float) -> list[torch.Tensor | None]:
    """By hand: the mean over what is kept of the whole batch, in one process."""
    unet, target = make_unet(), batch[-1]
    pred, keep = judged(unet, batch, tau)
    if not keep.any():
        return [None for _ in unet.parameters()]
    torch.nn.functional.mse_loss(pred[keep], target[keep]).backward()
    return [p.grad for p in unet.parameters()]


def split(batch, size: int):
    return zip(*(tensor.split(size) for tensor in batch), strict=True)


def assert_same(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keeps", KEEPS)
@pytest.mark.parametrize("size", [8, 4, 2])
def test_micro_batches_give_the_gradients_of_one_batch(tiny_unet, tiny_batch, keeps, size):
    tau, batch = thresholds(tiny_unet, tiny_batch)[keeps], tiny_batch(7, BATCH)
    mem_filter = MemFilter(tau, reduction="kept_global")
    unet = mem_filter.wrap(tiny_unet(), null=torch.zeros(5, 16))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    found = gradients(unet, mem_filter, optimizer, split(batch, size), torch.Tensor.backward)
    assert_same(found, expected(tiny_unet, batch, tau))


def test_division_of_the_loss_by_accelerate_is_undone(tiny_unet, tiny_batch):
    tau, batch = thresholds(tiny_unet, tiny_batch)["some"], tiny_batch(7, BATCH)
    accelerator = Accelerator(gradient_accumulation_steps=4)
    mem_filter = MemFilter(tau, reduction="kept_global")
    unet = mem_filter.wrap(tiny_unet(), null=torch.zeros(5, 16))
    unet, optimizer = accelerator.prepare(unet, torch.optim.SGD(unet.parameters(), lr=0.1))
    for latents, timesteps, embeds, target in split(batch, 2):
        with accelerator.accumulate(unet):
            accelerator.backward(mem_filter.loss(unet(latents, timesteps, embeds).sample, target))
            mem_filter.before_step(optimizer)
    assert_same([p.grad for p in unet.parameters()], expected(tiny_unet, batch, tau))


def _rank(make_unet, make_batch, taus: dict[str, float]) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    batch = make_batch(7, BATCH)
    mine = list(split(batch, BATCH // 2))[dist.get_rank()]
    for size in (4, 2):
        for tau in taus.values():
            mem_filter = MemFilter(tau, reduction="kept_global")
            wrapped = mem_filter.wrap(make_unet(), null=torch.zeros(5, 16))
            unet = DistributedDataParallel(wrapped)
            optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
            *first, last = split(mine, size)
            with unet.no_sync():
                for latents, timesteps, embeds, target in first:
                    mem_filter.loss(unet(latents, timesteps, embeds).sample, target).backward()
            found = gradients(unet, mem_filter, optimizer, [last], torch.Tensor.backward)
            assert_same(found, expected(make_unet, batch, tau))
    for reduction in ("kept", "batch"):
        for keeps in ("some", "one side", "none"):
            check_mean_over_parts(make_unet, batch, 2, taus[keeps], reduction, moves=keeps != "none")


def check_mean_over_parts(make_unet, batch, size: int, tau: float, reduction: str, moves: bool) -> None:
    """One step of two ranks; every part is a micro-batch of one of them, and its loss is divided by their number."""
    parts = list(split(list(split(batch, BATCH // 2))[dist.get_rank()], size))
    mem_filter = MemFilter(tau, reduction=reduction)
    unet = DistributedDataParallel(mem_filter.wrap(make_unet(), null=torch.zeros(5, 16)))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    with unet.no_sync():
        for latents, timesteps, embeds, target in parts[:-1]:
            (mem_filter.loss(unet(latents, timesteps, embeds).sample, target) / len(parts)).backward()
    found = gradients(unet, mem_filter, optimizer, parts[-1:], lambda loss: (loss / len(parts)).backward())
    assert_same(found, expected_mean(make_unet, batch, size, tau, reduction))

    optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in unet.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both)
    before = torch.cat([p.detach().flatten() for p in make_unet().parameters()])
    assert torch.equal(weights, before) != moves


def expected_mean(make_unet, batch, size: int, tau: float, reduction: str) -> list[torch.Tensor | None]:
    """By hand, in one process: the mean over all parts of each part's own masked mean, 0 where it keeps nothing."""
    unet, target = make_unet(), batch[-1]
    pred, keep = judged(unet, batch, tau)
    if not keep.any():
        return [None for _ in unet.parameters()]
    errors, total = (pred - target).square().flatten(1).mean(1), 0.0
    for part, kept in zip(errors.split(size), keep.split(size), strict=True):
        if kept.any():
            total = total + part[kept].sum() / (kept.sum() if reduction == "kept" else size)
    (total / (BATCH // size)).backward()
    return [p.grad for p in unet.parameters()]


def test_two_ranks_give_the_gradients_of_one_process_and_stay_the_same(tiny_unet, tiny_batch):
    debug_launcher(_rank, args=(tiny_unet, tiny_batch, thresholds(tiny_unet, tiny_batch)), num_processes=2)


def _sharded_rank(make_unet, make_batch, taus: dict[str, float]) -> None:
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def sharded(tau: float):
        mem_filter = MemFilter(tau, reduction="kept_global")
        unet = mem_filter.wrap(make_unet(), null=torch.zeros(5, 16))
        for block in (*unet.unet.down_blocks, *unet.unet.up_blocks, unet):
            fully_shard(block, mesh=mesh)
        assert all(isinstance(p, dist.tensor.DTensor) for p in unet.parameters())
        return unet, mem_filter, torch.optim.SGD(unet.parameters(), lr=0.1)

    def mine(batch):
        return [part[dist.get_rank() * BATCH // 2 :][: BATCH // 2] for part in batch]

    for tau in taus.values():
        batch = make_batch(7, BATCH)
        found = gradients(*sharded(tau), [mine(batch)], torch.Tensor.backward)
        whole = [None if gradient is None else gradient.full_tensor() for gradient in found]
        assert_same(whole, expected(make_unet, batch, tau))

    unet, mem_filter, optimizer = sharded(taus["one side"])
    kept = train(unet, mem_filter, optimizer, lambda seed: mine(make_batch(seed, BATCH)))
    one_filter = MemFilter(taus["one side"], reduction="kept_global")
    one = one_filter.wrap(make_unet(), null=torch.zeros(5, 16))
    wanted = train(one, one_filter, torch.optim.SGD(one.parameters(), lr=0.1), lambda seed: make_batch(seed, BATCH))
    assert torch.equal(kept, wanted.chunk(2, dim=1)[dist.get_rank()])
    halves = wanted.unflatten(1, (2, -1)).any(2)  # [steps, ranks]
    assert not halves.any(1).all() and (halves[:, 0] != halves[:, 1]).any()
    for sharded_weight, weight in zip(unet.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(sharded_weight.full_tensor(), weight, rtol=0, atol=1e-6)


def train(unet, mem_filter, optimizer, batch_of, steps: int = 30) -> torch.Tensor:
    """What was kept, bool [steps, samples]."""
    kept = []
    for seed in range(steps):
        gradients(unet, mem_filter, optimizer, [batch_of(seed)], torch.Tensor.backward)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept.append(mem_filter.verdict.keep)
    return torch.stack(kept)


def test_two_ranks_with_sharded_weights_give_the_gradients_of_one_process(tiny_unet, tiny_batch):
    debug_launcher(_sharded_rank, args=(tiny_unet, tiny_batch, thresholds(tiny_unet, tiny_batch)), num_processes=2)
