"""Running Python in several processes that make up one jax.distributed."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(*commands: list, timeout: int = 300) -> list[str]:
    """What each command, of arguments to Python, prints; all run at once."""
    # Without the devices that conftest.py asks for in this process.
    env = {key: x for key, x in os.environ.items() if key != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(ROOT)
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in commands
    ]
    try:
        out = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, out, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in out]


def address() -> str:
    """Of a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return f"localhost:{found.getsockname()[1]}"
