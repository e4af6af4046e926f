"""Shell scripts and workflows: they parse, say what they are for, and hold nothing of the machine they come from."""

import os
import re
import shlex
import subprocess
import sys
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


# Who may start a job on a machine of our own: the schedule, a maintainer by hand, and a maintainer's label on a pull
# request from a branch of this repository.
_ASKED = re.compile(
    r"github\.event_name == '(schedule|workflow_dispatch)'"
    r"|github\.event_name == 'pull_request' && github\.event\.action == 'labeled'"
    r" && github\.event\.label\.name == '[\w-]+'"
    r" && github\.event\.pull_request\.head\.repo\.full_name == github\.repository"
)


def open_doors(document: Any) -> list[str]:
    """Through what a fork's code, or code that nobody asked for, could reach a machine of our own."""
    found = []
    for name, job in document["jobs"].items():
        if job["runs-on"] == "ubuntu-latest":
            continue
        triggers = document[True]  # YAML reads the key `on` as a truth value
        found += [f"{name}: {trigger}" for trigger in ("pull_request_target", "workflow_run") if trigger in triggers]
        cases = [" ".join(case.strip(" ()").split()) for case in job.get("if", "always").split("||")]
        found += [f"{name}: {case}" for case in cases if not _ASKED.fullmatch(case)]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_machine_of_our_own_runs_what_nobody_asked_for(path: Path) -> None:
    assert open_doors(workflow(path)) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("github.event_name == 'schedule' ||", "github.event_name == 'pull_request' ||"),
        (" &&\n      github.event.pull_request.head.repo.full_name == github.repository", ""),
        ("pull_request:", "pull_request_target:"),
        ("github.event.action == 'labeled'", "true"),
    ],
)
def test_an_open_door_is_noticed(before: str, after: str) -> None:
    text = (ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
    assert before in text
    assert open_doors(yaml.safe_load(text.replace(before, after)))


def test_gpu_jobs_wait_for_their_machines_and_are_not_cancelled() -> None:
    document = workflow(ROOT / ".github" / "workflows" / "gpu.yml")
    jobs = document["jobs"]
    assert {name: job["runs-on"] for name, job in jobs.items()} == {
        "one-gpu": ["self-hosted", "gpu"],
        "eight-gpus": ["self-hosted", "gpu-8"],
    }
    assert "concurrency" not in document
    groups = [job["concurrency"] for job in jobs.values()]
    assert len({group["group"] for group in groups}) == 2
    assert all(group["cancel-in-progress"] is False for group in groups)


def gpu_script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """ci/gpu.sh, with nothing of the environment but what commands need."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(
        [ROOT / "ci" / "gpu.sh", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


class TestGpuScript:
    @pytest.mark.parametrize(("number", "many"), [("1", False), ("2", True), ("8", True)])
    def test_a_dry_run_prints_each_part_and_its_command(self, number: str, many: bool, tmp_path: Path) -> None:
        done = gpu_script("--dry-run", "--gpus", number, "--quick", PY="no-python", OUT=str(tmp_path / "out"))
        assert (done.returncode, done.stderr) == (0, "")
        parts = {
            name: shlex.split(command) for name, _, command in (x.partition(": ") for x in done.stdout.splitlines())
        }
        marks = {name: command[command.index("pytest") + 2] for name, command in parts.items() if "pytest" in command}
        assert marks == {"tests": "gpu and not gpus"} | ({"tests-gpus": "gpus"} if many else {})
        assert parts["arena"] == [
            "no-python",
            "ci/bench/arena.py",
            "--out",
            str(tmp_path / "out/arena.json"),
            "--quick",
        ]
        assert parts["golden"] == ["no-python", "ci/golden.py", "--check", "--out", str(tmp_path / "out/golden.json")]
        for command in parts.values():
            assert "pytest" in command or (ROOT / command[1]).is_file()
        assert list(tmp_path.iterdir()) == []

    def test_only_chooses_a_part_and_refuses_one_that_is_not_there(self) -> None:
        assert len(gpu_script("--dry-run", "--gpus", "1", "--only", "arena").stdout.splitlines()) == 1
        done = gpu_script("--dry-run", "--gpus", "1", "--only", "tests-gpus")
        assert done.returncode == 2 and "no such part with 1 GPU(s)" in done.stderr

    @pytest.mark.parametrize("number", ["", "0", "two", "-1"])
    def test_a_number_of_gpus_that_is_none_is_refused(self, number: str) -> None:
        done = gpu_script("--gpus", number)
        assert done.returncode == 2 and done.stderr.startswith("usage: ")

    @pytest.fixture
    def pretender(self, tmp_path: Path) -> dict[str, str]:
        """A Python that says it sees two GPUs, and runs pytest really; where the results go."""
        script = tmp_path / "python"
        body = """#!/bin/sh
case "$*" in
    *device_count*) echo 2 ;;
    *machine.json) echo "2 x pretended" ;;
    -c* | "-P -c"*) ;;
    *) exec "$REAL" "$@" ;;
esac
"""
        script.write_text(body, encoding="utf-8")
        script.chmod(0o755)
        return {"PY": str(script), "REAL": sys.executable, "OUT": str(tmp_path / "out")}

    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [
            ("def test_a(): pytest.skip('no')", 1, "all 1 tests were skipped: this run shows nothing"),
            ("def test_a(): pytest.skip('no')\ndef test_b(): pass", 0, "1 of 2 tests passed"),
            ("def test_a(): assert False\ndef test_b(): pass", 1, "FAILED: tests"),
        ],
        ids=["skipped", "passed", "failed"],
    )
    def test_skipped_tests_alone_are_a_failure(
        self, body: str, status: int, words: str, tmp_path: Path, pretender: dict[str, str]
    ) -> None:
        """The tests are given by hand, away from the fixtures of this folder, which would skip all of them here."""
        file = tmp_path / "test_few.py"
        file.write_text(f"import pytest\n\npytestmark = pytest.mark.gpu\n{body}\n", encoding="utf-8")
        options = f"{file} --rootdir={tmp_path} -c /dev/null"
        alone = {"PYTEST_ADDOPTS": options, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = gpu_script("--only", "tests", **alone, **pretender)
        assert (done.returncode, words in done.stdout) == (status, True), done.stdout + done.stderr

    def test_more_gpus_than_there_are_is_refused(self, pretender: dict[str, str]) -> None:
        done = gpu_script("--gpus", "3", **pretender)
        assert done.returncode == 2 and "--gpus 3: torch of" in done.stderr and "sees 2" in done.stderr


@pytest.mark.parametrize("flags", [("main",), ("@main",), ("x@",), ("x@main", "--only", "0.19.2")])
def test_sources_of_megatron_without_a_revision_or_with_a_release_are_refused(flags: tuple[str, ...]) -> None:
    command = [str(ROOT / "ci" / "matrix.sh"), "--megatron-source", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2 and done.stderr
