"""Which requests are answered: checks of host, token and origin, and headers that restrict the browser."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "selftrans-token"  #: followed by the port: cookies of a host are shared by its ports
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
#: nothing is loaded from elsewhere, no code is inline, and no other page may embed this one
POLICY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether a server on this host is reached from this machine only."""
    address = _numeric(host)
    return host == "localhost" or (address is not None and address.is_loopback)


class Guard:
    """ASGI middleware. A refused request does not reach the application.

    Host: the names of loopback, and `host`; on anything but loopback also any numeric address, and the name of the machine.
    So a page of another site cannot reach the server by a name of its own that resolves to this address (DNS rebinding).
    Token: if there is one, every request needs it: in the cookie that `?token=` sets, or as `Authorization: Bearer`.
    Origin: a request that changes something must come from this page.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None) -> None:
        self.app, self.token, self.loopback = app, token, is_loopback(host)
        self.names = LOOPBACK | {host.lower()} | (set() if self.loopback else {socket.gethostname().lower()})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in POLICY.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self.refuse(scope)
        await (self.app if refused is None else refused)(scope, receive, guarded)

    def refuse(self, scope: Scope) -> Response | None:
        """The answer to a request that is not served; None for one that is."""
        headers, query = Headers(scope=scope), dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if not self._is_own_host(headers.get("host", "")):
            return PlainTextResponse("this address is not one of the page: open it as it was printed", 421)
        given = query.pop("token", None)
        if self.token is not None and given is not None and scope["method"] == "GET":
            if not self._is_token(given):
                return _token_is_missing()
            path = "/" + scope["path"].lstrip("/")  # `//name` would be another server
            answer = RedirectResponse(path + (f"?{urlencode(query)}" if query else ""), 303)
            answer.set_cookie(_cookie(scope), given, httponly=True, samesite="strict", path="/")
            return answer
        if self.token is not None and not self._is_token(_token_of(headers, _cookie(scope))):
            return _token_is_missing()
        if scope["method"] not in ("GET", "HEAD") and not _own_origin(headers):
            return PlainTextResponse("requests that change something must come from the page itself", 403)
        return None

    def _is_own_host(self, host: str) -> bool:
        """Whether the header Host names this server."""
        parsed = _parsed(f"//{host}") if host and "/" not in host and "@" not in host else None
        name = parsed.hostname if parsed else None
        if name is None:
            return False
        return name in self.names or (not self.loopback and _numeric(name) is not None)

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())


def _token_is_missing() -> Response:
    return PlainTextResponse("this page needs its token: open the address that `selftrans ui` has printed", 401)


def _cookie(scope: Scope) -> str:
    return f"{COOKIE}-{(scope.get('server') or ('', 0))[1]}"


def _token_of(headers: Mapping[str, str], name: str) -> str:
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given.strip()
    # not SimpleCookie: it ends at the first cookie of another program of this host that is not of its form
    return cookie_parser(headers.get("cookie", "")).get(name, "")


def _own_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this page, or from a program that is no browser: those send no origin."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    json = headers.get("content-type", "").partition(";")[0].strip() == "application/json"  # never sent by plain forms
    parsed = _parsed(origin or "")
    own = origin is None or (parsed is not None and parsed.netloc == headers.get("host"))
    return json and site in (None, "same-origin") and own


def _parsed(address: str) -> SplitResult | None:
    """The parts of an address; None for an invalid one, such as `http://[`."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


def _numeric(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A numeric address; None for any other name."""
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
