"""Run by each of two ranks: an exported folder by its tensor-parallel plan; rank 0 writes logits and whole gradients.

tensor_parallel_worker.py FOLDER OUTPUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, dynamic_module_utils
from transformers.distributed import DistributedConfig


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def main() -> None:
    folder, output = sys.argv[1:]
    # Its environment variable was read when the nursery imported transformers; two ranks would copy into one folder.
    modules = Path(output).parent / f"modules_{os.environ['RANK']}"
    dynamic_module_utils.HF_MODULES_CACHE = str(modules)
    plan = DistributedConfig(tp_plan="auto", tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, distributed_config=plan)
    ids = torch.load(f"{folder}/ids.pt")
    out = model(ids, labels=ids)
    out.loss.backward()
    found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    logits = whole(out.logits).detach()
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "gradients": found}, output)
    dist.barrier()


if __name__ == "__main__":
    main()
