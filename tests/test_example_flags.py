"""The flags of the main example: what is wrong is said before anything starts, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The script's own parser, given a corpus that is there."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from pretrain.arguments import parse

    def parsed(*flags: object, ranks: int = 1) -> Any:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return parse(["--data-text", str(tmp_path), *map(str, flags)])

    yield parsed


PIPELINE = "--pipeline-model-parallel-size 4 --num-layers 8 --global-batch-size 8"
UNEVEN = "--pipeline-model-parallel-size 2 --num-layers 5"


class TestBadFlags:
    @pytest.mark.parametrize(
        ("ranks", "flags", "message"),
        [
            (4, "--pipeline-model-parallel-size 4 --num-layers 6", "not divisible by the 4 pipeline stages"),
            (
                2,
                "--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 4",
                "4 virtual",
            ),
            (2, "--tensor-model-parallel-size 2 --num-attention-heads 1", "not divisible by --tensor-model"),
            (1, "--sequence-parallel", "--sequence-parallel needs --tensor-model-parallel-size"),
            (2, "--global-batch-size 3", "not a multiple of --micro-batch-size"),
            (3, "--tensor-model-parallel-size 2", "3 ranks cannot hold"),
            (2, "--context-parallel-size 2", "needs --transformer-impl transformer_engine"),
            (
                2,
                "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 4"
                " --no-overlap-p2p-communication",
                "overlapped point-to-point",
            ),
            (1, "--num-query-groups 2", "needs --group-query-attention"),
            (1, "--expert-model-parallel-size 2", "needs --num-experts"),
            (1, "--num-experts 4", "needs --disable-bias-linear"),
            (1, "--compare", "needs something to compare"),
            (1, "--megamem-activations-policy meno", "did you mean 'memo'"),
            (1, "--async-save", "--async-save needs --save"),
            (1, "--data-path nowhere", "give one of --data-text"),
            (1, "--mtp-num-layers 0", "--mtp-num-layers 0: leave it out"),
            (2, f"{UNEVEN} --mtp-num-layers 1 --save x", "add --untie-embeddings-and-output-weights"),
            (1, "--num-layers 0", "--num-layers must be at least 1"),
            (1, "--megamem-schedule-name gis", "needs --pipeline-model-parallel-size of 2"),
            (4, f"{PIPELINE} --megamem-schedule-name gis --megamem-schedule-group 1", "nearest: group 2"),
            (4, f"{PIPELINE} --megamem-schedule-name gis --megamem-schedule-chunks 3", "nearest: 12 layers"),
            (
                4,
                f"{PIPELINE} --megamem-schedule-name zb-h1 --num-virtual-stages-per-pipeline-rank 2",
                "zb-h1 works with 1 chunks per rank, not 2; nearest: 1 chunks",
            ),
            (2, f"{UNEVEN} --pipeline-model-parallel-layout Et*3|tL", "has 4 layers, --num-layers is 5"),
            (2, f"{UNEVEN} --pipeline-model-parallel-layout Et|t*3|tL", "3 stages, which 2 pipeline ranks cannot"),
            (2, f"{UNEVEN} --pipeline-model-parallel-layout Et|xL", "'x' is none of E, t, m, L"),
            (2, f"{UNEVEN} --decoder-last-pipeline-num-layers 7", "-2 of 5 layers cannot be divided"),
            (
                2,
                f"{UNEVEN} --pipeline-model-parallel-layout Et|t*4L --decoder-last-pipeline-num-layers 4",
                "says it all; leave --decoder-last-pipeline-num-layers out",
            ),
            (4, f"{PIPELINE} --megamem-schedule-name v-half --megamem-schedule-memory-limit 1", "limit"),
            (4, f"{PIPELINE} --megamem-schedule-name 1f1b --megamem-schedule-memory-limit 4GiB", "megamem profile"),
            (4, f"{PIPELINE} --megamem-schedule-name file --megamem-schedule-file nowhere", "nowhere: cannot be read"),
        ],
    )
    def test_is_one_line_before_anything_starts(self, parse: Any, ranks: int, flags: str, message: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            parse(*flags.split(), ranks=ranks)
        assert message in str(stopped.value)
        assert all(line.startswith("pretrain_gpt.py: error: ") for line in str(stopped.value).splitlines())

    def test_all_mistakes_are_reported_at_once(self, parse: Any) -> None:
        with pytest.raises(SystemExit) as stopped:
            parse("--sequence-parallel", "--num-query-groups", 2, "--async-save")
        assert len(str(stopped.value).splitlines()) == 3

    def test_missing_folder_is_named(self, parse: Any, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="no such folder"):
            parse("--data-text", tmp_path / "absent")


def test_model_flops_are_those_of_causal_attention_without_recompute(
    parse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from pretrain.report import flops_per_sample

    args, _ = parse("--num-layers", 3, "--hidden-size", 64, "--seq-length", 128, "--swiglu", "--ffn-hidden-size", 160)
    h, s, f, v = 64, 128, 160, 384
    forward = 3 * s * (2 * h * 3 * h + 2 * h * h + 6 * h * f + 2 * s * h) + 2 * s * h * v
    assert flops_per_sample(args) == 3 * forward
    args.mtp_num_layers = 2  # two layers more, each behind a projection of twice the hidden size, and two losses more
    more = s * (2 * h * 3 * h + 2 * h * h + 6 * h * f + 2 * s * h + 4 * h * h) + 2 * s * h * v
    assert flops_per_sample(args) == 3 * (forward + 2 * more)
