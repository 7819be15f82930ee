"""What is wrong with a request, as a problem document of RFC 9457: nothing of the service itself is in it."""

import json
from http import HTTPStatus

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """An answer other than the one asked for; `detail` is for the caller, and says what would be right."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None, headers: dict[str, str] | None = None):
        super().__init__(status, detail, retry_after, headers)  # all, so that it pickles across processes
        self.status, self.detail, self.retry_after = status, detail, retry_after
        self.headers = headers or {}

    def body(self, request_id: str) -> bytes:
        content = {"type": "about:blank", "title": HTTPStatus(self.status).phrase, "status": self.status}
        return json.dumps(content | {"detail": self.detail, "request_id": request_id}).encode()

    def all_headers(self) -> dict[str, str]:
        again = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {"Content-Type": MEDIA_TYPE} | self.headers | again


def unexpected() -> Problem:
    """In place of an error of our own, which is in the log under the request's id."""
    return Problem(500, "an unexpected error; its cause is in the service's log under this request_id")
