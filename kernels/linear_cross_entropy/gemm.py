"""Matrix products that add into fp32 from 16-bit operands, by whatever this device and release of torch has.

Chunk after chunk is added to the input gradient and, over microbatches, to `main_grad`. If those sums were kept in 16
bits, every chunk would round them anew; Megatron-LM's own fused loss lost convergence that way (its pull request 2739).

    CUDA, torch >= 2.8   cuBLAS with fp32 output: exact products, fp32 sums, no temporary
    CPU                  operands widened to fp32: the same result; a temporary of the operands' size in fp32
    anything else        the product of one chunk is rounded to 16 bits once, then added in fp32
"""

import torch

_MIXED_DEVICES = frozenset({"cuda", "meta"})  # meta: so that allocations can be traced without a GPU


def has_mixed_matmul(device: torch.device) -> bool:
    """Whether 16-bit operands can be multiplied into an fp32 result there."""
    return device.type in _MIXED_DEVICES and hasattr(torch.ops.aten.addmm, "dtype_out")


def matmul_into(out_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b. `a` and `b` have one dtype; `out` has it too, or fp32, or any other 16-bit one."""
    if out_MN.dtype == a_MK.dtype:
        if accumulate:
            out_MN.addmm_(a_MK, b_KN)
        else:
            torch.mm(a_MK, b_KN, out=out_MN)
    elif out_MN.dtype == torch.float32 and has_mixed_matmul(out_MN.device):
        # Overloads that torch's type stubs lack.
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out_MN, a_MK, b_KN, torch.float32, out=out_MN)
        else:
            torch.ops.aten.mm.dtype_out(a_MK, b_KN, torch.float32, out=out_MN)
    elif out_MN.dtype == torch.float32 and out_MN.device.type == "cpu":
        matmul_into(out_MN, a_MK.float(), b_KN.float(), accumulate=accumulate)
    elif accumulate:
        out_MN.add_(torch.mm(a_MK, b_KN))
    else:
        out_MN.copy_(torch.mm(a_MK, b_KN))
