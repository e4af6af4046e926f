"""What vocabulary passes cost, and costs files with and without them."""

import pytest

from megamem.errors import ScheduleError
from megamem.ir.schedule import Placement
from megamem.ir.workload import PipelineCosts, StageCost, Uniform, VocabularyCost, Workload, parse_costs

LAYER = StageCost(forward=1, backward=2, weight=3)
FIRST = StageCost(forward=4, backward=0, weight=8, activation=0, weight_grad=0)
LAST = StageCost(forward=12, backward=16, weight=20, activation=5, weight_grad=5)
FOUR = Placement(shape="round-robin", num_ranks=4, num_chunks=1)


@pytest.mark.parametrize(
    "model",
    [
        Workload(layers=(LAYER,) * 4, first=FIRST, last=LAST, comm=0.5, kept=0.25),
        Uniform(forward=1, backward=2, weight=3, first=FIRST, last=LAST, comm=0.5, kept=0.25),
    ],
)
def test_embeddings_are_on_the_end_stages_or_divided_by_the_ranks(model: Workload | Uniform) -> None:
    whole, sharded = model.costs(FOUR), model.costs(FOUR, sharded=True)
    assert [stage.forward for stage in whole.stages] == [5, 1, 1, 13]
    assert whole.vocabulary is None
    assert sharded.stages == (LAYER,) * 4  # with the activations of the layers only
    assert sharded.vocabulary == VocabularyCost(
        logits=3, input_grad=4, weight_grad=5, embed=1, embed_grad=2, collective=0.5, kept=0.25
    )


def test_a_collective_has_a_latency_of_its_own_where_it_is_given() -> None:
    share = Workload(layers=(LAYER,) * 4, comm=0.5, collective=2).costs(FOUR, sharded=True).vocabulary
    assert share is not None
    assert share.collective == 2


def test_the_passes_take_the_gemms_that_are_theirs() -> None:
    share = VocabularyCost(logits=1, input_grad=10, weight_grad=100, embed=1000, embed_grad=10000)
    assert [share.seconds(kind, 2) for kind in ("S", "T", "IF", "IB")] == [1, 111, 1000, 10000]
    assert [share.seconds(kind, 1) for kind in ("S", "T")] == [11, 101]
    published = VocabularyCost(logits=1, input_grad=10, weight_grad=100, recompute=0)
    assert [published.seconds("S", 2), published.seconds("T", 2)] == [1, 110]


@pytest.mark.parametrize(
    "costs",
    [
        PipelineCosts(stages=(LAYER,) * 2, comm=0.1, vocabulary=VocabularyCost(logits=1, kept=2, recompute=0)),
        Workload(layers=(LAYER,), first=FIRST, last=LAST, collective=0.3, kept=0.1),
        Workload(layers=(LAYER,)),
    ],
)
def test_a_file_says_what_was_written(costs: PipelineCosts | Workload) -> None:
    assert parse_costs(costs.to_dict()) == costs


def test_files_without_vocabulary_stay_as_they_were() -> None:
    assert set(PipelineCosts(stages=(LAYER,)).to_dict()) == {"stages", "comm"}
    assert set(Workload(layers=(LAYER,)).to_dict()) == {"layers", "first", "last", "comm"}


def test_stages_that_say_nothing_of_the_embeddings_cannot_share_them() -> None:
    with pytest.raises(ScheduleError, match="add `vocabulary`"):
        PipelineCosts(stages=(LAYER,) * 4).costs(FOUR, sharded=True)


@pytest.mark.parametrize("share", [{"logit": 1}, 3, {"logits": -1}, {"kept": "much"}])
def test_what_is_no_cost_is_named(share: object) -> None:
    row = {"forward": 1, "backward": 1, "weight": 1}
    with pytest.raises(ScheduleError, match="vocabulary: "):
        parse_costs({"stages": [row], "vocabulary": share})
