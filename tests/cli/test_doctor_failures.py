from __future__ import annotations

import json
import math

import pytest

from i3lm.cli import doctor
from i3lm.errors import KernelError
from i3lm.ops import self_check


@pytest.mark.parametrize("as_json", [False, True])
def test_a_kernel_that_raises_is_reported_and_the_others_are_still_checked(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def check(op: str, implementation: str, device: object) -> float:
        if (op, implementation) == ("wkv", "scan"):
            raise RuntimeError("the kernel broke")
        return 0.0

    monkeypatch.setattr(self_check, "largest_difference", check)
    monkeypatch.setattr("i3lm.cli.doctor._speed", dict)
    with pytest.raises(
        KernelError, match=r"^wkv/scan on cpu.* fails or disagrees with the reference"
    ):
        doctor.doctor(json=as_json)
    printed = capsys.readouterr().out
    if as_json:
        checks = json.loads(printed)["kernels"]["cpu"]["wkv"]["checks"]
        assert checks["scan"] == {"failed": "RuntimeError: the kernel broke", "passed": False}
        assert checks["reference"]["passed"] is True
    else:
        assert "FAILED: RuntimeError: the kernel broke" in printed
        assert "agrees with the reference" in printed


def test_a_kernel_that_gives_nan_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(self_check, "largest_difference", lambda *_: math.inf)
    monkeypatch.setattr("i3lm.cli.doctor._speed", dict)
    with pytest.raises(KernelError, match=r"wkv/scan on cpu, wkv/reference on cpu.*fails or"):
        doctor.doctor(json=True)
    printed = capsys.readouterr().out
    assert "Infinity" not in printed
    facts = json.loads(printed)
    failure = {"failed": "gives NaN or infinity", "passed": False}
    assert facts["kernels"]["cpu"]["wkv"]["checks"]["reference"] == failure
    assert facts["versions"]["numba_threading_layer"] in ("omp", "tbb", "workqueue")
