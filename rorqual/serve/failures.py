"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, with the field that is wrong in `param`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rorqual.chat import ChatError
from rorqual.errors import UserError


class Refusal(Exception):
    """An answer that is an error: an HTTP status and what to say."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after_s: int = 0):
        self.status, self.message, self.param, self.code, self.retry_after_s = status, message, param, code, retry_after_s
        super().__init__(message)


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Turn every failure of a request into an answer of that shape."""

    @app.exception_handler(Refusal)
    async def _refused(request: Request, error: Refusal) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
        return JSONResponse(error_body(error.status, error.message, error.param, error.code), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        return JSONResponse(error_body(400, message, param, "invalid_value"), 400)

    @app.exception_handler(ChatError)
    async def _unwritable(request: Request, error: ChatError) -> JSONResponse:
        return JSONResponse(error_body(400, str(error), str(error).partition(":")[0], "invalid_value"), 400)

    @app.exception_handler(UserError)
    async def _wrong(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse(error_body(400, str(error), str(error).partition(":")[0], "invalid_value"), 400)

    @app.exception_handler(HTTPException)
    async def _status(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    async def _broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"{type(error).__name__}: {error}"), 500)
