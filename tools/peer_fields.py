"""Collect the names of the fields that other servers' requests have, for the table in `myserve.wire.peers`.

    python tools/peer_fields.py openai                        # from the installed client
    python tools/peer_fields.py vllm chat protocol.py 0.21    # from a source file, with the version that it is of
    python tools/peer_fields.py sglang chat protocol.py 4c82e07
    python tools/peer_fields.py llama.cpp chat server-task.cpp 00efb3e
    python tools/peer_fields.py tgi chat lib.rs db931fc

Names alone are kept, in `tools/peer_fields.json`: peer -> version, and route -> names. `tests/wire/test_peers.py` fails
for a name that no table and no request of ours has, and where the installed client knows more than the file.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

__all__ = ["fields_of_class", "fields_of_cpp", "fields_of_openai", "fields_of_rust"]

DATA = Path(__file__).with_name("peer_fields.json")

CLASSES = {
    "chat": ("ChatCompletionRequest", "ChatRequest"),
    "completions": ("CompletionRequest",),
    "generate": ("GenerateParameters", "SamplingParams"),
    "native": ("GenerateReqInput",),
    "native_sampling": ("SamplingParams",),
    "stream_options": ("StreamOptions",),
}


def fields_of_class(source: str, names: tuple[str, ...]) -> list[str]:
    r"""Return the annotated fields of the Python classes of these names; private ones are none.

    >>> fields_of_class("class A:\n    x: int = 0\n    _y: int\n    z = 3", ("A",))
    ['x']
    """
    found = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name in names
    ]
    return sorted(
        {
            item.target.id
            for node in found
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            if not item.target.id.startswith("_") and "ClassVar" not in ast.unparse(item.annotation)
        }
    )


def fields_of_cpp(source: str) -> list[str]:
    """Return the keys that a server in C++ reads from a request, with nlohmann's JSON.

    >>> fields_of_cpp('json_value(data, "top_k", 1); data.contains("lora"); json_value(opt, "x", 0); data.find("stop")')
    ['lora', 'stop', 'top_k']
    """
    keys = re.findall(r'json_value\(\s*data,\s*"([^"]+)"|\bdata\.(?:contains|find|at)\("([^"]+)"\)', source)
    return sorted({first or second for first, second in keys})


def fields_of_rust(source: str, names: tuple[str, ...]) -> list[str]:
    r"""Return the public fields of the Rust structs of these names.

    >>> fields_of_rust("struct A {\n    pub x: u32,\n    y: u32,\n}\nstruct B {\n    pub z: u32,\n}", ("A",))
    ['x']
    """
    bodies = [
        found[2] for found in re.finditer(r"struct (\w+) \{(.*?)\n\}", source, re.DOTALL) if found[1] in names
    ]
    return sorted({field for body in bodies for field in re.findall(r"^\s*pub (\w+):", body, re.MULTILINE)})


def fields_of_openai() -> dict[str, list[str]]:
    """Return the fields that the installed client can send, by route."""
    from openai.types import completion_create_params as completions
    from openai.types.chat import chat_completion_stream_options_param as options
    from openai.types.chat import completion_create_params as chat

    return {
        "chat": sorted(chat.CompletionCreateParamsBase.__annotations__),
        "completions": sorted(completions.CompletionCreateParamsBase.__annotations__),
        "stream_options": sorted(options.ChatCompletionStreamOptionsParam.__annotations__),
    }


def main(peer: str, route: str = "", file: str = "", version: str = "") -> None:
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    if peer == "openai":
        import openai

        known[peer] = {"version": openai.__version__, "fields": fields_of_openai()}
    else:
        source = Path(file).read_text()
        if file.endswith(".py"):
            names = fields_of_class(source, CLASSES[route])
        else:
            names = (
                fields_of_cpp(source)
                if file.endswith(".cpp")
                else fields_of_rust(source, sum(CLASSES.values(), ()))
            )
        entry = known.setdefault(peer, {"version": version, "fields": {}})
        entry["version"] = version
        entry["fields"][route] = names
    DATA.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
