"""What stands between the network and the page: limits on bodies and on clients, and headers for browsers.

Plain ASGI, so that bodies are counted as they arrive, before anything parses or keeps them.
"""

import time
from collections import OrderedDict

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_CLIENTS = 10_000

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class LimitBody:
    """Refuses bodies of more bytes: by what they say, and again by what arrives.

    Args:
      app: inside.
      limit: in bytes.
    """

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "0")
        if not said.isdecimal() or int(said) > self._limit:
            await _refuse(413, self._message())(scope, receive, send)
            return
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._limit:
                raise HTTPException(413, self._message())
            return message

        await self._app(scope, counted, send)

    def _message(self) -> str:
        return f"the request is larger than {self._limit / 2**20:g} MiB"


class LimitRate:
    """Refuses queries of a client that sends too many: a bucket of tokens for each address.

    Args:
      app: inside.
      rate: queries that a client may send in a second, in the long run; twice as many at once.
    """

    def __init__(self, app: ASGIApp, *, rate: float) -> None:
        self._app, self._rate, self._most = app, rate, max(2 * rate, 1)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a connection; only what computes is counted, and that is what is posted."""
        if scope["type"] == "http" and scope["method"] == "POST":
            client = scope["client"][0] if scope.get("client") else ""
            wait = self._take(client, time.monotonic())
            if wait > 0:
                answer = _refuse(429, f"too many queries; try again in {wait:.1f} s")
                answer.headers["Retry-After"] = str(int(wait) + 1)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _take(self, client: str, now: float) -> float:
        """Takes a token; returns the seconds to wait where there is none."""
        tokens, before = self._buckets.pop(client, (self._most, now))
        tokens = min(self._most, tokens + (now - before) * self._rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._buckets[client] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return wait


class AddHeaders:
    """Adds the headers that keep a browser to this page's own files.

    Args:
      app: inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a connection."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, with_headers)


def _refuse(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers={"Connection": "close"})
