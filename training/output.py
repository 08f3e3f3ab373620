"""Files that a run leaves, and those that the user names with --output."""

import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError

csv.field_size_limit(sys.maxsize)  # else 131,072 characters: the transcript of three hours has more
_MARK = ".unfinished"  # a file in a folder that is half written
_NOT_WRITTEN = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc", "iostream error")


@contextlib.contextmanager
def writing(path: Path, argument: str = "--output") -> Iterator[None]:
    """An error of writing within becomes the `UserError` that `path`, given by `argument`, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another {argument}") from error
    except Exception as error:  # of several kinds, by those who write tensors and tokenizers
        if not any(words in str(error) for words in _NOT_WRITTEN):
            raise
        raise UserError(f"{path}: cannot be written (is the disk full?); give another {argument}") from error


def check_writable(file: Path) -> None:
    """To be called before the work whose result `file` is to hold; what is in it stays.

    Raises:
        UserError: it cannot be written, or is a device or a pipe, in whose place a file would come.
    """
    there = file.exists()
    if there and not file.is_file() and not file.is_dir():
        raise UserError(f"{file}: is a device or a pipe; give a file as --output, or none")
    with writing(file):
        file.open("a").close()
        if not there:
            file.resolve().unlink()  # not a link to it


_claims: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _leave_claims() -> None:
    for stream in _claims:
        stream.close()


# A process that reads audio outlives a killed one by seconds, and would keep its files away from those who go on.
os.register_at_fork(after_in_child=_leave_claims)


def claimed(stream: IO[str]) -> bool:
    """Whether this process has the open file to itself, until it is closed or the process ends, however it does.

    Raises:
        OSError: files cannot be locked there, as on some network file systems.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _claims.add(stream)
    return True


@contextlib.contextmanager
def alone(file: Path, work: str) -> Iterator[None]:
    """Keeps other processes away while the context lasts by a lock on `file`, where files can be locked.

    Raises:
        UserError: another is at it, as `work` says.
        OSError: the file cannot be made.
    """
    with file.open("w") as stream:
        with contextlib.suppress(OSError):  # where files cannot be locked
            if not claimed(stream):
                raise UserError(f"{work}; wait for it, or give another --output")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_folder(folder: Path, argument: str = "--output") -> Iterator[None]:
    """As `writing`; whatever stops it takes the folder along, half of which would be in the way of the next.

    A kill leaves it with a mark in it, by which the next knows that it can be deleted.
    """
    try:
        with writing(folder, argument):
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / _MARK).is_file():
                for half in (item for item in folder.iterdir() if item.name != _MARK):
                    shutil.rmtree(half) if half.is_dir() else half.unlink()
            (folder / _MARK).touch()
            yield
            (folder / _MARK).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_empty(folder: Path, argument: str) -> None:
    """Nothing, where the folder that `argument` gives is empty, is yet to be made, or is half of a killed writing's.

    Raises:
        UserError: something is there.
    """
    if not (folder / _MARK).is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give an empty {argument}")


def holds_files(folder: Path) -> bool:
    """Whether there is a folder with anything in it but hidden files."""
    return folder.is_dir() and any(not item.name.startswith(".") for item in folder.iterdir())


def check_name(path: str | Path) -> None:
    """Nothing, where the path can stand in a table of files.

    Raises:
        UserError: it has bytes that are not UTF-8, a tab or a line break.
    """
    name = str(path)
    if name.encode(errors="replace").decode() != name or any(character in name for character in "\t\n\r"):
        raise UserError(f"{name!r}: its name has characters that no table can have; rename it")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which takes `file`'s place at the end: that is whole or as it was, killed whenever.

    Of a link it is the place of what that leads to.
    """
    file = file.resolve()
    unfinished = file.with_name(f".unfinished.{os.getpid()}")  # short, for the file's own name may be as long as can be
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Deletes what killed processes have left of `replacing`; for a folder into which no other writes now."""
    for file in folder.glob(".unfinished.*"):
        file.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """The text in UTF-8, by `replacing`."""
    with replacing(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_rows(file: Path, rows: Iterable[Iterable[Any]], delimiter: str = ",") -> None:
    """The rows as a table with quotation marks where they are needed, by `replacing`."""
    with replacing(file) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)


def write_json(file: Path, content: Any) -> None:
    """Indented JSON with a final newline, by `replacing`."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """What `write_json` wrote, a dictionary unless `kind` is list.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds {json.dumps(content):.20} and no {'object' if kind is dict else 'list'}")
    except ValueError as error:
        raise UserError(f"{file}: is damaged ({error}); restore it, or delete the folder of the run") from error
    return content


def literal(name: str) -> str:
    """A name as Markdown that shows it, without what would be HTML, a link, emphasis or code there."""
    return re.sub(r"([\\<`*\[])", r"\\\1", name)


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, heads and first column `literal`, that column to the left, the others to the right."""
    named = [map(literal, heads), *([literal(first), *cells] for first, *cells in rows)]
    head, *body = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in named]
    rule = ["---" if index == 0 else "--:" for index in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])
