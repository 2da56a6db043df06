"""python -m qaperso.serve --workdir DIR [--host 127.0.0.1] [--port 8000] [--keys FILE]

Serves a run over HTTP: a page at /, and an API that OpenAI's clients speak, in which `user` names the querier. SIGTERM and
Ctrl+C stop taking requests and end those under way. docs/serving.md describes it all; /openapi.json does for programs.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from qaperso.errors import UserError, command
from qaperso.mesh import start_runtime
from qaperso.run import open_run, restore
from qaperso.server.api import make_app
from qaperso.server.keys import VARIABLE, load_keys
from qaperso.server.protocol import Limits
from qaperso.server.service import Service

# Bytes of a request's line and headers.
HEADERS = 32_768


class Server(uvicorn.Server):
    """A server that tells the service first when it shuts down."""

    def __init__(self, config: uvicorn.Config, service: Service):
        """Serves a configuration's application, which is the service's."""
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more requests, ends those under way, and leaves."""
        self._service.draining = True
        await super().shutdown(sockets)


def make_server(service: Service, host: str, port: int) -> Server:
    """The server of a service; it is not bound to its port before it runs."""
    config = uvicorn.Config(
        make_app(service),
        host=host,
        port=port,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,  # paths name queriers
        server_header=False,
        h11_max_incomplete_event_size=HEADERS,
        timeout_graceful_shutdown=int(service.limits.timeout) + 1,
    )
    return Server(config, service)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    standard = Limits()
    parser = argparse.ArgumentParser(prog="python -m qaperso.serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 = whoever reaches this machine (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 = any that is free (default: %(default)s)")
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help=f"JSON, {{KEY: null or [querier, ...]}}; {VARIABLE} works too"
    )
    parser.add_argument(
        "--slots", type=int, default=standard.slots, help="replies written at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=int, default=standard.queue, help="requests that may wait (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=standard.tokens, help="of a reply (default: %(default)s)")
    parser.add_argument("--max-body", type=int, default=standard.body, help="bytes of a request (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=standard.timeout, help="seconds for an answer (default: %(default)s)"
    )
    known = parser.parse_args(arguments)
    limits = Limits(known.slots, known.queue, known.max_tokens, known.max_body, known.timeout)
    _check(limits, known.port)
    keys = load_keys(known.keys, os.environ)
    listening = _listen(known.host, known.port)
    start_runtime(alone=True)
    run = open_run(Path(known.workdir), enrolled=False)
    trainable, _, step = restore(run)
    service = Service(run, trainable, step, keys, limits)
    del run, trainable
    server = make_server(service, known.host, known.port)
    # Uvicorn raises the signal that ended it once more, for whoever handled it before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    port = listening.getsockname()[1]
    shown = f"[{known.host}]" if ":" in known.host else known.host
    print(f"serving {', '.join(list(service.models)[:4])} on http://{shown}:{port}", flush=True)
    server.run(sockets=[listening])
    return 0


def _check(limits: Limits, port: int) -> None:
    lowest = (("slots", limits.slots, 1), ("queue", limits.queue, 0), ("max-tokens", limits.tokens, 1))
    for name, value, least in (*lowest, ("max-body", limits.body, 1024), ("timeout", limits.timeout, 1)):
        if not least <= value < 2**31:
            raise UserError(f"--{name} is {value}, expected {least} or more, less than 2**31")
    if not 0 <= port < 65536:
        raise UserError(f"--port is {port}, expected 0 to 65535")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before minutes go into a model that nobody could ask."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port} cannot be listened at ({error.strerror}); give another"
        ) from error
    return listening


if __name__ == "__main__":
    sys.exit(main())
