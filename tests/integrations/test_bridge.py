"""NeMo through Megatron-Bridge: real `pretrain` runs on two CPU ranks, with megamem's section in the configuration."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from bridge_runs import bridge_runs

from megamem.testing.dist import run_ranks

pytestmark = [pytest.mark.megatron, pytest.mark.slow]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two ranks found."""
    if find_spec("megatron") is None or find_spec("megatron.bridge") is None:
        pytest.skip("megatron-bridge is not installed; ci/test.sh installs it beside the Megatron-Core that it fits")
    found: list[Found] = run_ranks(bridge_runs, 2, str(tmp_path_factory.mktemp("bridge")), timeout=400)
    return found


def same(ranks: list[Found], name: str, other: str = "stock") -> None:
    """The run ended well, and with the bits of another: every loss, gradient norm and weight, on every rank."""
    for found in ranks:
        assert found[name]["error"] == "" and len(found[name]["seen"]) > 10
        assert found[name]["seen"] == found[other]["seen"]


def errors(ranks: list[Found], name: str) -> str:
    """The error of a run, which all ranks have, before the first step; and nothing stays patched."""
    first, second = (found[name] for found in ranks)
    assert first["error"] == second["error"] != "" and first["seen"] == []
    assert first["restored"] and second["restored"]
    return str(first["error"])


class TestPretrain:
    def test_attached_it_trains_to_the_same_bits(self, ranks: list[Found]) -> None:
        same(ranks, "attached")
        assert all(found["attached"]["restored"] for found in ranks)
        first, second = (found["attached"]["output"] for found in ranks)
        assert "is on, with megatron-core" in first and "policy: memo" in first and "bubble 7.7 %" in first
        assert "what it did on rank 0" in first and "swapped to host memory" in first
        assert "is on, with" not in second and "what it did" not in second

    def test_the_trainers_copies_of_what_is_patched_are_replaced(self, ranks: list[Found]) -> None:
        """Bridge 0.6 holds some when it pretrains; 0.3 holds none, and only the functions' homes are looked at."""
        for found in ranks:
            assert found["attached"]["left alone"] == [] and len(found["idle"]["left alone"]) >= 2

    def test_files_and_overrides_reach_the_section(self, ranks: list[Found]) -> None:
        same(ranks, "merged")
        assert "policy: memo" in ranks[0]["merged"]["output"] and "name: zb-h1" in ranks[0]["merged"]["output"]

    def test_an_empty_section_is_stock(self, ranks: list[Found]) -> None:
        same(ranks, "idle")
        assert "is on, with" not in ranks[0]["idle"]["output"]

    def test_what_is_left_to_the_planner_is_decided_for_this_model(self, ranks: list[Found]) -> None:
        same(ranks, "left to the planner")
        output = ranks[0]["left to the planner"]["output"]
        assert "activations  off" in output and "The plan predicts" in output  # everything fits as it is

    def test_the_callback_writes_the_report(self, ranks: list[Found]) -> None:
        assert ranks[0]["board"] or ranks[1]["board"]

    def test_our_schedule_is_right_where_bridges_own_is_wrong(self, ranks: list[Found]) -> None:
        same(ranks, "mixed up, ours", "interleaved")

    @pytest.mark.parametrize("name", ["v", "v with experts"])
    def test_v_placements(self, ranks: list[Found], name: str) -> None:
        assert [found[name]["error"] for found in ranks] == ["", ""]
        losses = [losses[0] for losses, _ in ranks[1][name]["seen"][:3]]
        assert losses[2] < losses[0] < 5.2


class TestRefused:
    def test_a_file_with_mistakes_with_all_of_them_before_the_groups_are_made(self, ranks: list[Found]) -> None:
        error = errors(ranks, "wrong file")
        assert error.startswith("ConfigError: 3 problems")
        assert "did you mean 'schedule'?" in error and "did you mean 'policy'?" in error and "'lots' is no" in error

    def test_an_override_of_an_unknown_option(self, ranks: list[Found]) -> None:
        assert "Could not override 'megamem.schedule.nmae'" in errors(ranks, "wrong override")

    def test_an_override_with_an_unknown_word(self, ranks: list[Found]) -> None:
        assert "schedule.name: 'zbh1' is unknown; did you mean 'zb-h1'?" in errors(ranks, "wrong value")

    def test_a_mapping_with_mistakes(self, ranks: list[Found]) -> None:
        assert "did you mean 'memo'?" in errors(ranks, "wrong mapping")

    @pytest.mark.parametrize("name", ["mixed up", "mixed up, nothing on"])
    def test_a_layout_that_bridge_would_train_wrongly(self, ranks: list[Found], name: str) -> None:
        error = errors(ranks, name)
        assert "mixes up the messages" in error and "set overlap_p2p_comm to true" in error

    def test_groups_that_megatron_core_does_not_know(self, ranks: list[Found]) -> None:
        assert "use_decentralized_pg" in errors(ranks, "groups of its own")


class TestCheckpoints:
    def test_saved_with_megamem_resumed_without(self, ranks: list[Found]) -> None:
        for found in ranks:
            assert found["saved"]["error"] == found["resumed"]["error"] == ""
            assert found["resumed"]["seen"] == found["stock"]["seen"][2:]

    def test_nothing_in_the_saved_configuration_is_megamems_class(self, ranks: list[Found]) -> None:
        text = ranks[0]["run_config"]
        assert text.startswith("_target_: megatron.bridge.training.config.ConfigContainer\n")
        assert "_target_: megamem" not in text
        assert "\nmegamem:\n  activations:\n" in text


class TestAScriptThatKnowsNothing:
    @pytest.mark.parametrize("name", ["unchanged, from its file", "unchanged, from flags"])
    def test_trains_to_the_same_bits_under_megamem_run(self, ranks: list[Found], name: str) -> None:
        same(ranks, name)
        assert "name: zb-h1" in ranks[0][name]["output"] and "what it did on rank 0" in ranks[0][name]["output"]
        assert ("policy: memo" in ranks[0][name]["output"]) == ("file" in name)

    def test_three_commands_lead_from_the_script_to_its_plan_to_the_same_bits(self, ranks: list[Found]) -> None:
        assert ranks[0]["profiled"] == ranks[1]["profiled"] == 0
        assert ranks[0]["profile's errors"] == [], "that it is stopped is no failure"
        same(ranks, "as planned")
        output = ranks[0]["as planned"]["output"]
        assert "a step:" in output and "activations of rank 0, MiB" in output  # of the profile, and of the plan
        assert "name: zb-h1" in output and "The plan predicts" in output
        assert "plan: predicted and measured" in output
