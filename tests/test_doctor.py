"""The command `doctor`: a line for each piece, what its lack costs, and an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectors import ROOT
from patience import PATIENCE

from lofi_fast import doctor, gpu
from lofi_fast.doctor import Finding, decoded_size, examined, main, status_of

Captured = pytest.CaptureFixture[str]
NAMES = ["python", "versions", "torch", "driver", "card", "NVML", "DALI", "nvJPEG", "NVDEC", "PyAV", "Triton",
         "native kernels", "apex", "memory", "threads", "disk"]  # fmt: skip


def test_every_piece_has_a_line_and_a_record(capsys: Captured, tmp_path: Path) -> None:
    status = main(["--json", "--folder", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["findings"]] == NAMES and found["status"] == status
    assert all(one["says"] and one["state"] in doctor.MARKS for one in found["findings"])
    assert main(["--folder", str(tmp_path)]) == status
    lines = capsys.readouterr().out.splitlines()
    assert [line[3:18].strip() for line in lines[:-1]] == NAMES and len(lines) == len(NAMES) + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a card")
def test_without_a_card_nothing_of_a_card_is_missed(tmp_path: Path) -> None:
    states = {one.name: one.state for one in examined(tmp_path)}
    assert {states[name] for name in ("driver", "card", "NVML", "nvJPEG", "NVDEC", "Triton", "apex")} == {"absent"}
    assert {states[name] for name in ("python", "torch", "DALI", "PyAV")} == {"ok"}


def test_the_status_says_the_worst() -> None:
    ok, absent = Finding("a", "ok", "x"), Finding("b", "absent", "x")
    costs, broken = Finding("c", "costs", "is not there", "time", "install it"), Finding("d", "broken", "x")
    assert [status_of(of) for of in ([ok, absent], [ok, costs], [costs, broken])] == [0, 1, 2]
    assert costs.text() == "!  c              is not there (costs time; install it)"


def run_apart(code: str, **environment: str) -> dict[str, dict[str, str]]:
    """The findings of a process of its own, after `code`."""
    script = f"{code}\nimport sys; from lofi_fast.doctor import main; sys.exit(main(['--json']))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode in (1, 2), done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["findings"]}


def test_what_is_turned_off_or_cannot_be_imported_is_told() -> None:
    hide = "import sys; sys.modules['av'] = None; sys.modules['nvidia.dali'] = None"
    found = run_apart(hide, LOFI_FAST_NATIVE="0", OMP_NUM_THREADS="1")
    assert found["native kernels"]["state"] == "costs" and "LOFI_FAST_NATIVE=0" in found["native kernels"]["says"]
    assert found["PyAV"]["state"] == "broken" and "pip install av" in found["PyAV"]["says"]
    assert found["DALI"]["state"] == "broken" and "pip install nvidia-dali" in found["DALI"]["says"]
    if len(os.sched_getaffinity(0)) > 1:
        assert found["threads"]["state"] == "costs" and "OMP_NUM_THREADS=1" in found["threads"]["says"]


def test_a_torch_that_cannot_be_imported_ends_nothing() -> None:
    hide = """import sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden)"""
    found = run_apart(hide)
    assert found["torch"]["state"] == "broken" and "pip install torch" in found["torch"]["mend"]
    assert found["disk"]["state"] in ("ok", "costs") and list(found) == NAMES


@pytest.mark.parametrize("name", ["numpy.py", "torch/__init__.py"])
def test_a_file_that_hides_a_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "av").mkdir()  # which hides nothing
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in doctor._versions().says  # not imported from here
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._versions()
    assert found.state == "broken" and found.says.endswith(f": {tmp_path / name}") and "rename" in found.mend


def test_packages_that_do_not_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"av": "17.0.1", "triton": "3.1.0", "torch": "2.13.0+cu130"}
    wishes = {
        "lofi_fast": ["av>=18", "numpy>=2.0", "absent-package>=1", 'h5py>=3.10; extra == "h5"'],
        "torch": ['triton==3.7.1; platform_system == "Linux"'],
    }

    def version(name: str) -> str:
        if name == "absent-package":
            raise doctor.PackageNotFoundError(name)
        return versions.get(name, "99.0")

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", wishes.get)
    found = doctor._versions()
    assert found.state == "broken"
    assert found.says == (
        "av 17.0.1 is older than 18; absent-package is not installed; "
        "triton 3.1.0 does not belong to torch 2.13.0+cu130, which asks for 3.7.1"
    )
    assert found.mend == 'pip install "av>=18" "absent-package>=1" "triton==3.7.1"'


def test_a_card_that_pytorch_cannot_use_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    card = gpu.Card("NVIDIA GeForce GTX 1080 Ti", (6, 1), (12, 4), "550.90")
    monkeypatch.setattr(gpu, "cards", lambda: [card])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert doctor._driver().says == "NVIDIA 550.90, which offers CUDA 12.4"
    found = doctor._card()
    assert found.state == "costs" and "GTX 1080 Ti is here, but PyTorch cannot use it" in found.says


def test_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(tmp_path) in doctor._disk(tmp_path / "not" / "there").says
    monkeypatch.setattr(doctor, "LOW_DISK", 1 << 60)
    assert doctor._disk(tmp_path).state == "costs"


def test_a_picture_is_decoded_as_training_does_it() -> None:
    assert decoded_size("cpu") == (32, 16)
