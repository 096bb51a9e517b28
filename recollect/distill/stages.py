"""What a distillation run keeps on disk: one folder per trained model, named by everything that made it.

A stage is a pure function of its recipe (kind, options, the keys of the stages it reads), so rows of the table that
share a beginning share its stages, and a killed run continues at the stage it was in: finished ones are read back,
the current one resumes from the training loop's checkpoint in its `work/`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.distill.llm_srec_ranker import LlmSRec
from recollect.errors import InputError
from recollect.io import canonical_json, disk_errors, read_json, sha256_text, write_json
from recollect.recommenders.llm_sequential import LlmSequential
from recollect.recommenders.models import MODELS

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    key: hash of the recipe.  info: what its maker said of it; "validation" is the primary metric on validation.
    """

    key: str
    folder: Path
    recipe: Mapping[str, Any]
    info: Mapping[str, Any]

    @property
    def validation(self) -> float:
        return float(self.info["validation"])

    def load(self) -> Any:
        """The model, read from disk, so that a resumed run sees what an uninterrupted one sees; on the GPU if any."""
        model = self._read()
        if torch.cuda.is_available():
            model.module.to("cuda")
            if isinstance(model, LlmSRec):
                model.frozen.to("cuda")
        return model

    def _read(self) -> Any:
        kind = read_json(self.folder / "model" / "config.json")["kind"]
        if kind == LlmSequential.name:
            return LlmSequential.from_pretrained(self.folder / "model")
        if kind == LlmSRec.name:
            return LlmSRec.from_pretrained(self.folder / "model")
        return MODELS[kind].model_class.from_pretrained(self.folder / "model")


@dataclass
class Stages:
    """The stages of a run.

    folder: `stages/` of the run.  context: part of every recipe (data fingerprint, split).  made: stages made by this
    process, for the progress of long runs.  seconds: what training each stage took that this process asked for, made
    or read back.
    """

    folder: Path
    context: Mapping[str, Any]
    made: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def get(self, kind: str, recipe: Mapping[str, Any], make: Callable[[Path], tuple[Any, dict[str, Any]]]) -> Stage:
        """The stage of a recipe; `make(work folder)` gives the model (or None) and what is to be known of it."""
        full = {"kind": kind, **recipe, "context": dict(self.context)}
        key = sha256_text(canonical_json(full))[:16]
        folder = self.folder / f"{kind}-{key}"
        with _one_at_a_time(folder):
            if not (folder / STAGE_FILE).is_file():
                model, info = make(folder / "work")
                if model is not None:
                    model.save_pretrained(folder / "model")
                write_json(folder / STAGE_FILE, {"recipe": full, "info": info})
                self.made.append(folder.name)
            shutil.rmtree(folder / "work", ignore_errors=True)
        info = read_json(folder / STAGE_FILE)["info"]
        if "seconds" in info:
            self.seconds[folder.name] = float(info["seconds"])
        return Stage(key, folder, full, info)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds a stage; another process that wants it waits and then finds it made. The lock dies with its process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Inverse of `recollect.io.write_arrays`.

    Raises:
        InputError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove its folder and resume the run") from error
