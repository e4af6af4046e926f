"""Fake tensors give the shipped trace of Llama-7B (4K tokens, 4 microbatches), which another program recorded.

Two and three layers are traced. Every further one adds the same requests and bytes, so the 32 of the shipped trace
follow. The spec is that program's: Megatron's local one, with attention by PyTorch's kernel and a copy of its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamem.ir.allocation import Problem, read_problem
from megamem.planner.allocation.sweep import Sweep

SHIPPED = Path(__file__).parents[2].parent / "shared" / "data" / "traces" / "llama7b_4k.csv.gz"
pytestmark = pytest.mark.megatron


def peak_live(problem: Problem) -> int:
    sweep = Sweep.of(problem)
    return sweep.max_live * sweep.unit


@pytest.mark.skipif(not SHIPPED.is_file(), reason="no shipped traces beside the repository")
def test_llama_7b_is_traced_as_shipped() -> None:
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    (few, low), (more, high) = json.loads(done.stdout.splitlines()[-1])
    shipped = read_problem(SHIPPED)
    assert more + 29 * (more - few) == len(shipped)
    assert high + 29 * (high - low) == pytest.approx(peak_live(shipped), rel=1e-6)


def main() -> None:
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megamem.integrations import allocation_run
    from megamem.integrations.allocation_run import Job, groups_of, trace_gpt
    from megamem.integrations.megatron_profile import GptShape
    from megamem.testing.cpu import cpu_rig

    class Attention(torch.nn.Module):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()

        def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return output.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def spec(_config: Any, **_where: Any) -> Any:
        made = get_gpt_layer_local_spec(normalization="RMSNorm")
        made.submodules.self_attention.submodules.core_attention = Attention
        return made

    allocation_run.local_layer_spec = spec  # the recording program's layers, where the product has its own
    found = []
    for num_layers in (2, 3):
        shape = GptShape(
            num_layers=num_layers, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32,
            num_query_groups=32, seq_length=4096, micro_batch_size=1, vocab_size=32000, swiglu=True,
            normalization="RMSNorm", disable_bias_linear=True, bf16=True,
        )  # fmt: skip
        job = Job(shape=shape, num_microbatches=4)
        with groups_of(job), cpu_rig():
            problem = trace_gpt(job).problem()
        found.append((len(problem), peak_live(problem)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
