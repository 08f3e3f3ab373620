"""Files that the user names with --output."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An `OSError` within becomes the `UserError` that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another --output") from error


def check_writable(file: Path) -> None:
    """To be called before the work whose result `file` is to hold; what is in it stays.

    Raises:
        UserError: it cannot be written.
    """
    there = file.exists()
    with writing(file):
        file.open("a").close()
        if not there:
            file.unlink()
