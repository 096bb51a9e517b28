"""What is left of a training run when its process dies: one safetensors file, written whole or not at all.

Trained weights and buffers, the optimiser's moments and the best weights so far are its tensors; the options and the
position in the run are JSON in its header, so no two files can disagree.  Generator states are not kept: the training
loop (`recollect.loop`) seeds every step by its place in the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recollect.errors import InputError, ResumeRefused
from recollect.io import atomic_open

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT_FILE = "checkpoint.safetensors"
FORMAT = 1


@dataclass
class Moments:
    """What an optimiser remembers of each parameter, by name: carried from one run to the next.

    tensors: parameter name -> the optimiser's own names ("step", "exp_avg", …) -> values, on the CPU.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def give(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> None:
        """Put what is held into `optimizer`; a parameter of another name or shape begins without a past."""
        for name, parameter in trained.items():
            held = self.tensors.get(name, {})
            if held and all(value.ndim == 0 or value.shape == parameter.shape for value in held.values()):
                optimizer.state[parameter] = {key: value.to(parameter.device).clone() for key, value in held.items()}

    def take(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> None:
        """Hold what `optimizer` remembers of these parameters, and of no others."""
        self.tensors = {
            name: {key: value.detach().to("cpu").clone() for key, value in optimizer.state[parameter].items()}
            for name, parameter in trained.items()
            if optimizer.state.get(parameter)
        }

    def write(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageRefused: the disk refused.
        """
        from safetensors.torch import save

        with atomic_open(path, "wb") as handle:
            handle.write(save({title: value.contiguous() for title, value in self.flat().items()}))

    @classmethod
    def read(cls, path: Path) -> Moments:
        """Inverse of `write`.

        Raises:
            InputError: the file is missing or torn.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            flat = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} does not hold an optimiser's moments ({error}); start the run anew") from error
        return cls.from_flat(flat)

    def flat(self) -> dict[str, Tensor]:
        """All values as "KEY.PARAMETER" -> tensor."""
        return {f"{key}.{name}": value for name, held in self.tensors.items() for key, value in held.items()}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Tensor]) -> Moments:
        """Inverse of `flat`."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for title, value in flat.items():
            key, _, name = title.partition(".")
            tensors.setdefault(name, {})[key] = value
        return cls(tensors)


@dataclass
class Position:
    """Where a run stands: the next batch of the next epoch, and what validation has said so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # of this epoch's batches so far
    best_epoch: int = 0
    best_validation: float | None = None
    stale: int = 0
    done: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


class RunState:
    """The tensors of a run: trained weights and buffers, the optimiser's moments, the best weights so far."""

    def __init__(
        self, module: nn.Module, trained: dict[str, nn.Parameter], optimizer: Any, options: dict[str, Any]
    ) -> None:
        self._trained = trained
        self._optimizer = optimizer
        self._options = options
        kept = set(module.state_dict())
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
        self._best: dict[str, Tensor] = {}

    def _live(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in (self._trained | self._buffers).items()}

    def keep_best(self) -> None:
        self._best = {name: tensor.clone() for name, tensor in self._live().items()}

    def restore_best(self) -> None:
        for name, tensor in self._live().items():
            if self._best:
                tensor.copy_(self._best[name])

    def save(self, folder: Path, position: Position) -> None:
        """Write one file, whole or not at all: tensors, and the position as JSON in its header."""
        from safetensors.torch import save

        tensors = {f"live.{name}": tensor for name, tensor in self._live().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        moments = Moments()
        moments.take(self._optimizer, self._trained)
        tensors |= {f"optimizer.{title}": tensor for title, tensor in moments.flat().items()}
        header = {
            "format": str(FORMAT),
            "config": json.dumps(self._options),
            "position": json.dumps(dataclasses.asdict(position), allow_nan=False),
        }
        cpu = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
        with atomic_open(Path(folder) / CHECKPOINT_FILE, "wb") as handle:
            handle.write(save(cpu, metadata=header))

    def load(self, folder: Path) -> Position:
        """Continue where `folder` says, or at the start when it holds no checkpoint."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / CHECKPOINT_FILE
        if not path.exists():
            return Position()
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            position = Position(**json.loads(header["position"]))
            written = json.loads(header["config"])
            if header["format"] != str(FORMAT):
                raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a checkpoint of this loop ({error}); remove it to start anew") from error
        self._refuse_another_run(path, written, tensors)
        for name, tensor in self._live().items():
            tensor.copy_(tensors[f"live.{name}"])
        self._best = {
            name: tensors[f"best.{name}"].to(tensor.device)
            for name, tensor in self._live().items()
            if f"best.{name}" in tensors
        }
        held = {
            title.removeprefix("optimizer."): tensor
            for title, tensor in tensors.items()
            if title.startswith("optimizer.")
        }
        Moments.from_flat(held).give(self._optimizer, self._trained)
        return position

    def _refuse_another_run(self, path: Path, written: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        wanted = json.loads(json.dumps(self._options))
        for name, value in wanted.items():
            if written.get(name) != value:
                raise ResumeRefused(
                    f"{path} is of a run with {name}={written.get(name)!r}, not {value!r}; "
                    "use the same options or another folder"
                )
        shapes = {f"live.{name}": tuple(tensor.shape) for name, tensor in self._live().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("live.")}
        if shapes != found:
            differing = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise ResumeRefused(
                f"{path} is of another model ({differing[0].removeprefix('live.')!r} differs); use another folder"
            )
