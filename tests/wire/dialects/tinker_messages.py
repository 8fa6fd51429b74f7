"""The message kinds of `tinker_public.proto` that a sample's answer has, read by Google's own library."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["SampleResponse"]

MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "SampleResponse": {
        "sequences": (1, "SampledSequence*"),
        "prompt_logprobs": (2, "bytes"),
        "topk_prompt_logprobs": (3, "TopkLogprobs"),
        "prompt_cache_hit_tokens": (4, "int32"),
        "target_prompt_logprobs": (5, "Tensor"),
    },
    "SampledSequence": {
        "stop_reason": (1, "int32"),
        "tokens": (2, "bytes"),
        "logprobs": (3, "bytes"),
        "topk_sampled_logprobs": (4, "TopkLogprobs"),
    },
    "TopkLogprobs": {
        "token_ids": (1, "bytes"),
        "logprobs": (2, "bytes"),
        "k": (3, "uint32"),
        "length": (4, "uint32"),
    },
    "SparseCsr": {"values": (1, "bytes"), "crow_indices": (2, "bytes"), "col_indices": (3, "bytes")},
    "Tensor": {
        "dense": (1, "bytes"),
        "sparse_csr": (2, "SparseCsr"),
        "dtype": (3, "int32"),
        "shape": (4, "int64*"),
    },
}
SCALARS = {"bytes": 12, "int32": 5, "int64": 3, "uint32": 13}


def _sample_response() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="tinker_answers.proto", package="tinker_answers", syntax="proto3"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            base = kind.rstrip("*")
            added = message.field.add(name=field, number=number, label=3 if kind.endswith("*") else 1)
            if base in SCALARS:
                added.type = SCALARS[base]
            else:
                added.type, added.type_name = 11, f".tinker_answers.{base}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tinker_answers.SampleResponse"))


SampleResponse = _sample_response()
