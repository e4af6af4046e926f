"""The kernels that Transformer Engine's linear layers and norms call, as definitions in PyTorch, for any device.

What the compiled `transformer_engine_torch` computes, without its speed: matrix products, LayerNorm and RMSNorm, and
per-tensor FP8 (delayed and current scaling). Signatures are those of the extension. Everything else that the
extension has is absent; a call to it raises NotImplementedError that names it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FP8 = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}
_DTYPES = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16, **_FP8}


def torch_dtype(te_dtype: Any) -> torch.dtype:
    """The PyTorch dtype of a `transformer_engine_torch.DType`, which is an integer."""
    return _DTYPES[int(te_dtype)]


def get_num_cublas_streams() -> int:
    """Streams of a grouped product."""
    return 1


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    **options: Any,
) -> tuple[Any, Tensor | None, None, None]:
    """op(b) @ op(a), as cuBLAS sees row-major matrices; (product, gradient of the bias, None, None).

    With `grad` a bias asks for its gradient, the sum of b [tokens, out]; without, it is added.
    """
    _refuse(gelu, "GEMM with GELU")
    _refuse(options.get("comm_overlap") is not None, "GEMM overlapped with communication")
    left, right = dense(b), dense(a)
    leading = left.shape[:-1]
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    product = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    bias_gradient = left.sum(dim=0).to(torch_dtype(bias_dtype)) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias.float()
    if not transpose_b:
        product = product.reshape(*leading, product.shape[-1])
    if out is not None:
        out.copy_(out.float() + product.view_as(out) if accumulate else product.view_as(out))
        return out, bias_gradient, None, None
    product = product.to(torch_dtype(out_dtype) if out_dtype is not None else b.dtype)
    return (quantize(product, quantizer) if quantizer is not None else product), bias_gradient, None, None


def te_general_grouped_gemm(
    a: list[Any],
    transpose_a: bool,
    b: list[Any],
    transpose_b: bool,
    out: list[Tensor],
    out_dtype: Any,
    splits: list[int],
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_out: list[Tensor],
    grad: bool,
    workspaces: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    *_: Any,
) -> list[Tensor]:
    """`generic_gemm` for every group. The results, or the token ranges of the one result, are written to `out`."""
    results = list(torch.split(out[0], splits)) if single_output else out
    for index, result in enumerate(results):
        has_bias = bias[index].numel() > 0
        product = generic_gemm(
            a[index], transpose_a, b[index], transpose_b, result, None, out_dtype,
            bias[index] if has_bias else None, bias_dtype, False, None, grad, workspaces[0], workspace_size,
            accumulate, True,
        )  # fmt: skip
        if product[1] is not None:
            bias[index].copy_(product[1])
    return bias


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, _: int, centered: bool
) -> tuple[Any, Tensor, Tensor]:
    """LayerNorm of x [tokens, h]: (y, mean [tokens], 1/deviation [tokens]); `centered` weights are short of 1."""
    rows = x.float()
    mean = rows.mean(dim=-1)
    reciprocal = torch.rsqrt(rows.var(dim=-1, unbiased=False) + eps)
    y = (rows - mean[:, None]) * reciprocal[:, None] * _gamma(weight, centered) + bias.float()
    return _norm_output(y, out, quantizer, dtype), mean, reciprocal


def layernorm_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, reciprocal: Tensor, weight: Tensor, _: int, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weight and of the bias."""
    rows = (x.float() - mean[:, None]) * reciprocal[:, None]
    scaled = dy.float() * _gamma(weight, centered)
    along = (scaled * rows).mean(dim=-1, keepdim=True)
    dx = (scaled - scaled.mean(dim=-1, keepdim=True) - rows * along) * reciprocal[:, None]
    return dx.to(x.dtype), (dy.float() * rows).sum(dim=0).to(weight.dtype), dy.float().sum(dim=0).to(weight.dtype)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, _: int, centered: bool
) -> tuple[Any, None, Tensor]:
    """RMSNorm of x [tokens, h]: (y, None, 1/root mean square [tokens])."""
    rows = x.float()
    reciprocal = torch.rsqrt(rows.square().mean(dim=-1) + eps)
    y = rows * reciprocal[:, None] * _gamma(weight, centered)
    return _norm_output(y, out, quantizer, dtype), None, reciprocal


def rmsnorm_bwd(
    dy: Tensor, x: Tensor, reciprocal: Tensor, weight: Tensor, _: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    rows = x.float() * reciprocal[:, None]
    scaled = dy.float() * _gamma(weight, centered)
    dx = (scaled - rows * (scaled * rows).mean(dim=-1, keepdim=True)) * reciprocal[:, None]
    return dx.to(x.dtype), (dy.float() * rows).sum(dim=0).to(weight.dtype)


def _gamma(weight: Tensor, centered: bool) -> Tensor:
    return weight.float() + 1 if centered else weight.float()


def _norm_output(y: Tensor, out: Any, quantizer: Any, dtype: Any) -> Any:
    y = y.to(torch_dtype(dtype))
    if quantizer is not None:
        return quantize(y, quantizer, out)
    return y if out is None else out.copy_(y)


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """Per-tensor FP8: codes row-wise, transposed, or both, as the quantizer's usages say, and 1/scale."""
    _refuse(noop is not None, "quantisation with a no-op flag")
    fp8 = torch_dtype(quantizer.dtype)
    most = torch.finfo(fp8).max
    rows = tensor.detach().float()
    amax = rows.abs().amax() if rows.numel() else rows.new_zeros(())
    if hasattr(quantizer, "with_amax_reduction"):  # current scaling
        amax = _agreed_amax(amax, quantizer)
        scale = torch.where(amax > 0, most / amax, torch.ones_like(amax))
        if quantizer.force_pow_2_scales:
            scale = torch.exp2(torch.floor(torch.log2(scale)))
    elif hasattr(quantizer, "scale"):  # delayed scaling
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(())
    else:
        raise NotImplementedError(f"{type(quantizer).__name__} is not among the definitions of megamem.testing")
    codes = (rows * scale).clamp(-most, most).to(fp8).view(torch.uint8)
    return _filled(tensor, quantizer, codes, scale.reciprocal().reshape(1), out)


def _agreed_amax(amax: Tensor, quantizer: Any) -> Tensor:
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, quantizer.amax_reduction_group)
    return amax


def _filled(tensor: Tensor, quantizer: Any, codes: Tensor, reciprocal: Tensor, out: Any) -> Any:
    """A Transformer Engine tensor with these codes: `out`, or a new one as the quantizer asks for."""
    data = codes if quantizer.rowwise_usage else None
    turned = codes.reshape(-1, codes.shape[-1]).t().contiguous() if quantizer.columnwise_usage else None
    if turned is not None:
        turned = turned.reshape(codes.shape[-1], *codes.shape[:-1])
    if out is not None:
        out._data, out._transpose, out._transpose_invalid = data, turned, turned is None
        out._scale_inv.copy_(reciprocal)
        return out
    from transformer_engine.pytorch.tensor import float8_tensor

    fields = {
        "data": data, "data_transpose": turned, "fp8_scale_inv": reciprocal, "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer, "fake_dtype": tensor.dtype,
    }  # fmt: skip
    if quantizer.internal:
        return float8_tensor.Float8TensorStorage(**fields)
    del fields["fake_dtype"]
    return float8_tensor.Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, **fields)


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """The values of a per-tensor FP8 tensor, from whichever of its two layouts it has."""
    return _values(tensor).to(torch_dtype(dtype))


def dense(tensor: Any) -> Tensor:
    """The values of an operand in fp32."""
    return _values(tensor) if hasattr(tensor, "_scale_inv") else tensor.detach().float()


def _values(tensor: Any) -> Tensor:
    _refuse(not hasattr(tensor, "_transpose"), f"{type(tensor).__name__}")
    codes: Tensor = tensor._transpose.movedim(0, -1) if tensor._data is None else tensor._data
    scale: Tensor = tensor._scale_inv
    return codes.view(torch_dtype(tensor._fp8_dtype)).float() * scale


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient [tokens, out] of a bias, and the quantised output gradient."""
    return gradient.float().reshape(-1, gradient.shape[-1]).sum(dim=0).to(gradient.dtype), quantize(gradient, quantizer)


def split_quantize(tensor: Tensor, splits: list[int], quantizers: list[Any], **_: Any) -> list[Any]:
    """Each token range by its own quantizer."""
    return [quantize(part, quantizer) for part, quantizer in zip(torch.split(tensor, splits), quantizers, strict=True)]


def fp8_transpose(codes: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Codes [tokens ..., h] as [h, tokens ...]."""
    turned = codes.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Delayed scaling's step: the reduced maxima enter the histories, and give the next scales."""
    most = torch.finfo(torch_dtype(dtype)).max
    at = 0
    for history, scale in zip(histories, scales, strict=True):
        history[0].copy_(amaxes[at : at + scale.numel()])
        at += scale.numel()
        amax = history[0].clone() if algorithm == "most_recent" else history.amax(dim=0)
        found = (most / amax) / 2**margin
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), found, scale))
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise NotImplementedError(f"{what} is not among the definitions of megamem.testing")
