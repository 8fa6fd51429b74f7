"""Load and unload adapters of served models: an adapter's name is one that requests may call a model by."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from myserve.engine.scheduling.adapter import AdapterVersion
from myserve.errors import ModelNotFoundError, RequestError
from myserve.server.models.control import UpdateMode, mode_now
from myserve.server.models.snapshots import snapshot_folder

if TYPE_CHECKING:
    from myserve.server.models.models import Models

__all__ = ["load_adapter", "loaded_paths", "unload_adapter"]


async def load_adapter(
    models: Models,
    name: str,
    path: str,
    *,
    weights_dir: str | None,
    model: str | None = None,
    replaces: bool,
    mode: UpdateMode | None = None,
) -> AdapterVersion:
    """Load the adapter of a folder inside the weights directory; return its version once requests may name it.

    `mode`: how requests in flight with the one that it replaces go on; in a pause they follow it, else they finish
    with theirs. Raises RequestError for a name that is a model's or another model's adapter's, BadAdapterError.
    """
    if models.adapter_of(name) is None:
        raise RequestError(f"{name[:200]!r} is a served model's name", param="lora_name")
    folder = snapshot_folder(weights_dir, path)
    holder, wanted = models.holder_of(name), await models.get(model)
    if holder is not None and holder is not wanted:
        raise RequestError(f"{name[:200]!r} is an adapter of another model", param="lora_name")
    loading = wanted.engine.load_adapter(
        name, folder, path=path, replaces=replaces, mode=mode or mode_now(wanted, "drain")
    )
    # shielded: a client that leaves does not stop it
    return await asyncio.shield(asyncio.wrap_future(loading))


async def unload_adapter(models: Models, name: str) -> AdapterVersion:
    """Take an adapter away; requests that have begun with it go on. Raises ModelNotFoundError."""
    holder = models.holder_of(name)
    if holder is None:
        raise ModelNotFoundError(f"the adapter {name[:200]!r} is not loaded")
    return await asyncio.shield(asyncio.wrap_future(holder.engine.unload_adapter(name)))


def loaded_paths(models: Models) -> dict[str, str]:
    """Return the paths of the loaded adapters by name, as SGLang lists them."""
    holders = {name: models.holder_of(name) for name in models.adapters}
    return {name: holder.engine.adapters[name].path for name, holder in holders.items() if holder is not None}
