"""Every way a command can end has its exit code, one line on stderr, and no traceback."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from recollect import errors
from recollect.cli import doctor
from recollect.cli.main import main


@pytest.fixture
def ending(monkeypatch, capsys):
    """Run `recollect doctor` with its work replaced by raising `error`; (code, stderr)."""

    def run(error, *words):
        def fail(arguments):
            raise error

        monkeypatch.setattr(doctor, "run", fail)
        code = main(["doctor", *words])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("users must be at least 1, got 0"), 2),
        (errors.DataError("items.csv row 3 has no title"), 2),
        (errors.UnknownName("data set", "x", ["harbor"]), 2),
        (errors.MissingExtra("vllm", "vllm", "serving"), 2),
        (errors.ModelFileError("model.safetensors is truncated"), 2),
        (errors.BackboneConfigError("401 from the server"), 2),
        (errors.JournalLocked("process 7 writes this run"), 2),
        (errors.ResumeRefused("other options"), 2),
        (errors.TooManyFailures("9 of 10 agents failed"), 1),
        (errors.ReplayMismatch("call 3 differs"), 1),
        (errors.StorageRefused("cannot write a: No space left on device"), 74),
        (errors.ServerAway("http://127.0.0.1:1 stayed away"), 75),
        (errors.BudgetReached("100 calls"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
        (OSError(errno.EROFS, "Read-only file system"), 74),
        (PermissionError(errno.EACCES, "Permission denied", "/secret"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_each_error_has_its_code_and_one_line(ending, error, code):
    found, text = ending(error)
    assert found == code
    assert text.startswith("recollect: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text


def test_a_message_with_line_breaks_and_escapes_is_one_clean_line(ending):
    _, text = ending(errors.DataError("title 'a\nb\x1b[31mred\x07\u202e' is bad"))
    assert text == "recollect: title 'a bred' is bad\n"


def test_an_internal_failure_keeps_its_traceback_in_a_file(ending, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, text = ending(ZeroDivisionError("by zero"))
    assert code == 1
    assert text.startswith("recollect: internal failure: ZeroDivisionError: by zero; the traceback is in ")
    assert text.count("\n") == 1
    log = text.rsplit(" ", 1)[1].strip()
    assert "Traceback" in Path(log).read_text()


def test_an_internal_failure_of_a_run_keeps_its_traceback_beside_it(ending, tmp_path):
    code, text = ending(ZeroDivisionError("by zero"), "--out", str(tmp_path))
    assert code == 1
    assert f"{tmp_path}/error.log" in text
    assert "ZeroDivisionError" in (tmp_path / "error.log").read_text()


def test_debugging_prints_the_traceback(ending, monkeypatch):
    monkeypatch.setenv("RECOLLECT_DEBUG", "1")
    code, text = ending(ZeroDivisionError("by zero"))
    assert code == 1
    assert "Traceback" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code_after_its_clean_up(tmp_path, number, code):
    script = textwrap.dedent(
        """
        import sys, time
        from recollect.cli import doctor
        from recollect.cli.main import main

        def wait(arguments):
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                open("cleaned", "w").close()

        doctor.run = wait
        sys.exit(main(["doctor"]))
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, text = child.communicate(timeout=60)
    assert child.returncode == code
    assert text in ("recollect: terminated\n", "recollect: interrupted\n")
    assert (tmp_path / "cleaned").exists()


def test_a_resumable_ending_says_how_to_continue(tmp_path, monkeypatch, capsys):
    from recollect.cli import simulate

    def away(arguments):
        raise errors.ServerAway("http://127.0.0.1:1 stayed away")

    monkeypatch.setattr(simulate, "run", away)
    assert main(["simulate", "--out", str(tmp_path)]) == 75
    assert capsys.readouterr().err == (
        f"recollect: http://127.0.0.1:1 stayed away; to continue: the same command with --resume --out {tmp_path}\n"
    )


def test_a_reader_that_stops_early_is_no_failure(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "recollect", "doctor", "--skip-models", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
