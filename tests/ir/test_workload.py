"""Costs of stages: equal ones, those of layers, and costs files."""

from typing import Any

import pytest

from megamem.errors import ScheduleError
from megamem.ir.schedule import Placement
from megamem.ir.workload import PipelineCosts, StageCost, Uniform, Workload, parse_costs

LAYER = StageCost(forward=1, backward=2, weight=3, activation=4, weight_grad=1, offload=5)


def placement(ranks: int, chunks: int) -> Placement:
    return Placement(shape="round-robin", num_ranks=ranks, num_chunks=chunks)


def test_uniform_costs_are_divided_by_the_chunks_and_hops_are_not() -> None:
    costs = Uniform(forward=8, backward=4, weight=2, comm=0.5, activation=16, weight_grad=6, offload=3).costs(
        placement(3, 2)
    )
    assert costs.comm == 0.5
    assert costs.stages == (StageCost(forward=4, backward=2, weight=1, activation=8, weight_grad=3, offload=1.5),) * 6


def test_by_default_w_keeps_the_whole_activation() -> None:
    assert Uniform(activation=3).costs(placement(2, 3)).stages[0].weight_grad == 1
    assert StageCost(forward=1, backward=1, weight=1).total == 3


@pytest.mark.parametrize("field", ["forward", "backward", "weight", "activation", "weight_grad", "offload"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1"])
def test_costs_are_numbers_zero_or_more(field: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=f"{field}: a cost is a number"):
        StageCost(**{"forward": 1, "backward": 1, "weight": 1, field: value})


def test_weight_grad_is_a_part_of_the_activation() -> None:
    with pytest.raises(ScheduleError, match="weight_grad 2 is a part of activation 1"):
        StageCost(forward=1, backward=1, weight=1, activation=1, weight_grad=2)
    with pytest.raises(ScheduleError, match="comm"):
        PipelineCosts(stages=(LAYER,), comm=-1)


def test_layers_are_divided_evenly_and_the_ends_added() -> None:
    first = StageCost(forward=10, backward=0, weight=0, activation=0, weight_grad=0)
    last = StageCost(forward=0, backward=0, weight=20, activation=7, weight_grad=7)
    workload = Workload(layers=(LAYER,) * 8, first=first, last=last, comm=0.25)
    costs = workload.costs(placement(2, 2))
    assert [stage.forward for stage in costs.stages] == [12, 2, 2, 2]
    assert [stage.weight for stage in costs.stages] == [6, 6, 6, 26]
    assert [stage.activation for stage in costs.stages] == [8, 8, 8, 15]
    assert costs.comm == 0.25


def test_unequal_layers_keep_their_order() -> None:
    layers = tuple(StageCost(forward=n, backward=0, weight=0) for n in range(6))
    assert [stage.forward for stage in Workload(layers=layers).costs(placement(3, 1)).stages] == [1, 5, 9]


@pytest.mark.parametrize(("layers", "ranks", "chunks"), [(7, 2, 2), (2, 2, 2), (0, 1, 1)])
def test_layers_that_cannot_be_divided_are_refused_with_the_arithmetic(layers: int, ranks: int, chunks: int) -> None:
    with pytest.raises(ScheduleError, match=f"{layers} layers cannot be divided by {ranks} ranks x {chunks} chunks"):
        Workload(layers=(LAYER,) * layers).costs(placement(ranks, chunks))


def test_costs_of_stages_fit_one_number_of_stages() -> None:
    costs = PipelineCosts(stages=(LAYER,) * 4)
    assert costs.costs(placement(2, 2)) is costs
    with pytest.raises(ScheduleError, match=r"4 stages do not fit 4 ranks with 2 chunks; .* of 8 stages"):
        costs.costs(placement(4, 2))


def test_files_are_read_back() -> None:
    stages = PipelineCosts(stages=(LAYER, LAYER + LAYER), comm=0.1)
    layers = Workload(layers=(LAYER,) * 3, first=LAYER, comm=0.1)
    assert parse_costs(stages.to_dict()) == stages
    assert parse_costs(layers.to_dict()) == layers


def test_text_is_read_as_numbers_and_defaults_are_filled_in() -> None:
    """What `read_mapping` gives: every scalar is text. The ends hold nothing unless they say so."""
    row = {"forward": "1", "backward": "1e-1", "weight": "2"}
    workload = parse_costs({"layers": [row, {**row, "activation": "8"}], "last": row})
    assert isinstance(workload, Workload)
    assert workload.layers[0] == StageCost(forward=1, backward=0.1, weight=2, activation=1, weight_grad=1)
    assert workload.layers[1].weight_grad == 8
    assert (workload.last.activation, workload.first.total) == (0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "a list of stages, or a list of layers"),
        ({"stages": []}, "stages: a list with one entry per stage"),
        ({"stages": "1, 2"}, "stages: a list with one entry per stage"),
        ({"stages": [{"forward": 1}]}, r"stages\[0\]: .* forward, backward, weight"),
        ({"stages": [{"forward": 1, "backward": 1, "weight": 1, "colour": 1}]}, r"stages\[0\]"),
        ({"stages": [{"forward": 1, "backward": 1, "weight": "x"}]}, r"stages\[0\]: weight: 'x' is no number"),
        ({"stages": [{"forward": 1, "backward": 1, "weight": True}]}, r"stages\[0\]: weight: True is no number"),
        ({"stages": [{"forward": 1, "backward": 1, "weight": -1}]}, r"stages\[0\]: weight: a cost"),
        ({"stages": [1]}, r"stages\[0\]: 1 is no mapping"),
        ({"stages": [{"forward": 1, "backward": 1, "weight": 1}], "layers": []}, "unknown keys layers beside stages"),
        ({"layers": [{"forward": 1, "backward": 1, "weight": 1}], "first": 3}, "first: 3 is no mapping"),
        ({"layers": [{"forward": 1, "backward": 1, "weight": 1}], "comm": "fast"}, "comm: 'fast' is no number"),
    ],
)
def test_wrong_files_are_refused_with_the_entry(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ScheduleError, match=reason):
        parse_costs(content)
