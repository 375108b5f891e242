"""An OpenAI-compatible server of one model: transformers' own, which is told of our class."""

from __future__ import annotations

import socket
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_serve_available

from supra_cli.core.checkpoint.describing import with_mark
from supra_cli.core.checkpoint.record import PROVENANCE
from supra_cli.core.errors import SupraError, UsageError
from supra_cli.core.modeling import SupraForCausalLM


def serve(path: Path | str, *, host: str, port: int, device: str, dtype: torch.dtype) -> None:
    """Load the model in a directory and answer requests for it, under the directory's name, until interrupted; after
    `check_installed` and `check_free`.

    Requests are answered one after the other by `generate`. Continuous batching is never switched on: it keeps pages of
    keys and values, which recurrent layers do not have.
    """
    for file in sorted(with_mark(Path(path)) - {PROVENANCE}):  # which is ours alone to read
        raise UsageError(
            f"{path}/{file} begins with a byte-order mark, which transformers' server cannot read; save it without one"
        )
    described, _ = PreTrainedConfig.get_config_dict(path)
    if not described.get("architectures"):
        raise UsageError(
            f"{path}/config.json names no class under 'architectures', by which the server finds the model; "
            "write there what the base's has"
        )
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    # The server asks no Auto class: it looks for the class that config.json names in transformers. It has to be told by
    # the server's own name of that module, which transformers makes a second time while its processors are imported.
    model_manager.transformers.SupraForCausalLM = SupraForCausalLM
    Serve(str(path), host=host, port=port, device=device, dtype=str(dtype).removeprefix("torch."))
    # It ends by an interrupt alone, which the event loop that it closes may swallow.
    raise KeyboardInterrupt


def check_installed() -> None:
    """UsageError unless transformers finds all that its server needs."""
    if not is_serve_available():
        raise UsageError(
            "supra serve needs fastapi, uvicorn and openai, which are not all installed: "
            "`pip install '.[serving]'` in a clone of supra brings them"
        )


def check_free(host: str, port: int) -> None:
    """Raise an error unless a server can listen there: before a model is loaded, which the server would do first."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
    except (socket.gaierror, UnicodeError):
        raise UsageError(
            f"--host {host!r} is no address of this machine; 127.0.0.1 is for this machine alone"
        ) from None
    except OSError as error:
        raise SupraError(
            f"cannot listen at {host}, port {port}: {error.strerror.lower()}; choose another --port or --host"
        ) from None
