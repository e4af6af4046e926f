"""The configuration: one declaration per option, all faults at once, and the same reading of files, flags and calls."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from megamem.config import (
    SCHEDULES,
    Activations,
    Allocator,
    Config,
    Scheduling,
    TableRow,
    Vocabulary,
    add_arguments,
    config_from_args,
    json_schema,
    load_config,
    options_table,
)
from megamem.errors import ConfigError, MegamemError
from megamem.ir.activation import RECOMPUTE, Fate
from megamem.options import options_of
from megamem.planner.schedules.families import FAMILIES

EVERYTHING = {
    "policy": "memo",
    "swap_fraction": "0.123456789",
    "residual_every": "3",
    "keep_last_layers": "0",
    "host_memory": "1.5GiB",
    "experts": "swap",
    "table": '[{layers: "1-4,7", fc1: 0.3333333333, mlp.linear_fc2: recompute}, {layers: last 2, qkv: 0.25@hbm}]',
    "verify": "false",
}


def write(folder: Path, text: str) -> Path:
    path = folder / "megamem.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(text: str, folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text))
    return caught.value.problems


def parse(*flags: str) -> Config:
    return config_from_args(add_arguments(argparse.ArgumentParser()).parse_args(flags))


def test_nothing_is_on_unless_asked_for() -> None:
    assert load_config() == load_config({}) == Config() == parse()
    assert Config().enabled == ()
    assert load_config({"activations": {"policy": "recompute"}}).enabled == ("activations",)


def test_everything_reads_as_typed_values() -> None:
    activations = load_config({"activations": EVERYTHING}).activations
    assert activations.swap_fraction == 0.123456789
    assert (activations.residual_every, activations.keep_last_layers) == (3, 0)
    assert activations.host_memory == 3 << 29
    assert activations.verify is False
    first, second = activations.table
    assert first.fates == {"fc1": Fate(fraction=0.3333333333), "mlp.linear_fc2": RECOMPUTE}
    assert second.fates["qkv"] == Fate(fraction=0.25, tier="hbm")


@pytest.mark.parametrize(
    "given", [{}, {"policy": "recompute"}, {"policy": "ordered", "swap_fraction": 0.5}, EVERYTHING]
)
def test_a_resolved_configuration_reads_back(given: dict[str, object], tmp_path: Path) -> None:
    config = load_config({"activations": given})
    assert load_config(config.to_dict()) == config
    assert load_config(config) == config
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_file_mapping_flags_and_python_agree(tmp_path: Path) -> None:
    flags = [
        part for name, text in EVERYTHING.items() for part in (f"--megamem-activations-{name}".replace("_", "-"), text)
    ]
    from_flags = parse(*flags)
    assert from_flags == load_config({"megamem": {"activations": EVERYTHING}})
    assert from_flags == parse("--megamem", str(write(tmp_path, from_flags.to_yaml())))
    values = {item.name: getattr(from_flags.activations, item.name) for item in options_of(Activations)}
    assert Config(activations=Activations(**values)) == from_flags


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = str(write(tmp_path, "megamem: {activations: {policy: memo, swap_fraction: 0.5, residual_every: 2}}"))
    config = parse("--megamem", file, "--megamem-activations-swap-fraction", "0.25")
    assert (config.activations.swap_fraction, config.activations.residual_every) == (0.25, 2)


def test_the_flag_off_always_switches_off(tmp_path: Path) -> None:
    file = str(write(tmp_path, "megamem: {activations: {policy: memo, swap_fraction: 0.5}}"))
    assert parse("--megamem", file, "--megamem-activations-policy", "off") == Config()


def test_the_rest_of_a_trainers_file_is_tolerated(tmp_path: Path) -> None:
    text = "trainer: !their/tag {x: 1, x: 2}\nseq: off\nmegamem:\n  activations: {policy: off}\n"
    assert load_config(write(tmp_path, text)) == Config()
    assert load_config({"trainer": 1, "megamem": {"activations": {"policy": "off"}}}) == Config()


def test_yaml_11_booleans_stand_for_the_words_off(tmp_path: Path) -> None:
    assert load_config({"activations": {"policy": False}}) == Config()
    assert load_config(write(tmp_path, "megamem:\n  activations:\n")) == Config()
    assert load_config(write(tmp_path, "megamem:\n")) == Config()


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = """
megamem:
  shedule: {name: 1f1b}
  policy: memo
  activations:
    policy: memmo
    swap_fractoin: 1
    swap_fraction: 1.5
    residual_every: 0
    keep_last_layers: two
    host_memory: 100GB
    experts: [keep]
    verify: yes
    table:
      - {layers: "4-1", fc1: 0.5}
      - {layers: all, fcc1: keep, mlp.linear_fc2: maybe}
      - {layers: 1,3, experts: 0.5}
      - {fc1: keep}
      - {layers: all}
      - {layers: first 0, fc1: keep}
      - fc1
"""
    assert problems_of(text, tmp_path) == (
        "shedule: unknown section; did you mean 'schedule'?",
        "policy: unknown section; did you mean 'activations.policy'?",
        "activations.policy: 'memmo' is unknown; did you mean 'memo'?",
        "activations.swap_fractoin: unknown key; did you mean 'swap_fraction'?",
        "activations.swap_fraction: 1.5 is out of range; give a number from 0 to 1, or auto",
        "activations.residual_every: 0 is out of range; give a whole number of at least 1",
        "activations.keep_last_layers: 'two' is no whole number; give one of at least 0",
        "activations.host_memory: '100GB' has the unknown unit 'GB'; did you mean 100GiB?",
        "activations.experts: ['keep'] is no word; give one of keep, swap, recompute",
        "activations.verify: 'yes' is neither true nor false",
        "activations.table[0].layers: '4-1' is backwards; write 1-4",
        "activations.table[1].fcc1: unknown tensor; did you mean 'fc1'? "
        "(a module needs its path, such as mlp.linear_fc2)",
        "activations.table[1].mlp.linear_fc2: 'maybe' is none of keep, swap, recompute, or a fraction such as 0.5 or "
        "0.5@hbm",
        'activations.table[2].3: is no tensor; a list of layers is quoted, such as layers: "1,3"',
        "activations.table[2].experts: 0.5 is a share, and experts are handled whole; give keep, swap or recompute",
        'activations.table[3]: says no layers; add layers: "all", "1-4", "1,3", "first 1" or "last 2"',
        "activations.table[4]: names no tensor; add one with its fate, such as fc1: 0.5",
        'activations.table[5].layers: \'first 0\' names no layers; write "all", "1-4", "1,3", "first 1" or "last 2" '
        "(the first layer is 1)",
        "activations.table[6]: 'fc1' is no row; write {layers: all, fc1: 0.5}",
    )


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("swap_fraction", "nan", "out of range"),
        ("swap_fraction", "-0.1", "out of range"),
        ("swap_fraction", "half", "no number"),
        ("keep_last_layers", "1.5", "no whole number"),
        ("keep_last_layers", "-1", "out of range"),
        ("host_memory", "100", "no unit"),
        ("host_memory", "100G", "did you mean 100GiB"),
        ("host_memory", "100gib", "did you mean 100GiB"),
        ("host_memory", "100XB", "units: B, KiB"),
        ("host_memory", "plenty", "no amount of memory"),
        ("host_memory", "12B", "only 12 bytes"),
        ("table", "[{layers: all", "not YAML: line 1"),
        ("table", "{layers: all, fc1: 0.5}", "no list of rows"),
        ("table", "[{layers: all, fc1: 1.5}]", "between 0 and 1"),
        ("table", "[{layers: all, fc1: keep, fc1: swap}]", "given twice"),
        ("table", "[{layers: all, fc1: !!python/none x}]", "tag"),
    ],
)
def test_values_that_are_refused(name: str, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"activations": {"policy": "memo"}}, {f"activations.{name}": text})
    (problem,) = caught.value.problems
    assert problem.startswith(f"activations.{name}")
    assert reason in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [("swap_fraction", True), ("keep_last_layers", True), ("host_memory", 3.5), ("host_memory", True), ("verify", 1)],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        load_config({"activations": {"policy": "memo", name: value}})
    with pytest.raises(ConfigError, match=name):
        Activations(policy="memo", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "name", "value"),
    [
        ("recompute", "swap_fraction", 0.5),
        ("off", "swap_fraction", 0.5),
        ("recompute", "keep_last_layers", 1),
        ("off", "residual_every", 2),
        ("off", "table", [{"layers": "all", "fc1": "keep"}]),
    ],
)
def test_a_setting_without_effect_is_a_contradiction(policy: str, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"activations.{name}: has no effect with policy '{policy}'"):
        load_config({"activations": {"policy": policy, name: value}})
    with pytest.raises(ConfigError, match=f"activations.{name}: has no effect with policy '{policy}'"):
        Activations(policy=policy, **{name: value})  # type: ignore[arg-type]


def test_a_schedule_is_asked_for_by_name() -> None:
    config = parse("--megamem-schedule-name", "gis", "--megamem-schedule-group", "2")
    assert config.enabled == ("schedule",)
    assert config.schedule == Scheduling(name="gis", group=2)
    assert load_config(config.to_dict()) == config
    assert config.to_dict()["activations"] == {"policy": "off"}
    with pytest.raises(ConfigError, match=r"schedule.name: 'gish' is unknown; did you mean 'gis-h'"):
        load_config({"schedule": {"name": "gish"}})
    with pytest.raises(ConfigError, match=r"schedule.group: has no effect with name 'zb-v'; .* interleaved, gis"):
        load_config({"schedule": {"name": "zb-v", "group": 2}})
    with pytest.raises(ConfigError, match=r"schedule.group: 0 is out of range; .* at least 1, or auto"):
        load_config({"schedule": {"name": "gis", "group": "0"}})
    with pytest.raises(ConfigError, match=r"schedule.file: name is file, and there is none"):
        Scheduling(name="file")
    with pytest.raises(ConfigError, match=r"schedule.trace: has no effect with name 'off'"):
        load_config({"schedule": {"trace": "trace.json"}})


def test_every_schedule_that_there_is_can_be_asked_for() -> None:
    assert set(SCHEDULES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("text", "value"),
    [("4.5", 4.5), (4, 4.0), ("40GiB", 40 << 30), (40 << 30, 40 << 30), ("auto", "auto"), ("1e1", 10.0)],
)
def test_a_memory_limit_has_a_unit_or_counts_microbatches(text: object, value: object) -> None:
    config = load_config({"schedule": {"name": "auto", "memory_limit": text}})
    assert config.schedule.memory_limit == value
    assert type(config.schedule.memory_limit) is type(value)
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "40GB", "lots", True, [4]])
def test_what_is_no_memory_limit_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match=r"schedule.memory_limit: .*(give|did you mean)"):
        load_config({"schedule": {"name": "auto", "memory_limit": text}})


def test_a_setting_without_effect_is_refused_even_at_its_default() -> None:
    with pytest.raises(ConfigError, match="or remove swap_fraction"):
        load_config({"activations": {"policy": "recompute", "swap_fraction": 1.0}})
    assert load_config({"activations": {"policy": "recompute", "keep_last_layers": 0}}).enabled


def test_faults_of_the_file_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    cases = {
        "megamem: {activations: [": "not YAML: line 1",
        "a: 1\nb: ]\n": "not YAML: line 2, column 4",
        "trainer: 1": "no megamem: block",
        "- 1": "no megamem: block",
        "": "no megamem: block",
        "megamem: 3": "no mapping of sections",
        "megamem: {}\nmegamem: {}\n": "line 2: a second megamem: block",
        "megamem:\n  activations:\n    verify: true\n    verify: false\n": "activations.verify: given twice",
        "megamem: {activations: {policy: !x memo}}": "tag !x",
        "megamem: {activations: 3}": "activations: '3' is no mapping of options",
    }
    for text, reason in cases.items():
        assert reason in "\n".join(problems_of(text, tmp_path)), text


def test_unknown_overrides_are_named() -> None:
    with pytest.raises(ConfigError, match=r"activation.policy: unknown option; did you mean 'activations.policy'"):
        load_config({}, {"activation.policy": "memo"})
    with pytest.raises(ConfigError, match=r"activations.polcy: unknown key; did you mean 'policy'"):
        load_config({}, {"activations.polcy": "memo"})


def test_a_source_that_is_none() -> None:
    with pytest.raises(ConfigError, match="not int"):
        load_config(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no mapping of sections"):
        load_config({"megamem": "memo.yaml"})


def test_config_errors_are_megamem_errors_and_value_errors() -> None:
    assert issubclass(ConfigError, MegamemError)
    assert issubclass(ConfigError, ValueError)


def test_rows_name_layers_of_the_whole_model() -> None:
    def layers(text: str, num_layers: int = 8) -> list[int]:
        return sorted(TableRow(layers=text).layer_numbers(num_layers))

    assert layers("all", 3) == [1, 2, 3]
    assert layers("1-3, 5,last 2") == [1, 2, 3, 5, 7, 8]
    assert layers("first 2") == [1, 2]
    for text in ("9", "last 9", "3-12"):
        with pytest.raises(ConfigError, match="the model has 8 layers"):
            layers(text)


def test_every_option_is_in_every_description() -> None:
    parser = add_arguments(argparse.ArgumentParser(prog="train"))
    help_text, table = " ".join(parser.format_help().split()), options_table()
    blocks = json_schema()["properties"]["megamem"]["properties"]  # type: ignore[index]
    assert json.loads(json.dumps(json_schema())) == json_schema()
    for section in (Activations, Scheduling, Vocabulary):
        block = blocks[section.NAME]["properties"]
        for item in options_of(section):
            assert item.flag(section.NAME) in help_text
            assert " ".join(item.help.split())[:40] in help_text
            assert f"| `{section.NAME}.{item.name}` |" in table
            assert block[item.name]["description"] == item.help
            assert item.kind.parse(item.kind.plain(item.default)) == item.default
        assert set(block) == {item.name for item in dataclasses.fields(section)}
    assert all(line.replace("\\|", "").count("|") == 5 for line in table.splitlines())


def test_per_cent_signs_survive_argparse() -> None:
    """argparse expands every help string when it prints; a bare per-cent sign raises, but only then."""
    parser = add_arguments(argparse.ArgumentParser())
    formatter = parser._get_formatter()
    for action in parser._actions:
        assert formatter._expand_help(action)


def test_argument_names_follow_megatrons_style() -> None:
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help", "--megamem"}
    prefixes = tuple(f"--megamem-{name}-" for name in Config().to_dict())
    assert all(flag.startswith(prefixes) and "_" not in flag for flag in flags)
    assert parser.parse_args([]).megamem_activations_swap_fraction is None


def test_configurations_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().activations = Activations()  # type: ignore[misc]
    with pytest.raises(TypeError):
        Activations("memo")  # type: ignore[call-arg]


def test_a_section_can_be_switched_by_a_boolean(tmp_path: Path) -> None:
    for value in (True, "true", "True"):
        config = load_config({"vocabulary": {"fused_loss": value, "loss_chunk": 4096}})
        assert config.vocabulary == Vocabulary(fused_loss=True, loss_chunk=4096)
        assert config.enabled == ("vocabulary",)
        assert load_config(config) == load_config(write(tmp_path, config.to_yaml())) == config
    assert parse("--megamem-vocabulary-fused-loss", "true").vocabulary == Vocabulary(fused_loss=True)
    assert load_config({"vocabulary": {"fused_loss": False}}) == load_config({"vocabulary": {}}) == Config()
    with pytest.raises(
        ConfigError, match=r"loss_chunk: has no effect without vocabulary.fused_loss or .*parallel; set"
    ):
        load_config({"vocabulary": {"loss_chunk": 4096}})
    with pytest.raises(ConfigError, match="'yes' is neither true nor false"):
        load_config({"vocabulary": {"fused_loss": "yes", "loss_chunk": 4096}})


def test_a_section_with_two_switches_is_on_with_either(tmp_path: Path) -> None:
    shared = load_config({"vocabulary": {"parallel": True, "barriers": 2, "loss_chunk": 512}})
    assert shared.enabled == ("vocabulary",) and not shared.vocabulary.fused_loss
    assert load_config(shared) == load_config(write(tmp_path, shared.to_yaml())) == shared
    assert "barriers" not in load_config({"vocabulary": {"fused_loss": True}}).to_dict()["vocabulary"]  # type: ignore[operator]
    assert load_config(shared, {"vocabulary.fused_loss": "false"}) == shared  # the other switch is still on
    assert load_config(shared, {"vocabulary.parallel": "false"}) == Config()  # and what only it read is gone
    with pytest.raises(ConfigError, match=r"barriers: has no effect without vocabulary.parallel; set it to true"):
        load_config({"vocabulary": {"fused_loss": True, "barriers": 2}})
    with pytest.raises(ConfigError, match=r"barriers: 3 is out of range; give a whole number from 1 to 2") as caught:
        load_config({"vocabulary": {"parallel": "perhaps", "barriers": 3}})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("word", ["false", "False"])
def test_the_flag_false_always_switches_off(word: str, tmp_path: Path) -> None:
    file = str(write(tmp_path, "megamem: {vocabulary: {fused_loss: true, loss_chunk: 4096}}"))
    assert parse("--megamem", file, "--megamem-vocabulary-fused-loss", word) == Config()


def test_the_allocator_section() -> None:
    config = load_config({"allocator": {"mode": "static", "time_limit": "500ms", "min_size": "2MiB"}})
    assert config.allocator == Allocator(mode="static", time_limit=0.5, min_size=2 << 20)
    assert config.enabled == ("allocator",)
    assert load_config(config.to_dict()) == config
    assert parse("--megamem-allocator-mode", "static").allocator.plans == "none"
    with pytest.raises(ConfigError, match=r"allocator.poison: has no effect with mode 'off'"):
        load_config({"allocator": {"poison": True}})
    with pytest.raises(ConfigError, match=r"allocator.time_limit: '0s' is no time; .* such as 500ms, 60s or 5min"):
        load_config({"allocator": {"mode": "static", "time_limit": "0s"}})
