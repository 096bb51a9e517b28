"""A small training problem for tests of the loop; run as a script it trains in a folder and kills itself on the way.

python -m support.loop_world FOLDER KILL_AT: trains with checkpoints every 3 steps; SIGKILL before loss number KILL_AT.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from recollect.loop import LoopConfig, train
from recollect.tracking import Tracker

CONFIG = LoopConfig(
    epochs=4, learning_rate=0.01, warmup_steps=5, schedule="cosine", clip_norm=1.0, seed=3, patience=None
)


class Problem:
    """Regression by a network with dropout and batch statistics (a buffer); validation is deterministic."""

    def __init__(self, n_batches=7):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.x = torch.randn(n_batches * 8, 5)
            self.y = self.x.sin().sum(1, keepdim=True)
            self.module = nn.Sequential(
                nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)
            )
        self.n_batches = n_batches
        self.losses_taken = 0

    def batches(self, epoch):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        return [order[index :: self.n_batches] for index in range(self.n_batches)]

    def loss(self, rows):
        self.losses_taken += 1
        return nn.functional.mse_loss(self.module(self.x[rows]), self.y[rows])

    def validate(self):
        return -float(nn.functional.mse_loss(self.module(self.x), self.y))

    def run(self, config=CONFIG, **options):
        return train(
            self.module, batches=self.batches, loss=self.loss, config=config, **({"validate": self.validate} | options)
        )

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


class KilledProblem(Problem):
    def __init__(self, kill_at):
        super().__init__()
        self.kill_at = kill_at

    def loss(self, rows):
        if self.losses_taken == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    KilledProblem(int(sys.argv[2])).run(folder=folder, checkpoint_every=3, tracker=Tracker(folder))
