"""Vocabulary parallelism in Megatron-Core: what trainers give and get, refusals, failures, memory."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megamem.testing.trials import error_of, start_case

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]

PARALLEL: Fields = {"vocabulary": {"parallel": True}}
SMALL: Fields = {"layers": 2, "hidden": 16, "vocab": 72, "pp": 2}
FOUR: Fields = {**SMALL, "layers": 4}


# -- what trainers give and get ----------------------------------------------------------------------------------------


def as_megatron_lm_gives_it(fields: Fields, schedule: str, per_token: bool) -> dict[str, Any]:
    """A trainer whose middle stages get no data, the first no labels and the last no tokens, as Megatron-LM's do."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import batches
    from megamem.testing.parity import seed_everything
    from megamem.testing.pipeline import PipelineCase, build_pipeline, gradients_of, whole_model

    case = PipelineCase(gpt=start_case(**fields))
    calls = []

    def forward_step(data: Iterator[Any], model: Any) -> Any:
        inner = model.module
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=inner.vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=inner.vp_stage)
        calls.append((inner.vp_stage or 0, first, last))
        batch = next(data) if first or last else None
        tokens, positions = (batch.tokens, batch.positions) if first else (None, None)
        labels = batch.labels if last else None
        output = model(tokens, positions, None, labels=labels)
        return output, functools.partial(loss, labels, model=model)

    def loss(labels: Any, losses: Any, model: Any) -> Any:
        assert model is not None
        counted = (labels % 3 != 0).view(-1)  # a mask
        total, number = (losses.view(-1).float() * counted).sum(), counted.sum().to(torch.int)
        if per_token:
            return total, number, {"sum": total.detach().clone(), "tokens": number}
        return total / number, {"mean": (total / number).detach().clone()}

    def train(config: Fields) -> Any:
        seed_everything()
        with enable(config):
            chunks = build_pipeline(case)
            data = batches(case.gpt, 4)
            calls.clear()
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(data) for _ in chunks] if len(chunks) > 1 else iter(data),
                model=chunks,
                num_microbatches=4,
                seq_length=case.gpt.sequence,
                micro_batch_size=case.gpt.microbatch,
                decoder_seq_length=case.gpt.sequence,
                forward_only=False,
            )
            return results, whole_model(gradients_of(chunks)), sorted(calls)

    stock, ours = train({}), train({**PARALLEL, "schedule": {"name": schedule}})
    worst = max(float((ours[1][name] - value).norm() / value.norm()) for name, value in stock[1].items())
    return {"results": (stock[0], ours[0]), "worst": worst, "calls": (stock[2], ours[2])}


@pytest.mark.parametrize(
    ("fields", "schedule", "per_token"),
    [
        ({**FOUR, "pp": 4}, "1f1b", False),
        ({**FOUR, "pp": 4, "config": {"calculate_per_token_loss": True}}, "zb-h1", True),
        ({**FOUR, "vpp": 2}, "interleaved", True),
    ],
    ids=["four stages", "loss per token", "two chunks"],
)
def test_a_trainer_gives_tokens_to_the_first_stage_and_labels_to_the_last(
    dist: Dist, fields: Fields, schedule: str, per_token: bool
) -> None:
    found = dist(fields["pp"])(as_megatron_lm_gives_it, fields, schedule, per_token)
    for one in found:
        assert one["worst"] < 3e-6
        stock, ours = one["calls"]
        assert stock == ours  # once for every chunk and microbatch, on its own stage
        stock, ours = one["results"]
        assert [result.keys() for result in stock] == [result.keys() for result in ours]
        for expected, result in zip(stock, ours, strict=True):
            assert all(abs(float(result[key]) / float(expected[key]) - 1) < 3e-6 for key in expected)
    assert len(found[-1]["results"][1]) == 4 and found[0]["results"][1] == []


def evaluated_only() -> list[Any]:
    """Evaluation without any training step, and what the ranks hold afterwards."""
    import torch

    from megamem.integrations.megatron_core import enable
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    case = PipelineCase(gpt=start_case(**SMALL))
    found = []
    for config in ({}, PARALLEL):
        with enable(config):
            chunks = build_pipeline(case)
            with torch.no_grad():
                results = run_step(case, chunks, 3, seed=0, forward_only=True)
                data = run_step(case, chunks, 2, seed=0, forward_only=True, collect_non_loss_data=True)
        found.append([[float(one["loss"]) for one in results], [one["per token"].tolist() for one in data]])
    return found


def test_evaluation_and_data_that_is_no_loss(dist: Dist) -> None:
    import torch

    first, last = dist(2)(evaluated_only)
    assert first == [[[], []], [[], []]]
    (losses, data), (our_losses, our_data) = last
    assert len(losses) == 3 and losses == pytest.approx(our_losses, rel=3e-6)
    assert torch.tensor(data).shape == (2, 2, 16) and torch.allclose(torch.tensor(data), torch.tensor(our_data))


def reported(path: str) -> tuple[str, Any]:
    """Three steps of which the third is traced: the report, and what of the schedule ran whole in B."""
    from megamem.integrations.megatron_core import enable
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    case = PipelineCase(gpt=start_case(**SMALL))
    with enable({**PARALLEL, "schedule": {"name": "zb-h1", "trace": path}}) as handle:
        chunks = build_pipeline(case)
        for step in range(3):
            run_step(case, chunks, 4, seed=step)
        report = handle.report()
    assert report.schedule is not None
    return str(report), report.schedule.unsplit


def test_the_report_and_the_trace_know_the_passes(dist: Dist, tmp_path: Path) -> None:
    from megamem.planner.schedules.plan import load_workload

    for text, unsplit in dist(2)(reported, str(tmp_path / "trace.json")):
        assert unsplit == ()  # embeddings have T and IB
        assert "words on this rank                         36 of 72" in text
        assert "microbatches that passed through its rows  12" in text
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    for kind in ("IF", "S", "T", "IB"):
        assert sum(f"0{kind}2" in name for name in names) == 4  # on both ranks, measured and predicted
    costs: Any = load_workload(str(tmp_path / "trace.costs.json"))
    share = costs.vocabulary
    assert share.seconds("S", 1) > 0 and share.seconds("T", 1) > 0 and share.embed > 0 and share.embed_grad > 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What building says, and what a first step says of models that were spoilt since; nothing has run."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megamem.integrations.local_spec import local_layer_spec
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import build_config, build_gpt, unwrap
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    pipeline = PipelineCase(gpt=start_case(**SMALL))
    rank = parallel_state.get_pipeline_model_parallel_rank()

    def built(**options: Any) -> Callable[[], object]:
        return lambda: build_gpt(pipeline.gpt, config_overrides=options)

    def gathered() -> object:
        config = build_config(pipeline.gpt)
        ends = {"pre_process": rank == 0, "post_process": rank == 1}
        return GPTModel(config, local_layer_spec(config), 72, 16, parallel_output=False, **ends)

    def stepped(change: Callable[[Any], object] = lambda model: None, vocab: int = 72) -> Callable[[], object]:
        def call() -> object:
            chunks = build_pipeline(dataclasses.replace(pipeline, gpt=dataclasses.replace(pipeline.gpt, vocab=vocab)))
            change(unwrap(chunks[0]))
            return run_step(pipeline, chunks, 2, seed=0)

        return call

    with enable({"schedule": {"name": "1f1b"}}):
        before = build_pipeline(pipeline)
    lengths = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    faults: dict[str, Callable[[], object]] = {
        "mtp": built(mtp_num_layers=1),
        "lengths": built(**lengths),
        "gathered": gathered,
        "tiny": lambda: build_gpt(dataclasses.replace(pipeline.gpt, vocab=1)),
        "defer": stepped(lambda model: setattr(model.config, "defer_embedding_wgrad_compute", True)),
        "overlap": stepped(lambda model: setattr(model.config, "overlap_moe_expert_parallel_comm", True)),
        "loss": stepped(lambda model: setattr(model, "compute_language_model_loss", lambda *_: None)),
        "built before": lambda: run_step(pipeline, before, 2, seed=0),
        "shards": stepped(vocab=72 + 2 * rank),
    }
    said = {}
    for name, call in faults.items():
        with enable(PARALLEL):
            said[name] = error_of(call)
    return said


def test_what_does_not_go_with_it_is_refused_by_name_before_the_first_step(dist: Dist) -> None:
    names = {
        "mtp": "mtp_num_layers",
        "lengths": "variable_seq_lengths",
        "tiny": "vocab_size 1 leaves some of 2 ranks without words",
        "defer": "defer_embedding_wgrad_compute",
        "gathered": "parallel_output=False",
        "overlap": "overlap_moe_expert_parallel_comm",
        "loss": "GPTModel has a compute_language_model_loss of its own",
        "built before": "build a GPTModel after megamem.enable",
        "shards": "the output weight's shards do not match: rank 1's shard begins at word 37, not 36",
    }
    for said in dist(2)(refusals):
        assert said.keys() == names.keys()
        for name, text in said.items():
            assert text.startswith("UnsupportedError: vocabulary.parallel: ") and names[name] in text, (name, text)


def faulty_calls() -> dict[str, str]:
    """What comes of asking for what there is not, in a step and outside one."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import batches, unwrap
    from megamem.testing.pipeline import PipelineCase, build_pipeline

    case = PipelineCase(gpt=start_case(**SMALL))
    batch, *_ = batches(case.gpt, 1)

    def mean(losses: Any) -> Any:
        total = losses.mean()
        return total, {"loss": total.detach()}

    def square(losses: Any) -> Any:
        return losses.square().mean(), {}

    def shorter(data: Any, model: Any) -> Any:
        return model(batch.tokens[:, :8], batch.positions[:, :8], None, labels=batch.labels[:, :8]), mean

    steps: dict[str, Callable[[Any, Any], Any]] = {
        "labels": lambda data, model: (model(batch.tokens, batch.positions, None, labels=batch.labels + 40), mean),
        "tokens": lambda data, model: (model(batch.tokens + 40, batch.positions, None, labels=batch.labels), mean),
        "no sum": lambda data, model: (model(batch.tokens, batch.positions, None, labels=batch.labels), square),
        "logits": lambda data, model: (model(batch.tokens, batch.positions, None), mean),
        "twice": lambda data, model: (model(batch.tokens, batch.positions, None, labels=batch.labels) * 2, mean),
        "length": shorter,
    }
    said = {}
    for name, step in steps.items():
        with enable(PARALLEL) as handle:
            chunks = build_pipeline(case)
            run = functools.partial(
                get_forward_backward_func(),
                forward_step_func=step,
                data_iterator=None,
                model=chunks,
                num_microbatches=3,
                seq_length=16,
                micro_batch_size=2,
                decoder_seq_length=16,
                forward_only=False,
            )
            said[name] = error_of(run)
            del handle
    with enable(PARALLEL):
        chunks = build_pipeline(case)
        unwrap(chunks[0]).set_input_tensor(torch.zeros(16, 2, 16))
        said["outside"] = error_of(lambda: chunks[0](batch.tokens, batch.positions, None, labels=batch.labels))
    return said


def test_wrong_labels_and_steps_that_want_something_else_end_on_every_rank_with_a_reason(dist: Dist) -> None:
    first, last = dist(2)(faulty_calls)
    reasons = {
        "labels": "labels lie outside the vocabulary",
        "tokens": "tokens lie outside the vocabulary",
        "no sum": "it must be a sum of the tokens' losses with fixed weights",
        "logits": "the model is asked for logits",
        "twice": "forward_step_func must call the model",
        "length": "tokens of a microbatch are [2, 8], and micro_batch_size and seq_length say [2, 16]",
    }
    for said in (first, last):
        for name, reason in reasons.items():
            assert said[name].startswith("PipelineError: pipeline rank ") and reason in said[name], said[name]
    assert "called outside a training or evaluation step" in first["outside"]
    assert "outside a step of the pipeline" in last["outside"]


# -- failures ----------------------------------------------------------------------------------------------------------


def fail_then_train(kind: str, rank: int, barriers: int) -> dict[str, Any]:
    """One step in which a vocabulary pass of one rank fails, and one that does not, against stock Megatron."""
    import threading
    import time
    from unittest import mock

    import torch

    from megamem.errors import PipelineError
    from megamem.integrations.megatron_core import enable
    from megamem.runtime.vocabulary.passes import SharedVocabulary
    from megamem.testing.parity import seed_everything
    from megamem.testing.pipeline import (
        PipelineCase,
        build_pipeline,
        gradients_of,
        run_step,
        train_pipeline,
        whole_model,
    )

    case = PipelineCase(gpt=start_case(**{**FOUR, "pp": 4}), num_microbatches=6, steps=1)
    stock = whole_model(train_pipeline(case).gradients)
    seed_everything()
    original, count = SharedVocabulary.run, 0

    def run(self: Any, action: Any) -> None:
        nonlocal count
        count += action.kind == kind
        if action.kind == kind and count == 3 and torch.distributed.get_rank() == rank:
            raise ValueError("out of words")
        original(self, action)

    with enable({"vocabulary": {"parallel": True, "barriers": barriers}}):
        chunks = build_pipeline(case)
        began = time.monotonic()
        with mock.patch.object(SharedVocabulary, "run", run), pytest.raises(PipelineError) as caught:
            run_step(case, chunks, case.num_microbatches, seed=0)
        took = time.monotonic() - began
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        run_step(case, chunks, case.num_microbatches, seed=0)
        gradients = whole_model(gradients_of(chunks))
        lanes = [thread.name for thread in threading.enumerate() if thread.name.startswith("megamem-")]
    worst = max(float((gradients[name] - value).norm() / value.norm()) for name, value in stock.items())
    return {"error": str(caught.value), "took": took, "worst": worst, "lanes": len(lanes)}


@pytest.mark.parametrize(("kind", "rank", "barriers"), [("IF", 0, 1), ("S", 2, 1), ("T", 1, 2), ("IB", 3, 1)])
def test_when_a_pass_fails_every_rank_says_which_and_the_next_step_works(
    dist: Dist, kind: str, rank: int, barriers: int
) -> None:
    for one in dist(4)(fail_then_train, kind, rank, barriers):
        assert one["error"] == f"pipeline rank {rank} (global {rank}) failed in 0{kind}2: ValueError: out of words"
        assert one["took"] < 20 and one["worst"] < 3e-6


# -- memory ------------------------------------------------------------------------------------------------------------


def largest_allocation(fields: Fields, config: Fields) -> tuple[int, str]:
    """The most elements that an operator of two training steps made, on the rank's thread and on its lanes."""
    from unittest import mock

    from megamem.integrations.megatron_core import enable
    from megamem.runtime.pipeline import lanes
    from megamem.testing.live import LargestStorage
    from megamem.testing.models import build_optimizer
    from megamem.testing.pipeline import PipelineCase, build_pipeline, run_step

    traces = [LargestStorage()]
    original = lanes._Answer.run

    def run(self: Any, function: Any) -> None:
        traces.append(LargestStorage())
        with traces[-1]:
            original(self, function)

    case = PipelineCase(gpt=start_case(**fields))
    with enable(config), mock.patch.object(lanes._Answer, "run", run):
        chunks = build_pipeline(case)
        optimizer = build_optimizer(chunks, case.gpt)
        with traces[0]:
            for step in range(2):
                run_step(case, chunks, 4, seed=step)
                optimizer.step()
    return max((trace.elements, trace.where) for trace in traces)


LONG: Fields = {"layers": 2, "hidden": 8, "heads": 2, "vocab": 1000, "sequence": 64, "microbatch": 4, "pp": 2}


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_no_allocation_is_a_quarter_of_a_ranks_logits(dist: Dist, barriers: int, tp: int) -> None:
    """Nor of its share in them, tokens x vocabulary / ranks."""
    fields = {**LONG, "tp": tp, "sp": tp == 2, "tied": tp == 1}
    config = {"vocabulary": {"parallel": True, "barriers": barriers}, "schedule": {"name": "zb-h1"}}
    share = 64 * 4 * 1000 // (2 * tp)
    for size, where in dist(2 * tp)(largest_allocation, fields, config):
        assert 0 < size < share / 4, where
