"""Losses and every gradient of models trained without logits, against stock Megatron-Core on the same ranks.

fp32: relative errors below 3e-6. The two sum the same numbers in another order, which moves a result by a few units of
6e-8, the rounding of fp32, in the loss's gradient, and all other gradients inherit that.

bf16: both round every product to 3 digits, so one is no measure for the other. An fp32 run of the same values, rounded
to bf16 nowhere, is: no gradient may be further from it than 1.2 times as far as stock is, or a rounding of 4e-3.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megamem.testing.trials import error_of, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

FP32 = 3e-6
FUSED: Fields = {"vocabulary": {"fused_loss": True}}
SMALL: Fields = {"layers": 1, "hidden": 16, "vocab": 72}
TWO: Fields = {**SMALL, "layers": 2, "pp": 2}
V: Fields = {**SMALL, "layers": 4, "pp": 2, "vpp": 2}
PER_TOKEN: Fields = {"config": {"calculate_per_token_loss": True}}
OVERLAP: Fields = {"overlap_grad_reduce": True, "overlap_param_gather": True}

# ranks, fields of the model, fields of the case, schedule, chunk
CASES: dict[str, tuple[int, Fields, Fields, str | None, int | str]] = {
    "untied": (1, SMALL, {"evaluate": 1}, None, "auto"),
    "tied": (1, {**SMALL, "tied": True}, {}, None, "auto"),
    "chunks of 7": (1, SMALL, {}, None, 7),
    "without DDP, tied": (1, {**SMALL, "ddp": False, "tied": True}, {}, None, "auto"),
    "loss per token, masked": (1, {**SMALL, **PER_TOKEN}, {"per_token": True}, None, "auto"),
    "optimizer": (1, SMALL, {"adam": True, "steps": 3}, None, "auto"),
    "main_grad in bf16": (1, {**SMALL, "dtype": "bfloat16"}, {"ddp": {"grad_reduce_in_fp32": False}}, None, "auto"),
    "bf16": (1, {**SMALL, "dtype": "bfloat16"}, {}, None, "auto"),
    "dp2, overlapped": (
        2,
        {**SMALL, "distributed_optimizer": True},
        {"ddp": OVERLAP, "adam": True, "evaluate": 1},
        None,
        "auto",
    ),
    "tp2": (2, {**SMALL, "tp": 2}, {}, None, "auto"),
    "tp2 sp, tied": (2, {**SMALL, "tp": 2, "sp": True, "tied": True}, {"evaluate": 1}, None, "auto"),
    "tp2 sp, bf16, per token": (
        2,
        {**SMALL, "tp": 2, "sp": True, "dtype": "bfloat16", **PER_TOKEN},
        {"per_token": True},
        None,
        "auto",
    ),
    "cp2": (2, {**SMALL, "cp": 2}, {"evaluate": 1}, None, "auto"),
    "tp2 sp cp2, tied, per token": (
        4,
        {**SMALL, "tp": 2, "sp": True, "cp": 2, "tied": True, **PER_TOKEN},
        {"per_token": True},
        None,
        "auto",
    ),
    "pp2, Megatron's schedule": (2, TWO, {"evaluate": 1}, None, "auto"),
    "pp2, zb-h1, tied, overlapped": (
        2,
        {**TWO, "tied": True},
        {"ddp": {"overlap_grad_reduce": True}, "evaluate": 1},
        "zb-h1",
        "auto",
    ),
    "pp2, zb-h1, bf16, optimizer": (2, {**TWO, "dtype": "bfloat16"}, {"adam": True}, "zb-h1", "auto"),
    "pp2, v-half": (2, V, {"evaluate": 2}, "v-half", "auto"),
    "pp2, v-half, tied, per token": (2, {**V, "tied": True, **PER_TOKEN}, {"per_token": True}, "v-half", "auto"),
    "tp2 sp pp2, zb-h1, tied": (4, {**TWO, "tp": 2, "sp": True, "tied": True}, {}, "zb-h1", "auto"),
    "tp2 sp pp2, v-half, bf16": (4, {**V, "tp": 2, "sp": True, "dtype": "bfloat16"}, {}, "v-half", "auto"),
}


@contextlib.contextmanager
def _fresh(fields: Fields) -> Iterator[Any]:
    """A `GptCase` with Megatron's groups made for it; several in one call."""
    import torch
    from megatron.core import parallel_state

    from megamem.testing.models import GptCase, init_parallel

    case = GptCase(**{**fields, "dtype": getattr(torch, fields.get("dtype", "float32"))})
    init_parallel(case)
    yield case
    parallel_state.destroy_model_parallel()


def _together(outcome: Any) -> tuple[list[float], dict[str, Any]]:
    """Loss values and gradients of all ranks, for schedules that hold the layers elsewhere."""
    import torch
    import torch.distributed as torch_dist

    everybody: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(everybody, outcome)
    losses = [torch.cat([result["loss"].view(-1) for result in one.losses]) for one in everybody if one.losses]
    placed: dict[str, list[Any]] = {}
    for one in everybody:
        for name, gradient in one.gradients.items():
            found = placed.setdefault(name, [])
            if not any(torch.equal(gradient, other) for other in found):  # copies: replicated, or tied
                found.append(gradient)
    return [float(value) for values in losses for value in values], {name: torch.cat(g) for name, g in placed.items()}


def _trained(fields: Fields, options: Fields, schedule: str | None, config: Fields) -> Any:
    from megamem.testing.pipeline import PipelineCase, train_pipeline

    with _fresh(fields) as gpt:
        section = None if schedule is None else {"name": schedule}
        reports: list[Any] = []
        outcome = train_pipeline(
            PipelineCase(gpt=gpt, num_microbatches=4, **options),
            section,
            config=config,
            inspect=lambda handle: reports.append(handle.report().vocabulary),
        )
        return (*_together(outcome), reports)


def far_from_stock(fields: Fields, options: Fields, schedule: str | None, chunk: int | str) -> dict[str, float]:
    """What is further from stock Megatron than it may be, with its relative error; and that no logits were made."""
    from megamem.testing.parity import relative_error

    config = {"vocabulary": {"fused_loss": True, "loss_chunk": chunk}}
    losses, gradients, _ = _trained(fields, options, None, {})
    our_losses, our_gradients, reports = _trained(fields, options, schedule, config)
    is_last = bool(reports[0].num_losses)
    assert is_last == bool(reports[0].whole_nbytes) and not reports[0].num_stock
    assert is_last or fields.get("pp", 1) > 1
    assert len(losses) == len(our_losses) >= 8 and gradients.keys() == our_gradients.keys()
    if fields.get("dtype") == "bfloat16":
        exact = _trained({**fields, "dtype": "float32"}, options, None, {})
        errors = {
            name: relative_error(our_gradients[name], exact[1][name]) / max(1.2 * error, 4e-3)
            for name, gradient in gradients.items()
            for error in [relative_error(gradient, exact[1][name])]
        }
        for index, (one, other) in enumerate(zip(our_losses, losses, strict=True)):
            errors[f"loss {index}"] = abs(one - other) / abs(other) / 4e-3
    else:
        errors = {name: relative_error(our_gradients[name], gradients[name]) / FP32 for name in gradients}
        for index, (one, other) in enumerate(zip(our_losses, losses, strict=True)):
            errors[f"loss {index}"] = abs(one - other) / abs(other) / FP32
    return {name: error for name, error in errors.items() if not error < 1}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_stock_within_rounding(dist: Dist, name: str) -> None:
    num_ranks, *arguments = CASES[name]
    assert dist(num_ranks)(far_from_stock, *arguments) == [{}] * num_ranks


def largest_allocation(fields: Fields, schedule: str | None, fused: bool) -> tuple[int, str]:
    """The most elements that an operator of two training steps, optimizer included, made; and which one it was."""
    from megamem.integrations.megatron_core import enable
    from megamem.testing.live import LargestStorage
    from megamem.testing.models import build_optimizer
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    config = {**(FUSED if fused else {}), **({"schedule": {"name": schedule}} if schedule else {})}
    with _fresh(fields) as gpt, enable(config):
        case = PipelineCase(gpt=gpt)
        chunks = build_pipeline(case)
        optimizer = build_optimizer(chunks, gpt)
        with LargestStorage() as largest:
            for step in range(2):
                run_step(case, chunks, 4, seed=step)
                optimizer.step()
    return largest.elements, largest.where


LONG: Fields = {"layers": 2, "hidden": 8, "heads": 2, "vocab": 1000, "sequence": 64, "microbatch": 4}


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        (LONG, None),
        ({**LONG, "dtype": "bfloat16", "tied": True}, None),
        ({**LONG, "tp": 2, "sp": True}, None),
        ({**LONG, "pp": 2, "tied": True}, "zb-h1"),
    ],
    ids=["one rank", "bf16, tied", "tp2 sp", "pp2, zb-h1, tied"],
)
def test_no_allocation_is_a_quarter_of_the_logits(dist: Dist, fields: Fields, schedule: str | None) -> None:
    num_ranks = fields.get("tp", 1) * fields.get("pp", 1)
    logits = 64 * 4 * 1000 // fields.get("tp", 1)
    for size, where in dist(num_ranks)(largest_allocation, fields, schedule, True):
        assert 0 < size < logits / 4, where
    assert max(dist(num_ranks)(largest_allocation, fields, schedule, False))[0] >= logits  # the tracing sees them


def with_accumulation_fusion(tied: bool) -> dict[str, float]:
    """gradient_accumulation_fusion, whose CUDA extension does on the CPU what its name says."""
    from megatron.core.tensor_parallel import layers

    def accumulate(source: Any, grad_output: Any, main_grad: Any) -> None:
        main_grad.add_(grad_output.t() @ source)

    extension = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with (
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", extension, create=True),
    ):
        fields = {**SMALL, "tied": tied, "config": {"gradient_accumulation_fusion": True}}
        return far_from_stock(fields, {}, None, "auto")


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_accumulation_fusion(dist: Dist, tied: bool) -> None:
    assert dist(1)(with_accumulation_fusion, tied) == [{}]


def with_mup() -> dict[str, float] | None:
    """Logits that Megatron scales between output layer and loss; None where it cannot."""
    from megatron.core.transformer import TransformerConfig

    if not hasattr(TransformerConfig, "use_mup"):
        return None
    options = {"use_mup": True, "mup_base_hidden_size": 16, "mup_output_mult": 0.25}
    return far_from_stock({**SMALL, "config": options}, {}, None, "auto")


def test_logits_scaled_by_mup(dist: Dist) -> None:
    outcomes = dist(1)(with_mup)
    if outcomes == [None]:
        pytest.skip("Megatron-Core has muP since 0.18")
    assert outcomes == [{}]


def refusals() -> dict[str, str]:
    """What a first step says of models that do not go with it, before anything ran."""
    import torch
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import build_config, build_gpt, unwrap
    from megamem.testing.pipeline import PipelineCase, run_step

    case = start_case(**SMALL)

    class Adapted(ColumnParallelLinear):
        pass

    def put(owner: str, name: str, value: Any) -> Callable[[Any], None]:
        return lambda model: setattr({"config": model.config, "layer": model.output_layer}[owner], name, value)

    faults: dict[str, Callable[[Any], None]] = {
        "defer": put("config", "defer_embedding_wgrad_compute", True),
        "overlap": put("config", "overlap_moe_expert_parallel_comm", True),
        "logger": put("config", "config_logger_dir", "somewhere"),
        "graphs": put("config", "cuda_graph_impl", "local"),
        "bias": put("layer", "bias", torch.nn.Parameter(torch.zeros(72))),
        "forward": put("layer", "forward", lambda *_: None),
        "class": put("layer", "__class__", Adapted),
        "dtype": put("layer", "output_dtype", torch.float64),
        "gtp": put("layer", "gtp_remat_size", 2),
        "fsdp": lambda model: setattr(model.output_layer.weight, "__fsdp_param__", True),
        "loss": lambda model: setattr(model, "compute_language_model_loss", lambda *_: None),
    }
    said = {}
    for name, spoil in faults.items():
        with enable(FUSED):
            chunks = build_gpt(case)
            spoil(unwrap(chunks[0]))
            said[name] = error_of(functools.partial(run_step, PipelineCase(gpt=case), chunks, 2, seed=0))
            assert not any(parameter.main_grad.any() for parameter in chunks[0].parameters() if parameter.dim() > 1)
    with enable(FUSED):
        bert = BertModel(build_config(case), 2, bert_layer_local_spec, 72, 16)
        said["bert"] = error_of(functools.partial(run_step, PipelineCase(gpt=case), [bert], 2, seed=0))
    return said


def test_what_does_not_go_with_it_is_refused_by_name_before_the_first_step(dist: Dist) -> None:
    (said,) = dist(1)(refusals)
    names = {
        "defer": "defer_embedding_wgrad_compute",
        "overlap": "overlap_moe_expert_parallel_comm",
        "logger": "config_logger_dir",
        "graphs": "cuda_graph_impl",
        "bias": "bias",
        "forward": "ColumnParallelLinear with a forward of its own",
        "class": "the output layer is a Adapted",
        "dtype": "logit_dtype asks for logits in torch.float64",
        "gtp": "GTP",
        "fsdp": "Megatron-FSDP",
        "loss": "GPTModel has a compute_language_model_loss of its own",
        "bert": "BertModel computes its loss in a way of its own",
    }
    assert said.keys() == names.keys()
    for name, text in said.items():
        assert text.startswith("UnsupportedError: vocabulary.fused_loss: ") and names[name] in text, (name, text)


def gathered_output(pp: int) -> list[str]:
    """parallel_output=False on the last stage, which is the only rank that sees it; and the option of a call."""
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import batches, build_gpt, unwrap
    from megamem.testing.pipeline import PipelineCase, run_step

    case = start_case(**{**SMALL, "layers": pp, "tp": 2, "pp": pp})
    said = []
    with enable(FUSED):
        chunks = build_gpt(case)
        model = unwrap(chunks[0])
        if pp == 1:
            (batch,) = batches(case, 1)
            options = {"labels": batch.labels, "runtime_gather_output": True}
            said.append(error_of(lambda: chunks[0](batch.tokens, batch.positions, batch.mask, **options)))
            said.append(
                error_of(lambda: chunks[0](batch.tokens, batch.positions, batch.mask, labels=batch.labels + 72))
            )
        if model.post_process:
            model.output_layer.gather_output = True
        if pp == 1:  # a model that is called outside a step
            (other,) = build_gpt(case)
            unwrap(other).output_layer.gather_output = True
            said.append(error_of(lambda: other(batch.tokens, batch.positions, batch.mask, labels=batch.labels)))
        said.append(error_of(lambda: run_step(PipelineCase(gpt=case), chunks, 2, seed=0)))
    return said


def test_gathered_output_and_wrong_labels_are_refused_on_every_rank(dist: Dist) -> None:
    for call, labels, outside, step in dist(2)(gathered_output, 1):
        assert call.startswith("UnsupportedError: vocabulary.fused_loss: runtime_gather_output asks")
        assert labels.startswith("ValueError: 32 of 32 labels lie outside the vocabulary")
        assert "parallel_output=False gathers the logits" in step and outside == step
    found = [text for (text,) in dist(4)(gathered_output, 2)]
    assert all(text.startswith("UnsupportedError: vocabulary.fused_loss: ") for text in found)
    assert ["parallel_output=False" in text for text in found] == [False, False, True, True]
    assert "the model of another rank" in found[0]


def step_with_a_loss_of_its_own() -> tuple[str, int]:
    """A trainer that asks the model for logits: nothing of megamem's takes part."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import batches, build_gpt

    case = start_case(**SMALL)

    def forward_step(data: Iterator[Any], model: Any) -> Any:
        batch = next(data)
        return model(batch.tokens, batch.positions, batch.mask), lambda logits: (logits.mean(), {})

    with enable(FUSED) as handle:
        chunks = build_gpt(case)
        said = error_of(
            lambda: get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches(case, 2)),
                model=chunks,
                num_microbatches=2,
                seq_length=case.sequence,
                micro_batch_size=case.microbatch,
                forward_only=False,
            )
        )
        assert handle.loss is not None
        return said, handle.loss.num_stock


def test_a_step_without_a_fused_loss_is_an_error(dist: Dist) -> None:
    ((said, num_stock),) = dist(1)(step_with_a_loss_of_its_own)
    assert said.startswith("NotLiveError: vocabulary.fused_loss is true, a step has run, and no rank computed a loss")
    assert num_stock == 2


def scaled_and_looked_at() -> tuple[Any, dict[str, str], str, list[bool]]:
    """What stands for logits between layer and loss; the report; and whether disable leaves anything behind."""
    import torch

    from megamem.integrations.megatron_core import enable
    from megamem.integrations.vocabulary import PendingLogits
    from megamem.testing.models import build_gpt, unwrap
    from megamem.testing.pipeline import PipelineCase, run_step

    case = start_case(**SMALL)
    handle = enable({"vocabulary": {"fused_loss": True, "loss_chunk": 8}})
    chunks = build_gpt(case)
    layer = unwrap(chunks[0]).output_layer
    meter = handle.meter()
    run_step(PipelineCase(gpt=case), chunks, 2, seed=0)
    during = hasattr(layer.weight, "zero_out_wgrad") and layer.weight.grad_added_to_main_grad
    report = str(handle.report())
    assert meter.peak_bytes > 0  # of the layers, although the activation engine is off
    handle.disable()
    pending = PendingLogits(layer=layer, hidden=torch.ones(1), weight=layer.weight) * 0.5 * 0.5
    left = [during, hasattr(layer.weight, "zero_out_wgrad"), "forward" in vars(layer)]
    asked: dict[str, Callable[[], Any]] = {
        "float": lambda: pending.float(),
        "max(0)": lambda: pending.max(0),
        "max(-1)": lambda: pending.max(-1),  # before the loss
        "size(0)": lambda: pending.size(0),
        "argmax": lambda: torch.argmax(pending, dim=-1),  # type: ignore[call-overload]
        "softmax": lambda: torch.softmax(pending, -1),  # type: ignore[call-overload]
    }
    return pending.scale, {name: error_of(ask) for name, ask in asked.items()}, report, left


def test_what_stands_for_logits_says_so_and_nothing_stays(dist: Dist) -> None:
    ((scale, said, report, left),) = dist(1)(scaled_and_looked_at)
    assert scale == 0.25
    assert all(f"asks for the logits ({name}), which are never in memory" in text for name, text in said.items())
    assert "losses computed without logits  2" in report and "logits in memory at a time" in report
    assert left == [True, False, False]
