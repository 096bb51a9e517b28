"""A folder whose files are not those of its manifest is refused by the name of the file."""

import json

import numpy as np
import pytest
from support.chained_tokenizer import ChainedConfig, ChainedTokenizer

from recollect.errors import ConfigError, InputError, ModelFileError, StorageRefused, UnknownName
from recollect.tokenize.artefact import TokenizedItems
from recollect.tokenize.methods import tokenizer_class
from recollect.types import SemanticIDs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "recollect.tokenize.methods.tokenizer_class",
        lambda name: ChainedTokenizer if name == "chained" else tokenizer_class(name),
    )
    rows = np.random.Generator(np.random.Philox(0)).standard_normal((40, 4)).astype(np.float32)
    tokenizer = ChainedTokenizer(ChainedConfig(levels=2, codebook_size=4)).fit(rows)
    encoding = tokenizer.encode(rows)
    names = np.array([f"i{n}" for n in range(40)], dtype=object)
    return TokenizedItems(SemanticIDs(names, encoding.codes, (4, 4)), tokenizer, encoding).save(tmp_path / "sid")


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name", ["codes.npy", "codebooks.safetensors", "item_ids.txt", "sid_to_items.jsonl", "encoding.safetensors"]
)
def test_one_changed_byte_in_any_file_is_refused(folder, name):
    TokenizedItems.load(folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{name} is not what .*manifest.json was written with"):
        TokenizedItems.load(folder)
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=rf"{name} is missing"):
        TokenizedItems.load(folder)


def test_a_folder_without_manifest_holds_nothing(folder, tmp_path):
    (folder / "manifest.json").unlink()
    for place in (folder, tmp_path / "nowhere"):
        with pytest.raises(ModelFileError, match="holds no semantic IDs"):
            TokenizedItems.load(place)
    (folder / "manifest.json").write_text("[1]")
    with pytest.raises(ModelFileError, match="not a manifest"):
        TokenizedItems.load(folder)


def test_newer_formats_unknown_methods_and_options_are_refused(folder):
    edit_manifest(folder, format=99)
    with pytest.raises(ModelFileError, match="format 99"):
        TokenizedItems.load(folder)
    edit_manifest(folder, format=1, algorithm="from-next-year")
    with pytest.raises(UnknownName, match="from-next-year"):
        TokenizedItems.load(folder)
    edit_manifest(folder, algorithm="chained", options={"levels": 2, "colour": "red"})
    with pytest.raises(ConfigError, match="colour"):
        TokenizedItems.load(folder)
    edit_manifest(folder, options={"levels": 3})
    with pytest.raises(ModelFileError, match="does not hold what 'chained' needs"):
        TokenizedItems.load(folder)


def test_a_manifest_cannot_point_outside_or_leave_files_out(folder):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    edit_manifest(folder, files=files | {"../secret": "0"})
    with pytest.raises(ModelFileError, match="lists files that are none of"):
        TokenizedItems.load(folder)
    for name in ("codes.npy", "item_ids.txt", "codebooks.safetensors"):
        edit_manifest(folder, files={key: value for key, value in files.items() if key != name})
        with pytest.raises(ModelFileError, match=f"does not list {name}"):
            TokenizedItems.load(folder)


def test_codes_that_do_not_fit_the_manifest_are_refused(folder):
    edit_manifest(folder, codebook_sizes=[4, 2])
    with pytest.raises(ModelFileError, match="does not hold semantic IDs"):
        TokenizedItems.load(folder)
    edit_manifest(folder, codebook_sizes=[4, 4, 4])
    with pytest.raises(ModelFileError, match="levels"):
        TokenizedItems.load(folder)


@pytest.mark.parametrize("name", ["", "two\nlines", "cr\rline", 5])
def test_item_ids_that_no_line_can_hold_are_refused(tmp_path, name):
    ids = SemanticIDs(np.array([name], dtype=object), np.zeros((1, 1), dtype=int), (2,))
    with pytest.raises(InputError, match=r"cannot be a line of item_ids\.txt"):
        TokenizedItems(ids).save(tmp_path)


def test_an_unfitted_tokenizer_is_not_saved(tmp_path):
    ids = SemanticIDs(np.array(["i"], dtype=object), np.zeros((1, 1), dtype=int), (2,))
    with pytest.raises(InputError, match="not fitted"):
        TokenizedItems(ids, ChainedTokenizer()).save(tmp_path)


def test_a_full_disk_leaves_no_folder_that_loads(folder, monkeypatch):
    held = TokenizedItems.load(folder)
    other = SemanticIDs(held.ids.item_ids, 3 - held.ids.codes, (4, 4))
    import errno

    import recollect.io

    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    real, count = recollect.io.os.replace, []

    def refuse_second(source, target):
        count.append(target)
        return refuse(source, target) if len(count) == 2 else real(source, target)

    monkeypatch.setattr(recollect.io.os, "replace", refuse_second)
    with pytest.raises(StorageRefused, match="No space left"):
        TokenizedItems(other, held.tokenizer).save(folder)
    monkeypatch.undo()
    with pytest.raises(ModelFileError, match=r"codes\.npy is not what"):
        TokenizedItems.load(folder)
