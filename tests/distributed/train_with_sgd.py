"""train_filtered.py with plain SGD, which passes a difference of gradients on as it is."""

import sys

import torch

from memfilter.train import loop
from train_filtered import main

loop.make_optimizer = lambda parameters, config: torch.optim.SGD(parameters, lr=config.learning_rate)

if __name__ == "__main__":
    sys.exit(main())
