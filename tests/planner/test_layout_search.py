"""The search for a layout: in the order of the estimates, and on where the fastest by estimate cannot be settled."""

from __future__ import annotations

import pytest

from megamem.errors import InfeasibleError
from megamem.ir.job import Job, Layout
from megamem.planner.evaluation import Model
from megamem.planner.hardware import load_hardware
from megamem.planner.joint import search as searching
from megamem.planner.joint.layout import LayoutPlan, Wishes, plan_layout
from megamem.planner.joint.quick import Quick
from megamem.planner.models import load_model

H100 = load_hardware("h100")
JOB = Job(model=load_model("llama3-8b"), layout=Layout(), seq_length=32768, global_batch_size=32)
WISHES = Wishes(host=float(64 << 30))
FIXED = searching.Fixed(micro_batch_size=1)


def estimate(job: Job) -> float:
    try:
        return Quick(Model(job, H100)).seconds(WISHES)
    except InfeasibleError:
        return float("inf")


def test_layouts_come_in_the_order_of_their_estimates() -> None:
    jobs = list(searching.layouts_of(JOB, 16, H100, FIXED))
    ranking = searching._Ranking(jobs, H100, WISHES, lambda text: None)
    found = [estimate(job) for job in ranking]
    assert len(found) > 5 and found == sorted(seconds for job in jobs if (seconds := estimate(job)) < float("inf"))
    first = next(iter(ranking := searching._Ranking(jobs, H100, WISHES, lambda text: None)))
    assert estimate(first) == found[0] and ranking.estimated < len(jobs)


def test_the_search_goes_on_where_the_fastest_by_estimate_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[Job] = []

    def picky(job: Job, *rest: object) -> LayoutPlan:
        if len(refused) < 3:
            refused.append(job)
            raise InfeasibleError("what an estimate does not see")
        return plan_layout(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(searching, "plan_layout", picky)
    found = searching.search(JOB, 16, H100, WISHES, FIXED)
    assert len(refused) == 3 and len(found.plans) == 2
    assert all(plan.job.layout not in [one.layout for one in refused] for plan in found.plans)
