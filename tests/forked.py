"""Processes that start with torch imported: forked from one that imported it and ran nothing.

Importing what the command line needs takes each new process seconds. :func:`serving` gives the start of a command line,
``[python, this file, socket]``. What follows it (``-m MODULE ...`` or ``SCRIPT ...``) runs in a forked process with the caller's
environment, working directory and standard streams, and ends as it does: with its exit code, or by its signal. A caller that is
killed takes the forked process with it.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and len(sys.argv) > 2:
    # The caller: small, since its own start is all that a test waits for.
    import _socket
    import json
    import signal

    # Signals that come before the forked process is known wait.
    forwarded = signal.SIGINT, signal.SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.connect(sys.argv[1])
    request = json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()]).encode()
    streams = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
    server.sendmsg([len(request).to_bytes(8, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
    server.sendall(request)
    child = int.from_bytes(server.recv(8), "big")
    for number in forwarded:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    status = server.recv(8)
    if not status:
        sys.stderr.write("forked: the server is gone\n")
        os._exit(1)
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "big"))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)

import contextlib
import importlib
import json
import runpy
import select
import signal
import socket
import subprocess
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = ["-m", *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _child(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Never returns."""
    code = 0
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _run(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _handle(caller: socket.socket) -> None:
    """Run what the caller asks for, tell how it ended. Never returns."""
    head, streams, _, _ = socket.recv_fds(caller, 8, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += caller.recv(size - len(request))
    child = os.fork()
    if child == 0:
        caller.close()
        _child(*json.loads(request), streams)
    for stream in streams:
        os.close(stream)
    caller.sendall(child.to_bytes(8, "big"))
    ended = os.pidfd_open(child)
    # The caller says nothing more: it is readable when it is gone.
    ready, _, _ = select.select([ended, caller], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        caller.sendall(status.to_bytes(8, "big"))
    os._exit(0)


def _serve(path: str, modules: list[str]) -> None:
    """Import, then fork a process for each caller, until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(16)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if listener in ready:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _handle(caller)
            caller.close()
        elif sys.stdin in ready:
            return


@contextlib.contextmanager
def serving(*modules: str) -> Iterator[list[str]]:
    """The start of a command line whose processes are forked from one that has imported ``modules``."""
    if not hasattr(os, "pidfd_open"):
        # Not Linux: each process imports for itself.
        yield [sys.executable]
        return
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        find = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
        program = f"{find}; import forked; forked._serve({path!r}, {list(modules)!r})"
        server = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        try:
            assert server.stdout.readline() == "ready\n"
            yield [sys.executable, "-I", "-S", __file__, path]
        finally:
            server.communicate()
