"""The end of a contender's line in Python: loads works and runs them as asked. The other end is contender.ts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Job = dict[str, Any]
Values = npt.NDArray[np.float32]
#: Runs the work as often as the job says, and gives the result.
Loaded = Callable[[], Values]

REPLIES = 3


def tensors_of(job: Job) -> dict[str, Values]:
    """The float32 tensors of a safetensors file."""
    with open(job["data"], "rb") as file:
        data = file.read()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[begin + at[0] : begin + at[1]], np.float32).reshape(entry["shape"]).copy()
        for name, entry in header.items()
        for at in [entry["data_offsets"]]
    }


def contend(load: Callable[[Job], Loaded]) -> None:
    """Answers questions until standard input ends."""
    loaded: Loaded | None = None
    replies = os.fdopen(REPLIES, "w")
    for line in sys.stdin:
        question = json.loads(line)
        reply: dict[str, Any] = {}
        try:
            if "load" in question:
                loaded = load(question["load"])
                np.ascontiguousarray(loaded(), np.float32).tofile(question["load"]["out"])
            elif "run" in question and loaded:
                cpu, begun = time.process_time(), time.perf_counter()
                loaded()
                ms = (time.perf_counter() - begun) * 1000
                reply = {"ms": ms, "cpuMs": (time.process_time() - cpu) * 1000}
            else:
                loaded = None
        except Exception as error:
            # Whatever it is, the other end says it and goes on.
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)
