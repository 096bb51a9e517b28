"""A stream of small tasks in the benchmark's files and a decoder that reads bytes, for tests of continual runs."""

from __future__ import annotations

import json
from pathlib import Path

from recollect.continual.trace_tasks import trace_task
from recollect.progress import SilentProgress
from recollect.rng import stream

TASKS = ("NumGLUE-cm", "FOMC", "NumGLUE-ds")


def write_byte_decoder(folder: Path, seed: int = 0, context: int = 512) -> Path:
    """A randomly initialised Llama (hidden 32, 2 layers) whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,  # wide enough for answers to depend on the question
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def task_rows(name: str, n: int, seed: int) -> list[dict[str, str]]:
    """Rows of a task in its own form; the answers are short and repeat."""
    task = trace_task(name)
    draws = stream(seed, "small task", name)
    rows = []
    for number in range(n):
        body = f"q{seed}-{number}: {int(draws.integers(100))}?"
        answer = "ABC"[int(draws.integers(3))] if task.answer == "letter" else str(int(draws.integers(4)))
        ending = "" if task.cue_from == task.cue else task.cue_from.removesuffix(task.cue)
        rows.append({"prompt": f"{task.prefix}{body}{ending}{task.cue}", "answer": answer})
    return rows


def write_stream(folder: Path, tasks: tuple[str, ...] = TASKS, n_train: int = 12, n_test: int = 5) -> Path:
    """Task folders with train, eval and test files, and a replay buffer."""
    for name in tasks:
        for number, (split, n) in enumerate((("train", n_train), ("eval", 2), ("test", n_test))):
            write_rows(folder / name / f"{split}.json", task_rows(name, n, number))
    write_rows(folder / "Lima" / "train.json", [{"prompt": f"Say {n}.", "answer": f"{n}"} for n in range(3)])
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One file of the benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


SMALL = {
    "train_examples": 0,
    "test_examples": 0,
    "epochs": 1,
    "batch_size": 4,
    "eval_batch": 4,
    "max_prompt": 200,
    "max_answer": 16,
    "max_new_tokens": 3,
    "checkpoint_every": 1,
    "precision": "fp32",
    "learning_rate": 0.02,
}
"""Options that make a run of the small stream take a second."""


class Stopped(Exception):
    """What `StopAfter` raises."""


class StopAfter(SilentProgress):
    """Raises after so many steps of a stage whose name contains `where`."""

    def __init__(self, where: str, steps: int) -> None:
        self.where, self.left, self.inside = where, steps, False

    def stage(self, name, total=None):
        if not name.startswith("epoch"):  # epochs belong to the task named before them
            self.inside = self.where in name

    def advance(self, steps=1, note=""):
        if self.inside:
            self.left -= 1
            if self.left == 0:
                raise Stopped
