"""A real Chroma server for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


class Server:
    """`chroma run` on a free loopback port."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        program = Path(sys.executable).parent / "chroma"
        if not program.exists():
            pytest.skip("the chroma command is not installed beside this Python")
        self.process = subprocess.Popen(
            [str(program), "run", "--path", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self.process.poll() is None, "the Chroma server ended at once"
            time.sleep(0.1)
        raise AssertionError("the Chroma server did not start within 40 s")

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
