"""`megamem solve`: what it prints and writes, its exit status, and how it ends early."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamem.cli import main
from megamem.ir.allocation import Buffer, Problem, read_problem, read_solution, write
from megamem.ir.allocation_trace import AllocationTrace, Request, write_trace
from megamem.planner.allocation.validator import check

# Three buffers, live in turns of two: 3 KiB is the most that is live, and enough.
ROWS = (("a", 0, 4, 1024), ("b", 2, 8, 2048), ("c", 4, 9, 1024))
PROBLEM = Problem(buffers=tuple(Buffer(id=i, lower=b, upper=e, size=n) for i, b, e, n in ROWS))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "p.csv", PROBLEM)
    return tmp_path / "p.csv"


def test_it_says_what_it_found(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "peak         3072 bytes" in out
    assert "gap          0.0000%, optimal" in out
    assert "proof        no peak is below 3072 bytes: at instant" in out
    assert err == ""


@pytest.mark.parametrize("solver", ["auto", "greedy", "bilevel", "exact"])
def test_json_is_for_programs(solver: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(file), "--solver", solver, "--json", "--capacity", "3KiB"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {key: record[key] for key in ("peak", "lower_bound", "gap", "optimal", "fits", "capacity", "buffers")} == {
        "peak": 3072, "lower_bound": 3072, "gap": 0.0, "optimal": True, "fits": True, "capacity": 3072, "buffers": 3,
    }  # fmt: skip
    assert 0 <= record["seconds"] < 5
    assert record["solver"]


def test_the_solution_is_written_in_the_problem_s_form(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.csv.gz"
    assert main(["solve", str(file), "--output", str(output)]) == 0
    check(read_solution(output), capacity=3072)
    assert read_problem(output) == PROBLEM
    assert main(["solve", str(output)]) == 0, "a solution is a problem too"


def test_the_picture_is_written(file: Path, tmp_path: Path) -> None:
    assert main(["solve", str(file), "--svg", str(tmp_path / "s.svg")]) == 0
    assert (tmp_path / "s.svg").read_text(encoding="utf-8").count("bytes, [") == 3


def test_a_capacity_too_small_is_explained(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(file), "--capacity", "3071"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megamem: a capacity of 3071 bytes is too small by at least 1. 3072 bytes are needed: ")
    assert "b (2048), a (1024)" in err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--capacity", "3GB"], "--capacity: '3GB' is no amount"),
        (["--capacity", "auto"], "--capacity: 'auto' is no amount"),
        (["--capacity", "-5"], "--capacity: '-5' is no amount"),
        (["--capacity", "0"], "--capacity: '0' is no amount"),
        (["--time-limit", "soon"], "--time-limit: 'soon' is no time"),
        (["--time-limit", "0s"], "--time-limit: '0s' is no time"),
        (["--solver", "exakt"], "did you mean 'exact'?"),
        (["--output", "/absent/folder/s.csv"], "cannot be written"),
        (["--svg", "/absent/folder/s.svg"], "cannot be written"),
    ],
)
def test_mistakes_are_told(flags: list[str], reason: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag, value = flags
    assert main(["solve", str(file), f"{flag}={value}"]) == 2
    assert reason in capsys.readouterr().err


def test_a_malformed_file_is_told_with_its_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text(encoding="utf-8") + "d,5,5,8\n", encoding="utf-8")
    assert main(["solve", str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"megamem: {file}:5: buffer 'd' lives from 5 to 5")


def hard_problem(path: Path) -> Path:
    """Buffers of many sizes that are born and die in turns: nothing proves an optimum within seconds."""
    buffers = []
    for i in range(900):
        lower = i * 37 % 499
        buffers.append(Buffer(id=str(i), lower=lower, upper=lower + 20 + i * 53 % 61, size=64 * (1 + i * 7919 % 1009)))
    write(path, Problem(buffers=tuple(buffers)))
    return path


def test_without_a_fitting_solution_in_time_the_status_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = hard_problem(tmp_path / "hard.csv")
    assert main(["solve", str(problem), "--json", "--time-limit", "50ms"]) == 0
    bound = json.loads(capsys.readouterr().out)["lower_bound"]
    assert main(["solve", str(problem), "--capacity", str(bound), "--time-limit", "200ms"]) == 1
    assert "nothing that fits was found in the time" in capsys.readouterr().out


def test_a_trace_is_solved_as_the_runtime_plans_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [
        Request(size=1000, birth=0, death=2),
        Request(size=9, birth=1, death=4, stream=1),
        Request(size=500, birth=3, death=7),
        Request(size=70, birth=5, death=6, is_shared=True),
    ]
    path = tmp_path / "step.trace"
    write_trace(path, AllocationTrace(requests=tuple(requests), phases=(), num_events=8))
    assert main(["solve", str(path), "--json", "--output", str(tmp_path / "s.csv")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["peak"], record["buffers"], record["optimal"]) == (1024, 2, True)
    assert record["left_out"].startswith("2 requests of other streams")
    assert [buffer.size for buffer in read_problem(tmp_path / "s.csv").buffers] == [1024, 512]
    path.write_bytes(path.read_bytes()[:-12])
    assert main(["solve", str(path)]) == 2
    assert "step.trace: cannot be read" in capsys.readouterr().err


def test_what_does_not_fit_is_placed_all_the_same(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.csv"
    assert main(["solve", str(file), "--capacity", "1KiB", "--json", "--output", str(output)]) == 2
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["fits"], record["peak"]) == (False, 3072)
    assert "too small by at least 2048" in record["refusal"]
    assert f"The best placement that was found takes 3072 bytes, and is in {output}." in err
    check(read_solution(output), capacity=3072)


def test_an_interrupt_ends_it_with_the_best_so_far(tmp_path: Path) -> None:
    """Interrupted once it is seen to work: a pseudo-terminal shows the progress line."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "megamem", "solve", str(hard_problem(tmp_path / "hard.csv")), "--json"]
    command += ["--output", str(tmp_path / "s.csv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        shown = ""
        while "squeaky wheel" not in shown and "exact" not in shown:
            shown += os.read(main_end, 1 << 12).decode()
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    os.close(terminal)
    os.close(main_end)
    assert process.returncode == 0
    record = json.loads(out)
    solution = read_solution(tmp_path / "s.csv")
    check(solution)
    assert solution.peak == record["peak"] < 1.5 * record["lower_bound"]


def test_a_progress_line_is_shown_on_a_terminal(tmp_path: Path) -> None:
    """On a pseudo-terminal there is a line, written over and gone at the end; a pipe gets none (see above)."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    main_end, terminal = pty.openpty()
    problem = hard_problem(tmp_path / "hard.csv")
    command = [sys.executable, "-m", "megamem", "solve", str(problem), "--time-limit", "1s", "--json"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    shown = ""
    with contextlib.suppress(OSError):  # how Linux says that nobody has the other end open any more
        while part := os.read(main_end, 1 << 16):  # which may be a part of what was written
            shown += part.decode()
    os.close(main_end)
    assert "above the bound" in shown
    assert shown.endswith("\r\x1b[K")
    assert json.loads(found.stdout)["seconds"] < 10


def test_it_starts_without_a_compiler(file: Path) -> None:
    command = [sys.executable, "-m", "megamem", "solve", str(file), "--json"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"CXX": "no-such-compiler"}
    )
    record = json.loads(found.stdout)
    assert (record["peak"], record["optimal"]) == (3072, True)
    assert "no-such-compiler" in record["note"]
