"""The doctor as a whole: a healthy setup passes, what is named is examined, and the command says how it went."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from commands import Command
from doctor_world import failed, messages_of

from higgstune import BaseSpec
from higgstune.diagnostics.examine import doctor
from higgstune.diagnostics.report import Finding, sorted_report
from higgstune.diagnostics.without_libraries import check_disk, check_versions
from higgstune.errors import ConfigError


def test_a_healthy_setup_has_no_failed_finding(world: Path) -> None:
    shown: list[str] = []
    report = doctor(adapter=world / "adapter", data=world / "data", progress=shown.append)
    assert report.passed, failed(report)
    assert not report.summary["skipped"]
    assert {f.check for f in report.findings} == {*examine_checks()}
    assert "base with adapter" in messages_of(report, "generation", "ok")
    assert "normal for unfamiliar speech" in messages_of(report, "loss", "warning")
    assert "all 50 modules of the adapter have an effect" in messages_of(report, "adapter", "ok")
    assert "(0 of them audio)" not in messages_of(report, "prompt", "ok")
    assert "checkpoint, model" in shown


def examine_checks() -> list[str]:
    return [
        "environment", "checkpoint", "rotary", "codec", "data", "prompt", "loss", "adapter", "generation", "memory",
    ]  # fmt: skip


def test_without_anything_the_machine_is_examined() -> None:
    assert {finding.check for finding in doctor().findings} == {"environment"}


def test_wrong_versions_and_a_full_disk_are_found() -> None:
    assert check_versions().status == "ok"

    def installed(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.13.0+cpu", "transformers": "4.57.0"}[name]

    wanted = ["torch>=2.6", "transformers>=5.23,<6", "peft>=0.18", 'ruff>=0.11; extra == "dev"']
    finding = check_versions(wanted, "3.10.1", installed)
    assert finding.status == "failed"
    for part in ("Python 3.10.1", "transformers 4.57.0", "peft is not installed"):
        assert part in finding.message
    assert [check_disk(free).status for free in (10**7, 10**9, 10**12)] == ["failed", "warning", "ok"]


def test_without_libraries_the_rest_is_examined(world: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "higgstune.diagnostics.examine", None)
    code, out, _ = command("doctor", "--adapter", world / "adapter", "--data", world / "data", "--json")
    assert code == 1
    report = json.loads(out)
    found = {(finding["check"], finding["status"]): finding for finding in report["findings"]}
    assert "the libraries cannot be imported" in found["environment", "failed"]["message"]
    assert "its files are whole" in found["data", "ok"]["message"]
    assert "are whole" in found["adapter", "ok"]["message"]
    assert ("checkpoint", "skipped") in found
    assert "Traceback" not in out
    code, out, _ = command("doctor", "--data", world / "nowhere", "--json")
    assert ("data", "failed") in {(finding["check"], finding["status"]) for finding in json.loads(out)["findings"]}


def test_an_import_that_fails_in_a_check_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("cannot import name 'HiggsAudioV2Config'")

    monkeypatch.setattr("higgstune.diagnostics.examine.check_environment", broken)
    [finding] = doctor().findings
    assert (finding.status, "HiggsAudioV2Config" in finding.message) == ("failed", True)
    assert "pip install" in finding.advice


def test_a_device_that_does_not_exist_is_the_callers_mistake() -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        doctor(BaseSpec(device="toaster"))
    with pytest.raises(ConfigError, match="unknown dtype"):
        doctor(BaseSpec(dtype="int3"))


def test_the_command_prints_a_table_or_json_and_exits_as_it_should(
    world: Path,
    command: Command,
) -> None:
    code, out, err = command("doctor", "--adapter", world / "adapter", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["passed"]
    assert result["summary"]["failed"] == 0
    assert {"check", "status", "message", "advice"} == result["findings"][0].keys()
    assert "examining checkpoint" in err
    code, out, err = command("doctor", "--model", "/no/where")
    assert code == 1
    assert "failed" in out
    assert "/no/where does not exist" in out
    assert "Traceback" not in err
    code, _, err = command("doctor", "--device", "toaster")
    assert code == 2
    assert "toaster" in err
    assert command("doctor", "--modle", "x")[0] == 2
    assert command("doctor")[0] == 0


def test_without_a_terminal_nothing_is_cut_and_lines_stay_short() -> None:
    message = "word " * 100 + "/a/very/long/path" * 20
    report = sorted_report([Finding("data", "failed", message, "do this"), Finding("environment", "ok", "fine")])
    lines = report.text().splitlines()
    assert lines[0] == "ok       environment: fine"
    assert lines[1].startswith("failed   data: word word")
    assert lines[-1] == "         to do: do this"
    assert "".join(lines).count("word") == 100
    assert "/a/very/long/path" * 20 in report.text()
    assert all(len(line) <= 110 for line in lines if "/a/very" not in line)


def test_a_tracker_without_its_library_fails(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "data: {store: x}\nmodel: {checkpoint: nowhere/at/all}\nreport_to: wandb\n"
        "stages: [{name: a, kind: full, epochs: 1}]\n"
    )
    report = doctor(recipe=tmp_path / "recipe.yaml")
    assert "whose library wandb is not installed" in messages_of(report, "recipe", "failed")
