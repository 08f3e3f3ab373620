"""MP3 that does not say how long it is, as written to a pipe: if its bit rate changes, libsndfile guesses wrong."""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from typing import BinaryIO

_TAG_BYTES = 10  # of an ID3v2 tag's own header, before a cover and the like
_FRAME_BYTES = 2048  # and more
# "Info" of a constant bit rate, "Xing" of others, with flags of which the lowest says that frames are counted.
_COUNTED = re.compile(rb"(?:Info|Xing)...(.)|VBRI", re.DOTALL)


def counts_its_frames(stream: BinaryIO) -> bool:
    """Whether the first frame of an MP3 says how many there are."""
    head = stream.read(_TAG_BYTES)
    start = 0
    if head[:3] == b"ID3" and len(head) == _TAG_BYTES:
        high, upper, lower, low = head[6:]  # 7 bits each
        start = _TAG_BYTES + (high << 21 | upper << 14 | lower << 7 | low)
    stream.seek(start)
    found = _COUNTED.search(stream.read(_FRAME_BYTES))
    return found is not None and (found[1] is None or bool(found[1][0] & 1))


@contextlib.contextmanager
def piped(stream: BinaryIO) -> Iterator[int]:
    """A file descriptor to read all of the stream from, as of a pipe, where no length is guessed."""
    reading, writing = os.pipe()
    stream.seek(0)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), open(writing, "wb") as pipe:
            shutil.copyfileobj(stream, pipe)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield reading
    finally:
        os.close(reading)
        writer.join()
