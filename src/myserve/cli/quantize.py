"""`myserve quantize`: a checkpoint in int8, with the bits of `serve --quantize int8` on the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from myserve.cli.console import err, fail
from myserve.errors import MyserveError

__all__ = ["quantize"]


def quantize(
    model: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Write a checkpoint whose linear layers are int8: half the size, served without the one that it is made of.

    The format is compressed-tensors' int8 (W8A8, symmetric, per channel and per token), so other servers read it too.
    """
    try:
        from myserve.engine.weights.int8_checkpoint import write_int8  # imports torch

        write_int8(model, out, trust_remote_code=trust_remote_code)
    except MyserveError as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        fail(f"quantizing needs torch and friends: pip install 'myserve[server]'  (missing: {error.name})")
    except OSError as error:
        fail(f"{model} cannot be quantized into {out}: {error}")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    err.print(f"{out}: {size / 1e6:.0f} MB of weights; serve it with: myserve serve {out}", soft_wrap=True)
