"""What test_bridge.py looks at: Megatron-Bridge pretrains on two CPU ranks, with and without megamem, in one go.

Importing Bridge takes ten seconds, a run one or two; so the ranks are kept for all of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import logging.handlers
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MEMO = {"activations": {"policy": "memo", "keep_last_layers": 0}}
BOTH = {**MEMO, "schedule": {"name": "zb-h1"}}
AUTO = {"activations": {"policy": "auto"}, "planner": {"hardware": "h100"}}
YAML = "model: {hidden_size: 64}\nmegamem:\n  activations: {policy: memo, keep_last_layers: 0}\n"
WRONG = "megamem:\n  activations: {polcy: memo, swap_fraction: lots}\n  shedule: {name: zb-h1}\n"
CLI = ["megamem.schedule.name=zb-h1"]
EXPERTS = {
    "num_moe_experts": 2,
    "add_bias_linear": False,
    "moe_layer_freq": [0, 1, 1, 0],
    "moe_token_dispatcher_type": "allgather",
}
KNOWS_NOTHING = """
import importlib.util, sys
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
import bridge_script
if __name__ == "__main__":
    cfg = bridge_script.recipe()
    cfg = process_config_with_overrides(cfg, sys.argv[2], sys.argv[3:])
    pretrain(cfg, forward_step, callbacks=[bridge_script.watch])
"""


class Watch:
    """A callback of Bridge that keeps every loss and gradient norm, and the weights at the end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.copies: dict[str, Any] = {}

    def on_train_step_end(self, context: Any) -> None:
        losses = context.loss_dict or {}
        self.seen.append(([_number(value) for value in losses.values()], _number(context.grad_norm)))

    def on_train_end(self, context: Any) -> None:
        self.copies = patched_where_loaded()
        for chunk in context.model:
            self.seen += [(name, weight.detach().sum().item()) for name, weight in sorted(chunk.named_parameters())]


def patched_where_loaded() -> dict[str, Any]:
    """What now is in the two functions' homes, and in every place that holds a copy in some release of a trainer."""
    from megamem.patches import RECORDS

    homes = [f"megatron.core.parallel_state:{verb}_model_parallel" for verb in ("initialize", "destroy")]
    copies = [name for patches in RECORDS.values() for patch in patches for name in patch.where_loaded]
    pairs = [(binding, *binding.split(":")) for binding in homes + copies]
    found = {binding: getattr(sys.modules.get(module), name, None) for binding, module, name in pairs}
    return {binding: value for binding, value in found.items() if value is not None}


def _number(value: Any) -> float:
    first = value[0] if isinstance(value, list | tuple) else value
    return float(first)


class Runs:
    """Runs on this rank, and what came of them by name."""

    def __init__(self, folder: Path, example: ModuleType) -> None:
        self.folder, self.example = folder, example
        self.found: dict[str, Any] = {}

    def run(
        self,
        name: str,
        prepare: Callable[[Any], Any] = lambda cfg: None,
        model: Mapping[str, Any] = {},
        **changes: Any,
    ) -> None:
        """Pretrain the example's recipe. `prepare` may return a callback; `changes` are `section.option`."""
        from megatron.bridge.training.gpt_step import forward_step
        from megatron.bridge.training.initialize import destroy_global_state
        from megatron.bridge.training.pretrain import pretrain

        from megamem.integrations.door import Door

        before = patched_where_loaded()
        watch, output, error = Watch(), io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(output):
                cfg = self.example.recipe(**model)
                for key, value in changes.items():
                    section, _, option = key.partition("__")
                    setattr(getattr(cfg, section), option, value)
                added = prepare(cfg)
                pretrain(cfg, forward_step, callbacks=[watch, *([added] if added is not None else [])])
        except Exception as fault:
            error = f"{type(fault).__name__}: {fault}"
            destroy_global_state()
            if (door := Door.current()) is not None:
                door.abandon()
        after = patched_where_loaded()
        self.found[name] = {
            "seen": watch.seen,
            "output": output.getvalue(),
            "error": error,
            "left alone": [binding for binding, value in watch.copies.items() if value is before.get(binding)],
            "restored": before == after and Door.current() is None,
        }


def bridge_runs(folder: str) -> dict[str, Any]:
    """All runs, on one of two ranks; the other has the same."""
    from megamem.testing.trainers import unblock_trainers

    with warnings.catch_warnings(action="ignore"), unblock_trainers():  # Bridge's, and of what it imports
        runs = Runs(Path(folder), load_example())
        _whole_runs(runs)
        _refused(runs)
        _checkpoints(runs)
        _unchanged_script(runs)
        _measured_then_planned(runs)
    return runs.found


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bridge_script", EXAMPLES / "02_nemo_bridge.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _whole_runs(runs: Runs) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from megamem.integrations.bridge import attach

    def merged(cfg: Any) -> None:
        attach(cfg)
        process_config_with_overrides(cfg, str(runs.folder / "run.yaml"), CLI)

    (runs.folder / "run.yaml").write_text(YAML)
    runs.run("stock")
    board = str(runs.folder / "board")
    runs.run("attached", lambda cfg: attach(cfg, BOTH), logger__tensorboard_dir=board)
    runs.found["board"] = [path.name for path in Path(board).glob("events.*")]
    runs.run("merged", merged)
    runs.run("idle", lambda cfg: attach(cfg))
    runs.run("left to the planner", lambda cfg: attach(cfg, AUTO))
    chunks = {"virtual_pipeline_model_parallel_size": 2}
    # Freed at once, an output may be gone before gloo has sent it; NCCL's sends are ordered by the stream.
    overlap = {**chunks, "overlap_p2p_comm": True, "batch_p2p_comm": False, "deallocate_pipeline_outputs": False}
    runs.run("interleaved", model=overlap)
    runs.run("mixed up, ours", lambda cfg: attach(cfg, {"schedule": {"name": "interleaved"}}), model=chunks)
    runs.run("v", lambda cfg: attach(cfg, {"schedule": {"name": "v-half"}}), model=chunks)
    experts = {**chunks, **EXPERTS, "transformer_layer_spec": experts_spec}
    runs.run("v with experts", lambda cfg: attach(cfg, {"schedule": {"name": "zb-v"}}), model=experts)


def experts_spec(config: Any, vp_stage: int | None = None) -> Any:
    """A spec that differs from chunk to chunk."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)


def _refused(runs: Runs) -> None:
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    from megamem.integrations.bridge import attach

    def merged(cfg: Any, *overrides: str, file: str | None = None) -> None:
        attach(cfg)
        process_config_with_overrides(cfg, file, list(overrides))

    (runs.folder / "wrong.yaml").write_text(WRONG)
    runs.run("wrong file", lambda cfg: merged(cfg, file=str(runs.folder / "wrong.yaml")))
    runs.run("wrong override", lambda cfg: merged(cfg, "megamem.schedule.nmae=zb-h1"))
    runs.run("wrong value", lambda cfg: merged(cfg, "megamem.schedule.name=zbh1"))
    runs.run("wrong mapping", lambda cfg: attach(cfg, {"activations": {"policy": "mmemo"}}))
    chunks = {"virtual_pipeline_model_parallel_size": 2}
    runs.run("mixed up", lambda cfg: attach(cfg, MEMO), model=chunks)
    runs.run("mixed up, nothing on", lambda cfg: attach(cfg), model=chunks)
    groups = {"dist__use_decentralized_pg": True, "dist__use_gloo_process_groups": False}
    runs.run("groups of its own", lambda cfg: attach(cfg, MEMO), **groups)


def _checkpoints(runs: Runs) -> None:
    """Saved with megamem, resumed without; both in a folder that both ranks write to."""
    from megamem.integrations.bridge import attach

    where = str(runs.folder / "checkpoints")
    saved = {"checkpoint__save": where, "checkpoint__save_interval": 2, "train__train_iters": 2}
    runs.run("saved", lambda cfg: attach(cfg, BOTH), **saved)
    assert not runs.found["saved"]["error"], {name: found["error"] for name, found in runs.found.items()}
    runs.found["run_config"] = (Path(where) / "iter_0000002" / "run_config.yaml").read_text()
    runs.run("resumed", checkpoint__load=where)


def _unchanged_script(runs: Runs) -> None:
    """`megamem run` on a script that does not know of megamem."""
    from megamem.cli import main

    script = runs.folder / "unchanged.py"
    script.write_text(KNOWS_NOTHING)
    before = list(sys.path), list(sys.argv)
    sys.modules["bridge_script"] = runs.example
    for name, arguments in {
        "unchanged, from its file": ["--config-file", str(runs.folder / "run.yaml"), *CLI],
        "unchanged, from flags": ["--config-file", "", "--megamem-schedule-name", "zb-h1"],
    }.items():
        runs.example.watch = Watch()  # type: ignore[attr-defined]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["run", str(script), *arguments])
        sys.path[:], sys.argv[:] = before
        seen = runs.example.watch.seen
        runs.found[name] = {"seen": seen, "output": out.getvalue(), "error": err.getvalue() if status else ""}


def _measured_then_planned(runs: Runs) -> None:
    """Three commands: `megamem profile` on the script as it is, `megamem plan`, and the script with the plan."""
    from megatron.bridge.training.initialize import destroy_global_state

    from megamem.cli import main

    script, profile, plan = (str(runs.folder / name) for name in ("unchanged.py", "profile.json", "plan.yaml"))
    before = list(sys.path), list(sys.argv)
    runs.example.watch = Watch()  # type: ignore[attr-defined]
    out, logged = io.StringIO(), logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL)
    logging.getLogger("megatron.bridge.training.pretrain").addHandler(logged)
    with contextlib.redirect_stdout(out):
        command = ["profile", "--no-hardware", "--output", profile, "--script", script]
        runs.found["profiled"] = main([*command, "--config-file", "", "train.train_iters=9"])
    sys.path[:], sys.argv[:] = before
    logging.getLogger("megatron.bridge.training.pretrain").removeHandler(logged)
    runs.found["profile's errors"] = [one.getMessage() for one in logged.buffer if one.levelno >= logging.ERROR]
    destroy_global_state()
    with contextlib.redirect_stdout(out):
        asked = ["--gpu", "h100", "--schedule", "zb-h1", "-o", plan]
        if int(os.environ["RANK"]) == 0:  # planned once, and written whole
            assert main(["plan", "--from-profile", profile, *asked]) == 0
        while not Path(plan).exists():
            time.sleep(0.1)
        runs.example.watch = Watch()  # type: ignore[attr-defined]
        status = main(["run", script, "--config-file", "", "--megamem", plan])
    sys.path[:], sys.argv[:] = before
    runs.found["as planned"] = {
        "seen": runs.example.watch.seen, "output": out.getvalue(), "error": "" if status == 0 else "failed",
    }  # fmt: skip
