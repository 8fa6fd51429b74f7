"""Runs in OpenVINO's own environment: a line of JSON in is a workload, a line out is when its tokens came.

In:  {"prompts": [[ids]], "output_lens": [64], "at": [0.0], "n": 1, "sampling": {"temperature": 1.0, "top_p": 0.95}}
Out: {"traces": [{"started": s, "times": [s], "tokens": 64, "prompt_tokens": 128}]}, after a first line {"ready": true}
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

CACHE_GB = 4  # more than the largest workload needs


def load(folder: str) -> Any:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = False  # no two prompts are alike; it would only cost
    return genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")


def generation_config(asked: dict[str, Any], output_len: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = output_len
    config.ignore_eos = True
    sampling = asked["sampling"]
    config.do_sample = sampling["temperature"] > 0
    if config.do_sample:
        config.temperature = sampling["temperature"]
        config.top_p = sampling["top_p"]
        config.num_return_sequences = asked["n"]
    config.logprobs = sampling.get("logprobs", 0)
    return config


def run(pipeline: Any, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a trace for each choice. Times are of the whole request: choices come together, step by step.

    A request is added between two steps, the first after its moment; it counts as sent at its moment.
    """
    began = time.perf_counter()
    count = len(asked["prompts"])
    times: list[list[float]] = [[] for _ in range(count)]
    handles: list[Any] = []
    while len(handles) < count or pipeline.has_non_finished_requests():
        while len(handles) < count and time.perf_counter() - began >= asked["at"][len(handles)]:
            number = len(handles)
            ids = ov.Tensor(np.array([asked["prompts"][number]], dtype=np.int64))
            config = generation_config(asked, asked["output_lens"][number])
            handles.append(pipeline.add_request(number, ids, config))
        if not pipeline.has_non_finished_requests():
            time.sleep(0.001)
            continue
        pipeline.step()
        now = time.perf_counter()
        for handle, moments in zip(handles, times, strict=False):  # the others are still to come
            if handle.can_read():
                handle.read()
                moments.append(now)
    ended = time.perf_counter()
    return [
        {
            "started": began + at,
            "times": moments or [ended],
            "tokens": output_len,
            "prompt_tokens": len(ids),
        }
        for ids, output_len, at, moments in zip(
            asked["prompts"], asked["output_lens"], asked["at"], times, strict=True
        )
        for _ in range(asked["n"])
    ]


def main() -> None:
    pipeline = load(sys.argv[1])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"traces": run(pipeline, json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
