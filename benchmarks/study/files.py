"""JSON files that are whole or not there at all."""

import contextlib
import errno
import json
import math
import os
import pathlib
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes the whole file, or leaves the old one as it is."""
    text = json.dumps(finite(content), indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def finite(content: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if "No space left on device" in str(error):  # of libraries that are not Python
            return True
        error = error.__cause__ or error.__context__
    return False
