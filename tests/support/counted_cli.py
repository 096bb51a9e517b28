"""`recollect` with a list of what was paid for: `python -m support.counted_cli LOG simulate …`.

The key of every call is appended to LOG when the model is asked, one a line, straight to the file, so that the list
survives `kill -9`.
"""

import os
import sys

from recollect.backbones import journaled
from recollect.backbones.protocol import call_key
from recollect.backbones.server import ServerBackbone
from recollect.cli.main import main


def count_calls(path: str) -> None:
    """Note the key of every call that leaves the program from now on."""
    log = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    answer_batch, submit = journaled.answer_batch, ServerBackbone.submit

    def note(backbone, calls):
        os.write(log, "".join(f"{call_key(backbone.fingerprint, call)}\n" for call in calls).encode())

    def counted_batch(backbone, calls):
        note(backbone, calls)
        return answer_batch(backbone, calls)

    def counted_submit(backbone, call):
        note(backbone, [call])
        return submit(backbone, call)

    journaled.answer_batch = counted_batch
    ServerBackbone.submit = counted_submit


if __name__ == "__main__":
    count_calls(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
