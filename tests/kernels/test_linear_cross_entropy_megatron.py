"""Under Megatron-Core: its loss, and the weight gradient in `main_grad`, by either of its two conventions."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")

import torch
from torch.nn import functional as F

from megamem.kernels.linear_cross_entropy import LossOptions, linear_cross_entropy

Run = Callable[[int], Callable[..., list[Any]]]
OPTIONS = LossOptions(vocab_size=90, label_smoothing=0.1)


def parameter(dtype: torch.dtype, main_dtype: torch.dtype | None) -> Any:
    weight = torch.nn.Parameter(torch.randn(96, 8, generator=torch.Generator().manual_seed(0)).to(dtype))
    if main_dtype is not None:
        weight.main_grad = torch.zeros(96, 8, dtype=main_dtype)  # type: ignore[attr-defined]
    return weight


def step(weight: Any, into_main_grad: bool, microbatch: int) -> None:
    random = torch.Generator().manual_seed(microbatch)
    hidden = torch.randn(20, 8, generator=random).to(weight.dtype).requires_grad_()
    labels = torch.randint(90, (20,), generator=random)
    linear_cross_entropy(hidden, weight, labels, OPTIONS, into_main_grad=into_main_grad).loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_microbatches_add_up_in_main_grad(dtype: torch.dtype, main_dtype: torch.dtype) -> None:
    plain, fused = parameter(dtype, None), parameter(dtype, main_dtype)
    total = torch.zeros(96, 8)
    for microbatch in range(3):
        step(plain, False, microbatch)
        total += plain.grad.float()
        plain.grad = None
        step(fused, True, microbatch)
    assert fused.grad is None  # without the attribute of Megatron's data parallelism, autograd is given nothing
    rounding = 1e-6 if dtype == main_dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(fused.main_grad.float(), total, rtol=rounding, atol=rounding * total.abs().max().item())
    assert not fused.main_grad[90:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_for_megatrons_hook_is_zero_and_no_memory(dtype: torch.dtype) -> None:
    weight = parameter(dtype, torch.float32)
    weight.grad_added_to_main_grad = False
    step(weight, True, 0)
    assert weight.grad_added_to_main_grad and weight.main_grad.any()
    assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype
    assert weight.grad.is_sparse and weight.grad._values().numel() == 0
    before = weight.main_grad.clone()
    weight.main_grad.add_(weight.grad.data)  # what the hook does with zero_out_wgrad
    assert torch.equal(weight.main_grad, before)


def test_several_uses_in_one_backward() -> None:
    """Multi-token prediction uses the weight several times; autograd adds what it is given for each."""
    weight, twice = parameter(torch.float32, torch.float32), parameter(torch.float32, torch.float32)
    for each in (weight, twice):
        each.grad_added_to_main_grad = False
    step(weight, True, 0)
    step(weight, True, 1)
    losses = []
    for microbatch in (0, 1):
        random = torch.Generator().manual_seed(microbatch)
        hidden = torch.randn(20, 8, generator=random)
        labels = torch.randint(90, (20,), generator=random)
        losses.append(linear_cross_entropy(hidden, twice, labels, OPTIONS, into_main_grad=True).loss.sum())
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(twice.main_grad, weight.main_grad, rtol=1e-6, atol=1e-6)


class Model(torch.nn.Module):
    """Embedding, one layer, output layer and loss; tied: one weight at both ends."""

    def __init__(self, tied: bool, fusion: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.output = torch.nn.Parameter(torch.randn(96, 8, generator=random))
        self.embedding = self.output if tied else torch.nn.Parameter(torch.randn(96, 8, generator=random))
        self.layer = torch.nn.Linear(8, 8)
        torch.nn.init.eye_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.fusion = fusion
        if tied:
            self.output.zero_out_wgrad = True  # type: ignore[attr-defined]  # LanguageModule does this

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(F.embedding(tokens, self.embedding))
        return linear_cross_entropy(hidden, self.output, labels, OPTIONS, into_main_grad=self.fusion).loss.sum()

    def stock(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(F.embedding(tokens, self.embedding))
        logits = (hidden @ self.output[:90].T).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=0.1)


def _under_megatron(tied: bool, fusion: bool, overlap: bool) -> list[tuple[str, float]]:
    """Two microbatches under Megatron's DistributedDataParallel; each parameter's error."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    model, plain = Model(tied, fusion), Model(tied, fusion)
    options = DistributedDataParallelConfig(overlap_grad_reduce=overlap, use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(config=config, ddp_config=options, module=model)
    batches = [torch.randint(90, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for _ in range(2):  # the second step, so that the first one's flags and gradients have been reset
        wrapped.zero_grad_buffer()
        with wrapped.no_sync():
            wrapped(batches[0], batches[1]).backward()
        wrapped(batches[2], batches[3]).backward()
        wrapped.finish_grad_sync()
    (plain.stock(batches[0], batches[1]) + plain.stock(batches[2], batches[3])).backward()
    found = []
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is None
        main_grad: torch.Tensor = ours.main_grad  # type: ignore[attr-defined]
        found.append((name, ((main_grad - theirs.grad).abs().max() / theirs.grad.abs().max()).item()))
    return found


@pytest.mark.megatron
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_under_megatrons_data_parallelism(dist: Run, tied: bool, fusion: bool, overlap: bool) -> None:
    """Both conventions give the gradients of the stock loss, also where the weight is the embedding's too."""
    for errors in dist(2)(_under_megatron, tied, fusion, overlap):
        assert len(errors) == (3 if tied else 4)
        assert max(error for _, error in errors) < 5e-6, errors


def _beside_stock(sequence_parallel: bool, dtype: torch.dtype) -> dict[str, float]:
    """Megatron's output layer and loss under tensor parallelism, and ours on the same weight: relative differences."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, tensor_model_parallel_size=2, params_dtype=dtype,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    group = parallel_state.get_tensor_model_parallel_group()
    layer = ColumnParallelLinear(
        16, 128, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False
    )
    random = torch.Generator().manual_seed(3)
    whole = torch.randn(8, 3, 16, generator=random).to(dtype)
    labels = torch.randint(128, (8, 3), generator=random)
    upstream = torch.rand(8, 3, generator=random)
    results = []
    for is_ours in (False, True):
        part = whole.chunk(2)[group.rank()] if sequence_parallel else whole
        hidden = part.clone().requires_grad_()
        layer.weight.grad = None
        if is_ours:
            outputs = linear_cross_entropy(
                hidden,
                layer.weight,
                labels,
                LossOptions(vocab_size=128),
                group=group,
                sequence_parallel=sequence_parallel,
            )
            loss = outputs.loss
        else:
            loss = vocab_parallel_cross_entropy(layer(hidden)[0].float(), labels)
        loss.backward(upstream)
        assert hidden.grad is not None and layer.weight.grad is not None
        results.append([loss.detach(), hidden.grad.float(), layer.weight.grad.float()])
    return {
        name: ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for name, theirs, ours in zip(("loss", "hidden", "weight"), *results, strict=True)
    }


@pytest.mark.megatron
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_megatrons(dist: Run, sequence_parallel: bool, dtype: torch.dtype) -> None:
    """On two tensor-parallel ranks; in bf16 both round logits, gradients and their sums, each once."""
    for errors in dist(2)(_beside_stock, sequence_parallel, dtype):
        assert max(errors.values()) < (2e-6 if dtype == torch.float32 else 4 * 2.0**-8), errors
