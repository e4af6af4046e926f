"""The local spec's attention and norm against Megatron's own modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron")

with warnings.catch_warnings():  # Megatron's import reports every optional package that is absent
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.utils import GlobalMemoryBuffer

    from megamem.errors import UnsupportedError
    from megamem.integrations.local_spec import FlashAttention, Norm, local_layer_spec
    from megamem.testing.cpu import cpu_rig

pytestmark = [pytest.mark.megatron, pytest.mark.filterwarnings("ignore:full scope is deprecated")]

S, B, HEADS, DIM = 24, 2, 4, 8


def config(**changes: Any) -> TransformerConfig:
    """A small model; `changes` on top."""
    base: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": HEADS * DIM,
        "num_attention_heads": HEADS,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**(base | changes))


class _Group:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1


class _Groups:
    tp = _Group()


@pytest.fixture(autouse=True)
def _rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Megatron's own attention needs, which `initialize_model_parallel` and its seeding otherwise make."""
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    with cpu_rig():
        tracker = get_cuda_rng_tracker()
        tracker.reset()
        tracker.add("model-parallel-rng", 1)
        yield
        tracker.reset()


@pytest.fixture
def qkv() -> Any:
    def make(groups: int) -> list[Any]:
        generator = torch.Generator().manual_seed(groups)
        shapes = [(S, B, heads, DIM) for heads in (HEADS, groups, groups)]
        return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]

    return make


def both(cfg: TransformerConfig, kind: AttnMaskType) -> tuple[Any, Any]:
    """Our attention and Megatron's."""
    arguments = {"config": cfg, "layer_number": 3, "attn_mask_type": kind, "attention_type": "self"}
    return FlashAttention(**arguments), DotProductAttention(**arguments, pg_collection=_Groups())


@pytest.mark.parametrize("layer_scaling", [False, True])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_causal_attention_equals_megatrons(qkv: Any, groups: int, layer_scaling: bool) -> None:
    cfg = config(num_query_groups=groups, apply_query_key_layer_scaling=layer_scaling)
    ours, theirs = both(cfg, AttnMaskType.causal)
    tensors = qkv(groups)
    out, expected = ours(*tensors, None), theirs(*tensors, None)
    assert out.shape == expected.shape == (S, B, HEADS * DIM)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weight).sum(), tensors)
    for grad, want in zip(grads, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(grad, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [AttnMaskType.padding, AttnMaskType.arbitrary, AttnMaskType.padding_causal])
def test_masked_attention_equals_megatrons(qkv: Any, kind: AttnMaskType) -> None:
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    mask[1, :, :, S // 2 :] = True  # the second sequence is half as long
    full = mask | ~torch.ones(S, S, dtype=torch.bool).tril() if kind is AttnMaskType.padding_causal else mask
    ours, theirs = both(config(), kind)
    tensors = qkv(HEADS)
    torch.testing.assert_close(ours(*tensors, mask), theirs(*tensors, full), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_attention_output_and_projection_input_are_one_storage(batch: int, strided: bool) -> None:
    """megamem stores attention's output once; a copy here would double it."""
    saved: list[int] = []
    mixed = torch.randn(S, batch, HEADS, 3 * DIM, requires_grad=True)
    q, k, v = mixed.split(DIM, dim=-1)
    if not strided:
        q = q.contiguous()
    attention, _ = both(config(), AttnMaskType.causal)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.untyped_storage().data_ptr()), t)[1], lambda t: t
    ):
        out = attention(q, k, v, None)
    assert out.is_contiguous()
    assert out.untyped_storage().data_ptr() in saved


def test_attention_keeps_no_scores(qkv: Any) -> None:
    sizes: list[int] = []
    attention, _ = both(config(num_query_groups=2), AttnMaskType.causal)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        attention(*qkv(2), None)
    assert max(sizes) == S * B * HEADS * DIM


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"window_size": (4, 0)}, "window"),
        ({"softmax_type": "off-by-one"}, "softmax_type"),
        ({"context_parallel_size": 2}, "context parallelism"),
    ],
)
def test_what_attention_cannot_do_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{word}.*transformer_engine"):
        FlashAttention(config=config(**changes), layer_number=1, attn_mask_type=AttnMaskType.causal)


def test_forward_refuses_what_it_would_ignore(qkv: Any) -> None:
    attention = FlashAttention(config=config(), layer_number=1, attn_mask_type=AttnMaskType.causal)
    q, k, v = qkv(HEADS)
    with pytest.raises(UnsupportedError, match="bias"):
        attention(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(UnsupportedError, match="packed"):
        attention(q, k, v, None, packed_seq_params=object())
    with pytest.raises(UnsupportedError, match="key-value cache"):
        attention(q[:1], k, v, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm_equals_megatrons(kind: str, dtype: Any) -> None:
    cfg = config(normalization=kind)
    ours, theirs = Norm(cfg, 32).to(dtype), WrappedTorchNorm(cfg, 32).to(dtype)
    gain = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for norm in (ours, theirs):
        norm.weight.data.copy_(gain)
        x = torch.randn(S, B, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = norm(x)
        (y.float() ** 2).sum().backward()
        results.append((y, x.grad, norm.weight.grad))
    # Two orders of rounding: a few units in the last place, of gradients that sum over 48 tokens for the weight.
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 2e-2}
    for mine, their in zip(*results, strict=True):
        torch.testing.assert_close(mine, their, **tolerance)


def test_rms_norm_saves_its_input_and_one_number_a_token() -> None:
    x = torch.randn(S, B, 32, dtype=torch.bfloat16, requires_grad=True)
    sizes = []
    norm = Norm(config(normalization="RMSNorm"), 32).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        norm(x)
    assert sorted(sizes) == sorted([x.nbytes, S * B * 4, 32 * 2])


def test_zero_centered_gain_and_sequence_parallel_mark() -> None:
    norm = Norm(config(layernorm_zero_centered_gamma=True), 32)
    assert not norm.weight.any()
    x = torch.randn(4, 32)
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (32,)))
    assert all(p.sequence_parallel is False for p in norm.parameters())


def test_moe_pattern_alternates_dense_and_expert_layers() -> None:
    cfg = config(num_moe_experts=2, moe_layer_freq=[0, 1, 0, 1], moe_ffn_hidden_size=64, add_bias_linear=False)
    block = local_layer_spec(cfg, pp_rank=0)
    kinds = ["MoE" if "MoE" in repr(spec.submodules.mlp) else "dense" for spec in block.layer_specs]
    assert kinds == ["dense", "MoE", "dense", "MoE"]
    assert block.layer_norm is Norm


def _half_of_a_norm(kind: str) -> list[Any]:
    """Normalise this rank's half of the tokens; the gradients, the parameters' summed as Megatron sums them."""
    rank = torch.distributed.get_rank()
    norm = Norm(config(normalization=kind, tensor_model_parallel_size=2, sequence_parallel=True), 32)
    assert all(p.sequence_parallel is True for p in norm.parameters())
    y, dx = _normalise(norm, slice(rank * S // 2, (rank + 1) * S // 2))
    for parameter in norm.parameters():
        torch.distributed.all_reduce(parameter.grad)
    return [y, dx, *(p.grad for p in norm.parameters())]


def _normalise(norm: Norm, tokens: slice) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(S, B, 32, generator=generator) for _ in range(2))
    part = x[tokens].clone().requires_grad_()
    y = norm(part)
    (y * weight[tokens]).sum().backward()
    return y.detach(), part.grad


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm_of_two_sequence_parallel_ranks_is_the_norm_of_one(kind: str, dist: Callable[..., Any]) -> None:
    halves = dist(2)(_half_of_a_norm, kind)
    norm = Norm(config(normalization=kind), 32)
    y, dx = _normalise(norm, slice(None))
    assert torch.equal(torch.cat([halves[0][0], halves[1][0]]), y)
    assert torch.equal(torch.cat([halves[0][1], halves[1][1]]), dx)
    for rank in (0, 1):
        for grad, parameter in zip(halves[rank][2:], norm.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, atol=1e-5, rtol=1e-5)  # summed in another order
