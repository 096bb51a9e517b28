"""The other side of `sequential.py`: RecBole's SASRec, driven line by line from its own environment.

    python recbole_worker.py FOLDER      # run by sequential.py with the interpreter of RecBole's environment

Reads one JSON command a line on standard input ({"do": "train", "seconds": 8}, {"do": "evaluate"}, {"do": "quality"})
and answers each with one JSON line. FOLDER holds `bench/bench.inter` (RecBole's own format), `options.json` and
`cases.npz` (full histories and targets of the test users). Imports nothing of this project.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")


class UntilDeadline:
    """A data loader that ends an epoch after some seconds of the processor, and counts the samples it handed out."""

    def __init__(self, loader, seconds):
        self._loader, self._deadline, self.n_samples = loader, time.process_time() + seconds, 0

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        for interaction in self._loader:
            if time.process_time() >= self._deadline:
                return
            self.n_samples += len(interaction)
            yield interaction


class Clock:
    """Seconds on the wall and of the processor since it was made."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self):
        return {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}


class Peer:
    """Data, model and trainer of RecBole."""

    def __init__(self, folder):
        import torch
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.trainer import Trainer
        from recbole.utils import init_seed

        options = json.loads((folder / "options.json").read_text())
        torch.set_num_threads(options.pop("threads"))
        config = Config(
            model="SASRec",
            dataset="bench",
            config_dict={
                "data_path": str(folder),
                "checkpoint_dir": str(folder / "saved"),
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "use_gpu": False,
                "gpu_id": "",
                "show_progress": False,
                "train_neg_sample_args": None,
                "loss_type": "CE",
                "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
                "metrics": ["Hit", "NDCG"],
                "topk": [10],
                "valid_metric": "NDCG@10",
                **options,
            },
        )
        init_seed(config["seed"], config["reproducibility"])
        self.dataset = create_dataset(config)
        self.train_data, _, self.test_data = data_preparation(config, self.dataset)
        from recbole.model.sequential_recommender import SASRec

        self.model = SASRec(config, self.train_data.dataset)
        self.trainer = Trainer(config, self.model)
        self.trainer.eval_collector.data_collect(self.train_data)
        self.folder = folder

    def train(self, seconds):
        clock, began = Clock(), time.process_time()
        n_samples = epochs = 0
        while time.process_time() - began < seconds:
            loader = UntilDeadline(self.train_data, seconds - (time.process_time() - began))
            self.trainer._train_epoch(loader, epochs, show_progress=False)
            n_samples += loader.n_samples
            epochs += 1
        return {"samples": n_samples, **clock.read()}

    def evaluate(self):
        clock = Clock()
        self.trainer.evaluate(self.test_data, load_best_model=False, show_progress=False)
        return {"users": len(self.test_data.dataset), **clock.read()}

    def quality(self):
        """NDCG@10 of its scores under the rule of the comparison: full ranking, the whole history masked."""
        import numpy as np
        import torch

        cases = np.load(self.folder / "cases.npz")
        items, starts, targets = cases["items"], cases["starts"], cases["target"]
        number = self.dataset.field2token_id["item_id"]
        column = np.array([number[str(item)] for item in range(int(cases["n_items"]))])
        user_tokens = self.dataset.field2id_token["user_id"]
        self.model.eval()
        gains = []
        with torch.no_grad():
            for interaction, *_ in self.test_data:
                scores = self.model.full_sort_predict(interaction).reshape(len(interaction), -1).numpy()[:, column]
                for row, user in enumerate(interaction["user_id"].tolist()):
                    case = int(user_tokens[user])
                    own, target = scores[row], targets[case]
                    of_target = own[target]
                    own[items[starts[case] : starts[case + 1]]] = -np.inf
                    own[target] = of_target
                    above, equal = int((own > of_target).sum()), int((own == of_target).sum()) - 1
                    places = range(above + 1, above + equal + 2)
                    gains.append(sum(1 / np.log2(place + 1) for place in places if place <= 10) / (equal + 1))
        return {"ndcg@10": float(np.mean(gains)), "users": len(gains)}


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # RecBole logs to standard output
    sys.argv = sys.argv[:2]
    folder = Path(sys.argv.pop())
    os.chdir(folder)  # RecBole writes its logs where it stands
    peer = Peer(folder)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(peer, command.pop("do"))(**command)
        answers.write(json.dumps(answer, default=float) + "\n")


if __name__ == "__main__":
    main()
