"""The vocabulary passes of one step: IF, S, T and IB (see the package)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.nn import Parameter

from megamem.ir.schedule import TOKENS_AHEAD, Action, Barriers, Direction
from megamem.ir.vocabulary import VocabShard
from megamem.kernels.linear_cross_entropy import (
    LossOptions,
    check_labels,
    combine_statistics,
    empty_logits,
    gradient_coefficients,
    shard_gradient,
    shard_input_gradient,
    shard_statistics,
    shard_statistics_and_numerator,
    token_outputs,
)
from megamem.kernels.linear_cross_entropy.autograd import mark_added
from megamem.kernels.linear_cross_entropy.collectives import gather_first, scatter_sum_first, stack_ranks, sum_
from megamem.runtime.pipeline.lanes import Pending
from megamem.runtime.pipeline.loop import AbstractVocabulary
from megamem.runtime.pipeline.weights import WeightTask, run_tasks
from megamem.runtime.vocabulary.connections import Connections, Letter
from megamem.runtime.vocabulary.layout import AbstractEnds, AbstractShards, Layout


class _Kept(NamedTuple):
    """What S leaves for T."""

    hidden: Tensor
    labels: Tensor  # [T]
    gradient: Tensor  # [T]
    logits: Tensor | None  # [T, K], where they are not made again
    combined: Pending[tuple[Tensor, Tensor | None]]  # statistics of all shards; see `SharedVocabulary._meet`


@final
class SharedVocabulary(AbstractVocabulary):
    """The vocabulary passes of one step.

    options:  the loss; its vocab_size is the whole vocabulary's
    barriers, chunk:  of `ir.schedule`; how many rows of the weight at a time
    keeps_logits:     whether this rank's logits stay from S to T, which else makes them again
    order:    microbatches in the order in which the first stage takes them
    trains:   whether backward passes follow
    checks:   whether to look at tokens and labels of the first microbatches, for which the host waits for the device
    """

    def __init__(
        self,
        layout: Layout,
        shards: AbstractShards,
        ends: AbstractEnds,
        connections: Connections,
        options: LossOptions,
        *,
        barriers: Barriers,
        chunk: int | None,
        keeps_logits: bool,
        order: Sequence[int],
        trains: bool,
        checks: bool,
    ) -> None:
        self._layout, self._shards, self._ends, self._wires = layout, shards, ends, connections
        self._options, self._barriers, self._chunk, self._keeps_logits = options, barriers, chunk, keeps_logits
        self._order, self._sent, self._trains, self._checks = order, 0, trains, checks
        # By microbatch. A function waits for what it returns; a rank does not wait for what it has sent itself.
        self._tokens: dict[int, Callable[[], Tensor]] = {}
        self._rows: dict[int, Tensor] = {}  # of the shard, [B, S], from IF to IB; -1 for other ranks' words
        self._embeddings: dict[int, Callable[[], Tensor]] = {}  # on the rank of the first stage
        self._letters: dict[int, tuple[Letter, Callable[[], Tensor]]] = {}
        self._kept: dict[int, _Kept] = {}
        self._gradients: dict[int, Callable[[], Tensor]] = {}  # of the hidden state, on the rank of the last stage
        self._embedding_gradients: dict[int, Callable[[], Tensor]] = {}
        self._passes = {"IF": self._embed, "S": self._statistics, "T": self._gradient, "IB": self._embedding_gradient}
        if layout.is_first:
            self._send_tokens(TOKENS_AHEAD)

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def expect(self, action: Action) -> None:
        layout, microbatch = self._layout, action.microbatch
        if action.kind == "IF" and not layout.is_first:
            blank = torch.empty(layout.tokens, dtype=torch.int64, device=layout.device)
            self._tokens[microbatch] = self._wires.broadcast("tokens", blank, layout.first).wait
        elif action.kind == "S" and not layout.is_last:
            letter = Letter.blank(layout)
            self._letters[microbatch] = letter, self._wires.broadcast("hidden", letter.buffer, layout.last).wait
        elif action.kind == "IB" and not layout.is_first:
            empty = torch.empty(layout.embedding, dtype=layout.dtype, device=layout.device)
            arrives = self._wires.broadcast("embedding_gradient", empty, layout.first)
            self._embedding_gradients[microbatch] = arrives.wait

    def receive(self, action: Action) -> None:
        microbatch = action.microbatch
        if action.kind == "IF":
            if self._layout.is_first:
                self._send_tokens(self._order.index(microbatch) + TOKENS_AHEAD + 1)
            self._tokens[microbatch]()
        elif action.kind == "S":
            self._letters[microbatch][1]()
        elif action.kind == "T":
            self._kept[microbatch].combined.wait()
        else:
            self._embedding_gradients[microbatch]()

    def run(self, action: Action) -> None:
        self._passes[action.kind](action.microbatch)

    def take(self, direction: Direction, microbatch: int) -> Tensor:
        layout = self._layout
        if direction == "F":
            embedding = self._embeddings.pop(microbatch)()
            return embedding if layout.scatters_embedding else sum_(embedding, layout.tensor_group)
        gradient = self._gradients.pop(microbatch)()
        return gradient if layout.sequence_parallel else sum_(gradient, layout.tensor_group)

    def give(self, direction: Direction, microbatch: int, tensor: Tensor) -> None:
        layout = self._layout
        if direction == "B":
            gradient = tensor.detach().contiguous()
            self._wires.broadcast("embedding_gradient", gradient, layout.first)
            self._embedding_gradients[microbatch] = lambda: gradient
            return
        letter = Letter.blank(layout)
        labels, gradient_of_loss = self._ends.labels(microbatch)
        letter.hidden.copy_(tensor.detach())
        letter.labels.copy_(labels.t().reshape(-1))
        if gradient_of_loss is None:
            letter.gradient.zero_()
        else:
            letter.gradient.copy_(gradient_of_loss.t().reshape(-1))
        self._wires.broadcast("hidden", letter.buffer, layout.last)
        self._letters[microbatch] = letter, lambda: letter.buffer

    def finish(self) -> None:
        if not self._trains:
            for microbatch, kept in self._kept.items():
                self._report(microbatch, kept)
            self._kept.clear()
        self._wires.finish()

    def clear(self) -> None:
        for held in (self._tokens, self._rows, self._embeddings, self._letters, self._kept, self._gradients):
            held.clear()
        self._embedding_gradients.clear()

    # -- the passes ----------------------------------------------------------------------------------------------------

    def _send_tokens(self, count: int) -> None:
        """Have the tokens of the first `count` microbatches on their way to the other ranks."""
        looks = self._checks and self._sent == 0
        for microbatch in self._order[self._sent : count]:
            tokens = self._ends.tokens(microbatch).contiguous()
            if looks:
                _check_tokens(tokens, self._options.vocab_size)
            self._wires.broadcast("tokens", tokens, self._layout.first)
            self._tokens[microbatch] = partial(_itself, tokens)
        self._sent = max(self._sent, count)

    def _embed(self, microbatch: int) -> None:
        layout, words = self._layout, self._shards.words
        rows_BS, is_here_BS = words_to_rows(self._tokens.pop(microbatch)(), words)
        with torch.no_grad():
            part = torch.nn.functional.embedding(rows_BS, self._shards.input_weight())
            part.masked_fill_(~is_here_BS.unsqueeze(-1), 0.0)
            if layout.scatters_embedding:
                part = scatter_sum_first(part.transpose(0, 1).contiguous(), layout.tensor_group)
        pending = self._wires.reduce("embedding", part, layout.first)
        if layout.is_first:
            self._embeddings[microbatch] = pending.wait
        if self._trains:
            self._rows[microbatch] = torch.where(is_here_BS, rows_BS, -1)

    def _statistics(self, microbatch: int) -> None:
        layout, options = self._layout, self._options
        letter, _ = self._letters.pop(microbatch)
        if self._checks:
            check_labels(letter.labels, options)
            self._checks = False
        self._wires.lane("statistics").drop_finished()
        hidden_TD, weight_KD = self._whole(letter.hidden), self._shards.output_weight()
        logits_TK = empty_logits(hidden_TD, weight_KD, options) if self._trains and self._keeps_logits else None
        own_NT, numerator_TD = self._shard_statistics(hidden_TD, weight_KD, letter.labels, logits_TK)
        stage_NT = combine_statistics(stack_ranks(own_NT, layout.tensor_group), options)
        meet = self._meet(letter, weight_KD, own_NT, stage_NT, numerator_TD)
        combined = self._wires.lane("statistics").post(meet)
        if self._trains or layout.is_last:
            self._kept[microbatch] = _Kept(letter.hidden, letter.labels, letter.gradient, logits_TK, combined)
        if self._trains and self._barriers == 1 and layout.is_last:
            self._gradients[microbatch] = lambda: _second(combined)

    def _shard_statistics(
        self, hidden_TD: Tensor, weight_KD: Tensor, labels_T: Tensor, logits_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Statistics of this rank's shard; with one barrier the numerator of the input gradient too."""
        options, first_word, chunk = self._options, self._shards.words.start, self._chunk
        if self._trains and self._barriers == 1:
            return shard_statistics_and_numerator(
                hidden_TD, weight_KD, labels_T, options, first_word=first_word, logits_TK=logits_TK, chunk=chunk
            )
        statistics_NT = shard_statistics(
            hidden_TD, weight_KD, labels_T, options, first_word=first_word, logits_TK=logits_TK, chunk=chunk
        )
        return statistics_NT, None

    def _meet(
        self, letter: Letter, weight_KD: Tensor, own_NT: Tensor, stage_NT: Tensor, numerator_TD: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """What happens beside the computation when S of all ranks is done.

        The statistics of all stages; and from a numerator the input gradient, of which the rank of the last stage gets
        the sum over pipeline ranks.
        """
        layout, options, wires = self._layout, self._options, self._wires
        group = wires.group("statistics")

        def meet() -> tuple[Tensor, Tensor | None]:
            whole_NT = combine_statistics(group.gather(stage_NT), options)
            if numerator_TD is None:
                return whole_NT, None
            coefficients_MT = gradient_coefficients(
                whole_NT, letter.labels, options, loss_gradient_T=letter.gradient
            )  # fmt: skip
            gradient_TD = shard_input_gradient(
                numerator_TD, own_NT, coefficients_MT, weight_KD, letter.labels, options,
                first_word=self._shards.words.start,
            )  # fmt: skip
            gradient = gradient_TD.to(layout.dtype).view(-1, *layout.hidden[1:])
            if layout.sequence_parallel:
                gradient = wires.group("tensor").scatter_sum(gradient)
            group.reduce(gradient, layout.last)
            return whole_NT, gradient if layout.is_last else None

        return meet

    def _gradient(self, microbatch: int) -> None:
        layout, options, kept = self._layout, self._options, self._kept.pop(microbatch)
        whole_NT, _ = kept.combined.wait()
        coefficients_MT = gradient_coefficients(whole_NT, kept.labels, options, loss_gradient_T=kept.gradient)
        hidden_TD, weight_KD = self._whole(kept.hidden), self._shards.output_weight()
        made: list[Tensor | None] = []

        def add(gradient_KD: Tensor | None, accumulate: bool) -> None:
            part_TD = shard_gradient(
                hidden_TD,
                weight_KD,
                kept.labels,
                coefficients_MT,
                options,
                first_word=self._shards.words.start,
                logits_TK=kept.logits,
                needs_input_gradient=self._barriers == 2,
                weight_gradient_KD=gradient_KD,
                accumulate=accumulate,
                chunk=self._chunk,
            )
            made.append(part_TD)

        accumulate(weight_KD, add)
        (part_TD,) = made
        if part_TD is not None:
            part = part_TD.to(layout.dtype).view(-1, *layout.hidden[1:])
            if layout.sequence_parallel:
                part = scatter_sum_first(part, layout.tensor_group)
            pending = self._wires.reduce("gradient", part, layout.last)
            if layout.is_last:
                self._gradients[microbatch] = pending.wait
        if layout.is_last:
            self._report(microbatch, kept)

    def _embedding_gradient(self, microbatch: int) -> None:
        layout = self._layout
        rows_BS = self._rows.pop(microbatch)
        gradient = self._embedding_gradients.pop(microbatch)()
        if layout.scatters_embedding:
            gradient = gather_first(gradient, layout.tensor_group)
            rows = rows_BS.t().reshape(-1)
        else:
            rows = rows_BS.reshape(-1)
        gradient_TD = gradient.reshape(-1, gradient.shape[-1])

        def add(gradient_KD: Tensor | None, accumulate: bool) -> None:
            if gradient_KD is None:
                return
            if not accumulate:
                gradient_KD.zero_()
            is_here = rows >= 0
            # Tokens of other ranks add zeros. Each to a row of its own: a GPU adds to one row one after the other.
            anywhere = torch.arange(len(rows), device=rows.device) % len(gradient_KD)
            values = torch.where(is_here.unsqueeze(1), gradient_TD, 0.0).to(gradient_KD.dtype)
            gradient_KD.index_put_((torch.where(is_here, rows, anywhere),), values, accumulate=True)

        accumulate(self._shards.input_weight(), add)

    def _whole(self, hidden: Tensor) -> Tensor:
        """The hidden states of all tokens, [T, D]."""
        if self._layout.sequence_parallel:
            hidden = gather_first(hidden, self._layout.tensor_group)
        return hidden.reshape(-1, hidden.shape[-1])

    def _report(self, microbatch: int, kept: _Kept) -> None:
        """On the rank of the last stage: tell the trainer the losses."""
        whole_NT, _ = kept.combined.wait()
        loss_T = token_outputs(whole_NT, kept.labels, self._options).loss
        batch, length = self._layout.tokens
        self._ends.losses(microbatch, loss_T.view(length, batch).t().contiguous())


def _check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError for a token that is no word, which is in no rank's rows: its embedding would be zero."""
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)].tolist()
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {tokens.numel()} tokens lie outside the vocabulary, the first is {wrong[0]}: words are 0 "
            f"to {vocab_size - 1} (vocab_size)"
        )


def words_to_rows(tokens: Tensor, words: VocabShard) -> tuple[Tensor, Tensor]:
    """The rows of a shard that hold `tokens`, and whether they are there; row 0 where they are not."""
    rows = tokens - words.start
    is_here = (rows >= 0) & (rows < words.num_words)
    return torch.where(is_here, rows, 0), is_here


def accumulate(weight: Parameter, add: Callable[[Tensor | None, bool], None]) -> None:
    """Have `add(gradient, accumulate)` compute a weight gradient, and let it enter the parameter through autograd.

    Where Megatron's DDP has a `main_grad` that is what is added to, else a gradient of the weight's size is written.
    For a frozen weight `gradient` is None.
    """
    if not weight.requires_grad:
        add(None, False)
        return

    def gradient() -> Tensor | None:
        main: Tensor | None = getattr(weight, "main_grad", None)
        if main is None:
            made = torch.empty_like(weight)
            add(made, False)
            return made
        add(main, True)
        return mark_added(weight)

    run_tasks([WeightTask(parameter=weight, gradient=gradient, kept=())])


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _second(combined: Pending[tuple[Tensor, Tensor | None]]) -> Tensor:
    _, gradient = combined.wait()
    assert gradient is not None
    return gradient
