"""A server for pages on this machine: at 127.0.0.1 alone, for whoever has the link.

The link holds a random token, without which every path is missing. A page of another origin can neither read nor
write here: the `Host` must be this one (no name that a stranger's DNS points here), and so must an `Origin`. A policy
lets a page load nothing from anywhere else. Only the given routes exist: no path of a request is ever that of a file.
"""

import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from higgstune.errors import ConfigError, HiggstuneError, InputError

_MAX_BODY = 1 << 20  # bytes
_IDLE = 60  # seconds after which a connection without a request is closed
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Request:
    """What a page requests: the values of its query, or the JSON of its body."""

    query: Mapping[str, str]
    body: Any = None


@dataclass(frozen=True)
class Reply:
    """What a page gets."""

    content: bytes
    kind: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, status: int = 200) -> "Reply":
        """Plain data."""
        content = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return cls(content.encode(), "application/json; charset=utf-8", status)


Route = Callable[[Request], Reply]


def static_route(package: str, name: str) -> Route:
    """A file of a package, such as a page, its style or its script."""
    file = files(package) / "static" / name
    kind = f"{_KINDS[name[name.rindex('.') :]]}; charset=utf-8"
    return lambda _: Reply(file.read_bytes(), kind)


class PageServer:
    """Serves routes: `{"GET /": ..., "GET /rows": ..., "POST /decide": ...}`, all below `url`."""

    def __init__(self, routes: Mapping[str, Route], port: int = 0) -> None:
        """Begin to accept connections; port 0 takes a free one. Raises ConfigError for a port that is taken."""
        token = secrets.token_urlsafe(24)
        handler = type("Handler", (_Handler,), {"routes": routes, "token": token})
        try:
            self._server = _Server(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"port {port} cannot be used ({error}): name another one, or none") from error
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/{token}/"

    def serve(self) -> None:
        """Answer requests until `stop`, or an exception such as that of Ctrl-C."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def stop(self) -> None:
        """End `serve`, which runs in another thread."""
        self._server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(BaseHTTPRequestHandler):
    routes: Mapping[str, Route]
    token: str
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "higgstune", ""
    timeout = _IDLE
    disable_nagle_algorithm = True  # or a small answer waits for 40 ms

    def do_GET(self) -> None:
        self._answer(self._reply("GET", None))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            self.close_connection = True  # what follows is not read
            self._answer(_error(413, "a request has at most 1 MB, and says how long it is"))
            return
        self._answer(self._reply("POST", self.rfile.read(int(length))))

    def _reply(self, method: str, body: bytes | None) -> Reply:
        if refusal := self._refusal(body is not None):
            return refusal
        target = urlsplit(self.path)
        token, _, path = target.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return _error(404, "nothing is here: open the link that the command printed")
        route = self.routes.get(f"{method} /{path}")
        if route is None:
            return _error(404, "nothing is here")
        try:
            query = dict(parse_qsl(target.query, keep_blank_values=True, max_num_fields=50))
            request = Request(query, None if body is None else json.loads(body))
        except ValueError:
            return _error(400, "the request has no valid JSON")
        try:
            return route(request)
        except HiggstuneError as error:
            return _error(400 if isinstance(error, InputError) else 500, str(error))

    def _refusal(self, is_post: bool) -> Reply | None:
        port = self.connection.getsockname()[1]
        own = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        if self.headers.get("Host") not in own:
            return _error(403, "the host has another name: open the link that the command printed")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{name}" for name in own]:
            return _error(403, "another origin has no access")
        site, mode = self.headers.get("Sec-Fetch-Site", "none"), self.headers.get("Sec-Fetch-Mode")
        if site not in ("none", "same-origin") and mode != "navigate":  # a click on the link, in a browser's terminal
            return _error(403, "another site has no access")
        if is_post and self.headers.get_content_type() != "application/json":
            return _error(415, "a request is JSON")
        return None

    def _answer(self, reply: Reply) -> None:
        try:
            self.send_response(reply.status)
            for name, value in {**_HEADERS, **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Type", reply.kind)
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)
        except (BrokenPipeError, ConnectionResetError):  # the tab was closed
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is a person's."""


def _error(status: int, message: str) -> Reply:
    return Reply.of_json({"error": message}, status)
