"""The seam where fault tests stop a process: called at every boundary of a write, does nothing."""


def trigger(name: str) -> None:
    """A boundary called `name` was reached."""
