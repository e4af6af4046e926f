"""What trainers rely on beside losses and gradients, what is refused, and schedules of a user's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytestmark = pytest.mark.megatron

Dist = Callable[[int], Callable[..., list[Any]]]
Fields = dict[str, Any]


def _case(pp: int = 2, vpp: int | None = None, **options: Any) -> Any:
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.pipeline import PipelineCase

    fields = options.pop("fields", {})
    gpt = GptCase(**{"layers": 2 * pp * (vpp or 1), "hidden": 16, "pp": pp, "vpp": vpp, **fields})
    init_parallel(gpt)
    return PipelineCase(gpt=gpt, **options)


def run_own_order(text: str, folder: str, kind: str) -> Any:
    """Train under a schedule of one's own: what differs from stock, or what is refused."""
    import torch.distributed as torch_dist

    from megamem.errors import MegamemError
    from megamem.testing.pipeline import train_pipeline

    case = _case(vpp=2 if "chunks: 2" in text else None)
    path = Path(folder) / f"schedule of rank {torch_dist.get_rank()}.txt"
    path.write_text(text, encoding="utf-8")
    try:
        ours = train_pipeline(case, {"name": "file", "file": str(path)})
    except MegamemError as error:
        return type(error).__name__, str(error)
    assert kind == "runs"
    return ours.differences(train_pipeline(case))


HEAD = "megamem-schedule 1\nname: mine\nplacement: round-robin\nranks: 2\nchunks: 1\nmicrobatches: 4\n"
IN_PARTS = (
    "rank 0: 0F0 0F1 0F2 0B0 0W0:0/3 0F3 0W0:1/3 0B1 0W0:2/3 0B2 0W1:0/2 0B3 0W1:1/2 0W2 "
    "0W3:0/4 0W3:1/4 0W3:2/4 0W3:3/4\n"
    "rank 1: 0F0 0B0 0F1 0B1 0F2 0B2 0F3 0W0 0W1 0W2:0/2 0B3 0W2:1/2 0W3\n"
)
MIXED = (
    "rank 0: 0F0 0F1 0BW0 0F2 0B1 0F3 0W1 0BW2 0BW3\n"
    "rank 1: 0F0 0B0 0F1 0W0 0B1 0W1 0F2 0BW2 0F3 0BW3\n"
)  # fmt: skip


@pytest.mark.parametrize("ranks", [IN_PARTS, MIXED], ids=["weights in parts", "split and fused"])
def test_an_order_of_ones_own(dist: Dist, tmp_path: Path, ranks: str) -> None:
    assert dist(2)(run_own_order, HEAD + ranks, str(tmp_path), "runs") == [[], []]


@pytest.mark.parametrize(
    ("ranks", "error"),
    [
        ("rank 0: 0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\nrank 1: 0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n", "ScheduleError"),
        (
            "rank 0: 0F0 0F1 0F2 0F3 0S0 0S1 0S2 0S3 0T0 0T1 0T2 0T3 0BW0 0BW1 0BW2 0BW3\n"
            "rank 1: 0F0 0F1 0F2 0F3 0S0 0S1 0S2 0S3 0T0 0T1 0T2 0T3 0BW0 0BW1 0BW2 0BW3\n",
            "InfeasibleError",
        ),
    ],
    ids=["without W", "vocabulary passes"],
)
def test_what_cannot_run_is_refused_before_the_first_message(
    dist: Dist, tmp_path: Path, ranks: str, error: str
) -> None:
    for found in dist(2)(run_own_order, HEAD + ranks, str(tmp_path), "is refused"):
        assert found[0] == error, found


DISORDERED = (
    "rank 0: 0F0 0F1 0F2 0F3 0BW0 0B1 0B3 0B2 0W1 0W2 0W3\n"
    "rank 1: 0F0 0F1 0F2 0F3 0BW0 0BW1 0B3 0BW2 0W3\n"
)  # fmt: skip


def run_out_of_order(folder: str, overlap: bool) -> list[str] | str:
    """A later microbatch first: how far the gradients are from stock, where that is not refused."""
    import torch.distributed as torch_dist

    from megamem.errors import UnsupportedError
    from megamem.testing.parity import relative_error
    from megamem.testing.pipeline import train_pipeline

    case = _case(ddp={"overlap_grad_reduce": overlap})
    path = Path(folder) / f"schedule of rank {torch_dist.get_rank()}.txt"
    path.write_text(HEAD + DISORDERED, encoding="utf-8")
    try:
        ours = train_pipeline(case, {"name": "file", "file": str(path)})
    except UnsupportedError as error:
        return str(error)
    stock = train_pipeline(case)
    return [name for name, one in stock.gradients.items() if relative_error(ours.gradients[name], one) > 1e-5]


def test_microbatches_out_of_order_do_not_go_with_overlapped_reductions(dist: Dist, tmp_path: Path) -> None:
    assert dist(2)(run_out_of_order, str(tmp_path), False) == [[], []]
    for refusal in dist(2)(run_out_of_order, str(tmp_path), True):
        assert "rank 0 runs 0B2 after a later microbatch's" in refusal and "overlap_grad_reduce off" in refusal


def contract(name: str, vpp: int | None) -> dict[str, Any]:
    """Call the forward-backward function in every way that trainers do, stock and ours: what was equal."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config

    from megamem.integrations import compat
    from megamem.integrations.megatron_core import enable
    from megamem.testing.pipeline import build_pipeline, gradients_of, run_step

    case = _case(vpp=vpp)
    seen: dict[str, list[Any]] = {"stock": [], "ours": []}

    class Timers:
        def __init__(self, log: list[str]) -> None:
            self.log = log

        def __call__(self, name: str, log_level: int | None = None) -> Any:
            log = self.log

            class Timer:
                def start(self, barrier: bool = False) -> None:
                    log.append(f"{name} starts")

                def stop(self) -> None:
                    log.append(f"{name} stops")

            return Timer()

    def calls(chunks: list[Any], log: list[Any]) -> None:
        config: Any = get_model_config(chunks[0])
        finalize, timers = config.finalize_model_grads_func, []
        config.timers, config.grad_scale_func = Timers(timers), lambda loss: loss * 4

        def finalized(model: Any, tokens: Any, **options: Any) -> None:
            log.append(("finalize", len(model), tokens, sorted(options), options.get("force_all_reduce")))
            finalize(model, tokens, **options)

        config.finalize_model_grads_func = finalized
        groups = ProcessGroupCollection.use_mpu_process_groups()
        communicator = P2PCommunicator(pp_group=parallel_state.get_pipeline_model_parallel_group(), config=config)
        reduces = compat.takes_force_all_reduce(schedules.forward_backward_pipelining_without_interleaving)
        log.append(run_step(case, chunks, 4, seed=0, **({"force_all_reduce": True} if reduces else {})))
        log.append(gradients_of(chunks))
        log.append(run_step(case, chunks, 4, seed=1, p2p_communicator=communicator, pg_collection=groups))
        with torch.no_grad():
            for chunk in chunks:
                chunk.eval()
            log.append(run_step(case, chunks, 4, seed=2, forward_only=True, collect_non_loss_data=True))
        log.append(sorted(entry for entry in timers if "-recv" not in entry and "-send" not in entry))

    calls(build_pipeline(case), seen["stock"])
    with enable({"schedule": {"name": name}}):
        calls(build_pipeline(case), seen["ours"])
    from megamem.testing.pipeline import _equal

    return {"equal": [_equal(a, b) for a, b in zip(*seen.values(), strict=True)], "timers": seen["ours"][-1]}


@pytest.mark.parametrize(("name", "vpp"), [("1f1b", None), ("zb-h1", None), ("gis", 2)])
def test_trainers_get_what_they_expect(dist: Dist, name: str, vpp: int | None) -> None:
    for found in dist(2)(contract, name, vpp):
        assert len(found["equal"]) == 7 and all(found["equal"]), found["equal"]
        assert "forward-backward stops" in found["timers"]


def align(name: str) -> tuple[list[str], list[str]]:
    """Gradients that are reduced by grad_sync_func, parameters that are gathered by param_sync_func."""
    from megatron.core.utils import get_model_config

    from megamem.integrations.megatron_core import enable
    from megamem.testing.pipeline import build_pipeline, gradients_of, run_step

    def train(chunks: list[Any]) -> tuple[Any, list[str]]:
        calls: list[str] = []
        config: Any = get_model_config(chunks[0])

        def reduce(chunk: int) -> Callable[..., None]:
            def start(parameters: Any) -> None:
                calls.append(f"reduce {chunk}: {len(list(parameters))}")
                chunks[chunk].start_grad_sync()

            return start

        config.grad_sync_func = [reduce(index) for index in range(len(chunks))]
        config.param_sync_func = [lambda parameters, c=index: calls.append(f"gather {c}") for index in range(2)]
        for seed in range(2):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            run_step(case, chunks, 4, seed=seed)
        return gradients_of(chunks), calls

    case = _case(vpp=2, ddp={"overlap_grad_reduce": True})
    stock, stock_calls = train(build_pipeline(case))
    with enable({"schedule": {"name": name}}):
        ours, calls = train(build_pipeline(case))
    assert sorted(calls) == sorted(stock_calls)
    return [key for key, value in stock.items() if not ours[key].equal(value)], calls


def test_reductions_that_trainers_align(dist: Dist) -> None:
    for differing, calls in dist(4)(align, "gis"):
        assert differing == []
        assert calls[:2] == ["gather 0", "gather 1"]
        assert len([call for call in calls if call.startswith("reduce")]) == 4


def unsplit_of(fields: Fields, name: str) -> Any:
    """After a step: the matrices whose gradient was not computed apart; or the refusal."""
    from megamem.errors import MegamemError
    from megamem.testing.pipeline import train_pipeline

    found: list[str] = []

    def look(handle: Any) -> None:
        found.extend(handle.schedule.unsplit())

    case = _case(fields=fields, steps=1)
    try:
        train_pipeline(case, {"name": name}, inspect=look)
    except MegamemError as error:
        return type(error).__name__, str(error)
    return found


def test_what_is_not_split_is_listed(dist: Dist) -> None:
    dense = dist(2)(unsplit_of, {}, "zb-h1")
    assert dense == [["chunk 0: module.embedding.word_embeddings.weight (VocabParallelEmbedding)"], []]
    assert dist(2)(unsplit_of, {}, "1f1b") == [[], []]
    mixture = {"experts": 4, "bias": False, "config": {"moe_token_dispatcher_type": "allgather"}}
    experts = dist(2)(unsplit_of, mixture, "zb-h1")
    assert [name.rpartition(" ")[2] for name in experts[1]] == ["(TopKRouter)", "(TopKRouter)"]


def foreign_linears() -> Any:
    """Layers whose matrices Megatron's own linear function never sees, as Transformer Engine's."""
    import torch

    from megamem.errors import MegamemError
    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import unwrap
    from megamem.testing.pipeline import build_pipeline, run_step

    case = _case(fields={"ddp": False})
    with enable({"schedule": {"name": "zb-h1"}}):
        chunks = build_pipeline(case)
        for layer in unwrap(chunks[0]).decoder.layers:
            for parent, name in ((layer.self_attention, "linear_qkv"), (layer.self_attention, "linear_proj")):
                setattr(parent, name, torch.nn.Linear(16, 16))
            layer.mlp = torch.nn.Linear(16, 16)
        try:
            run_step(case, chunks, 4, seed=0)
        except MegamemError as error:
            return type(error).__name__, str(error)
    return None


def test_a_model_whose_layers_cannot_be_split_is_refused_by_all_ranks(dist: Dist) -> None:
    first, last = dist(2)(foreign_linears)
    assert first == last  # although the last stage has an output layer, which could be
    assert first[0] == "UnsupportedError" and "Use 1f1b or interleaved" in first[1]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"cuda_graph_impl": "local"}, "CUDA graphs"),
        ({"num_microbatches_with_partial_activation_checkpoints": 1}, "counts microbatches as 1F1B does"),
    ],
)
def test_settings_that_do_not_go_with_a_schedule(dist: Dist, config: Fields, reason: str) -> None:
    for error, text in dist(2)(refusal, config):
        assert error == "UnsupportedError"
        assert reason in text and "switch it off" in text


def refusal(config: Fields) -> Any:
    from megatron.core.utils import get_model_config

    from megamem.errors import MegamemError
    from megamem.integrations.megatron_core import enable
    from megamem.testing.pipeline import build_pipeline, run_step

    case = _case()
    with enable({"schedule": {"name": "zb-h1"}}):
        chunks = build_pipeline(case)
        for name, value in config.items():
            setattr(get_model_config(chunks[0]), name, value)
        try:
            run_step(case, chunks, 4, seed=0)
        except MegamemError as error:
            return type(error).__name__, str(error)
    return None


def alone() -> list[str]:
    """One pipeline rank: Megatron's own loop, and a word about it."""
    from megamem.testing.pipeline import train_pipeline

    words: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megamem").addHandler(handler)
    case = _case(pp=1)
    assert train_pipeline(case, {"name": "1f1b"}).differences(train_pipeline(case)) == []
    return words


def test_one_pipeline_rank_runs_megatrons_own_loop(dist: Dist) -> None:
    (words,) = dist(1)(alone)
    assert len(words) == 1 and "one pipeline rank only" in words[0]


def trace_of(name: str) -> Any:
    """The measured times of a step, of all pipeline ranks."""
    from megatron.core import parallel_state

    from megamem.testing.pipeline import train_pipeline

    found: list[Any] = []

    def look(handle: Any) -> None:
        rows = handle.schedule.trace.gather(parallel_state.get_pipeline_model_parallel_group())
        found.append((rows, handle.schedule.planned.schedule))

    train_pipeline(_case(steps=2), {"name": name, "trace": "unused.json"}, inspect=look)
    return found[0]


def test_measured_times_are_those_of_the_schedule(dist: Dist) -> None:
    for rows, schedule in dist(2)(trace_of, "zb-h1"):
        for rank, actions in enumerate(schedule.ranks):
            mine = [row for row in rows if row.rank == rank]
            assert tuple(row.action for row in mine) == actions
            assert all(row.start < row.end for row in mine)
            assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
        forward = {row.rank: row for row in rows if str(row.action) == "0F0"}
        assert forward[0].end <= forward[1].start + 0.1  # clocks of one machine


def ahead(schedule: Fields, num_microbatches: int | None) -> str:
    """What `enable` says of a schedule when the trainer has, or has not, told Megatron how long a step is."""
    import torch.distributed
    from megatron.core import num_microbatches_calculator as calculator

    from megamem.integrations.megatron_core import enable
    from megamem.testing.models import GptCase, init_parallel
    from megamem.testing.trials import error_of

    init_parallel(GptCase(pp=2, vpp=2))
    if num_microbatches is not None:
        calculator.init_num_microbatches_calculator(0, None, num_microbatches, 1, 1)
    # A rank that refuses must not have begun a collective: here nobody would join it.
    alone = torch.distributed.get_rank() == 0

    def switch_on() -> None:
        if alone or num_microbatches is None:
            enable({"schedule": schedule}).disable()

    try:
        return error_of(switch_on)
    finally:
        if num_microbatches is not None:
            calculator.destroy_num_microbatches_calculator()


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ({"name": "gis", "group": 5}, "gis on 2 ranks works with groups of"),
        ({"name": "zb-h1"}, "zb-h1 works with 1 chunks per rank, not 2"),
        ({"name": "v-half", "memory_limit": 0.5}, "exceeds the memory limit"),
        ({"name": "auto", "memory_limit": 0.1}, "nearest: memory limit"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_collective(dist: Dist, schedule: Fields, text: str) -> None:
    refused, _ = dist(2)(ahead, schedule, 4)
    assert refused.startswith("InfeasibleError: ") and text in refused


def test_without_a_number_of_microbatches_the_first_step_decides(dist: Dist) -> None:
    assert dist(2)(ahead, {"name": "gis", "group": 5}, None) == ["", ""]
