"""Progress goes to the stream it is given, in lines people can read, and counts right."""

import io

from hypothesis import given
from hypothesis import strategies as st

from recollect.progress import PlainProgress, SilentProgress, TerminalProgress, open_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal_and_bars_where_there_is_one():
    assert isinstance(open_progress(io.StringIO()), PlainProgress)
    progress = open_progress(Terminal())
    assert isinstance(progress, TerminalProgress)
    progress.close()
    progress.close()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_plain_progress_says_the_stage_and_at_most_each_tenth(steps):
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.stage("simulating", sum(steps))
    for n in steps:
        progress.advance(n)
    lines = stream.getvalue().splitlines()
    assert lines[0] == f"recollect: simulating (0 of {sum(steps)})"
    assert lines[-1] == f"recollect: simulating ({sum(steps)} of {sum(steps)})"
    assert len(lines) <= 11


def test_bars_show_stage_count_and_note_without_reading_markup():
    stream = Terminal()
    progress = TerminalProgress(stream)
    progress.stage("reading [bold]x[/bold]", 3)
    progress.advance(2, note="[red]note")
    progress.advance()
    progress.stage("unknown length")
    progress.advance(5)
    progress.close()
    text = stream.getvalue()
    assert "3/3" in text
    assert "[bold]x[/bold]" in text


def test_silence_is_silent(capsys):
    progress = SilentProgress()
    progress.stage("x", 3)
    progress.advance()
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
