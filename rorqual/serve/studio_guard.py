"""Who may see the studio. Its pages carry a model, a sandbox and the names of files, so a browser must be let in.

With a bearer key, a browser proves that it knows it once, on a form at /login; it then holds a cookie of this process (HttpOnly,
SameSite=Strict), which a restart makes worthless. A request with the key as a bearer token needs no cookie.
Two things are refused whatever the key: an Origin that is not this server, since a foreign page may otherwise open a socket here;
and on loopback a Host that is not loopback, since a foreign name may be made to point at this machine.
"""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

COOKIE = "rorqual_studio"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_FORM_BYTES = 4096

FORM = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Rorqual studio</title>
<style>body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:1rem}
form{display:grid;gap:.75rem;width:min(22rem,100%%)}input,button{font:inherit;padding:.6rem}</style>
<main><form method="post" action="/login"><h1>Rorqual studio</h1><label for="key">The server's bearer key</label>
<input id="key" name="key" type="password" autocomplete="current-password" autofocus required>
<button>Open</button><p role="alert">%s</p></form></main></html>"""


class Guard:
    """ASGI middleware in front of the studio's pages and socket. An empty key asks for none."""

    def __init__(self, app: Any, key: str, host: str):
        self.app, self.key, self.is_loopback = app, key, host in LOOPBACK
        self._session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._stranger(headers)
        if answer is None and scope["path"] == "/login" and self.key:
            answer = await self._login(scope, receive)
        elif answer is None and not self._is_let_in(headers):
            answer = RedirectResponse("/login", 303) if _wants_page(scope, headers) else PlainTextResponse("a key is needed", 401)
        if answer is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(scope, receive, send)

    def _stranger(self, headers: dict[str, str]) -> Response | None:
        host = urlsplit(f"//{headers.get('host', '')}")
        if self.is_loopback and host.hostname not in LOOPBACK:
            return PlainTextResponse(f"the host {host.hostname} is not this machine", 421)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host.netloc:
            return PlainTextResponse(f"the origin {origin} is another site", 403)
        return None

    def _is_let_in(self, headers: dict[str, str]) -> bool:
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return not self.key or _same(bearer, self.key) or _same(_cookie(headers), self._session)

    async def _login(self, scope: Any, receive: Any) -> Response:
        if scope["method"] != "POST":
            return HTMLResponse(FORM % "")
        given = parse_qs((await _body(receive)).decode("utf-8", "replace")).get("key", [""])[0]
        if not _same(given, self.key):
            return HTMLResponse(FORM % "That is not the key.", 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._session, httponly=True, samesite="strict", secure=scope["scheme"] == "https")
        return answer


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())


def _cookie(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _wants_page(scope: Any, headers: dict[str, str]) -> bool:
    return scope["type"] == "http" and scope["method"] == "GET" and "text/html" in headers.get("accept", "")


async def _body(receive: Any) -> bytes:
    body, more = b"", True
    while more and len(body) <= MAX_FORM_BYTES:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body[:MAX_FORM_BYTES]
