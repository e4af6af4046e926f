"""megamem in a training script of your own: one call after the parallel groups exist, before the model is built.

python examples/01_enable_in_your_script.py            one rank; on a CPU if there is no GPU
torchrun --nproc-per-node 2 examples/01_enable_in_your_script.py
"""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

import megamem
from megamem.integrations.local_spec import local_layer_spec
from megamem.testing.cpu import cpu_rig

SEQUENCE, VOCABULARY = 256, 128


def build_model() -> GPTModel:
    """A GPT of four layers, split over the tensor-parallel ranks."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        tensor_model_parallel_size=dist.get_world_size(),
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    spec = local_layer_spec(config)  # or Megatron's Transformer Engine spec
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope").cuda()


def forward_step(tokens: torch.Tensor, model: GPTModel) -> tuple[torch.Tensor, object]:
    """One microbatch, in the form that Megatron's schedules call it: the model is to predict each token's successor."""
    positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
    losses = model(tokens, positions, None, labels=tokens.roll(-1, dims=1))
    return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def train(steps: int) -> None:
    """Megatron's own schedule and an ordinary optimizer."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = Path(__file__).read_bytes()[: 2 * SEQUENCE]
    tokens = (torch.tensor(list(text)) % VOCABULARY).view(2, SEQUENCE).cuda()
    for step in range(steps):
        optimizer.zero_grad()
        (report,) = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=tokens, model=[model], num_microbatches=1,
            seq_length=SEQUENCE, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        print(f"step {step}: loss {report['loss']:.4f}") if dist.get_rank() == 0 else None


if __name__ == "__main__":
    with cpu_rig() if not torch.cuda.is_available() else contextlib.nullcontext():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl", **alone)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
        with megamem.enable({"activations": {"policy": "memo", "keep_last_layers": 1}}) as handle:
            train(steps=5)
            print(handle.report())
        dist.destroy_process_group()
