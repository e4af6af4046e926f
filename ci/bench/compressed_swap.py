"""Swap in FP8 against swap as it is: bytes over the link and in host memory, and the error of gradients. Runs on a CPU.

A stack of layers in bf16, everything swapped (`memo`, fraction 1), with the same weights and the same input. Without
compression the gradients are those of stock Megatron, bit by bit; `error` is the norm of a gradient's difference from
these over its norm, of the stack's input and of the weight where it is largest. Kinds of tensors are compressed one at
a time, all layers at once, and together as `activations.compress: fp8` does.

`query and key` is what no option can ask for, measured to show why: attention's backward pass makes its probabilities
anew from them and the log-sum-exp that belongs to the exact ones. Fresh weights would hide it, for their attention is
nearly uniform; so the weights of linear_qkv are four times what Megatron starts with, which makes the logits of
attention as large as those of trained models (standard deviation about 3).

`bf16 itself` is the yardstick: the error of stock Megatron's bf16 gradients, against the same layers in fp32.

Targets: `compress: fp8` moves at most 0.75 of the bytes, and no gradient's error is above 5 %.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import common
import torch
from rig import LayerStack, Shape, single_rank
from torch import Tensor

import megamem
from megamem.integrations import megatron_core
from megamem.ir.activation import SWAP, ActivationPlan
from megamem.planner.activations import plan_activations

SWAPPED: dict[str, Any] = {"policy": "memo", "swap_fraction": 1.0, "keep_last_layers": 0, "host_memory": 1 << 28}
LINEAR_INPUTS = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_SHARPNESS = 4.0
ATTENTION = "self_attention.core_attention"
KINDS: dict[str, dict[str, str]] = {
    "input of linear_qkv": {"self_attention.linear_qkv": "swap/fp8"},
    "input of linear_fc1": {"mlp.linear_fc1": "swap/fp8"},
    "input of linear_fc2": {"mlp.linear_fc2": "swap/fp8"},
    "attention output": {"attention_output": "swap/fp8"},
    "layer input": {"layer_input": "swap/fp8"},
}
CONTENDERS: dict[str, dict[str, Any]] = {
    **{kind: {"table": [{"layers": "all", **row}]} for kind, row in KINDS.items()},
    "what the activation function is given": {
        "compress": "fp8",
        "table": [{"layers": "all", **dict.fromkeys(LINEAR_INPUTS, "swap/none")}],
    },
    "query and key": {},
    "compress: fp8": {"compress": "fp8"},
}


def shapes(quick: bool) -> dict[str, Shape]:
    """MEMO's layer and Llama's; widths are multiples of the codec's groups, as in real models."""
    heads = 1 if quick else 4
    hidden = 128 * heads
    return {
        "memo": Shape(kind="memo", hidden=hidden, heads=heads, kv_groups=heads, head_dim=128, ffn=4 * hidden),
        "llama": Shape(kind="llama", hidden=hidden, heads=heads, kv_groups=1, head_dim=128, ffn=7 * hidden // 2),
    }


def gradients(stack: LayerStack, tokens: int) -> dict[str, Tensor]:
    """One step: of the stack's input, and of every parameter."""
    leaf = stack.leaf(tokens)
    stack.clear_gradients()
    hidden = leaf.clone()
    for index in range(len(stack.layers)):
        hidden = stack.call(index, hidden, tokens)
    hidden.backward(stack.output_gradient(tokens))
    found = {"input": leaf.grad}
    for number, layer in enumerate(stack.layers):
        found |= {f"{number}.{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {name: gradient.float() for name, gradient in found.items() if gradient is not None}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> common.Json:
    """Relative error of the input's gradient, and of the parameter's whose is largest."""
    each = {name: float((found[name] - right).norm() / right.norm()) for name, right in exact.items()}
    of_input = each.pop("input")
    worst = max(each, key=lambda name: each[name])
    return {"input": of_input, "worst_parameter": each[worst], "worst_parameter_name": worst}


@contextlib.contextmanager
def query_and_key_compressed() -> Iterator[None]:
    """Let the plan say of attention's saved tensors what the options refuse."""

    def plan(*arguments: Any) -> ActivationPlan:
        made = plan_activations(*arguments)
        coded = {ATTENTION: replace(SWAP, codec="fp8")}
        return ActivationPlan(rules=tuple(replace(rule, fates={**rule.fates, **coded}) for rule in made.rules))

    with mock.patch.object(megatron_core, "plan_activations", plan):
        yield


def measure(stack: LayerStack, tokens: int, name: str, exact: dict[str, Tensor] | None) -> common.Json:
    """One contender: what it moves, for one layer, and the errors against `exact`."""
    options = {**SWAPPED, **CONTENDERS.get(name, {})}
    guard = query_and_key_compressed() if name == "query and key" else contextlib.nullcontext()
    with guard, megamem.enable({"activations": options}) as handle:
        found = gradients(stack, tokens)
        engine = handle.engine
        assert engine is not None
        engine.end_step()
        stats, layers = engine.stats, len(stack.layers)
        result = {
            "tensors_bytes": stats.swapped_nbytes / layers,
            "link_bytes": stats.link_nbytes / layers,
            "host_bytes": engine.courier.arena.peak / layers,
        }
    if exact is None:
        return {**result, "gradients": found}
    return {**result, "error": errors(found, exact)}


def measure_shape(shape: Shape, layers: int, tokens: int) -> common.Json:
    """All contenders on one stack."""
    stack = LayerStack(shape, layers, torch.bfloat16)
    with torch.no_grad():
        for layer in stack.layers:
            layer.self_attention.linear_qkv.weight.mul_(_SHARPNESS)
    stock = gradients(stack, tokens)
    plain = measure(stack, tokens, "swap", None)
    is_bitwise = all(torch.equal(plain["gradients"][name], right) for name, right in stock.items())
    found = {name: measure(stack, tokens, name, stock) for name in CONTENDERS}
    for result in found.values():
        result["bytes_ratio"] = result["link_bytes"] / plain["link_bytes"]
    exact = LayerStack(shape, layers, torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), stack.parameters(), strict=True):
            ours.copy_(theirs)
    del plain["gradients"]
    return {
        "swap": {**plain, "bitwise": is_bitwise},
        "bf16 itself": errors(stock, gradients(exact, tokens)),
        "contenders": found,
    }


def _print(results: common.Json) -> None:
    for kind, result in results["shapes"].items():
        yardstick = result["bf16 itself"]
        rows = [("bf16 itself, against fp32", "", "", *_percent(yardstick), yardstick["worst_parameter_name"])]
        rows += [
            (
                name,
                common.mib(found["link_bytes"]),
                f"{found['bytes_ratio']:.3f}",
                *_percent(found["error"]),
                found["error"]["worst_parameter_name"],
            )
            for name, found in result["contenders"].items()
        ]
        header = ("compressed", "MiB a layer", "of swap", "error, input", "error, worst", "where")
        common.print_table(f"{kind}: swap is bitwise equal: {result['swap']['bitwise']}", header, rows)
    for target in results["targets"]:
        print(("  met      " if target["met"] else "  NOT MET  ") + target["what"])


def _percent(error: common.Json) -> tuple[str, str]:
    return f"{error['input']:.2%}", f"{error['worst_parameter']:.2%}"


def main() -> None:
    """Run and write."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=4, help="layers of the stack (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the sequence (default: %(default)s)")
    args = parser.parse_args()
    layers, tokens = (2, 64) if args.quick else (args.layers, args.tokens)
    with single_rank("cpu") as rig:
        del rig  # nothing is timed
        found = {kind: measure_shape(shape, layers, tokens) for kind, shape in shapes(args.quick).items()}
    coded = [result["contenders"]["compress: fp8"] for result in found.values()]
    ratio = max(result["bytes_ratio"] for result in coded)
    worst = max(error for result in coded for error in (result["error"]["input"], result["error"]["worst_parameter"]))
    results: common.Json = {"layers": layers, "tokens": tokens, "shapes": found}
    results["targets"] = [
        {"what": f"compress: fp8 moves {ratio:.3f} of the bytes, 0.75 allowed", "met": ratio <= 0.75},
        {"what": f"no gradient is off by more than {worst:.2%}, 5 % allowed", "met": worst <= 0.05},
        {
            "what": "swap without compression is bitwise equal to stock Megatron",
            "met": all(result["swap"]["bitwise"] for result in found.values()),
        },
    ]
    _print(results)
    common.write(args.out, "compressed_swap", args, results)


if __name__ == "__main__":
    main()
