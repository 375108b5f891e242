"""The hub over the network: whether it can be reached, and what its answers and failures are called here."""

from __future__ import annotations

import errno
import os
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from supra_cli.core.errors import NotAuthorisedError, NotFoundError, SupraError, UsageError, first_line

if TYPE_CHECKING:
    from supra_cli.core.hub import Source

_CONNECT_SECONDS = 3.0

# Of httpx, or of its successor, whichever huggingface_hub imports.
_NO_ANSWERS = ("TooManyRedirects", "DecodingError", "UnsupportedProtocol")


def reach() -> str:
    """Whether models can be downloaded, in words."""
    if _offline_by_choice():
        return "not asked: HF_HUB_OFFLINE is set"
    return "reachable" if online() else "cannot be reached"


@contextmanager
def answers() -> Iterator[None]:
    """In here are calls of huggingface_hub and nothing else: what they stumble over is an answer that no hub gives.

    That is then a FileMetadataError, huggingface_hub's word for an answer of which it noticed so itself.
    """
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, HFValidationError, HTTPError

    try:
        yield
    except (HfHubHTTPError, HFValidationError):  # of which some are a ValueError, too
        raise
    except HTTPError as error:
        if type(error).__name__ not in _NO_ANSWERS:
            raise
        raise FileMetadataError(str(error)) from error
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FileMetadataError(str(error)) from error


@contextmanager
def translated(source: Source) -> Iterator[None]:
    """The hub's exceptions in this project's words and exit codes."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise NotAuthorisedError(
            f"{source.repo} is gated: accept its terms on its hub page, then run `hf auth login` or set HF_TOKEN"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        of_alias = f" ({source.repo})" if source.kind == "alias" else ""
        raise NotFoundError(
            f"'{source.name}'{of_alias} is neither a directory here nor a model on the hub that you may see; "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{source.repo} has no revision '{source.revision}'") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        # huggingface_hub says "not in the cache" of whatever kept it from asking the hub, and keeps that as the cause.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(source, error.__cause__) from error
        if isinstance(error.__cause__, errors.FileMetadataError):
            raise no_hub() from error
        raise NotFoundError(
            f"{source.repo} is not on this machine and {why_offline()}; "
            f"run `supra prefetch {source.name}` where there is a network, or give a model's directory"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refused(source, error) from error
    except errors.FileMetadataError as error:
        raise no_hub() from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise _broken_off(source) from error
    except OSError as error:
        if error.errno is None:  # what came was less than was announced
            raise _broken_off(source) from error
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise SupraError(
            f"cannot write to the hub's cache ({first_line(error)}); set HF_HOME to a place where you may write"
        ) from error


def _broken_off(source: Source) -> NotFoundError:
    return NotFoundError(
        f"the connection to the hub broke off while fetching {source.repo}; run again and it goes on from there"
    )


def _refused(source: Source, error: Exception) -> SupraError:
    """What to do about the status that the hub answered with."""
    status = error.response.status_code if error.response is not None else "no answer"
    if status == 403 and (said := error.response.headers.get("X-Error-Message")):
        return NotAuthorisedError(f"the hub refuses {source.repo} ({status}) and says: {said}")
    if status in (401, 403):
        return NotAuthorisedError(
            f"the hub refuses {source.repo} ({status}); check HF_TOKEN, or run `hf auth login` again"
        )
    if status == 429:
        return NotFoundError(
            f"the hub takes no more requests from here for now (429), so {source.repo} was not fetched; "
            "run again in some minutes, or with a token (`hf auth login`), which allows for more"
        )
    return NotFoundError(f"the hub did not deliver {source.repo} ({status}); try again later")


def no_hub() -> NotFoundError:
    return NotFoundError(f"what answers at {_endpoint()} is no Hugging Face hub; check HF_ENDPOINT and your proxy")


def why_offline() -> str:
    return "HF_HUB_OFFLINE is set" if _offline_by_choice() else "the hub cannot be reached"


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def check_endpoint() -> None:
    """Before anything of huggingface_hub is imported, which takes an address apart as it comes."""
    try:
        address = urllib.parse.urlsplit(_endpoint())
        fits = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(f"HF_ENDPOINT is '{_endpoint()}', expected an address such as https://huggingface.co; mend it")


def check_token() -> None:
    """NotAuthorisedError for a token that cannot be sent, over which huggingface_hub's client would stumble."""
    from huggingface_hub.utils import build_hf_headers

    sent = build_hf_headers().get("authorization", "")
    if not (sent.isascii() and sent.isprintable()):
        raise NotAuthorisedError(
            "the token for the hub holds characters that no token has; check HF_TOKEN, or run `hf auth login` again"
        )


def _offline_by_choice() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def online() -> bool:
    """Whether the hub takes a connection within a few seconds: a closed network must not mean minutes of retries."""
    if _offline_by_choice():
        return False
    endpoint = urllib.parse.urlsplit(_endpoint())
    if endpoint.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(endpoint.netloc):
        return True  # only the proxy knows
    connected: list[bool] = []

    def connect() -> None:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        try:
            socket.create_connection((endpoint.hostname, port), timeout=_CONNECT_SECONDS).close()
        except OSError:
            return
        connected.append(True)

    attempt = threading.Thread(target=connect, daemon=True)  # in a thread because name look-up heeds no timeout
    attempt.start()
    attempt.join(_CONNECT_SECONDS + 1)
    return bool(connected)
