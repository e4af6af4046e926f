"""Our flags among those of somebody else's script."""

from pathlib import Path

import pytest

from megamem.errors import ConfigError
from megamem.flags import split_flags

THEIRS = ["--num-layers", "4", "--lr=1e-3", "-x", "--flag"]


def test_flags_are_taken_out_and_the_others_keep_their_order() -> None:
    ours = ["--megamem-activations-policy", "memo", "--megamem-activations-swap-fraction=0.5"]
    request, rest = split_flags([*THEIRS[:2], *ours, *THEIRS[2:]])
    assert rest == THEIRS
    assert request.config.activations.policy == "memo" and request.config.activations.swap_fraction == 0.5
    assert request.values == {"megamem_activations_policy": "memo", "megamem_activations_swap_fraction": "0.5"}
    assert request.origins["activations.swap_fraction"] == "--megamem-activations-swap-fraction"


def test_without_flags_nothing_is_on() -> None:
    request, rest = split_flags(THEIRS)
    assert rest == THEIRS and request.config.enabled == () and request.values == {}


def test_what_follows_two_dashes_is_the_scripts() -> None:
    _, rest = split_flags(["--", "--megamem", "theirs.yaml"])
    assert rest == ["--", "--megamem", "theirs.yaml"]


def test_a_flag_wins_over_the_file_and_each_says_where_it_is_from(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("megamem: {activations: {policy: memo, swap_fraction: 0.5}}\n")
    request, _ = split_flags(["--megamem", str(file), "--megamem-activations-swap-fraction", "0.25"])
    assert request.config.activations.swap_fraction == 0.25
    assert request.origins == {
        "activations.policy": str(file),
        "activations.swap_fraction": "--megamem-activations-swap-fraction",
    }


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        split_flags(["--megamem-activations-polcy", "memo", "--megamem-schedule-name", "--lr", "1", "--megamem"])
    told = "\n".join(caught.value.problems)
    assert "did you mean '--megamem-activations-policy'?" in told
    assert "--megamem-schedule-name: has no value" in told and "--megamem: has no value" in told


class TestTheTrainersOwnYaml:
    TEXT = "language_model: {num_layers: 4, path: !pathex x}\nmegamem:\n  schedule: {name: zb-h1}\n"

    def test_its_block_counts_as_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(self.TEXT)
        request, rest = split_flags(["--yaml-cfg", str(file)])
        assert request.config.schedule.name == "zb-h1"
        assert request.origins == {"schedule.name": f"the megamem: block in {file}"}
        assert rest == ["--yaml-cfg", str(file)]

    def test_it_needs_none(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("language_model: {num_layers: 4}\n")
        assert split_flags([f"--yaml-cfg={file}"])[0].config.enabled == ()

    def test_two_answers_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(self.TEXT)
        with pytest.raises(ConfigError, match="two answers to one question"):
            split_flags(["--yaml-cfg", str(file), "--megamem", str(file)])

    def test_its_mistakes_are_told(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("megamem: {schedule: {nmae: zb-h1}}\n")
        with pytest.raises(ConfigError, match=r"did you mean 'name'\?"):
            split_flags(["--yaml-cfg", str(file)])
