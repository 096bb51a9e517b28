"""A fit that is killed goes on to the same bits."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from support.gmm_worlds import clouds

from recollect.errors import ModelFileError, ResumeRefused
from recollect.tokenize.gmm_config import RQGMMConfig
from recollect.tokenize.rq_gmm import RQGMM

VALUES = clouds(seed=1, n=1500, d=12, k=40)

CHILD = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path

    import numpy as np

    from recollect.config import build
    from recollect.progress import SilentProgress
    from recollect.tokenize.gmm_config import RQGMMConfig
    from recollect.tokenize.rq_gmm import RQGMM


    class Deadly(SilentProgress):
        left = int(sys.argv[3])

        def advance(self, steps=1, note=""):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


    options = build(RQGMMConfig, eval(sys.argv[4]), "test")
    RQGMM(options).fit(np.load(sys.argv[1]), checkpoint=Path(sys.argv[2]), progress=Deadly())
""")

FULL = {
    "levels": 3,
    "codebook_size": 24,
    "max_iterations": 10,
    "tolerance": 0.0,
    "checkpoint_iterations": 3,
    "restarts": 1,
}


def killed(tmp_path: Path, after: int, options: dict) -> Path:
    """The checkpoint folder of a fit whose process died by SIGKILL after so many iterations."""
    np.save(tmp_path / "items.npy", VALUES)
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(tmp_path / "items.npy"),
        str(tmp_path / "fit"),
        str(after),
        repr(options),
    ]
    result = subprocess.run(command, capture_output=True, timeout=240)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    return tmp_path / "fit"


@pytest.mark.parametrize(
    ("after", "options", "kept"),
    [
        (8, FULL, ["state.0.safetensors"]),
        (25, FULL | {"residual_memory_mb": 0}, ["level.0.safetensors", "level.1.safetensors", "state.2.safetensors"]),
        (5, FULL | {"batch_rows": 128, "checkpoint_iterations": 2}, ["state.0.safetensors"]),
        (28, FULL | {"levels": 1, "restarts": 3}, ["state.0.safetensors"]),
    ],
    ids=["first level", "third level, streamed", "stepwise", "third restart"],
)
def test_killed_fit_resumes_to_the_same_bits(tmp_path, after, options, kept):
    folder = killed(tmp_path, after, options)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == kept

    config = RQGMMConfig(**options)
    resumed = RQGMM(config).fit(VALUES, checkpoint=folder)
    straight = RQGMM(config).fit(VALUES)

    for name, array in straight.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], array, err_msg=name)
    for one, other in zip(resumed.report.levels, straight.report.levels, strict=True):
        assert one == other
    np.testing.assert_array_equal(resumed.encode(VALUES).codes, straight.encode(VALUES).codes)


def small(**options) -> RQGMM:
    return RQGMM(RQGMMConfig(**({"levels": 2, "codebook_size": 8, "max_iterations": 4} | options)))


def test_finished_checkpoint_gives_the_same_fit_without_iterating(tmp_path):
    first = small().fit(VALUES, checkpoint=tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = small().fit(VALUES, checkpoint=tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    np.testing.assert_array_equal(first.encode(VALUES).codes, again.encode(VALUES).codes)
    assert sorted(before) == ["fit.json", "level.0.safetensors", "level.1.safetensors"]


@pytest.mark.parametrize(
    ("options", "values", "more", "named"),
    [
        ({"shrinkage": 1.0}, VALUES, {}, "options"),
        ({}, VALUES[::-1], {}, "embeddings"),
        ({}, VALUES, {"weight": np.ones(len(VALUES))}, "weight"),
        ({}, VALUES, {"mask": np.arange(len(VALUES)) > 0}, "rows"),
    ],
    ids=["options", "data", "weight", "mask"],
)
def test_checkpoint_of_another_fit_is_refused(tmp_path, options, values, more, named):
    small().fit(VALUES, checkpoint=tmp_path)
    with pytest.raises(ResumeRefused, match=rf"differs in .*{named}"):
        small(**options).fit(values, checkpoint=tmp_path, **more)


def test_torn_checkpoint_file_is_named(tmp_path):
    small().fit(VALUES, checkpoint=tmp_path)
    file = tmp_path / "level.1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelFileError, match=r"level\.1\.safetensors cannot be read"):
        small().fit(VALUES, checkpoint=tmp_path)
