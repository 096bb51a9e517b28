"""Run folders before and after something."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but locks, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("-lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
