"""Train the same small GPT by Megatron's own pipeline schedules and by one of megamem's, to compare number by number.

case = PipelineCase(gpt=GptCase(layers=4, pp=2))
init_parallel(case.gpt)
stock, ours = train_pipeline(case), train_pipeline(case, {"name": "zb-h1"})
assert ours.differences(stock) == []
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

from megamem.integrations.megatron_core import Handle, enable
from megamem.runtime.activations.streams import AbstractDevice
from megamem.testing.models import Batch, GptCase, batches, build_gpt, build_optimizer, global_names
from megamem.testing.parity import relative_error, seed_everything


@dataclass(frozen=True, kw_only=True)
class PipelineCase:
    """What is trained.

    gpt:               the model and its parallel layout
    num_microbatches:  of a training step
    steps:             training steps
    ddp:               further options of Megatron's DDP, such as overlap_grad_reduce
    adam:              Megatron's optimizer; else the gradients are only looked at
    per_token:         a loss function that counts tokens
    lengths:           sequence lengths of the microbatches in turn, of which each must be at most `gpt.sequence`
    evaluate:          microbatches of a forward-only step before each training step; 0 for none
    """

    gpt: GptCase
    num_microbatches: int = 4
    steps: int = 2
    ddp: Mapping[str, Any] = field(default_factory=dict)
    adam: bool = False
    per_token: bool = False
    lengths: tuple[int, ...] = ()
    evaluate: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out on this rank: the results of all steps in order, evaluations included; the last gradients, and the
    parameters, which the last step has not changed."""

    losses: list[dict[str, Any]]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def differences(self, other: "Outcome") -> list[str]:
        """What is not bitwise equal: `losses`, and names of gradients with their relative error."""
        found = [] if _equal(self.losses, other.losses) else ["losses"]
        for name in sorted(self.gradients.keys() | other.gradients.keys()):
            one, two = self.gradients.get(name), other.gradients.get(name)
            if one is None or two is None or not torch.equal(one, two):
                found.append(f"{name}: {relative_error(one, two):.1e}")
        return found


def train_pipeline(
    case: PipelineCase,
    schedule: Mapping[str, object] | None = None,
    *,
    config: Mapping[str, Any] = {},
    inspect: Callable[[Handle], None] | None = None,
    device: AbstractDevice | None = None,
) -> Outcome:
    """Build the model and train it; `schedule` is the configuration section, None for stock Megatron.

    `config` holds other sections; `inspect(handle)` is called after the last step; `device` replaces the copy queues.
    """
    seed_everything()
    with contextlib.ExitStack() as stack:
        sections = {**config, **({"schedule": dict(schedule)} if schedule is not None else {})}
        handle = stack.enter_context(enable(sections, device=device)) if sections else None
        outcome = _train(case, build_pipeline(case))
        if inspect is not None and handle is not None:
            inspect(handle)
        return outcome


def build_pipeline(case: PipelineCase) -> list[Module]:
    """This rank's chunks in DDP, with the functions on the configuration that a trainer puts there."""
    chunks = build_gpt(dataclasses.replace(case.gpt, ddp=False))
    model_config: Any = get_model_config(chunks[0])
    if case.gpt.ddp:
        options = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": case.gpt.distributed_optimizer, **case.ddp}
        ddp_config = DistributedDataParallelConfig(**options)
        chunks = [
            DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        model_config.finalize_model_grads_func = finalize_model_grads
        if ddp_config.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in chunks]
            model_config.no_sync_func = functions if len(functions) > 1 else functions[0]
    return chunks


def _train(case: PipelineCase, chunks: list[Module]) -> Outcome:
    optimizer = build_optimizer(chunks, case.gpt) if case.adam else None
    losses: list[dict[str, Any]] = []
    for step in range(case.steps):
        if case.evaluate:
            with torch.no_grad():
                losses += run_step(case, chunks, case.evaluate, seed=100 + step, forward_only=True)
        for chunk in chunks:
            if case.gpt.ddp:
                chunk.zero_grad_buffer()  # type: ignore[operator]
            chunk.zero_grad(set_to_none=True)
        if optimizer is not None:
            optimizer.zero_grad()
        losses += run_step(case, chunks, case.num_microbatches, seed=step)
        if optimizer is not None and step + 1 < case.steps:
            optimizer.step()
    parameters = {name: value.detach().clone() for chunk in chunks for name, value in global_names(chunk)}
    return Outcome(losses=losses, gradients=gradients_of(chunks), parameters=parameters)


def gradients_of(chunks: Sequence[Module]) -> dict[str, Tensor]:
    """Every gradient of this rank, by the name that its parameter has in the whole model.

    Two copies of a tied weight on one rank must have the same gradient.
    """
    found: dict[str, Tensor] = {}
    for chunk in chunks:
        for name, parameter in global_names(chunk):
            main: Tensor | None = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if main is None else main
            if gradient is not None:
                assert name not in found or torch.equal(found[name], gradient), f"{name} differs between chunks"
                found[name] = gradient.clone()
    return found


def whole_model(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `gradients_of` or `Outcome.parameters` holds on the ranks of data-parallel rank 0, together; a collective.

    The weights of the vocabulary are put together from their rows, whoever holds them; others have the number of the
    tensor-parallel rank behind their name.
    """
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (_tensor_rank(), parallel_state.get_data_parallel_rank(), dict(values)))
    found: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for tensor_rank, replica, held in everybody:
        for name, value in held.items() if replica == 0 else ():
            if shard := re.fullmatch(r"(.*)\[(\d+):\d+\]", name):
                rows.setdefault(shard[1], {})[int(shard[2])] = value
            elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                rows.setdefault(name, {})[tensor_rank * len(value)] = value
            else:
                found[f"{name} {tensor_rank}"] = value
    return found | {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in rows.items()}


def _tensor_rank() -> int:
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return rank


def run_step(case: PipelineCase, chunks: Sequence[Module], count: int, *, seed: int, **options: Any) -> list[Any]:
    """One call of the forward-backward function, as a trainer makes it; what it returns."""
    data = batches(case.gpt, count, step=seed)
    if case.lengths:
        data = [_cut(batch, case.lengths[index % len(case.lengths)]) for index, batch in enumerate(data)]
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=_per_token_step if case.per_token else _mean_step,
        data_iterator=[iter(data) for _ in chunks] if len(chunks) > 1 else iter(data),
        model=list(chunks),
        num_microbatches=count,
        seq_length=case.gpt.sequence,
        micro_batch_size=case.gpt.microbatch,
        decoder_seq_length=case.gpt.sequence,
        **{"forward_only": False, **options},
    )
    return results


def _cut(batch: Batch, length: int) -> Batch:
    return Batch(
        tokens=batch.tokens[:, :length].contiguous(),
        labels=batch.labels[:, :length].contiguous(),
        positions=batch.positions[:, :length],
        mask=None if batch.mask is None else batch.mask[..., :length, :length],
    )


def _mean_step(data: Iterator[Batch], model: Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(data)
    output = model(batch.tokens, batch.positions, batch.mask, labels=batch.labels)

    def loss(per_token: Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return {"per token": per_token.detach().clone()}
        mean = per_token.float().mean()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def _per_token_step(data: Iterator[Batch], model: Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(data)
    output = model(batch.tokens, batch.positions, batch.mask, labels=batch.labels)

    def loss(per_token: Tensor) -> Any:
        counts = batch.labels != 0  # token 0 is padding
        total, number = (per_token.float() * counts).sum(), counts.sum().to(torch.int)
        return total, number, {"loss": torch.stack([total.detach(), number.float()])}

    return output, loss


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)
