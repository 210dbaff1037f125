"""Files that are whole: the old content or the new, whatever ends the program that writes them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file at once, so that a reader, a kill, a full disk or a power cut never leaves half of it.

    Makes its folder where there is none. Raises OSError, with the old file untouched and nothing left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            # Some disks say only here that they are full; without it a power cut may keep the name and lose the rest.
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        # Its own failure, as in a folder that is gone, would hide the reason.
        with contextlib.suppress(OSError):
            part.unlink()
        raise
