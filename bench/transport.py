"""Times forwards of the node pack's client, as a sampler makes them: one after another, with the same conditioning.

Takes one argument, the JSON that transport.ts writes; prints the milliseconds of each step as a JSON list.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from unetd.client import Client, Patience


def main() -> None:
    stated = json.loads(sys.argv[1])
    dtype = {"F16": torch.float16, "F32": torch.float32}[stated["dtype"]]
    context = torch.randn(stated["context"]).to(dtype)
    images = stated["x"][0]
    y = None if stated["adm"] is None else torch.randn(images, stated["adm"]).to(dtype)
    # As in ComfyUI: somebody looks for an interrupt while the answer is awaited.
    patience = Patience("error", lambda: None)
    client = Client.shared([stated["url"]], None)
    steps, warm_up = stated["steps"], stated["steps"] // 10
    times = []
    for step in range(-warm_up, steps):
        x = torch.randn(stated["x"]).to(dtype)
        timesteps = torch.full((images,), float(1000 * (steps - step) / (steps + warm_up)))
        started = time.perf_counter()
        # A sampler hands over copies, of equal content.
        out, _ = client.forward(stated["model"], [], x, timesteps, context.clone(), y, None, patience)
        elapsed = time.perf_counter() - started
        assert torch.equal(out, x), "not the answer to this request"
        if step >= 0:
            times.append(1000 * elapsed)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
