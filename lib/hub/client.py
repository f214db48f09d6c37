"""The client of the hub: it gives up within seconds, and says in one line what went wrong.

The client of `huggingface_hub` has no timeout for most requests, and repeats others for minutes.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from huggingface_hub.utils import logging
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status
from huggingface_hub.utils.tqdm import disable_progress_bars

# Seconds without a byte after which the hub counts as silent.
PATIENCE = 4.0

# What the library would repeat.
REPEATED = (408, 429, 500, 502, 503, 504)

REASONS = {
    401: "check the name; a private or gated repository needs a token (HF_TOKEN, or hf auth login)",
    403: "the token has no permission for it: accept its terms on the hub, or use another token",
    404: "check the name and the revision",
    408: "try again",
    429: "too many requests: wait some minutes, or give a token (HF_TOKEN) for a higher limit",
}

# What calls of `huggingface_hub` raise, for uploads in threads and unexpected answers too.
HUB_ERRORS = (OSError, ValueError, RuntimeError, LookupError, httpx2.HTTPError)


class HubError(FileMetadataError):
    """The hub did not do what was asked; one line says how.

    The library looks in its cache after an error of the base class, and asks no second time.
    """


def hub_api() -> HfApi:
    """Return the hub's API; from then on all its libraries use the client of this module."""
    set_client_factory(_client)
    if "HF_HUB_DISABLE_XET" not in os.environ:
        # Transfers through Xet have their own client, with timeouts and repetitions of its own.
        constants.HF_HUB_DISABLE_XET = True
    logging.set_verbosity_error()  # what goes wrong is said in one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def reason_of(error: BaseException) -> str:
    """Return the cause of an error of the hub's libraries in one line, with the remedy."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HubError):
            return str(found)
        if isinstance(found, httpx2.TransportError):
            return str(_described(found))
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(found, HfHubHTTPError) and status is not None:
            remedy = REASONS.get(status, "try again later" if status >= 500 else "")
            return f"the hub answered {status}" + (f": {remedy}" if remedy else "")
        if "Consistency check failed" in str(found):
            return "the hub sent a part of a file: try again"
        found = found.__cause__ or found.__context__
    return " ".join(str(error).split("\n")[0].split()) or type(error).__name__


class _Client(httpx2.Client):
    """A client that waits `PATIENCE` for each part of an answer, and asks once."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        request.extensions["timeout"] = httpx2.Timeout(PATIENCE).as_dict()
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as error:
            raise _described(error) from error
        if response.status_code in REPEATED:
            response.read()
            hf_raise_for_status(response)
        if options.get("stream"):
            response.stream = _Stream(response.stream)
        return response


class _Stream(httpx2.SyncByteStream):
    """The body of an answer; an interruption ends the download."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self.stream
        except httpx2.TransportError as error:
            raise _described(error) from error

    def close(self) -> None:
        self.stream.close()


def _described(error: httpx2.TransportError) -> HubError:
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"the hub was silent for {PATIENCE:g} s: try again")
    reason = " ".join(str(error).split()) or type(error).__name__
    return HubError(f"the connection to the hub failed ({reason}): try again")


def _client() -> httpx2.Client:
    # With the hooks of the library's own client, which keep to HF_HUB_OFFLINE.
    hooks = default_client_factory().event_hooks
    return _Client(event_hooks=hooks, follow_redirects=True)
