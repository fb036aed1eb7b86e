"""The process of `selftrans ui`: a socket, the address to open, the server until it is interrupted."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch
import uvicorn

from selftrans.messages import plural, printable
from selftrans.ui.guard import is_loopback
from selftrans.ui.server import Page, application

LEAST_TOKEN = 12  #: characters


def serve(
    runs: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    token: str | None = None,
    device: str | None = None,
) -> None:
    """Show the page of these folders (none: `runs`, or else the current one) until the process is interrupted.

    Args:
        host: where the server listens. On anything but loopback `token` is required. port: 0 takes a free one.
        token: that the browser must know; `auto` makes one. device: of sampling; None: the GPU if there is one.
    Raises ValueError for folders, hosts, ports and tokens that cannot be used.
    """
    token = chosen_token(host, token)
    folders = list(runs) or [path for path in (Path("runs"), Path()) if path.is_dir()][:1]
    page = Page(folders, device=None if device is None else torch.device(device))
    listener = listening(host, port)
    port = listener.getsockname()[1]
    shown = shown_host(host)
    query = f"?token={quote(token, safe='')}" if token else ""
    count = plural(len(page.folders.listing().runs), "run")
    print(f"{count} in {', '.join(printable(path) for path in folders)}")
    print(f"Open http://{shown}:{port}/{query}   (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(
        application(page, host=host, token=token),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has closed everything by then
        pass
    finally:
        listener.close()
    print("ended")


def shown_host(host: str) -> str:
    """The host in the address to open; for all addresses of this machine its name."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def chosen_token(host: str, token: str | None) -> str | None:
    """The token to ask for. ValueError where one is missing or too short."""
    if token == "auto":
        return secrets.token_urlsafe(24)
    if token is None and not is_loopback(host):
        raise ValueError(f"--host {printable(host)} is reached from other machines; give --token too (auto makes one)")
    if token is not None and (
        len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token
    ):
        raise ValueError(f"--token needs {LEAST_TOKEN} characters at least, without spaces; auto makes one")
    return token


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError where the host or the port cannot be used."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port} is no port; use 1 to 65535, or 0 for a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # `::` takes addresses of IPv4, too
        return socket.create_server(address, family=family, backlog=128, dualstack_ipv6=both)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # create_server adds the address once more
        raise ValueError(
            f"{printable(host)}:{port} cannot be used ({reason}); give another --port (0: a free one) or --host"
        ) from error
