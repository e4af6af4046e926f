"""Small GPTs with Transformer Engine's layers, trained with and without megamem, for test_te_live.py.

usage: python te_cases.py FOLDER CASE ...

FOLDER holds an unpacked wheel of Transformer Engine; its Python runs, on kernels written in PyTorch
(`megamem.testing.transformer_engine`). A process of its own, because Megatron-Core finds Transformer Engine when it is
imported, or never. Prints one JSON object: what each case found, by its name.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from megamem.testing.transformer_engine import claiming_cuda, install

Fields = dict[str, Any]

LLAMA: Fields = {"layers": 4, "activation": "swiglu", "norm": "RMSNorm", "bias": False, "kv_groups": 2}
GPT: Fields = {"layers": 4, "activation": "gelu", "norm": "LayerNorm", "bias": True}
OVERLAP: Fields = {"ddp": {"overlap_grad_reduce": True}}
SWAP: Fields = {"policy": "memo", "keep_last_layers": 0}
FUSED: Fields = {"gradient_accumulation_fusion": True}


def fp8(recipe: str, **config: Any) -> Fields:
    """Model fields for FP8."""
    return {"dtype": "bfloat16", "config": {"fp8": "hybrid", "fp8_recipe": recipe, **config}}


class FusedOnCpu:
    """The two functions of Apex's CUDA extension that Megatron's own output layer calls, in PyTorch."""

    @staticmethod
    def wgrad_gemm_accum_fp32(source: Any, grad_output: Any, main_grad: Any) -> None:
        main_grad.add_(grad_output.float().t().matmul(source.float()))

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def make_case(fields: Fields, options: Fields) -> Any:
    """The case, with its groups made."""
    import torch

    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase

    fields = {**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))}
    case = PipelineCase(gpt=GptCase(transformer_engine=True, **fields), **options)
    init_parallel(case.gpt)
    return case


def layers_of(chunks: Any) -> list[Any]:
    """Transformer Engine's layers with weight gradients."""
    return [
        module for chunk in chunks for module in chunk.modules() if getattr(module, "wgrad_store", None) is not None
    ]


def split(fields: Fields, options: Fields, name: str) -> Fields:
    """Stock Megatron against a schedule: what differs, how much was split, what is left in the model afterwards."""
    from megatron.core.tensor_parallel import layers

    from megamem.testing import pipeline

    built: list[Any] = []
    build = pipeline.build_pipeline
    found: Fields = {}

    def note(case: Any) -> Any:
        built[:] = build(case)
        return built

    def look(handle: Any) -> None:
        found.update(split=len(handle.schedule.queue.split), unsplit=handle.schedule.unsplit())
        found["waiting"] = len(handle.schedule.queue.waiting)

    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", FusedOnCpu, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(pipeline, "build_pipeline", note),
    ):
        case = make_case(fields, options)
        stock = pipeline.train_pipeline(case)
        ours = pipeline.train_pipeline(case, {"name": name}, inspect=look)
    found["differences"] = ours.differences(stock)
    found["matrices"] = sum(len(gradient.shape) > 1 for gradient in stock.gradients.values())
    modules = layers_of(built)
    found["layers"] = len(modules)
    found["stores"] = sorted({type(module.wgrad_store).__name__ for module in modules})
    found["hidden"] = sum("weight" in vars(module) for module in modules)
    return found


def tiled(fields: Fields, options: Fields, sections: Fields) -> Fields:
    """Stock Megatron against MLPs in one tile and in three: what differs, and by how much."""
    from megatron.core.tensor_parallel import layers

    from megamem.testing import pipeline
    from megamem.testing.parity import relative_error

    found: Fields = {}
    with (
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", FusedOnCpu, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
    ):
        case = make_case(fields, options)
        stock = pipeline.train_pipeline(case)
        for tiles in (1, 3):
            schedule = sections.get("schedule")
            others = {key: value for key, value in sections.items() if key != "schedule"}
            ours = pipeline.train_pipeline(case, schedule, config={**others, "mlp": {"tiles": tiles}})
            errors = [relative_error(ours.gradients[key], right) for key, right in stock.gradients.items()]
            found[str(tiles)] = {"differences": ours.differences(stock), "error": max(errors)}
    return found


def refused(fields: Fields, name: str, attribute: str, value: Any) -> Fields:
    """With this set on every layer: the error."""
    from megamem.errors import MegamemError
    from megamem.integrations.megatron_core import enable
    from megamem.testing import pipeline

    case = make_case(fields, {})
    chunks = pipeline.build_pipeline(case)
    for module in layers_of(chunks) if attribute else []:
        setattr(module, attribute, value)
    with enable({"schedule": {"name": name}}):
        try:
            pipeline.run_step(case, chunks, 4, seed=0)
        except MegamemError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


def swap(fields: Fields, activations: Fields, attention: str = "") -> Fields:
    """Stock Megatron against an activation policy: what differs, what was swapped, and what was taken for a weight."""
    from megamem.testing import pipeline

    found: Fields = {}
    with attention_that(attention):
        case = make_case(fields, {"steps": 2})
        stock = pipeline.train_pipeline(case)
        ours = pipeline.train_pipeline(case, config={"activations": activations}, inspect=moves(found))
    return {**found, "differences": ours.differences(stock)}


def moves(found: Fields) -> Callable[[Any], None]:
    """Notes what of the first layer's saved tensors the engine moves."""

    def look(handle: Any) -> None:
        found["swapped"] = handle.engine.stats.swapped_nbytes
        known = next(iter(handle.engine._known.values()))
        (signature,) = known.signatures.values()
        packs = [(list(p.shape), str(p.dtype).removeprefix("torch."), p.entry >= 0) for p in signature.packs]
        found["moved"] = [(shape, dtype) for shape, dtype, is_moved in packs if is_moved]
        found["left"] = [(shape, dtype) for shape, dtype, is_moved in packs if not is_moved]

    return look


def share(fields: Fields) -> Fields:
    """`fp8.saved_activations` with and without `save_original_input` of the layers behind: what differs, what moves."""
    from megamem.integrations import transformer_engine
    from megamem.testing import pipeline

    case = make_case({**fields, "config": {**fields["config"], "bias_activation_fusion": True}}, {})
    sections = {"activations": WHOLE, "fp8": {"saved_activations": "rebuild"}}
    found: Fields = {}
    apart: Fields = {}
    ours = pipeline.train_pipeline(case, config=sections, inspect=moves(found))
    with mock.patch.object(transformer_engine, "save_original_inputs", lambda modules: []):
        without = pipeline.train_pipeline(case, config=sections, inspect=moves(apart))
    return {**found, "differences": ours.differences(without), "without": apart["moved"]}


@contextlib.contextmanager
def attention_that(does: str) -> Iterator[None]:
    """Core attention that hands its output on in FP8, as Transformer Engine's does with fp8_mha, or marks a buffer."""
    import torch
    from transformer_engine.pytorch.cpu_offload import mark_not_offload
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    from megamem.integrations.local_spec import FlashAttention

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            buffer = torch.full((5, 7), 2.0)
            mark_not_offload(buffer)
            ctx.save_for_backward(buffer)
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient * ctx.saved_tensors[0][0, 0]

    forward = FlashAttention.forward
    extension = sys.modules["transformer_engine_torch"]

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if does == "quantises":
            return Float8CurrentScalingQuantizer(extension.DType.kFloat8E4M3, device="cpu")(output)
        return Marked.apply(output) if does == "marks" else output

    with mock.patch.object(FlashAttention, "forward", changed):
        yield


def inside_offload(fields: Fields) -> Fields:
    """A layer that runs inside Transformer Engine's own CPU offload: the error."""
    import torch
    from transformer_engine.pytorch.cpu_offload import get_cpu_offload_context

    from megamem.errors import MegamemError
    from megamem.integrations.megatron_core import enable
    from megamem.testing import models

    case = make_case(fields, {}).gpt
    with enable({"activations": {"policy": "memo"}}):
        layer = models.unwrap(models.build_gpt(case)[0]).decoder.layers[0]
        context, _ = get_cpu_offload_context(enabled=True, num_layers=1, model_layers=3)
        try:
            with context:
                layer(torch.randn(case.sequence, case.microbatch, case.hidden, requires_grad=True), None)
        except MegamemError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {"error": ""}


WHOLE: Fields = {"policy": "memo", "keep_last_layers": 0}
LONG: Fields = {"sequence": 24, "layers": 3}  # 48 tokens: no dimension of a weight

CASES: dict[str, tuple[int, Callable[..., Fields], tuple[Any, ...]]] = {
    "llama": (2, split, ({**LLAMA, "pp": 2}, {}, "zb-h1")),
    "overlapped reduction": (2, split, ({**GPT, "pp": 2}, OVERLAP, "zb-h1")),
    "chunks": (2, split, ({**LLAMA, "pp": 2, "vpp": 2, "dtype": "bfloat16"}, {}, "gis")),
    "experts": (2, split, ({**GPT, "pp": 2, "experts": 4}, OVERLAP, "zb-h1")),
    "fp8 tensorwise": (2, split, ({**GPT, "pp": 2, **fp8("tensorwise")}, OVERLAP, "zb-h1")),
    "fp8 delayed": (2, split, ({**LLAMA, "pp": 2, **fp8("delayed")}, {}, "zb-h1")),
    "fused accumulation": (2, split, ({**GPT, "pp": 2, "config": FUSED}, OVERLAP, "zb-h1")),
    "whole backward passes": (2, split, ({**LLAMA, "pp": 2}, {}, "1f1b")),
    "sequence parallel": (4, split, ({**GPT, "pp": 2, "tp": 2, "sp": True}, OVERLAP, "zb-h1")),
    "swapped": (1, swap, ({**LLAMA, **LONG}, WHOLE)),
    "half rebuilt": (1, swap, ({**LLAMA, **LONG}, {**WHOLE, "swap_fraction": 0.5})),
    "rebuilt": (1, swap, ({**GPT, **LONG, "dtype": "bfloat16"}, {"policy": "recompute"})),
    "swapped fp8 tensorwise": (1, swap, ({**LLAMA, **LONG, **fp8("tensorwise")}, WHOLE)),
    "swapped fp8 delayed": (1, swap, ({**GPT, **LONG, **fp8("delayed")}, WHOLE)),
    "fp8 outputs rebuilt": (1, share, ({**GPT, **LONG, **fp8("tensorwise")},)),
    "fp8 outputs rebuilt, delayed": (1, share, ({**GPT, **LONG, **fp8("delayed")},)),
    "fp8 out of attention": (1, swap, ({**LLAMA, **LONG, **fp8("tensorwise")}, WHOLE, "quantises")),
    "a marked buffer": (1, swap, ({**LLAMA, **LONG}, WHOLE, "marks")),
    "fp8 weights": (1, swap, ({**LLAMA, **LONG, **fp8("tensorwise", fp8_param=True)}, WHOLE)),
    "fp8 weights apart": (2, refused, ({**LLAMA, "pp": 2, **fp8("tensorwise", fp8_param=True)}, "zb-h1", "", None)),
    "inside the other offload": (1, inside_offload, ({**LLAMA, **LONG},)),
    "tiles": (1, tiled, (LLAMA, {}, {})),
    "tiles, swapped": (1, tiled, (GPT, {}, {"activations": SWAP})),
    "tiles, recomputed": (1, tiled, (LLAMA, {}, {"activations": {"policy": "recompute"}})),
    "tiles, fused accumulation": (2, tiled, ({**GPT, "config": FUSED}, OVERLAP, {"activations": SWAP})),
    "tiles, split": (2, tiled, ({**LLAMA, "pp": 2}, {}, {"schedule": {"name": "zb-h1"}})),
    "tp_comm_overlap": (2, refused, ({**LLAMA, "pp": 2}, "zb-h1", "ub_bulk_wgrad", True)),
}


def on_rank(name: str) -> Fields:
    """A case on this rank."""
    with claiming_cuda():
        _, function, arguments = CASES[name]
        return function(*arguments)


def main(folder: str, names: list[str]) -> None:
    """Run the cases, those with equally many ranks one after the other on the same ranks."""
    install(Path(folder))
    from megamem.testing.dist import RankPool

    results: dict[str, Any] = {}
    for count in sorted({CASES[name][0] for name in names}):
        with RankPool(count, timeout=90) as pool:
            for name in (name for name in names if CASES[name][0] == count):
                try:
                    results[name] = pool.run(on_rank, name)
                except Exception:
                    results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
