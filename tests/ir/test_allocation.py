"""Problems and solutions as values and as files: both ways, and refused with line and reason."""

import dataclasses
import gzip
import random
from pathlib import Path

import pytest

from megamem.errors import AllocationError, MegamemError
from megamem.ir.allocation import (
    Buffer,
    Problem,
    Solution,
    parse_problem,
    parse_solution,
    read_problem,
    read_solution,
    write,
)

HEAD = "id,lower,upper,size\n"
TWO = Problem(
    buffers=(Buffer(id="a", lower=0, upper=3, size=512), Buffer(id="b", lower=3, upper=4, size=1024, group="layer 0"))
)


def test_lifetimes_are_half_open() -> None:
    early, late = TWO.buffers
    assert not early.overlaps(late)
    assert dataclasses.replace(early, upper=4).overlaps(late)
    assert late.overlaps(dataclasses.replace(early, upper=4))


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TWO.buffers[0].size = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        TWO.buffers = ()  # type: ignore[misc]


def test_the_peak_is_the_highest_end() -> None:
    assert Solution(problem=TWO, offsets=(0, 256)).peak == 1280
    assert Solution(problem=Problem(buffers=()), offsets=()).peak == 0


@pytest.mark.parametrize("seed", range(5))
def test_files_read_back_as_what_was_written(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    buffers = []
    for index in range(rng.randrange(30)):
        lower = rng.randrange(-5, 10)
        name = rng.choice([f"{index}", f'odd,"{index}"', f"ü{index}"])
        group = rng.choice(["", "layer 1, forward"])
        buffers.append(
            Buffer(id=name, lower=lower, upper=lower + rng.randint(1, 9), size=rng.randint(1, 10**12), group=group)
        )
    problem = Problem(buffers=tuple(buffers))
    solution = Solution(problem=problem, offsets=tuple(rng.randrange(10**13) for _ in buffers))
    for name in ("p.csv", "p.csv.gz"):
        write(tmp_path / name, problem)
        assert read_problem(tmp_path / name) == problem
        write(tmp_path / name, solution)
        assert read_solution(tmp_path / name) == solution
        assert read_problem(tmp_path / name) == problem
    assert parse_solution(solution.to_csv()) == solution


def test_the_file_form_is_that_of_minimalloc() -> None:
    plain = Problem(buffers=TWO.buffers[:1])
    assert plain.to_csv() == "id,lower,upper,size\na,0,3,512\n"
    assert Solution(problem=plain, offsets=(64,)).to_csv() == "id,lower,upper,size,offset\na,0,3,512,64\n"


def test_columns_come_in_any_order_and_with_spaces() -> None:
    assert parse_problem("size, upper ,id,lower\r\n 512, 3 ,a,0\r\n\r\n") == Problem(buffers=TWO.buffers[:1])


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("", "p:1", "no column id, lower, upper, size"),
        ("id,lower,upper\n", "p:1", "no column size"),
        ("id,lower,upper,size,alignment\n", "p:1", "unknown column 'alignment'"),
        ("id,lower,upper,size,size\n", "p:1", "size is there twice"),
        (HEAD + "a,0,3\n", "p:2", "3 cells, but the header has 4 columns"),
        (HEAD + "a,0,3,8\nb,0,3,8,9\n", "p:3", "5 cells"),
        (HEAD + "a,0,3,8\na,4,5,8\n", "p:3", "the id 'a' is that of line 2 too"),
        (HEAD + " ,0,3,8\n", "p:2", "the id is empty"),
        (HEAD + "a,zero,3,8\n", "p:2", "lower is 'zero'"),
        (HEAD + "a,0,3.5,8\n", "p:2", "upper is '3.5'"),
        (HEAD + "a,0,3,\n", "p:2", "size is ''"),
        (HEAD + "a,0,3,1_000\n", "p:2", "size is '1_000'"),
        (HEAD + "a,0,3,٣\n", "p:2", "no whole number"),
        (HEAD + "a,0,3," + "9" * 5000 + "\n", "p:2", "at most 19 digits"),
        (HEAD + "a,3,3,8\n", "p:2", "half-open"),
        (HEAD + "a,4,3,8\n", "p:2", "half-open"),
        (HEAD + "a,0,3,0\n", "p:2", "leave out buffers without bytes"),
        (HEAD + "a,0,3,-8\n", "p:2", "-8 bytes"),
        (HEAD + '"a,0,3,8\n', "p:2", "unexpected end"),
        (HEAD + "".join(f"{i},0,3,{1 << 61}\n" for i in range(3)), "p", "2^62"),
        ("id,lower,upper,size,offset\na,0,3,8,x\n", "p:2", "offset is 'x'"),
    ],
)
def test_a_malformed_file_is_refused_with_line_and_reason(text: str, place: str, reason: str) -> None:
    with pytest.raises(AllocationError) as caught:
        parse_problem(text, name="p")
    message = str(caught.value)
    assert message.startswith(f"{place}: ")
    assert reason in message


def test_random_bytes_never_crash_the_reader(tmp_path: Path) -> None:
    """Mutations of a good file are read or refused; nothing else is raised."""
    rng = random.Random(7)
    good = Solution(problem=TWO, offsets=(0, 0)).to_csv().encode()
    path = tmp_path / "p.csv"
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b',"\n-0'])
        path.write_bytes(bytes(data[: rng.randint(1, len(data))]))
        try:
            read_problem(path)
        except MegamemError:
            refused += 1
    assert 50 < refused < 400


# Named here: an archive holds the time it was made at, and processes that share a run must agree on every test's name.
@pytest.mark.parametrize(
    "damage",
    [b"no gzip", gzip.compress(b"id,lower")[:-9], gzip.compress(b"\xff\xfe")],
    ids=["not an archive", "cut short", "not text"],
)
def test_a_damaged_archive_is_refused(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.csv.gz").write_bytes(damage)
    with pytest.raises(AllocationError, match="cannot be read"):
        read_problem(tmp_path / "p.csv.gz")


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AllocationError, match="No such file"):
        read_problem(tmp_path / "absent.csv")
    with pytest.raises(AllocationError, match="cannot be written"):
        write(tmp_path / "absent" / "p.csv", TWO)


def test_a_problem_is_no_solution(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", TWO)
    with pytest.raises(AllocationError, match="no column `offset`"):
        read_solution(tmp_path / "p.csv")
    with pytest.raises(AllocationError, match="no column `offset`"):
        parse_solution(TWO.to_csv())
    with pytest.raises(AllocationError, match="1 offsets for 2 buffers"):
        Solution(problem=TWO, offsets=(0,))


def test_ids_are_unique() -> None:
    with pytest.raises(AllocationError, match="two buffers have the id 'a'"):
        Problem(buffers=(TWO.buffers[0], TWO.buffers[0]))
