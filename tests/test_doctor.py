"""The doctor: green exactly when the capabilities have what they need, with a remedy for everything else."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megamem import doctor
from megamem.cli import main
from megamem.doctor import Package, PatchState, Report

NEEDED = Package(name="torch", state="ok", needed=True, found="2.6")
ABSENT = Package(name="apex", state="not installed", needed=False, remedy="build it")
FITS = PatchState(capability="activations", target="m:f", state="applicable", detail="")
GREEN = Report(megamem="1", python="3.11", packages=(NEEDED, ABSENT), patches=(FITS,), machine=(("GPU", "none"),))

WITHOUT_TORCH = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'megatron'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Hide())
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name in ('torch', 'megatron-core'):
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
from megamem.cli import main
sys.exit(main(['doctor']))
"""


def test_a_missing_optional_package_is_no_fault() -> None:
    assert GREEN.is_green
    assert "Ready" in GREEN.to_text()
    assert "build it" in GREEN.to_text()


@pytest.mark.parametrize(
    ("packages", "patches", "fault"),
    [
        (
            (dataclasses.replace(NEEDED, state="not installed", remedy="get it"),),
            (FITS,),
            "torch: not installed. get it",
        ),
        ((dataclasses.replace(NEEDED, state="broken", remedy="mend it"),), (FITS,), "torch: broken. mend it"),
        (
            (NEEDED, dataclasses.replace(ABSENT, state="wrong version", remedy="newer")),
            (FITS,),
            "apex: wrong version. newer",
        ),
        ((NEEDED,), (dataclasses.replace(FITS, state="moved", detail="m:f is gone"),), "m:f is gone"),
    ],
)
def test_what_is_a_fault(packages: tuple[Package, ...], patches: tuple[PatchState, ...], fault: str) -> None:
    report = dataclasses.replace(GREEN, packages=packages, patches=patches)
    assert not report.is_green
    assert report.faults() == [fault]
    assert f"x {fault}" in report.to_text()
    assert json.loads(report.to_json())["faults"] == [fault]


@pytest.mark.megatron
def test_the_installed_versions_are_green(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("megatron.core")
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == []
    assert status == 0
    assert report["green"] is True
    assert {"torch", "megatron-core", "transformer-engine", "apex", "triton"} <= {p["name"] for p in report["packages"]}
    facts = {"GPU", "host memory", "locked memory (ulimit -l)", "C++ compiler", "CUDA_DEVICE_MAX_CONNECTIONS"}
    assert facts <= set(report["machine"])
    assert all(p["remedy"] for p in report["packages"] if p["state"] != "ok")


def test_it_reports_without_torch(tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_TORCH, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert 'torch: not installed. pip install "megamem[train]"' in done.stdout
    assert "Traceback" not in done.stderr


def test_a_version_out_of_range_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.12.0")
    package = doctor._package("megatron-core", torch_fault="")
    assert package.state == "wrong version"
    assert "found 0.12.0, supported is" in package.remedy
    assert 'pip install "megamem[train]"' in package.remedy


def test_a_torch_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.6.0")
    assert doctor._package("torch", torch_fault="libcudart.so: cannot open").state == "broken"


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = dict(doctor.examine().machine)["C++ compiler"]
    assert "CXX names the compiler 'no-such-compiler'" in text and "no static allocator" in text
