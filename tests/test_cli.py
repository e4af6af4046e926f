"""The `megamem` command: fast, without tracebacks, and with an exit status that scripts can use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamem import __version__, load_config
from megamem.cli import main

MEMO = "megamem: {activations: {policy: memo, swap_fraction: 0.5}}\n"
WRONG = "megamem: {activations: {policy: memmo, swap_fractoin: 0.5}}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_check_accepts_and_says_what_is_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--check", write(tmp_path, MEMO)]) == 0
    assert "valid; switched on: activations" in capsys.readouterr().out


def test_check_reports_every_mistake_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--check", write(tmp_path, WRONG)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megamem: 2 problems")
    assert "did you mean 'memo'?" in err
    assert "did you mean 'swap_fraction'?" in err


def test_resolve_fills_in_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, MEMO)
    assert main(["config", "--resolve", file, "--megamem-activations-swap-fraction", "0.25"]) == 0
    resolved = load_config(write(tmp_path, capsys.readouterr().out)).activations
    assert (resolved.policy, resolved.swap_fraction, resolved.keep_last_layers) == ("memo", 0.25, 2)


def test_resolve_works_from_flags_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--resolve", "--megamem-activations-policy", "recompute"]) == 0
    assert "policy: recompute" in capsys.readouterr().out


def test_schema_is_json_and_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["megamem"]
    assert main(["config", "--table"]) == 0
    assert capsys.readouterr().out.startswith("| option | values |")


@pytest.mark.parametrize(
    "flags", [[], ["config"], ["config", "--check"], ["nonsense"], ["config", "--schema", "--table"]]
)
def test_misuse_exits_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


@pytest.mark.parametrize("flags", [["--help"], ["doctor", "--help"], ["config", "--help"], ["--version"]])
def test_help_can_be_printed(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 0
    assert capsys.readouterr().out


def test_python_m_megamem_is_the_command(tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megamem", *flags], check=False, capture_output=True, text=True, cwd=tmp_path
        )

    assert run("--version").stdout == f"megamem {__version__}\n"
    assert run("config", "--check", write(tmp_path, WRONG)).returncode == 2
    assert "Traceback" not in run("config", "--check", "absent.yaml").stderr


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom megamem.cli import main\n"
        "try:\n    main(['config', '--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0
