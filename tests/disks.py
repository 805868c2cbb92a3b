"""A full disk, for tests of what is lost on one."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(limit):
    """No file of this process, nor of its children, grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
