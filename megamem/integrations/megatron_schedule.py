"""Megatron-Core's forward-backward functions, replaced by a schedule and the one loop that runs it.

What a pass computes stays Megatron's: its `forward_step` (loss scaling, auxiliary losses, per-token loss, data that is
no loss) and `backward_step`, its tensor shapes, its pseudo-deallocated outputs. What is done here is what surrounds
them, and what trainers rely on: gradients are reduced when a chunk's last one is there, `finalize_model_grads_func`
gets the number of tokens, loss dicts come back in the order of microbatches and on the last pipeline rank, timers run.

    refuse                  what does not go with a schedule, before the first message
    MegatronSchedule        plans, connections and failures of a process; runs a step
    megatron_stages         the model's chunks in one step: what the loop calls
    step_plan               a schedule ready to run
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn import Module

from megamem.config import Scheduling, Vocabulary
from megamem.errors import PipelineError, UnsupportedError
from megamem.integrations import compat
from megamem.integrations.gradient_sync import check_order
from megamem.integrations.megatron_linear import SplitLinears
from megamem.integrations.megatron_stages import Stages, formats
from megamem.integrations.placement import VPlacement
from megamem.integrations.step_call import StepCall
from megamem.integrations.step_plan import StepPlan
from megamem.integrations.transformer_engine import DelayedLinears
from megamem.ir.schedule import Action, Placement, Schedule, Shape
from megamem.planner.schedules.families import FAMILIES
from megamem.planner.schedules.forward_order import forward_order
from megamem.planner.schedules.plan import PlannedSchedule, load_schedule, plan_schedule
from megamem.runtime.pipeline.failure import FailureNotice
from megamem.runtime.pipeline.links import Links
from megamem.runtime.pipeline.loop import Loop
from megamem.runtime.pipeline.mailbox import Mailbox
from megamem.runtime.pipeline.trace import Trace
from megamem.runtime.pipeline.weights import WeightQueue

if TYPE_CHECKING:
    from megamem.integrations.vocabulary_parallel import VocabularyParallel

_LOG = logging.getLogger("megamem")


@final
class MegatronSchedule:
    """Runs the steps of a process as `options` ask.

    placement:   the model's, where it is not Megatron's own
    vocabulary:  what shares the embeddings among the ranks, where they do
    """

    def __init__(
        self,
        options: Scheduling,
        placement: VPlacement | None,
        name: str,
        vocabulary: VocabularyParallel | None = None,
    ) -> None:
        self.options, self.placement, self._name, self.vocabulary = options, placement, name, vocabulary
        self.offloads = offloads(options)
        self.queue = WeightQueue()
        self.linears = SplitLinears(self.queue)
        self.delayed = DelayedLinears(self.queue)
        self.trace: Trace | None = None
        self.records = options.trace != "none"  # whether steps are traced
        self.observe: Callable[[Action], None] | None = None  # called after every action of a training step
        self.leaving: tuple[int, int] | None = None  # chunk and microbatch that runs forward and is to be offloaded
        self.reload: Callable[[tuple[int, int]], None] = lambda key: None  # what RELOAD calls
        self._plans: dict[tuple[int, int, bool], StepPlan] = {}
        self._ordered: set[tuple[int, bool]] = set()  # plans, by id, whose order of gradients is known to be right
        self._is_alone = self._can_split = False
        self._links: Links | None = None
        self._mailbox: Mailbox | None = None
        self._notice: FailureNotice | None = None
        self._known: weakref.WeakSet[Module] = weakref.WeakSet()
        self._chunks: list[weakref.ref[Module]] = []

    @classmethod
    def of(
        cls,
        options: Scheduling,
        planned: PlannedSchedule | None,
        name: str,
        vocabulary: VocabularyParallel | None = None,
    ) -> MegatronSchedule:
        """For a model that is about to be built: with a V placement if the schedule asked for is made for one.

        `planned` is what `plan_ahead` gave. `name` is the same on all ranks of the job, and no earlier one's:
        connections are found by it.
        """
        return cls(options, VPlacement() if _shape(options, planned) == "v" else None, name, vocabulary)

    @property
    def planned(self) -> PlannedSchedule | None:
        """The schedule of the last training step that was planned, with its predicted cost; None before the first."""
        return next((plan.planned for plan in reversed(self._plans.values()) if plan.planned is not None), None)

    @property
    def messages(self) -> list[Tensor]:
        """The buffers of messages that are posted and not consumed, or under way, at this moment of a step."""
        return [] if self._mailbox is None else self._mailbox.held

    def unsplit(self) -> list[str]:
        """Matrices whose weight gradient was computed in B although the schedule has W apart; known after a step."""
        planned = self.planned
        if planned is None or not planned.schedule.splits_backward:
            return []
        return self.linears.unsplit([chunk for ref in self._chunks if (chunk := ref()) is not None])

    def close(self) -> None:
        """Drop the connections, which the next step would make anew, and give layers back what was taken from them."""
        self.delayed.close()
        if self._notice is not None:
            self._notice.close()
        if self._links is not None:
            self._links.close()
        if self.vocabulary is not None:
            self.vocabulary.disconnect()

    def run(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Run a step as a schedule. Raises PipelineError on every rank when one fails."""
        call = StepCall.of(step, args, kwargs)
        if call.group.size() == 1:
            self._say_alone()
            return step(*args, **kwargs)  # type: ignore[no-any-return]
        config = get_model_config(call.chunks[0])
        self._check(call, config)
        plan = self._plan(call)
        if not call.forward_only:
            self._check_order(plan, reduces=config.no_sync_func is not None)
        return self._guarded(call, config, plan)

    def _say_alone(self) -> None:
        if not self._is_alone:
            self._is_alone = True
            _LOG.warning(
                "megamem: schedule.name is %s, and there is one pipeline rank only: Megatron's own loop runs",
                self.options.name,
            )

    def _check(self, call: StepCall, config: Any) -> None:
        """Once per model: refuse what cannot be run, before the first message."""
        if all(chunk in self._known for chunk in call.chunks):
            return
        refuse(config, self.options.name)
        if self.placement is not None:
            self.placement.check_model(call.chunks)
        matrices = self.linears.learn(call.chunks) + self.delayed.learn(call.chunks)
        self._can_split = _total(matrices, call.group, call.device) > 0
        if self.vocabulary is not None:  # T and IB are apart from B
            self.queue.split.update(map(id, self.vocabulary.shards.parameters()))
        self._known.update(call.chunks)
        self._chunks = [weakref.ref(chunk) for chunk in call.chunks]

    def _check_order(self, plan: StepPlan, reduces: bool) -> None:
        """Once per plan and setting."""
        if (key := (id(plan), reduces)) not in self._ordered:
            check_order(plan.schedule, reduces=reduces, overwrites=self.delayed.overwrites)
            self._ordered.add(key)

    def _plan(self, call: StepCall) -> StepPlan:
        key = len(call.chunks), call.num_microbatches, call.forward_only
        if key not in self._plans:
            num_ranks, rank = call.group.size(), call.group.rank()
            shape: Shape = "round-robin" if self.placement is None else self.placement.placement.shape
            if call.forward_only:
                placement = Placement(shape=shape, num_ranks=num_ranks, num_chunks=len(call.chunks))
                order = forward_order(placement, call.num_microbatches, vocabulary=self.vocabulary is not None)
                self._plans[key] = StepPlan.of(order, None, rank)
            else:
                planned = plan_schedule(
                    self.options,
                    num_ranks=num_ranks,
                    num_microbatches=call.num_microbatches,
                    num_chunks=len(call.chunks),
                    shapes=(shape,),
                    vocabulary=None if self.vocabulary is None else self.vocabulary.barriers,
                    keeps_logits=self.vocabulary is not None and self.vocabulary.options.keep_logits,
                )
                self._refuse_idle_split(planned.schedule)
                is_tied = self.vocabulary is not None and self.vocabulary.shards.is_tied
                self._plans[key] = StepPlan.of(planned.schedule, planned, rank, is_tied=is_tied)
        return self._plans[key]

    def _refuse_idle_split(self, schedule: Schedule) -> None:
        if schedule.splits_backward and not self._can_split:
            why = "".join(f"; of Transformer Engine's, {problem}" for problem in self.delayed.problems)
            raise UnsupportedError(
                f"schedule {schedule.name} computes weight gradients apart, and no linear layer of this model can: "
                "that needs tensor_parallel.ColumnParallelLinear or RowParallelLinear, or Transformer Engine's Linear, "
                f"LayerNormLinear or GroupedLinear{why}. Use 1f1b or interleaved"
            )

    def _guarded(self, call: StepCall, config: Any, plan: StepPlan) -> list[Any]:
        links, notice = self._connected(call, plan)
        trace = Trace(links.rank, links.device) if self.records and not call.forward_only else None
        forms = formats(call, config, links.device)
        mailbox = Mailbox(links, plan.schedule.placement, links.rank, forms)
        self._mailbox = mailbox
        loop: Loop | None = None
        try:
            ends = passes = None
            if self.vocabulary is not None:
                ends, passes = self.vocabulary.begin(call, config, self.placement, plan, forms["F"])
            stages = Stages(self, call, config, plan, links.device, ends)
            loop = Loop(stages, mailbox, notice, vocabulary=passes, keeps=not call.forward_only, trace=trace)
            loop.observe = None if call.forward_only else self.observe
            result = stages.step(loop)
        except BaseException as error:
            self._fail(error, loop)
            raise
        finally:
            notice.end()
            self._mailbox = None
            if self.vocabulary is not None:
                self.vocabulary.end()
        if trace is not None:
            self.trace = trace
        return result

    def _connected(self, call: StepCall, plan: StepPlan) -> tuple[Links, FailureNotice]:
        ranks = dist.get_process_group_ranks(call.group)
        if self._links is None or self._links.ranks != tuple(ranks):
            self._links = Links(ranks, call.group.rank(), call.device, self._store())
        links = self._links
        if self._notice is None:
            self._notice = FailureNotice(self._store(), self._wake)
        if (earlier := self._notice.begin()) is not None:
            self._leave()
            raise PipelineError(f"before this rank began its step: {earlier}")
        links.open(plan.schedule.placement, self._notice.epoch)
        if self.vocabulary is not None:
            notice = self._notice
            self.vocabulary.connect(call.group, links.device, self._store(), notice.epoch, lambda: notice.found)
        return links, self._notice

    def _store(self) -> Any:
        return distributed_c10d.PrefixStore(f"megamem/{self._name}", distributed_c10d._get_default_store())

    def _wake(self) -> None:
        """Called by the thread that watches for failures: end what waits on the device."""
        if self._links is not None and self._links.device.type == "cuda":
            self._links.close()
            if self.vocabulary is not None:
                self.vocabulary.disconnect()

    def _leave(self) -> None:
        """After a failure: nothing of the step may be left, and nothing of its connections."""
        assert self._links is not None and self._notice is not None
        self.queue.clear()
        self.delayed.forget()
        self._links.close()
        if self.vocabulary is not None:
            self.vocabulary.disconnect()
        self._notice.next_epoch()

    def _fail(self, error: BaseException, loop: Loop | None) -> None:
        """Tell the other ranks, and raise what failed first. What is no Exception (an interrupt) passes through."""
        assert self._links is not None and self._notice is not None
        if loop is None:
            where = "before its first action"
        else:
            where = f"in {loop.current}" if loop.current is not None else "after its last action"
        rank = self._links.rank
        what = (
            f"pipeline rank {rank} (global {self._links.ranks[rank]}) failed {where}: {type(error).__name__}: {error}"
        )
        first = self._notice.publish(what)
        if loop is not None:
            loop.abandon()
        self._leave()
        if isinstance(error, Exception):
            raise PipelineError(first) from error


def plan_ahead(options: Scheduling, shared: Vocabulary | None = None) -> PlannedSchedule | None:
    """The schedule of the steps to come, where the trainer has told Megatron how many microbatches they have.

    shared: how all ranks share the embeddings, if they do

    So that what cannot be had is refused before the model is built, and before anything is sent. Raises as
    `plan_schedule`, on every rank alike.
    """
    num_ranks = parallel_state.get_pipeline_model_parallel_world_size()
    num_microbatches = compat.num_microbatches()
    if num_microbatches is None or num_ranks == 1:
        return None
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    return plan_schedule(
        options,
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_chunks=chunks,
        vocabulary=None if shared is None else shared.barriers,
        keeps_logits=shared is not None and shared.keep_logits,
    )


def _shape(options: Scheduling, planned: PlannedSchedule | None) -> Shape:
    """The placement that a schedule is made for; unplanned, `auto` leaves the layers where Megatron puts them."""
    if planned is not None:
        return planned.schedule.placement.shape
    if options.name == "auto":
        return "round-robin"
    return load_schedule(options.file).placement.shape if options.name == "file" else FAMILIES[options.name].shape


def offloads(options: Scheduling) -> bool:
    """Whether the schedule asked for sends activations of some chunks and microbatches to host memory."""
    if options.name == "file":
        return any(action.kind == "OFFLOAD" for _, action in load_schedule(options.file))
    return options.name in FAMILIES and FAMILIES[options.name].offloads


def refuse(config: Any, name: str) -> None:
    """Raise UnsupportedError, with every reason, where settings of the model do not go with a schedule."""
    problems = []
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        problems.append("overlap_moe_expert_parallel_comm runs the parts of a layer on a schedule of its own")
    if getattr(config, "defer_embedding_wgrad_compute", False):
        problems.append("defer_embedding_wgrad_compute belongs to Megatron's own cool-down")
    if compat.uses_cuda_graphs(config):
        problems.append(
            "CUDA graphs are captured in the order of Megatron's own schedules; set cuda_graph_impl to none"
        )
    if compat.uses_fine_grained_offload(config):
        problems.append(
            "fine_grained_activation_offloading expects the order of Megatron's own schedules; megamem's activations "
            "section does the same in any order"
        )
    if getattr(config, "hybrid_context_parallel", False):
        problems.append("hybrid_context_parallel has a loop over microbatches of its own")
    if getattr(config, "num_microbatches_with_partial_activation_checkpoints", None) is not None:
        problems.append("num_microbatches_with_partial_activation_checkpoints counts microbatches as 1F1B does")
    if problems:
        raise UnsupportedError(
            f"schedule.name: {name}: " + "; ".join(f"{problem}; switch it off" for problem in problems)
        )


def _total(number: int, group: Any, device: torch.device) -> int:
    """The sum over the ranks of a group."""
    value = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(value, group=group)
    return int(value.item())
