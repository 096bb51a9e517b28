"""What the trained tokenizers refuse, in one line that says what to do, and what a killed fit leaves behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.trained_tokenizers import (
    METHODS,
    behaviour_vectors,
    fitted,
    small_config,
    small_tokenizer,
    unit_embeddings,
)

from recollect.checkpoints import CHECKPOINT_FILE
from recollect.errors import ConfigError, InputError, MissingExtra, ResumeRefused, TrainingDiverged
from recollect.progress import SilentProgress
from recollect.tokenize import neural_config, training_rows
from recollect.tokenize.fsq import digits_of, index_of
from recollect.tokenize.neural_config import FSQConfig, LETTERConfig, RQVAEConfig, VQVAEConfig

NAMES = sorted(METHODS)
TESTS = Path(__file__).resolve().parent.parent
LONG = {"steps": 450, "hidden": (8,)}  # three rounds, so two checkpoints before the end


@pytest.fixture(scope="module")
def rows():
    return unit_embeddings()


@pytest.fixture(scope="module")
def tokenizers(rows):
    return {name: fitted(name, rows, steps=2) for name in NAMES}


class _Killed(Exception):
    pass


class KilledAt(SilentProgress):
    """Raises, or kills the process, when so many steps are done."""

    def __init__(self, step, signal_number=None):
        self.left, self.signal_number = step, signal_number

    def advance(self, steps=1, note=""):
        self.left -= steps
        if self.left <= 0 and self.signal_number is not None:
            os.kill(os.getpid(), self.signal_number)
        if self.left <= 0:
            raise _Killed


class Counted(SilentProgress):
    """Counts steps and remembers stages."""

    def __init__(self):
        self.steps, self.stages = 0, []

    def stage(self, name, total=None):
        self.stages.append((name, total))

    def advance(self, steps=1, note=""):
        self.steps += steps


def fit_of_45_steps(name, rows, folder, progress):
    return small_tokenizer(name, steps=45).fit(
        rows,
        checkpoint=folder,
        progress=progress,
        collaborative=behaviour_vectors() if name == "letter" else None,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_killed_and_resumed_ends_with_the_same_arrays(name, rows, tmp_path, monkeypatch):
    for module in (neural_config, training_rows):
        monkeypatch.setattr(module, "ROUND_STEPS", 10)
    whole = fit_of_45_steps(name, rows, None, SilentProgress()).arrays()
    for step in (13, 12):
        with pytest.raises(_Killed):
            fit_of_45_steps(name, rows, tmp_path, KilledAt(step))
    rest = Counted()
    resumed = fit_of_45_steps(name, rows, tmp_path, rest)
    assert rest.steps == 25
    assert rest.stages == [(f"{name}: training", 45)]
    for key, array in whole.items():
        np.testing.assert_array_equal(resumed.arrays()[key], array)


@pytest.mark.slow
def test_a_process_killed_in_a_fit_leaves_what_a_resumed_one_needs(rows, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]
    resumed = fitted("rq-vae", rows, checkpoint=tmp_path, **LONG)
    for key, array in fitted("rq-vae", rows, **LONG).arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[key], array)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"commitment": 0.5}, r"commitment=0.25, not 0.5"),
        ({"seed": 1}, r"seed=0, not 1"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(other, message, rows, tmp_path):
    fitted("rq-vae", rows, checkpoint=tmp_path)
    with pytest.raises(ResumeRefused, match=message):
        fitted("rq-vae", rows, checkpoint=tmp_path, **other)


def test_a_checkpoint_of_other_embeddings_is_refused(rows, tmp_path):
    fitted("rq-vae", rows, checkpoint=tmp_path)
    with pytest.raises(ResumeRefused, match="embeddings="):
        fitted("rq-vae", unit_embeddings(seed=2), checkpoint=tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: np.where(np.arange(300)[:, None] == 17, np.nan, rows), "item 17 holds NaN"),
        (lambda rows: np.where(np.arange(300)[:, None] == 4, np.inf, rows), "item 4 holds NaN, infinity"),
        (lambda rows: np.ones_like(rows), "every item has the same embedding"),
        (lambda rows: rows[0], r"must be a float array \(N, D\)"),
        (lambda rows: rows.astype(np.int64), "must be a float array"),
        (lambda rows: rows[:2], "2 items cannot fill a codebook of"),
    ],
)
def test_embeddings_that_cannot_be_fitted_are_refused(name, spoil, message, rows):
    with pytest.raises(InputError, match=message):
        fitted(name, spoil(rows), collaborative=behaviour_vectors() if name == "letter" else None)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_or_weight_that_fits_nothing_is_refused(name, rows):
    with pytest.raises(InputError, match="mask must be"):
        fitted(name, rows, mask=np.ones(7, dtype=bool))
    with pytest.raises(InputError, match="weight of item 0"):
        fitted(name, rows, weight=np.full(300, -1.0))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_fitted_says_so(name, rows):
    tokenizer = small_tokenizer(name)
    for question in (
        lambda: tokenizer.encode(rows),
        lambda: tokenizer.decode(np.zeros((1, 1), np.int32)),
        tokenizer.arrays,
    ):
        with pytest.raises(InputError, match=f"{name}: not fitted yet"):
            question()


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_codes_of_another_form_are_refused(name, tokenizers, rows):
    tokenizer = tokenizers[name]
    with pytest.raises(InputError, match=r"fitted on \(N, 24\)"):
        tokenizer.encode(rows[:, :20])
    with pytest.raises(InputError, match="item 2 holds NaN"):
        tokenizer.encode(np.where(np.arange(300)[:, None] == 2, np.nan, rows))
    with pytest.raises(InputError, match="outside 0"):
        tokenizer.decode(np.full((1, 1), 99))
    with pytest.raises(InputError, match="codes have no level"):
        tokenizer.decode(np.zeros((3, 0), np.int32))
    with pytest.raises(InputError, match="beam must be"):
        tokenizer.encode(rows, beam=0)
    with pytest.raises(InputError, match=r"top_m must be between 1 and"):
        tokenizer.encode(rows, top_m=99)


def test_fsq_refuses_a_beam_and_the_others_take_one(tokenizers, rows):
    with pytest.raises(InputError, match="beam must be 1: every scalar of fsq is rounded on its own, got 4"):
        tokenizers["fsq"].encode(rows, beam=4)
    assert tokenizers["rq-vae"].encode(rows, beam=4).codes.shape == (300, 3)


@pytest.mark.parametrize(
    ("collaborative", "message"),
    [
        (None, r"needs behaviour vectors: give collaborative of shape \(300, 8\)"),
        (behaviour_vectors(dimension=5), "dimension 5 where code_dim is 8; set code_dim to 5"),
        (behaviour_vectors(n=20), r"\(20, 8\) where there are 300 items"),
        (np.where(np.arange(300)[:, None] == 9, np.nan, behaviour_vectors()), "behaviour vector of item 9"),
    ],
)
def test_letter_says_which_behaviour_vectors_it_needs(collaborative, message, rows):
    with pytest.raises(InputError, match=message):
        small_tokenizer("letter").fit(rows, collaborative=collaborative)


def test_behaviour_vectors_nobody_reads_are_refused(rows):
    with pytest.raises(InputError, match="rq-vae does not use behaviour vectors"):
        small_tokenizer("rq-vae").fit(rows, collaborative=behaviour_vectors())


@pytest.mark.parametrize(("name", "package"), [("letter", "k_means_constrained"), ("fsq", "vector_quantize_pytorch")])
def test_a_missing_package_is_named_before_anything_is_trained(name, package, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package.replace('_', '-')}.*recollect\[tokenize\]"):
        fitted(name, rows)


def test_letter_without_diversity_does_without_its_package(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "k_means_constrained", None)
    fitted("letter", rows, diversity_weight=0.0, steps=1)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_other_options_are_refused(name, tokenizers):
    arrays = dict(tokenizers[name].arrays())
    with pytest.raises(InputError, match=r"lack 'encoder\.0\.weight'"):
        small_tokenizer(name).take_arrays({"codebook.0": arrays["codebook.0"]})
    with pytest.raises(InputError, match=r"'encoder\.0\.\w+' is \(16.*where the options ask for \(9"):
        small_tokenizer(name, hidden=(9,)).take_arrays(arrays)
    del arrays["codebook.0"]
    tokenizer = small_tokenizer(name)
    with pytest.raises(InputError, match=r"'codebook.0' is missing"):
        tokenizer.take_arrays(arrays)
    assert tokenizer.dimension is None


def test_other_scalar_values_than_fsqs_are_refused(tokenizers):
    arrays = dict(tokenizers["fsq"].arrays())
    arrays["codebook.1"] = arrays["codebook.1"] + 1
    with pytest.raises(InputError, match=r"'codebook\.1' does not hold the 5 values"):
        small_tokenizer("fsq").take_arrays(arrays)


def test_a_learning_rate_that_blows_up_ends_in_an_error(rows):
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        fitted("rq-vae", rows, learning_rate=1e30, steps=50)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RQVAEConfig, {"levels": 0}, "levels must be between 1 and 32, got 0"),
        (RQVAEConfig, {"codebook_size": 0}, "codebook_size must be at least 1"),
        (RQVAEConfig, {"code_dim": 0}, "code_dim must be at least 1"),
        (RQVAEConfig, {"commitment": -1.0}, "commitment must be at least 0"),
        (RQVAEConfig, {"commitment": float("nan")}, "commitment must be at least 0"),
        (RQVAEConfig, {"reseed_every": 0}, "reseed_every must be at least 1 or none"),
        (RQVAEConfig, {"estimator": "gumbel"}, "estimator must be 'straight-through' or 'rotation'"),
        (RQVAEConfig, {"residual_gradient": "both"}, "residual_gradient must be 'detach_code' or 'straight_through'"),
        (RQVAEConfig, {"quantisation_reduction": "max"}, "quantisation_reduction must be 'sum' or 'mean'"),
        (RQVAEConfig, {"reconstruction_reduction": "max"}, "reconstruction_reduction must be 'sum' or 'mean'"),
        (RQVAEConfig, {"hidden": (512, 0)}, "hidden must be widths of at least 1"),
        (RQVAEConfig, {"steps": 0}, "steps must be at least 1"),
        (RQVAEConfig, {"learning_rate": -1.0}, "learning_rate must be a number not below 0"),
        (VQVAEConfig, {"levels": 2}, "vq-vae has 1 level"),
        (LETTERConfig, {"diversity_clusters": 0}, "diversity_clusters must be at least 1"),
        (LETTERConfig, {"codebook_size": 1}, "diversity loss needs 2 codes per level"),
        (LETTERConfig, {"collaborative_weight": -0.1}, "collaborative_weight must be at least 0"),
        (LETTERConfig, {"regroup_every": 0}, "regroup_every must be at least 1"),
        (FSQConfig, {"counts": ()}, "counts must hold between 1 and 32"),
        (FSQConfig, {"counts": (8, 2)}, "counts must be at least 3"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_any_data_is_read(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_digits_and_indices_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"digits must be \(N, 2\)"):
        index_of(np.zeros((1, 3), np.int32), (8, 5))
    with pytest.raises(InputError, match="digits must be below"):
        index_of(np.array([[7, 5]]), (8, 5))
    with pytest.raises(InputError, match=r"must be in 0\.\.39, got 3\.\.40"):
        digits_of(np.array([3, 40]), (8, 5))


def test_the_options_can_be_read_without_torch():
    code = "import sys, recollect.tokenize.neural_config as c; c.LETTERConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent).returncode == 0


if __name__ == "__main__":
    config = small_config("rq-vae", **LONG)
    METHODS["rq-vae"](config).fit(
        unit_embeddings(), checkpoint=Path(sys.argv[1]), progress=KilledAt(300, signal.SIGKILL)
    )
