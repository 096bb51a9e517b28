"""`recollect tokenize` and `recollect tokenize-bench` killed while they embed: nothing is embedded twice or differs."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from support.token_worlds import CountingEmbedder, themed_log, write_shop

from recollect.cli.main import main
from recollect.tokenize import embeddings

PART = 8

# The command in a process of its own, whose embedder writes down each text, and which kills itself.
CHILD = textwrap.dedent("""
    import os, signal, sys

    import recollect.backbones.resolve as resolve
    from recollect.cli.main import main
    from recollect.tokenize import embeddings
    from support.token_worlds import CountingEmbedder

    moment, log, embeddings.PART = sys.argv[1], open(sys.argv[2], "w"), int(sys.argv[3])


    class Logged(CountingEmbedder):
        def embed(self, texts):
            if moment == "embedding" and self.calls == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            log.writelines(f"{text}\\n" for text in texts)
            log.flush()
            return super().embed(texts)


    def joined(*arguments):
        join(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)


    def torn(path, mode):
        if path.name == "000002.npy":
            path.with_name(path.name + ".tmp-half").write_bytes(b"\\x93NUMPY")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, mode)


    join, whole = embeddings._join, embeddings.atomic_open
    if moment == "all parts there":
        embeddings._join = joined
    if moment == "writing a part":
        embeddings.atomic_open = torn
    resolve.open_embedder = lambda name: Logged()
    main(sys.argv[4:])
""")

COMMANDS = {
    "tokenize": ("tokenize", "shop", "--method", "rq-kmeans", "--levels", "2", "--codebook-size", "4"),
    "tokenize-bench": (
        *("tokenize-bench", "shop", "--core", "0", "--methods", "rq-kmeans", "--levels", "2", "--codebook-size", "4"),
        *("--seeds", "1", "--resamples", "50", "--probe-epochs", "1"),
    ),
}
RESULTS = {
    "tokenize": ("embeddings.npy", "codes.npy", "codebooks.safetensors", "item_ids.txt", "sid_to_items.jsonl"),
    "tokenize-bench": ("embeddings.npy", "rows/rq-kmeans/seed-0/codes.npy"),
}


def run(folder, words):
    """The texts the command embeds in this process."""
    embedder = CountingEmbedder()
    embedder.seen = []
    embed = embedder.embed
    embedder.embed = lambda texts: embedder.seen.extend(texts) or embed(texts)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(embeddings, "PART", PART)
        patched.setattr("recollect.backbones.resolve.open_embedder", lambda name: embedder)
        assert main(words) == 0
    return embedder.seen


def killed(folder, moment, words):
    """The texts the command had embedded when it died by SIGKILL."""
    log = folder / "embedded.txt"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, moment, str(log), str(PART), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    return log.read_text().splitlines()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A folder with the data and a finished run of each command, and the texts those embedded."""
    folder = tmp_path_factory.mktemp("whole")
    titles = [f"thing {item}" for item in range(60)]
    titles[41] = titles[3]  # equal texts are embedded once
    write_shop(folder / "shop", themed_log(n_users=60, length=6), titles)
    return folder, {command: run(folder, [*words, "--out", command]) for command, words in COMMANDS.items()}


@pytest.mark.parametrize(
    ("command", "moment", "before"),
    [
        ("tokenize", "embedding", 24),
        ("tokenize", "writing a part", 24),
        pytest.param("tokenize", "all parts there", 59, marks=pytest.mark.slow),
        pytest.param("tokenize-bench", "embedding", 24, marks=pytest.mark.slow),
    ],
)
def test_a_killed_embedding_goes_on_without_the_finished_parts_and_gives_the_same_artefact(
    uninterrupted, tmp_path, command, moment, before
):
    whole, embedded = uninterrupted
    (tmp_path / "shop").symlink_to(whole / "shop")
    words = [*COMMANDS[command], "--out", "run"]
    first = killed(tmp_path, moment, words)
    assert len(first) == before
    assert not (tmp_path / "run" / "embeddings.json").exists()
    kept = 16 if moment == "writing a part" else before
    rest = run(tmp_path, [*words, "--resume"])
    assert first[:kept] + rest == embedded[command]
    assert len(embedded[command]) == 59
    for name in RESULTS[command]:
        assert (tmp_path / "run" / name).read_bytes() == (whole / command / name).read_bytes(), name
    assert not list((tmp_path / "run").glob("embeddings.parts-*"))
    if command == "tokenize":
        manifests = [
            json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "run", whole / command)
        ]
        assert manifests[0] == manifests[1]
