"""The loss rule of IET-AGC (Liu et al., ECCV 2024): what has a small loss for its timestep is thought to be memorized."""

from __future__ import annotations

import torch
from torch import Tensor

from memfilter.keys import KeyTable, Step
from memfilter.reference import SIGNALS


class LossRule(KeyTable):
    """Keeps a sample whose loss, times ``ratio``, reaches the running mean of the loss at its timestep.

    There is no null pass and nothing is remembered of a sample. The means are updated once a step with the losses of all
    samples, kept or not, one after the other in the order of the stream. As in the official code they begin at 0, so that little
    is dropped at a timestep before it has come some ten times.

    Args:
        ratio: mem_ratio of the official code.
        decay: share of the mean that is left after one more loss.
        num_train_timesteps: T.
    """

    makes_passes = False
    judges_loss = True

    def __init__(self, ratio: float = 1.25, decay: float = 0.8, num_train_timesteps: int = 1000):
        super().__init__(table_size=1)
        if not ratio > 0:
            raise ValueError(f"filter.loss_ratio must be above 0, found {ratio}")
        if not 0 <= decay < 1:
            raise ValueError(f"filter.loss_decay must be at least 0 and below 1, found {decay}")
        self.ratio, self.decay = ratio, decay
        self.means = torch.zeros(num_train_timesteps)

    def decide(self, slots: Tensor):
        decisions = super().decide(slots)
        return decisions._replace(look=torch.zeros_like(decisions.look))

    def keeps(self, timesteps: Tensor, loss: Tensor) -> Tensor:
        """[B] and [B] on any device -> bool [B], from the means before this step."""
        means = self.means.to(loss.device, non_blocking=True)[timesteps.long()]
        return loss * self.ratio >= means

    def update(self, step: Step, gone_by: int) -> tuple[Tensor, Tensor]:
        losses = step.signals[:, SIGNALS.index("loss")]
        for timestep, loss in zip(step.timesteps.tolist(), losses, strict=True):
            if not loss.isnan():
                self.means[timestep] = self.decay * self.means[timestep] + (1 - self.decay) * loss
        return super().update(step, gone_by)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"means": self.means.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.means.copy_(state["means"])
