"""Shell scripts and workflows: they parse, say what they are for, and hold nothing of the machine they come from."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    ".ci/run",
    *sorted(path.relative_to(ROOT).as_posix() for room in ("ci", "examples") for path in (ROOT / room).glob("*.sh")),
    "examples/slurm/ci.sbatch",
    "examples/slurm/train.sbatch",
]
SOURCED = {"ci/environment.sh"}
RUN = [name for name in SCRIPTS if name not in SOURCED]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))

# Written so that this file does not match itself.
_HOSTS = "|".join(
    ("pypi[.]" + "org", "pythonhosted[.]" + "org", "download[.]" + "pytorch[.]org", "pypi[.]nvidia" + "[.]com")
)
_FOLDERS = "|".join(("work", "root", "home", "Users"))
FOREIGN = re.compile(rf"{_HOSTS}|--(extra-)?index-url|(?<![\w.$}}~/])/({_FOLDERS})/\w")


def tracked() -> list[Path]:
    """The files that git holds, or every file of a source archive without git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def workflow(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_parse_the_script(name: str) -> None:
    done = subprocess.run(["bash", "-n", name], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", RUN)
def test_the_script_stops_at_the_first_failure_and_can_be_executed(name: str) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / name).read_text(encoding="utf-8")
    assert (ROOT / name).stat().st_mode & 0o111


@pytest.mark.parametrize("name", RUN)
def test_help_says_how_to_call_the_script_from_any_folder(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ci/matrix.sh", "ci/gpu.sh"])
def test_an_option_without_its_value_is_refused(name: str) -> None:
    done = subprocess.run([ROOT / name, "--only"], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_every_node_of_a_slurm_job_starts_one_torchrun_that_meets_at_the_first(tmp_path: Path) -> None:
    """Slurm's two commands are replaced: one lists three nodes, the other prints what it would start."""
    for name, body in (("scontrol", "printf 'n7\\nn8\\nn9\\n'"), ("srun", 'printf "%s\\n" "$PWD" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "20041", "SLURM_JOB_NODELIST": "n[7-9]", "SLURM_JOB_NUM_NODES": "3"}
    place = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "4", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [ROOT / "examples" / "slurm" / "train.sbatch", "train.py", "--note", "two words"],
        env=job | place, capture_output=True, text=True, check=True, timeout=20,
    )  # fmt: skip
    folder, *command = done.stdout.splitlines()
    assert folder == str(tmp_path)
    assert command[command.index("python3") :] == [
        *("python3", "-m", "torch.distributed.run", "--nnodes", "3", "--nproc-per-node", "4", "--rdzv-id", "20041"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "n7:10041"),
        *("-m", "megamem", "run", "train.py", "--note", "two words"),
    ]


@pytest.mark.parametrize("name", ["ci", "train"])
def test_outside_slurm_a_job_script_says_how_to_submit_it(name: str) -> None:
    script = ROOT / "examples" / "slurm" / f"{name}.sbatch"
    done = subprocess.run(
        [script, "x"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stderr) == (2, f"{name}.sbatch: not in a Slurm job; submit it with sbatch\n")


def test_no_file_names_a_package_registry_or_a_folder_of_the_machine_it_was_written_on() -> None:
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if FOREIGN.search(line)
        ]
    assert found == []


@pytest.mark.parametrize(
    "text", ["/work/" + "main", 'open("/home/' + 'me/x")', "pip install --index" + "-url x", "https://pypi." + "org"]
)
def test_what_must_not_be_in_a_file_is_noticed(text: str) -> None:
    assert FOREIGN.search(text)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_workflow_calls_scripts_that_exist(path: Path) -> None:
    commands = [step["run"] for job in workflow(path)["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        script = ROOT / command.split()[0]
        assert script.is_file() and script.stat().st_mode & 0o111, command


def test_the_gpu_machine_runs_nothing_that_nobody_asked_for() -> None:
    """A fork's code never runs on a machine of our own; a branch of this repository does, once it has the label."""
    job = workflow(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["gpu"]
    assert job["runs-on"] == ["self-hosted", "gpu"]
    asked = [" ".join(case.strip(" ()").split()) for case in job["if"].split("||")]
    assert asked == [
        "github.event_name == 'schedule'",
        "github.event_name == 'workflow_dispatch'",
        "github.event_name == 'pull_request' && github.event.action == 'labeled' && github.event.label.name == 'gpu'"
        " && github.event.pull_request.head.repo.full_name == github.repository",
    ]
