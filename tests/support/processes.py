"""Commands that tests start in processes of their own."""

import os
import socket
import subprocess
from pathlib import Path

from tests.support.paths import REPO


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that imports this checkout and uses one thread."""
    return dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1', **more)


def run(
    *command: object, cwd: Path | None = None, timeout: float = 500, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; ``more`` are environment variables."""
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout
    )


_RESERVED: list[socket.socket] = []


def free_port() -> str:
    """A port of this machine that nobody else gets until this process ends; torch's server, which sets SO_REUSEADDR, may listen."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(('127.0.0.1', 0))
    _RESERVED.append(server)
    return str(server.getsockname()[1])
