"""The folder a tokenizer leaves: codes, codebooks, item ids, inverse map, and a manifest that vouches for them.

`codes.npy` int32 (N, L); `codebooks.safetensors` (`codebook.0`… and the method's own arrays); `item_ids.txt`, one a
line; `sid_to_items.jsonl`, one ID a line with its items; `encoding.safetensors` (codes as emitted, confidence, entropy,
distance) where it was kept; `manifest.json` with the SHA-256 of each of them, written last. Loading checks every file;
nothing is pickled. A loaded tokenizer encodes bit for bit as the saved one did; one that was fitted on a GPU computes
on one where there is one, else on the CPU.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recollect.config import build, to_dict, versions
from recollect.errors import DataError, InputError, ModelFileError
from recollect.io import atomic_open, read_json, sha256_file, tensor_bytes, write_json
from recollect.tokenize.checkpoint import array_sha256
from recollect.tokenize.groups import tuple_ids
from recollect.tokenize.protocol import Encoding, ItemTokenizer
from recollect.tokenize.text_form import codes_of, texts_of
from recollect.types import SemanticIDs

if TYPE_CHECKING:
    from recollect.tokenize.trie import PrefixTrie

FORMAT = 1
MANIFEST = "manifest.json"
CODES = "codes.npy"
CODEBOOKS = "codebooks.safetensors"
ITEM_IDS = "item_ids.txt"
INVERSE = "sid_to_items.jsonl"
ENCODING = "encoding.safetensors"
_ENCODING_ARRAYS = ("codes", "distance", "confidence", "entropy")


@dataclass(frozen=True)
class TokenizedItems:
    """The semantic IDs of a catalogue, and the tokenizer that made them.

    ids: after collision handling.  tokenizer: fitted; None where the codes come from elsewhere.  encoding: what it
    said of each item, with the codes before collision handling, or None (alternatives are not saved).  details: JSON
    values for the manifest beside what is written anyway: seed, embedder, data fingerprint, `embeddings_sha256` and
    `fit_mask_sha256` (of `array_sha256`), `collisions` (`Resolution.summary`), the fit report.
    """

    ids: SemanticIDs
    tokenizer: ItemTokenizer | None = None
    encoding: Encoding | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def texts(self) -> np.ndarray:
        """(N,) object array: the text of each item's ID, `<a_12><b_200><c_7>`."""
        return texts_of(self.ids.codes)

    @cached_property
    def trie(self) -> PrefixTrie:
        """The prefix tree of the IDs, built at first use."""
        from recollect.tokenize.trie import PrefixTrie

        return PrefixTrie(self.ids.codes, self.ids.codebook_sizes)

    def groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The inverse map as (rows (N,), starts (S + 1,)): `rows[starts[s]:starts[s + 1]]` share ID number s.

        IDs are numbered in lexicographic order, rows of one ID ascend; both int64.
        """
        numbers = tuple_ids(self.ids.codes)
        order = np.argsort(numbers, kind="stable")
        return order, np.searchsorted(numbers[order], np.arange(int(numbers.max(initial=-1)) + 2))

    def items_of(self, text: str) -> list[str]:
        """Ids of the items whose semantic ID is `text`; empty where no item has it.

        Raises:
            InputError: `text` is not a semantic ID.
        """
        import torch

        codes = codes_of(text)
        if len(codes) > self.ids.n_levels:
            return []
        padded = [*codes, *[-1] * (self.ids.n_levels - len(codes))]
        leaf = int(self.trie.walk(torch.tensor([padded], dtype=torch.int64, device=self.trie.device))[0])
        return [] if leaf < 0 else self.ids.item_ids[self.trie.items_at(leaf)].tolist()

    def codebooks(self) -> list[np.ndarray | None]:
        """Per level of the IDs the (K_l, d) float32 codebook; None for a level without one (a collision digit)."""
        arrays = {} if self.tokenizer is None else self.tokenizer.arrays()
        decodable = (self.details.get("collisions") or {}).get("decodable_levels", self.ids.n_levels)
        return [arrays.get(f"codebook.{level}") if level < decodable else None for level in range(self.ids.n_levels)]

    def save(self, folder: str | Path) -> Path:
        """Write the folder (see the module's text), `manifest.json` last; returns it.

        Raises:
            InputError: an item id that a line of `item_ids.txt` cannot hold; a tokenizer that is not fitted.
            StorageRefused: the disk refused; a manifest that was there is gone or matches its files no longer.
        """
        folder = Path(folder)
        names = self.ids.item_ids.tolist()
        broken = [name for name in names if not isinstance(name, str) or len(name.splitlines()) != 1]
        if broken:
            raise InputError(f"item id {broken[0]!r} cannot be a line of {ITEM_IDS}; ids are non-empty one-line texts")
        written = {
            CODES: _npy_bytes(self.ids.codes),
            ITEM_IDS: "".join(f"{name}\n" for name in names).encode("utf-8", "surrogatepass"),
            INVERSE: self._inverse_lines(),
        }
        if self.tokenizer is not None:
            self.tokenizer.check_fitted()
            written[CODEBOOKS] = tensor_bytes(self.tokenizer.arrays())
        if self.encoding is not None:
            kept = {name: getattr(self.encoding, name) for name in _ENCODING_ARRAYS}
            written[ENCODING] = tensor_bytes({name: array for name, array in kept.items() if array is not None})
        for name, content in written.items():
            with atomic_open(folder / name, "wb") as handle:
                handle.write(content)
        write_json(folder / MANIFEST, self._manifest({name: sha256_file(folder / name) for name in sorted(written)}))
        return folder

    def _manifest(self, files: dict[str, str]) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {
            "format": FORMAT,
            "algorithm": None if tokenizer is None else tokenizer.name,
            "options": None if tokenizer is None else to_dict(tokenizer.config),
            "dimension": None if tokenizer is None else tokenizer.dimension,
            "n_items": len(self.ids),
            "codebook_sizes": list(self.ids.codebook_sizes),
            "codes_sha256": array_sha256(self.ids.codes),
            "details": dict(self.details),
            "versions": versions(),
            "files": files,
        }

    def _inverse_lines(self) -> bytes:
        rows, starts = self.groups()
        names = self.ids.item_ids[rows].tolist()
        texts = self.texts[rows[starts[:-1]]].tolist()
        dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        lines = [
            dump({"sid": text, "items": names[start:end]}) + "\n"
            for text, start, end in zip(texts, starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        ]
        return "".join(lines).encode("utf-8", "surrogatepass")

    @classmethod
    def load(cls, folder: str | Path) -> TokenizedItems:
        """Read a folder of `save` and check every file against the manifest.

        Raises:
            ModelFileError: a file is missing, changed, or of a newer format.
            UnknownName: made by a method this version does not know.
            ConfigError: its options are not legal ones of this version.
        """
        folder = Path(folder)
        manifest = _manifest_of(folder)
        files = {name: _checked(folder, name, digest) for name, digest in manifest["files"].items()}
        missing = [name for name in (CODES, ITEM_IDS) if name not in files]
        if missing:
            raise ModelFileError(f"{folder / MANIFEST} does not list {missing[0]}; tokenize again")
        try:
            codes = np.load(io.BytesIO(files[CODES]), allow_pickle=False)
            names = np.array(files[ITEM_IDS].decode("utf-8", "surrogatepass").split("\n")[:-1], dtype=object)
            ids = SemanticIDs(names, codes, tuple(manifest["codebook_sizes"]))
        except (ValueError, TypeError, DataError) as error:
            raise ModelFileError(f"{folder} does not hold semantic IDs: {error}") from error
        tokenizer = None
        if manifest["algorithm"] is not None:
            if CODEBOOKS not in files:
                raise ModelFileError(f"{folder / MANIFEST} does not list {CODEBOOKS}; tokenize again")
            tokenizer = _tokenizer_of(manifest, _arrays_of(folder / CODEBOOKS, files[CODEBOOKS]), folder)
        encoding = None
        if ENCODING in files:
            arrays = _arrays_of(folder / ENCODING, files[ENCODING])
            encoding = Encoding(**{name: arrays[name] for name in _ENCODING_ARRAYS if name in arrays})
        return cls(ids, tokenizer, encoding, manifest["details"])


def _manifest_of(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except InputError as error:
        raise ModelFileError(f"{folder} holds no semantic IDs: {error}") from error
    expected = ("format", "algorithm", "options", "codebook_sizes", "details", "files")
    if not isinstance(manifest, dict) or any(key not in manifest for key in expected):
        raise ModelFileError(f"{path} is not a manifest of semantic IDs")
    if manifest["format"] != FORMAT:
        raise ModelFileError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}; update recollect")
    known = {CODES, CODEBOOKS, ITEM_IDS, INVERSE, ENCODING}
    if not isinstance(manifest["files"], dict) or not known.issuperset(manifest["files"]):
        raise ModelFileError(f"{path} lists files that are none of {', '.join(sorted(known))}")
    return manifest


def _checked(folder: Path, name: str, digest: str) -> bytes:
    path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing; tokenize again") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ModelFileError(f"{path} is not what {folder / MANIFEST} was written with; tokenize again")
    return content


def _tokenizer_of(manifest: dict[str, Any], arrays: dict[str, np.ndarray], folder: Path) -> ItemTokenizer:
    from recollect.tokenize.methods import tokenizer_class

    kind = tokenizer_class(manifest["algorithm"])
    stored = dict(manifest["options"] or {})
    if stored.get("device") == "cuda":  # where it was fitted; this machine may have none
        stored["device"] = "auto"
    tokenizer: ItemTokenizer = kind(build(kind.config_class, stored, str(folder / MANIFEST)))
    try:
        tokenizer.take_arrays(arrays)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"{folder / CODEBOOKS} does not hold what {manifest['algorithm']!r} needs: {error!r}"
        ) from error
    return tokenizer


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _arrays_of(path: Path, content: bytes) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(content)
    except (SafetensorError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from error
