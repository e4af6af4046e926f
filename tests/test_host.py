"""Host memory as the process may use it, on made-up machines."""

from pathlib import Path

import pytest

from megamem.errors import ConfigError
from megamem.host import host_memory, resolve_host_memory

GIB = 1 << 30
MEMINFO = f"MemTotal:       {64 * GIB >> 10} kB\nMemFree:        1 kB\nMemAvailable:   {48 * GIB >> 10} kB\n"


def machine(root: Path, cgroup: str = "", **files: str) -> Path:
    """A root folder with /proc and /sys; `files` are keyed by path with `__` for slashes and `_dot_` for dots."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_control_group_the_machine_counts(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert host_memory(root).total_nbytes == 64 * GIB
    assert resolve_host_memory("auto", 1, root) == 24 * GIB
    assert resolve_host_memory("auto", 8, root) == 3 * GIB


def test_version_2_of_control_groups_with_the_limit_on_an_ancestor(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/job/step\n",
        job__memory_dot_max=f"{16 * GIB}\n",
        job__memory_dot_current=f"{6 * GIB}\n",
        job__memory_dot_stat=f"anon 1\ninactive_file {2 * GIB}\n",
        job__step__memory_dot_max="max\n",
        job__step__memory_dot_current="1\n",
    )
    assert host_memory(root).total_nbytes == 16 * GIB
    assert host_memory(root).available_nbytes == 12 * GIB, "file cache is given up before anything is killed"


def test_version_1_seen_from_inside_a_container(tmp_path: Path) -> None:
    """The path of /proc/self/cgroup exists outside only; the mount itself is the container's group."""
    root = machine(
        tmp_path,
        "4:memory:/outside/id\n1:cpu:/\n",
        memory__memory_dot_limit_in_bytes=f"{8 * GIB}\n",
        memory__memory_dot_usage_in_bytes=f"{2 * GIB}\n",
    )
    assert resolve_host_memory("auto", 1, root) == 3 * GIB


def test_an_unlimited_version_1_group_is_no_bound(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "4:memory:/\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        memory__memory_dot_usage_in_bytes="4096\n",
    )
    assert host_memory(root).total_nbytes == 64 * GIB


def test_more_than_the_machine_has_is_refused_with_what_fits(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert resolve_host_memory(8 * GIB, 8, root) == 8 * GIB
    with pytest.raises(ConfigError, match=r"16GiB for each of 8 ranks .* more than the 64GiB .* give 4GiB or less"):
        resolve_host_memory(16 * GIB, 8, root)


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs Linux"):
        host_memory(tmp_path)
    with pytest.raises(ValueError, match="at least one rank"):
        resolve_host_memory("auto", 0)


def test_this_machine_tells() -> None:
    memory = host_memory()
    assert 0 < memory.available_nbytes <= memory.total_nbytes
