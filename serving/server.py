"""The application around the endpoints: who may ask, how errors are told, and uvicorn, which runs it."""

import asyncio
import ipaddress
import secrets
import socket
from base64 import b64decode
from collections.abc import Callable
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.interface.api import Api
from serving.interface.fields import RequestError
from serving.metrics import Counted
from serving.worker import Worker

GRACE = 2  # seconds for answers to end by themselves when the server does
CUT = 1  # more for what cutting them takes
KEEP_ALIVE = 65  # seconds that an idle connection stays: longer than clients keep one, or they would meet its end


# ---------------------------------------------------------------- the application


def build_app(api: Api, host: str, origins: list[str], key: str | None) -> Starlette:
    """The application. host: the name by which it is reached; origins: of pages that may use it; key: that it asks for.

    Preflights of CORS carry no key.
    """
    routes = api.routes()
    paths = {route.path for route in routes}
    middleware = [
        Middleware(Counted, metrics=api.worker.metrics, paths=paths),
        Middleware(Guard, check=site_check(host, origins)),
        Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]),
    ]
    if key:
        middleware.append(Middleware(Guard, check=key_check(key)))
    handlers = {RequestError: on_error, HTTPException: on_http_error, ClientDisconnect: on_disconnect}
    handlers[Exception] = on_failure
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False  # to a place that the Host header names
    return app


async def on_error(request: Request, error: RequestError) -> Response:
    return refusal(error)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    words = {404: "there is nothing at this path", 405: f"this path does not take {request.method}"}
    return refusal(RequestError(words.get(error.status_code, error.detail), status=error.status_code))


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # which nobody reads


async def on_failure(request: Request, error: Exception) -> Response:
    return refusal(RequestError(f"the server failed: {type(error).__name__}", status=500))


# ---------------------------------------------------------------- who may ask


class Guard:
    """Lets a request through unless the check raises a RequestError, which is then the answer."""

    def __init__(self, app: ASGIApp, check: Callable[[Request], None]):
        self.app, self.check = app, check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            try:
                self.check(Request(scope))
            except RequestError as error:
                app = refusal(error)
        await app(scope, receive, send)


def refusal(error: RequestError) -> JSONResponse:
    return JSONResponse(error.to_json(), error.status, error.headers)


def site_check(host: str, origins: list[str]) -> Callable[[Request], None]:
    """Refuse pages of other sites, and names that are not this server's.

    A page whose own name is made to lead here (DNS rebinding) sends that name as Host. Addresses cannot be made to.
    """
    names = {"localhost", host.lower(), socket.gethostname().lower()}
    names |= {urlsplit(origin).hostname for origin in origins}

    def check(request: Request) -> None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not is_address(hostname(host)) and hostname(host) not in names:
            raise RequestError(f"this server is not {host!r}; --cors_origin names other ways to it", status=403)
        if origin is None or origin in origins or "*" in origins or urlsplit(origin).netloc.lower() == host.lower():
            return
        raise RequestError(f"pages of {origin} may not use this server; --cors_origin lets them", status=403)

    return check


def hostname(host: str) -> str:
    """The name in a Host header; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def key_check(key: str) -> Callable[[Request], None]:
    """Refuse whoever lacks the key, which a browser asks for as a password; /health needs none."""

    def check(request: Request) -> None:
        if request.scope["path"] == "/health" or secrets.compare_digest(given_key(request), key.encode()):
            return
        scheme = 'Basic realm="any name, and the key as password"' if request.scope["path"] == "/" else "Bearer"
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        raise RequestError(message, code="invalid_api_key", status=401, WWW_Authenticate=scheme)

    return check


def given_key(request: Request) -> bytes:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # as which headers are decoded, whatever they are
    try:
        return b64decode(value, validate=True).partition(b":")[2] if scheme.lower() == "basic" else b""
    except ValueError:
        return b""


# ---------------------------------------------------------------- uvicorn


class Server(uvicorn.Server):
    """Says its address once it listens, and cuts the answers that take too long at the end."""

    def __init__(self, config: uvicorn.Config, worker: Worker, address: str):
        super().__init__(config)
        self.worker, self.address = worker, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"Listening on {self.address}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE, self.worker.cut)
        await super().shutdown(sockets)


def run_server(
    worker: Worker, bound: socket.socket, host: str, origins: list[str], key: str | None, max_body: int
) -> None:
    """Answer requests at the socket until a signal ends it. host: as the person named the address."""
    app = build_app(Api(worker.served, worker, max_body), host, origins, key)
    config = uvicorn.Config(
        app,
        log_config=None,  # what is logged as a warning or an error goes to standard error
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEEP_ALIVE,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE + CUT,
    )
    shown = f"[{host}]" if ":" in host else host
    Server(config, worker, f"http://{shown}:{bound.getsockname()[1]}").run([bound])
