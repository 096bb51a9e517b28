"""Two processes under torchrun train as one process does with the gradients of two batches accumulated."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recollect.loop import LoopConfig, train

TESTS = Path(__file__).resolve().parent.parent
CONFIG = LoopConfig(epochs=2, learning_rate=0.01, patience=None)


class Regression:
    """Five batches, so that the last step of an epoch has one for two processes."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.module = torch.nn.Linear(4, 1)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.fill_(0.1)
        self.x = torch.randn(5, 8, 4, generator=generator)

    def train(self, config):
        def loss(x):
            return (self.module(x) - x.sum(1, keepdim=True)).square().mean()

        return train(self.module, batches=lambda epoch: list(self.x), loss=loss, config=config)


@pytest.mark.slow
def test_two_processes_equal_one_with_two_batches_per_step(tmp_path):
    one = Regression()
    result = one.train(LoopConfig(epochs=2, learning_rate=0.01, patience=None, accumulation=2))
    assert result.steps == 6
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    outputs = [child.communicate(timeout=240)[0].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in "01")
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    problem = Regression()
    problem.train(CONFIG)
    save_file(problem.module.state_dict(), str(Path(sys.argv[1]) / f"{os.environ['RANK']}.safetensors"))
