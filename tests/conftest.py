"""Fixtures shared by every test: where the real data and the embedded models are."""

import os
import signal
from pathlib import Path

import pytest

# Child processes and torch each spin on every core they may use; several at once are slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts background jobs deaf to SIGINT, and their children inherit it; interrupted children need ears.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets (`recsys/…`); tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("RECOLLECT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "recsys").is_dir():
        pytest.skip(f"real data not found at {folder}; set RECOLLECT_TEST_DATA")
    return folder


def _model_folder(name: str) -> Path:
    from recollect.backbones.store import model_folder
    from recollect.errors import ModelFileError

    try:
        return model_folder(name)
    except ModelFileError as error:
        pytest.skip(f"model {name} cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """Folder of the embedded SmolLM2-135M-Instruct (config, tokenizer, safetensors)."""
    return _model_folder("smollm2")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of the embedded all-MiniLM-L6-v2."""
    return _model_folder("minilm")
