"""What the trained tokenizers share: an encoder and a decoder around a quantiser, their training, encoding and files.

A method brings a quantiser (`Quantiser`); `AutoencoderTokenizer` makes it an `ItemTokenizer`. Training runs on
`recollect.loop`, whose epoch is here a round of `ROUND_STEPS` batches, so a killed fit continues bit for bit. Encoding
and decoding run on the CPU in float64: the float32 product of a row can depend on its batch mates in the last bit,
enough to change a code.

Networks learn from rows shifted to mean 0 and scaled, all dimensions alike, to variance 1 [our design]: of small rows
as they are an untrained network makes latents near 0, from which a decoder with ReLU learns nothing but the items'
mean, and for large ones the optimiser's steps are too small. The outer layers take the change of units in when
training ends, so all that is saved, encoded, decoded and measured is in the units of the rows.

Where the options name `preprocess` steps, everything lives in the space after them and `decode` undoes them as far as
they can be undone. Not covered: training over several processes (codes that are placed anew would differ).
"""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from recollect.config import to_dict, versions
from recollect.errors import InputError
from recollect.loop import train
from recollect.progress import Progress, SilentProgress
from recollect.rng import call_seed
from recollect.tokenize.checkpoint import array_sha256, rows_sha256
from recollect.tokenize.neural_config import AutoencoderConfig
from recollect.tokenize.preprocess import Preprocess
from recollect.tokenize.protocol import Encoding, FitReport, ItemTokenizer, check_embeddings, fit_rows
from recollect.tokenize.rows import ArrayRows, spans
from recollect.tokenize.scaling import Moments, Scaling, scaling_of
from recollect.tokenize.training_rows import Batch, StepsOf, TrainingRound, TrainingRows

BLOCK_CELLS = 2**21  # distances held at a time when encoding (16 MiB of float64)
BLOCK_ROWS = 8192  # items encoded or decoded at a time, at most
SETTLED = 0.01  # share by which the loss may still fall from the last round but one to the last
HEALTHY_USE = 0.8  # share of used codes below which TIGER's authors call a codebook unhealthy


class Quantised(NamedTuple):
    """What a quantiser makes of latents in training.

    vector: (B, d) what the decoder reads, with the estimator's gradient.  penalty: (B,) the quantisation loss of each
    row.  codes: (B, L) int64.
    """

    vector: Tensor
    penalty: Tensor
    codes: Tensor


class Quantiser(Protocol):
    """A torch module between encoder and decoder.

    sizes: codes of each level.  reseeded: (L,) int64, codes of each level placed anew in training.
    """

    sizes: tuple[int, ...]
    reseeded: Tensor

    def __call__(self, latent: Tensor) -> Quantised:
        """Quantise latents (B, d) in training."""
        ...

    def codes_of(self, latent: Tensor, beam: int) -> Tensor:
        """(B, L) int64 codes of latents (B, d)."""
        ...

    def alternatives(self, latent: Tensor, codes: Tensor, count: int) -> Tensor:
        """(B, L, count) int64, the nearest codes of every level given `codes` (B, L) of the levels above."""
        ...

    def vectors(self, codes: Tensor) -> Tensor:
        """(B, d) what the decoder reads for codes (B, l <= L)."""
        ...

    def codebook_arrays(self) -> dict[str, np.ndarray]:
        """`codebook.0` … float32."""
        ...

    def take_codebooks(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `codebook_arrays`."""
        ...


def perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers between `widths` with ReLU between them; Glorot-normal weights, biases 0.

    With torch's default weights the latents of different items start nearly equal; Glorot's keep their spread.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(nn.Module):
    """Encoder D -> hidden -> d, a quantiser of latents (B, d), and the mirrored decoder."""

    def __init__(self, dimension: int, hidden: tuple[int, ...], code_dim: int, quantiser: nn.Module) -> None:
        super().__init__()
        self.encoder = perceptron((dimension, *hidden, code_dim))
        self.decoder = perceptron((code_dim, *reversed(hidden), dimension))
        self.quantiser: Any = quantiser

    def take_units(self, scaling: Scaling) -> None:
        """Read and write rows x where (x - mean) / size was learned: the outer layers take the change of units in.

        Weights and biases are rounded to float32, so that what is saved is what is used.
        """
        first: Any = self.encoder[0]
        last: Any = self.decoder[-1]
        with torch.no_grad():
            first.weight.copy_((first.weight / scaling.size).float())
            first.bias.copy_((first.bias - first.weight @ scaling.mean).float())
            last.weight.copy_((last.weight * scaling.size).float())
            last.bias.copy_((last.bias * scaling.size + scaling.mean).float())


def reduced(difference: Tensor, reduction: str) -> Tensor:
    """(B,) squares of (B, d) summed or averaged over d."""
    squares = difference.square()
    return squares.sum(-1) if reduction == "sum" else squares.mean(-1)


class AutoencoderTokenizer(ItemTokenizer):
    """A tokenizer whose codes are those of an autoencoder's latents; a method gives its quantiser.

    module: in float64 on the CPU once fitted.
    unit_variance: which variance of the rows it learns from is 1, the total or the mean over dimensions.
    """

    config: Any
    config_class: ClassVar[type] = AutoencoderConfig
    unit_variance: ClassVar[Literal["total", "mean"]] = "total"
    remedy: ClassVar[str] = "use fewer codes, more steps or a smaller reseed_every"
    """What to do when codes stay unused."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.preprocess = Preprocess(self.config)
        self.module: Autoencoder | None = None

    @abstractmethod
    def quantiser(self) -> Any:
        """A fresh quantiser for `config`: a torch module and a `Quantiser`."""

    @property
    @abstractmethod
    def latent_dim(self) -> int:
        """Dimension of the space that is quantised."""

    def check_fit(self, rows: np.ndarray, n_items: int, collaborative: np.ndarray | None) -> None:
        """Refuse what the method cannot be fitted on, before anything is computed."""
        if collaborative is not None:
            raise InputError(f"{self.name} does not use behaviour vectors; leave out collaborative, or use letter")

    def place_codes(self, module: Autoencoder, data: TrainingRows) -> None:
        """Give the codes of an untrained module their first places, where a method learns codes."""

    def row_losses(self, module: Autoencoder, batch: Batch) -> Tensor:
        """(B,) loss of each row: squared error of the reconstruction plus the quantiser's penalty."""
        quantised = module.quantiser(module.encoder(batch.rows))
        error = reduced(batch.rows - module.decoder(quantised.vector), self.config.reconstruction_reduction)
        return error + quantised.penalty

    def build(self, dimension: int) -> Autoencoder:
        """A module with fresh weights drawn from the config's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(call_seed(self.config.seed, self.name, "initial weights"))
            return Autoencoder(dimension, self.config.hidden, self.latent_dim, self.quantiser())

    def fit(
        self,
        embeddings: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        collaborative: np.ndarray | None = None,
        checkpoint: Path | None = None,
        progress: Progress = SilentProgress(),  # noqa: B008 - stateless
    ) -> Self:
        """Train encoder, codes and decoder; see `ItemTokenizer.fit`.

        An item's loss counts `weight` times. `report.levels` holds, per level: iterations (steps), objective_before
        and objective_after (mean loss of the first and the last round, in the units it learns in; it may rise as the
        latents spread, for they set the scale of the quantisation loss), relative_mse (squared error of the decoded
        first levels over the total variance), used_codes, dead_codes, usage, reseeded.

        Raises:
            TrainingDiverged: a loss or weight became NaN or infinite.
            ResumeRefused: `checkpoint` holds another fit.
        """
        started = time.perf_counter()
        rows, weights = fit_rows(embeddings, mask, weight)
        check_embeddings(embeddings if len(rows) == len(embeddings) else embeddings[rows], max(self.quantiser().sizes))
        self.check_fit(rows, len(embeddings), collaborative)
        self.dimension, self.module, self.codebook_sizes = None, None, ()
        self.preprocess.fit(embeddings, rows, weights)
        source = ArrayRows(embeddings, rows, self.preprocess.apply)
        scaling = scaling_of(source, weights, self.unit_variance)
        data = TrainingRows(embeddings, rows, weights, collaborative, self.preprocess, scaling)
        module = self.build(data.dimension)
        self.place_codes(module, data)
        config = self.config
        progress.stage(f"{self.name}: training", config.steps)
        result = train(
            module,
            batches=lambda index: TrainingRound(data, config.batch_size, config.seed, config.steps, index),
            loss=lambda batch: (batch.weight * self.row_losses(module, batch)).mean(),
            config=config.loop,
            folder=checkpoint,
            progress=StepsOf(progress),
            size=lambda batch: len(batch.rows),
            identity={
                **to_dict(config),
                "method": self.name,
                "unit_variance": self.unit_variance,
                "embeddings": rows_sha256(embeddings, rows) if checkpoint is not None else "",
                "weights": array_sha256(weights),
                "collaborative": array_sha256(None if collaborative is None else collaborative[rows]),
                "torch": versions()["torch"],
            },
        )
        self._take_module(module)
        module.take_units(scaling)
        self.dimension = int(embeddings.shape[1])
        losses = [entry["loss"] for entry in result.history]
        self.report = self._fit_report(source, weights, losses)
        self.report.seconds = time.perf_counter() - started
        return self

    def _take_module(self, module: Autoencoder) -> None:
        self.module = module.to("cpu").double().eval().requires_grad_(False)
        self.codebook_sizes = self.module.quantiser.sizes

    def _fit_report(self, source: ArrayRows, weights: np.ndarray | None, losses: list[float]) -> FitReport:
        module, start = self._fitted(), 0
        used = [np.zeros(size, dtype=bool) for size in self.codebook_sizes]
        errors, moments = torch.zeros(len(used), dtype=torch.float64), Moments(source)
        for block, latent in self._latents(source, 1):
            stop = start + len(block)
            share = torch.ones(len(block)) if weights is None else torch.from_numpy(weights[start:stop])
            codes = module.quantiser.codes_of(latent, 1)
            for level, seen in enumerate(used):
                seen[codes[:, level].numpy()] = True
                decoded = module.decoder(module.quantiser.vectors(codes[:, : level + 1]))
                errors[level] += share.double() @ (block - decoded).square().sum(1)
            moments.add(block, share.double())
            start = stop
        reseeded, total = module.quantiser.reseeded, moments.total_variance()
        report = FitReport()
        if len(losses) > 1 and losses[-1] < (1 - SETTLED) * losses[-2]:
            report.warnings.append(
                f"the loss of {self.name} still fell by {1 - losses[-1] / losses[-2]:.1%} in its last round of steps; "
                "raise steps before comparing it"
            )
        for level, seen in enumerate(used):
            n_used = int(seen.sum())
            report.levels.append(
                {
                    "iterations": self.config.steps,
                    "objective_before": losses[0],
                    "objective_after": losses[-1],
                    "relative_mse": float(errors[level]) / total if total > 0 else None,
                    "used_codes": n_used,
                    "dead_codes": len(seen) - n_used,
                    "usage": n_used / len(seen),
                    "reseeded": int(reseeded[level]),
                }
            )
            if n_used < HEALTHY_USE * len(seen):
                report.warnings.append(
                    f"level {level + 1} of {self.name} uses {n_used} of its {len(seen)} codes, below the "
                    f"{HEALTHY_USE:.0%} of a healthy codebook; {self.remedy}"
                )
        return report

    def encode(
        self, embeddings: np.ndarray, *, beam: int = 1, top_m: int = 1, return_posterior: bool = False
    ) -> Encoding:
        """Codes of each row; see `ItemTokenizer.encode`.

        A beam ranks partial tuples by squared error in the space of the latents, where the levels add up; `distance`
        is that of the decoded row. There is no posterior: `confidence`, `entropy` and `probability` stay None.

        Raises:
            InputError: also a beam below 1 or that the method does not have, or top_m outside 1..min K.
        """
        self.check_rows(embeddings)
        self.check_search(beam=beam, top_m=top_m)
        if not 1 <= top_m <= min(self.codebook_sizes):
            raise InputError(f"top_m must be between 1 and {min(self.codebook_sizes)}, got {top_m!r}")
        n, levels = len(embeddings), len(self.codebook_sizes)
        codes = np.empty((n, levels), dtype=np.int32)
        distance = np.empty(n, dtype=np.float32)
        others = np.empty((n, levels, top_m), dtype=np.int32) if top_m > 1 else None
        module, start = self._fitted(), 0
        for block, latent in self._latents(ArrayRows(embeddings, None, self.preprocess.apply), beam):
            stop = start + len(block)
            found = module.quantiser.codes_of(latent, beam)
            codes[start:stop] = found.numpy()
            decoded = module.decoder(module.quantiser.vectors(found))
            distance[start:stop] = (block - decoded).square().sum(-1).numpy()
            if others is not None:
                others[start:stop] = module.quantiser.alternatives(latent, found, top_m).numpy()
            start = stop
        return Encoding(codes=codes, distance=distance, alternatives=others)

    def _latents(self, source: ArrayRows, beam: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows and their latents, float64."""
        block_rows = max(1, min(BLOCK_ROWS, BLOCK_CELLS // (max(self.codebook_sizes) * beam)))
        for start, stop in spans(len(source), block_rows):
            block = source.block(start, stop).double()
            yield block, self._fitted().encoder(block)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decoder of the sum of the codes' vectors; see `ItemTokenizer.decode`."""
        self.check_codes(codes)
        if not codes.shape[1]:
            raise InputError(f"{self.name}: codes have no level; give at least one column")
        module = self._fitted()
        found = np.empty((len(codes), self.dimension or 0), dtype=np.float32)
        for start, stop in spans(len(codes), BLOCK_ROWS):
            block = torch.from_numpy(np.asarray(codes[start:stop], dtype=np.int64))
            found[start:stop] = self.preprocess.invert(module.decoder(module.quantiser.vectors(block)).numpy())
        return found

    def _fitted(self) -> Autoencoder:
        self.check_fitted()
        assert self.module is not None
        return self.module

    def arrays(self) -> dict[str, np.ndarray]:
        """`codebook.{l}` (K_l, d), and `encoder.…`, `decoder.…`: the layers' weights and biases; all float32."""
        module = self._fitted()
        layers = {
            f"{part}.{name}": value.float().numpy()
            for part, network in (("encoder", module.encoder), ("decoder", module.decoder))
            for name, value in network.state_dict().items()
        }
        return module.quantiser.codebook_arrays() | layers | self.preprocess.arrays()

    def take_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Inverse of `arrays`.

        Raises:
            InputError: an array is missing or of another shape than the options ask for.
        """
        first = arrays.get("encoder.0.weight")
        if first is None or first.ndim != 2:
            raise InputError(f"{self.name}: the stored arrays lack 'encoder.0.weight' (width, D)")
        module = self.build(first.shape[1])
        stored = {
            f"{part}.{name}": value
            for part, network in (("encoder", module.encoder), ("decoder", module.decoder))
            for name, value in network.state_dict().items()
        }
        expected = {name: tuple(value.shape) for name, value in stored.items()}
        expected |= {name: value.shape for name, value in module.quantiser.codebook_arrays().items()}
        for name, shape in expected.items():
            if name not in arrays or arrays[name].shape != shape:
                found = "is missing" if name not in arrays else f"is {arrays[name].shape}"
                raise InputError(f"{self.name}: the stored array {name!r} {found} where the options ask for {shape}")
        self.preprocess.take_arrays(arrays)
        with torch.no_grad():
            for name, value in stored.items():
                value.copy_(torch.from_numpy(np.array(arrays[name], dtype=np.float32)))
            module.quantiser.take_codebooks(arrays)
        self._take_module(module)
        self.dimension = self.preprocess.input_dimension or first.shape[1]
