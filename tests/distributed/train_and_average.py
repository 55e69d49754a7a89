"""train_filtered.py, and beside it the average of the whole fp32 weights, which is left in the run's directory."""

import sys

from safetensors.torch import save_file

from memfilter.train.loop import Trainer
from memfilter.train.optimizer import ema_decay
from train_filtered import main

begin, step, finish = Trainer.__init__, Trainer._step, Trainer._finish


def begun(self, config):
    begin(self, config)
    self.first, self.average = list(self.engine.full_weights()), None


def averaged(self, samples):
    step(self, samples)
    decay, now = ema_decay(self.config.train, samples), list(self.engine.full_weights())
    self.average = [decay * old + (1 - decay) * new for old, new in zip(self.average, now, strict=True)] if self.average else now


def finished(self):
    if self.main:
        found = {"first": self.first, "average": self.average, "last": [p.detach().float() for p in self.engine.trained]}
        for name, weights in found.items():
            whole = {key: value.clone() for key, value in zip(self.trained, weights, strict=True)}
            save_file(whole, self.run_dir / f"{name}.safetensors")
    return finish(self)


Trainer.__init__, Trainer._step, Trainer._finish = begun, averaged, finished

if __name__ == "__main__":
    sys.exit(main())
