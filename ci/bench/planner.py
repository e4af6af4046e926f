"""The planner against what is published, against what is measured, against other estimators, and how long it takes.

    python ci/bench/planner.py --out ci/bench/results/planner.cpu.json

published   times and bytes of papers, from the hardware table's numbers alone; nothing is fitted
measured    peak activation bytes of real Megatron-Core models on gloo ranks, beside what is predicted
estimators  memory of five public models, beside what other tools say of them
speed       processor seconds of `megamem plan`, started from a shell
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
from common import Json

from megamem.config import load_config
from megamem.ir.job import Job, Layout
from megamem.ir.kernels import Kernels
from megamem.ir.model import Model as Sizes
from megamem.ir.schedule import Schedule
from megamem.planner.activations import plan_activations
from megamem.planner.costs.layer import LayerTime
from megamem.planner.evaluation import Model, Setup
from megamem.planner.hardware import load_hardware
from megamem.planner.memory.activations import metered_peaks, single_rank_schedule
from megamem.planner.memory.inventory import saved_tensors, storage_bytes
from megamem.planner.memory.parameters import model_parameters, stage_parameters, states_of
from megamem.planner.models import load_model
from megamem.planner.schedules.families import build_schedule
from megamem.planner.schedules.family import Request

HERE = Path(__file__).resolve().parent
SEQUENCE_RUNS = "megamem plan --model llama3-70b --gpus 1024 --gpu h100 --seq-length 128k --global-batch-size 512"
ONE_LAYOUT = (
    "megamem plan --model llama3-8b --gpus 8 --seq-length 256k --tensor-model-parallel-size 8 "
    "--pipeline-model-parallel-size 1 --context-parallel-size 1 --expert-model-parallel-size 1 --micro-batch-size 1"
)
PIPELINED_LAYOUT = (
    "megamem plan --model llama3-70b --gpus 64 --seq-length 8k --tensor-model-parallel-size 8 "
    "--pipeline-model-parallel-size 8 --global-batch-size 64"
)
DEEP_LAYOUT = (
    "megamem plan --model deepseek-v3 --gpus 1024 --seq-length 4k --tensor-model-parallel-size 1 "
    "--pipeline-model-parallel-size 16 --expert-model-parallel-size 64 --global-batch-size 4096"
)
TIMED = {
    "one layout": ONE_LAYOUT,
    "pipelined layout": PIPELINED_LAYOUT,
    "deep layout with experts": DEEP_LAYOUT,
    "1024 GPUs": SEQUENCE_RUNS,
}
"""What `speed` runs. The second and the third leave the chunks and microbatches of their layout to the planner."""


# -- published ---------------------------------------------------------------------------------------------------------


def published() -> Iterator[Json]:
    """One row for each published number: ours, theirs, and how far apart they may be."""
    yield _row(
        "MEMO: a layer's copies hide from so many tokens on", "arXiv 2407.12117, fig. 1b", 192, _crossover(), 0.05, "K"
    )
    yield _row("ALST: a step of Llama-8B with 500K tokens on one H100", "arXiv 2506.13996", 1010, _alst(), 0.05, "s")
    yield _row("MEMO: activations of 7B at 1M tokens", "arXiv 2407.12117, sect. 1", 4096, _memo_gib(), 0.0, "GiB")
    yield from _formulas()
    yield from _vocabulary()


def _row(what: str, source: str, theirs: float, ours: float, within: float, unit: str) -> Json:
    return {
        "what": what,
        "source": source,
        "published": theirs,
        "ours": ours,
        "unit": unit,
        "error": ours / theirs - 1,
        "within": within,
        "met": abs(ours / theirs - 1) <= within,
    }


def _crossover() -> float:
    """All 16 units of a GPT-7B layer on A800s: the length from which computing takes as long as copying."""
    hardware = load_hardware("a800")
    for length in range(4, 512):
        layer = LayerTime(Job(model=load_model("gpt-7b"), layout=Layout(), seq_length=length * 1024), 1, hardware)
        computing = layer.work.gemm / hardware.gemm + layer.forward.attention
        if computing >= 16 * 4096 * 2 * length * 1024 / hardware.to_host:
            return float(length)
    return float("inf")


def _alst() -> float:
    """As ALST runs: full recomputation, FlashAttention-2, the MLP's tiles once more, copies of layer inputs not
    overlapped; without the optimizer, which was on the CPU.
    """
    hardware = load_hardware("h100-flash2")
    job = Job(model=load_model("llama3-8b"), layout=Layout(), seq_length=500_000)
    found = Model(job, hardware).price(Setup(schedule=single_rank_schedule(1), fused_loss=True, recompute_all=True))
    layer = LayerTime(job, 1, hardware)
    tiles = 32 * (layer.work.gemms["fc1"] + layer.work.gemms["fc2"]) / hardware.gemm
    inputs = 32 * job.tokens * 4096 * 2
    copies = inputs / hardware.to_host + inputs / hardware.from_host
    return found.step_seconds - found.time["optimizer"] + tiles + copies


def _memo_gib() -> float:
    job = Job(model=load_model("gpt-7b"), layout=Layout(), seq_length=1 << 20)
    own = [one for one in saved_tensors(job, 1) if "statistics" not in one.storage.name and one.storage.name != "lse"]
    return 32 * sum(one.nbytes for one in own) / 2**30


def _formulas() -> Iterator[Json]:
    """Bytes of a layer, arXiv 2205.05198, equations 1, 2 and 4 and table 2."""
    s, b, h, a = 2048, 4, 1536, 16
    model = Sizes(
        num_layers=8, hidden_size=h, num_attention_heads=a, num_query_groups=a, kv_channels=h // a,
        ffn_hidden_size=4 * h, vocab_size=51200, position="learned_absolute", hidden_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    sbh, scores, source = s * b * h, 5 * a * s * s * b, "arXiv 2205.05198, table 2"

    def nbytes(layout: Layout, without: str = "-") -> int:
        job = Job(model=model, layout=layout, seq_length=s, micro_batch_size=b, kernels=Kernels(attention="unfused"))
        names = ("statistics", without)
        return storage_bytes(t for t in saved_tensors(job, 1) if not any(word in t.storage.name for word in names))

    yield _row("Megatron: no parallelism", source, 34 * sbh + scores, nbytes(Layout()), 0.0, "B")
    for t in (2, 8):
        both = Layout(tensor=t, sequence_parallel=True)
        yield _row(
            f"Megatron: tensor {t}", source, 10 * sbh + (24 * sbh + scores) // t, nbytes(Layout(tensor=t)), 0.0, "B"
        )
        yield _row(f"Megatron: tensor and sequence {t}", source, (34 * sbh + scores) // t, nbytes(both), 0.0, "B")
        yield _row(f"Megatron: the same, selective {t}", source, 34 * sbh // t, nbytes(both, "scores"), 0.0, "B")


def _vocabulary() -> Iterator[Json]:
    """What the last stage's output layer costs, over the smallest vocabulary, from that benchmark's own file."""
    rows = json.loads((HERE / "results" / "vocabulary_schedules.cpu.json").read_text(encoding="utf-8"))["results"][
        "rows"
    ]
    first: dict[tuple[str, str, int], float] = {}
    for row in rows:
        if not row["published"] or row["recomputed"]:
            continue
        key = row["model"], row["family"], row["ranks"]
        smallest = first.setdefault(key, row["baseline"]["speed"])
        if smallest != row["baseline"]["speed"]:
            what = f"Vocabulary Parallelism: {key[0]} {key[1]}, {key[2]} ranks, {row['vocabulary'] // 1024}k over 32k"
            yield _row(
                what,
                "arXiv 2411.05288, tables 5 and 6",
                row["published"],
                row["baseline"]["speed"] / smallest,
                0.05,
                "",
            )


# -- measured ----------------------------------------------------------------------------------------------------------

_SMALL: Json = {"hidden": 32, "heads": 4, "sequence": 32, "vocab": 128}
GPT: Json = {**_SMALL, "ffn": 128, "activation": "gelu", "norm": "LayerNorm", "bias": True}
LLAMA: Json = {**_SMALL, "kv_groups": 2, "ffn": 96, "activation": "swiglu", "norm": "RMSNorm", "bias": False}
MOE: Json = {**LLAMA, "experts": 4}
MODELS = {"gpt": GPT, "llama": LLAMA, "moe": MOE}
LAYOUTS: dict[str, Json] = {
    "one rank": {},
    "pipeline": {"pp": 2},
    "interleaved": {"pp": 2, "vpp": 2},
    "tensor": {"tp": 2},
    "sequence": {"tp": 2, "sp": True},
}
_ALL = {"keep_last_layers": 0}
POLICIES: dict[str, Json] = {
    "stock": {},
    "recompute": {"policy": "recompute"},
    "recompute, every 2nd input": {"policy": "recompute", "residual_every": 2},
    "memo": {"policy": "memo", **_ALL},
    "memo, half": {"policy": "memo", "swap_fraction": 0.5, **_ALL},
    "ordered, quarter": {"policy": "ordered", "swap_fraction": 0.25, **_ALL},
}


def _peaks(fields: Json, policies: dict[str, Json]) -> dict[str, int]:
    """On a rank: the most that its layers hold, in two steps of four microbatches."""
    import megamem
    from megamem.integrations.metering import measured_activations
    from megamem.testing.models import GptCase, build_gpt, init_parallel, train_steps

    case = GptCase(**fields, layers=4)
    init_parallel(case)
    peaks = {}
    for name, options in policies.items():
        if not options:
            with measured_activations() as stock:
                train_steps(build_gpt(case), case, num_microbatches=4, steps=2)
            peaks[name] = stock.peak_bytes
            continue
        with megamem.enable({"activations": options}) as handle:
            meter = handle.meter()
            train_steps(build_gpt(case), case, num_microbatches=4, steps=2)
            peaks[name] = meter.peak_bytes
    return peaks


def _job(fields: Json) -> Job:
    from megamem.testing.jobs import job_of_case
    from megamem.testing.models import GptCase

    return job_of_case(GptCase(**fields, layers=4), num_microbatches=4)


def measured(models: dict[str, Json], layouts: dict[str, Json]) -> Iterator[Json]:
    """Predicted and measured peaks, averaged over the ranks where routing decides."""
    from megamem.testing.dist import RankPool

    for ranks in sorted({layout.get("tp", 1) * layout.get("pp", 1) for layout in layouts.values()}):
        with RankPool(ranks, timeout=600) as pool:
            for model, sizes in models.items():
                for name, layout in layouts.items():
                    if layout.get("tp", 1) * layout.get("pp", 1) == ranks and (model != "moe" or name != "tensor"):
                        yield from _compared(pool.run, model, name, {**sizes, **layout})


def _compared(run: Callable[..., list[Any]], model: str, layout: str, fields: Json) -> Iterator[Json]:
    found = run(_peaks, fields, POLICIES)
    job = run(_job, fields)[0]
    stages = range(0, len(found), fields.get("tp", 1))
    for policy, options in POLICIES.items():
        plan = plan_activations(load_config({"activations": options}).activations, 4) if options else None
        predicted = list(metered_peaks(job, plan, _stock(fields)))
        seen = [sum(found[s + t][policy] for t in range(fields.get("tp", 1))) / fields.get("tp", 1) for s in stages]
        errors = [ours / theirs - 1 for ours, theirs in zip(predicted, seen, strict=True)]
        yield {
            "model": model, "layout": layout, "policy": policy, "predicted": predicted, "measured": seen,
            "error": max(errors, key=abs),
        }  # fmt: skip


def _stock(fields: Json) -> Schedule:
    if "pp" not in fields:
        return single_rank_schedule(4)
    request = Request(num_ranks=2, num_microbatches=4, num_chunks=fields.get("vpp", 1))
    return build_schedule("interleaved" if "vpp" in fields else "1f1b", request)


# -- estimators --------------------------------------------------------------------------------------------------------

PUBLIC: dict[str, float] = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
}
"""Parameters as the models' makers publish them: the bytes of their bf16 weights over 2."""


def estimators() -> Iterator[Json]:
    """Bytes per GPU on 8 GPUs, TP 8, 32K tokens, Adam in fp32: what each tool says, None where it says nothing."""
    for name, parameters in PUBLIC.items():
        model = load_model(name)
        layout = Layout(tensor=8, sequence_parallel=True)
        job = Job(model=model, layout=layout, seq_length=32768)
        states = states_of(job, stage_parameters(job, 0))
        kept = metered_peaks(job, None, single_rank_schedule(1))[0]
        yield {
            "model": name,
            "parameters": {"published": parameters, "ours": model_parameters(model)},
            "ours": {"states": states.weights + states.gradients + states.optimizer, "activations": kept},
            "megatron": _megatron(model, 32768),
            # docs/code-docs/source/memory.rst: 4 * params + 16 * params / GPUs, and 18 * params / GPUs (ZeRO-3) besides
            # the largest layer; activations: "needs to be completed".
            "deepspeed": {"zero2": 4 * parameters + 16 * parameters / 8, "zero3": 18 * parameters / 8},
            "accelerate": _accelerate(parameters),
        }


def _megatron(model: Sizes, length: int) -> Json | str:
    """`theoretical_memory_utils` of Megatron-Bridge, which is Megatron-LM's; selective recomputation is assumed."""
    try:
        import torch

        theirs = _bridge()
    except Exception as fault:
        return f"not run: {type(fault).__name__}: {fault}"
    experts = model.experts
    provider = SimpleNamespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups, kv_channels=model.kv_channels, seq_length=length,
        ffn_hidden_size=model.ffn_hidden_size if experts is None else experts.ffn_hidden_size,
        num_moe_experts=None if experts is None else experts.num_experts, gated_linear_unit=model.swiglu,
        activation_func=torch.nn.functional.silu, vocab_size=model.vocab_size, make_vocab_size_divisible_by=128,
        should_pad_vocab=True, share_embeddings_and_output_weights=model.share_embeddings,
        tensor_model_parallel_size=8, pipeline_model_parallel_size=1, virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1, sequence_parallel=True, recompute_granularity="selective",
    )  # fmt: skip
    config = SimpleNamespace(
        model=provider, train=SimpleNamespace(micro_batch_size=1), data_parallel_size=1,
        optimizer=SimpleNamespace(use_distributed_optimizer=True),
        tokenizer=SimpleNamespace(vocab_size=model.vocab_size),
    )  # fmt: skip
    return {
        "states": theirs.compute_weight_and_optimizer_memory(config),
        "activations": theirs.compute_activation_memory(config, num_microbatches=1),
    }


def _bridge() -> Any:
    from megamem.testing.cpu import cpu_rig
    from megamem.testing.trainers import unblock_trainers

    with cpu_rig(), unblock_trainers(), contextlib.redirect_stdout(sys.stderr):
        from megatron.bridge.training.utils import theoretical_memory_utils
    return theoretical_memory_utils


def _accelerate(parameters: float) -> Json | str:
    """`accelerate estimate-memory` in bf16: its own function for training, of the size in fp32."""
    try:
        from accelerate.commands.estimate import estimate_training_usage
    except ImportError as fault:
        return f"not run: {fault}"
    return {name: float(size) for name, size in estimate_training_usage(int(4 * parameters), "bfloat16").items()}


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(repetitions: int) -> Json:
    """Processor and wall seconds of whole processes; a busy machine spoils the wall."""
    found = {}
    for name, command in TIMED.items():
        words = [sys.executable, "-m", *command.split()]
        spent, wall = [], []
        for _ in range(repetitions):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(words, check=True, capture_output=True, timeout=600)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            wall.append(time.perf_counter() - start)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        found[name] = {"command": command, "cpu_seconds": common.summary(spent), "wall_seconds": common.summary(wall)}
    return found


def main() -> int:
    """Run all parts; the exit status."""
    parser = common.argument_parser(__doc__ or "")
    parser.add_argument("--repetitions", type=int, default=5, help="of the timed commands (default: %(default)s)")
    arguments = parser.parse_args()
    results = run(arguments)
    for target in results["targets"]:
        print(f"{'met' if target['met'] else 'NOT MET'}: {target['what']}")
    common.write(arguments.out, "planner", arguments, results)
    return 0


def run(arguments: argparse.Namespace) -> Json:
    """Everything; --quick leaves out most models and repeats nothing."""
    rows = list(
        measured({"llama": LLAMA} if arguments.quick else MODELS, {"one rank": {}} if arguments.quick else LAYOUTS)
    )
    results: Json = {"published": list(published()), "measured": rows}
    results["speed"] = speed(1 if arguments.quick else arguments.repetitions)
    results["estimators"] = list(estimators())
    worst = max(rows, key=lambda row: abs(row["error"]))
    taken = {name: results["speed"][name]["cpu_seconds"]["median"] for name in TIMED}
    *single, many = taken.items()
    results["targets"] = [
        {
            "what": f"predicted activation bytes within 3 % of measured ({len(rows)} runs); worst "
            f"{100 * worst['error']:.2f} % ({worst['model']}, {worst['layout']}, {worst['policy']})",
            "met": abs(worst["error"]) <= 0.03,
        },
        *(
            {"what": f"{name} below 1 s: {seconds:.2f} s of processor time", "met": seconds < 1}
            for name, seconds in single
        ),
        {
            "what": f"a search over layouts of 1024 GPUs below 30 s: {many[1]:.1f} s of processor time",
            "met": many[1] < 30,
        },
        {
            "what": "published numbers as near as asked",
            "exceptions": [row["what"] for row in results["published"] if not row["met"]],
            "met": all(row["met"] for row in results["published"]),
        },
    ]
    return results


if __name__ == "__main__":
    sys.exit(main())
