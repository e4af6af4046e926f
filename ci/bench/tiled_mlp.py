"""Memory and work of the MLP in tiles: what a layer holds, what it needs on top while it runs, its FLOPs. On a CPU.

A stack of equal layers in bf16, counted below autograd (`megamem.testing.live`), host memory left out:

    held        growth of memory from layer to layer in the forward pass: what waits for the backward pass
    forward     most memory in the forward pass above what the layers hold: the running layer, copies under way
    backward    the same in the backward pass
    flops       of matrix products in a step, over those of stock Megatron

Contenders, each alone and with the activation engine's policies:

    stock               Megatron-Core
    chunks              its `mlp_chunks_for_training` (0.18): the MLP called for each chunk of tokens
    chunks, recomputed  each chunk under activation checkpointing, as the Mini-Sequence Transformer (arXiv 2407.15892)
                        and ALST's TiledMLP (arXiv 2506.13996) do: the forward pass of the MLP runs twice
    tiles               `mlp.tiles`

One unit is s*b*h elements. Attention is flash attention; where it is what needs most, more tiles change nothing. What
swap in FP8 needs on top is not what it needs on a GPU: the codec is plain PyTorch here, in several passes over fp32.

Targets: tiles need less than stock on top, in both passes and under every policy; no product twice unless the policy
recomputes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import common
import torch
from megatron.core.transformer.mlp import MLP
from rig import LayerStack, Shape, single_rank
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

import megamem
from megamem.testing.live import LiveStorages

LAYERS = 4
SWAP: dict[str, Any] = {"policy": "memo", "swap_fraction": 1.0, "keep_last_layers": 0, "host_memory": 1 << 30}
POLICIES: dict[str, dict[str, Any] | None] = {
    "off": None,
    "swap": SWAP,
    "swap in fp8": {**SWAP, "compress": "fp8"},
    "recompute": {"policy": "recompute"},
}


def shapes(quick: bool) -> dict[str, Shape]:
    """MEMO's layer and Llama's."""
    heads = 1 if quick else 4
    hidden = 128 * heads
    return {
        "memo": Shape(kind="memo", hidden=hidden, heads=heads, kv_groups=heads, head_dim=128, ffn=4 * hidden),
        "llama": Shape(kind="llama", hidden=hidden, heads=heads, kv_groups=1, head_dim=128, ffn=7 * hidden // 2),
    }


class Flops(TorchDispatchMode):
    """Counts those of matrix products and attention. PyTorch's own counter also puts hooks on modules, for its table by
    module, and these hooks do not allow a backward pass within a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextlib.contextmanager
def chunked(count: int, recompute: bool) -> Iterator[None]:
    """MLPs called chunk by chunk, as Megatron-Core 0.18 does it; `recompute`: each under activation checkpointing."""
    forward: Callable[..., Any] = MLP.forward

    def in_chunks(self: Any, hidden: Any, **kwargs: Any) -> Any:
        def one(part: Any) -> Any:
            output, _ = forward(self, part, **kwargs)
            return output

        run = (lambda part: checkpoint(one, part, use_reentrant=True)) if recompute else one
        outputs = [run(part) for part in hidden.chunk(count, dim=0)]
        return torch.cat(outputs, dim=0), self.linear_fc2.bias

    with mock.patch.object(MLP, "forward", in_chunks):
        yield


def step(stack: LayerStack, tokens: int, end: Callable[[], None] | None) -> None:
    """Both passes, uncounted."""
    hidden = stack.leaf(tokens).clone()
    for index in range(len(stack.layers)):
        hidden = stack.call(index, hidden, tokens)
    hidden.backward(stack.output_gradient(tokens))
    if end is not None:
        end()


def as_in_a_trainer(stack: LayerStack) -> None:
    """Gradients are added to fp32 buffers as they come, as Megatron's DDP does it; the buffers do not count."""

    def add(parameter: Any) -> None:
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    for parameter in stack.parameters():
        owned: Any = parameter
        owned.main_grad = torch.zeros(parameter.shape, dtype=torch.float32)
        owned.grad_added_to_main_grad = False
        parameter.register_post_accumulate_grad_hook(add)


def counted(stack: LayerStack, tokens: int, engine: Any) -> common.Json:
    """The bytes of one step."""
    leaf, gradient = stack.leaf(tokens), stack.output_gradient(tokens)
    after, peaks = [], []
    for parameter in stack.parameters():
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    with LiveStorages() as live:
        live.ignore([leaf, gradient, *stack.parameters()])
        live.ignore([parameter.main_grad for parameter in stack.parameters()])  # type: ignore[attr-defined]
        if engine is not None and engine.courier.arena._memory is not None:
            live.ignore([engine.courier.arena._memory])
        hidden = leaf.clone()
        for index in range(len(stack.layers)):
            live.reset_peak()
            hidden = stack.call(index, hidden, tokens)
            peaks.append(live.peak_bytes)
            after.append(live.live_bytes())
        held = after[-1] - after[-2]
        live.reset_peak()
        hidden.backward(gradient)
        backward = live.peak_bytes
        del hidden
    if engine is not None:
        engine.end_step()
    layers = len(stack.layers)
    return {
        "held_bytes": held,
        "forward_bytes": peaks[-1] - (layers - 1) * held,
        "backward_bytes": backward - layers * held,
    }


def measure(stack: LayerStack, tokens: int, policy: dict[str, Any] | None, tiles: int | None) -> common.Json:
    """One contender: a step in which layers are learned, one that is counted in bytes, and one in FLOPs."""
    sections: dict[str, Any] = {}
    if policy is not None:
        sections["activations"] = policy
    if tiles is not None:
        sections["mlp"] = {"tiles": tiles}
    with contextlib.ExitStack() as exits:
        handle = exits.enter_context(megamem.enable(sections)) if sections else None
        engine: Any = None
        if policy is not None:
            assert handle is not None
            step(stack, tokens, None)
            engine = handle.engine
            engine.end_step()
        found = counted(stack, tokens, engine)
        with Flops() as counter:
            step(stack, tokens, None if engine is None else engine.end_step)
        found["flops"] = counter.total
    return found


def measure_shape(shape: Shape, tokens: int, tiles: tuple[int, ...]) -> common.Json:
    """All contenders on one stack; bytes in units of s*b*h elements besides."""
    stack = LayerStack(shape, LAYERS, torch.bfloat16)
    as_in_a_trainer(stack)
    found: common.Json = {}
    for policy, section in POLICIES.items():
        found[policy] = {"stock": measure(stack, tokens, section, None)}
        for count in tiles:
            found[policy][f"{count} tiles"] = measure(stack, tokens, section, count)
    for count in tiles:
        for recompute in (False, True):
            with chunked(count, recompute):
                name = f"{count} chunks" + ", recomputed" * recompute
                found["off"][name] = measure(stack, tokens, None, None)
    unit = tokens * shape.hidden * 2
    flops = found["off"]["stock"]["flops"]
    for contenders in found.values():
        for result in contenders.values():
            result["flops_ratio"] = result.pop("flops") / flops
            for name in ("held", "forward", "backward"):
                result[f"{name}_units"] = result[f"{name}_bytes"] / unit
    return found


def _print(results: common.Json) -> None:
    for kind, policies in results["shapes"].items():
        rows = [
            (
                f"{policy}: {name}",
                *(f"{found[f'{part}_units']:.2f}" for part in ("held", "forward", "backward")),
                f"{found['flops_ratio']:.3f}",
            )
            for policy, contenders in policies.items()
            for name, found in contenders.items()
        ]
        common.print_table(f"{kind}, units of s*b*h", ("", "held", "forward", "backward", "flops"), rows)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])


def targets(found: common.Json, tiles: tuple[int, ...]) -> list[common.Json]:
    """What the tiles are to reach."""
    ratios = [
        contenders[f"{tiles[-1]} tiles"][part] / contenders["stock"][part]
        for policies in found.values()
        for contenders in policies.values()
        for part in ("forward_bytes", "backward_bytes")
    ]
    twice = [
        contenders[f"{count} tiles"]["flops_ratio"] - contenders["stock"]["flops_ratio"]
        for policies in found.values()
        for policy, contenders in policies.items()
        for count in tiles
        if policy != "recompute"
    ]
    return [
        {
            "what": f"{tiles[-1]} tiles need {min(ratios):.2f} to {max(ratios):.2f} of the memory that stock needs on "
            "top, below 1 asked for",
            "met": max(ratios) < 1,
        },
        {"what": "no matrix product is computed twice unless the policy recomputes", "met": not any(twice)},
    ]


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the sequence (default: %(default)s)")
    args: argparse.Namespace = parser.parse_args()
    tokens, tiles = (128, (4,)) if args.quick else (args.tokens, (4, 16))
    with single_rank("cpu"), contextlib.redirect_stdout(io.StringIO()):  # the tables of what is switched on
        found = {kind: measure_shape(shape, tokens, tiles) for kind, shape in shapes(args.quick).items()}
    results: common.Json = {"tokens": tokens, "layers": LAYERS, "shapes": found, "targets": targets(found, tiles)}
    _print(results)
    common.write(args.out, "tiled_mlp", args, results)


if __name__ == "__main__":
    main()
