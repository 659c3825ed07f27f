"""`lightrft doctor`, `strategies` and `engines`, in this environment and with packages that do not work."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import pytest
from command_line import lightrft, listed

from lightrft_cli import doctor, machine, registered, requirements
from lightrft_cli.imports import error_of


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a distribution with metadata alone, importable here and in child processes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def make(name, requires=(), extras=(), points="", source=""):
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {each}" for each in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (folder / "entry_points.txt").write_text(points)
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(source)
        return distribution(name)

    return make


def test_a_lock_whose_build_ends_meanwhile_is_no_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "lock").symlink_to(tmp_path / "gone")  # listed, and not there when it is read
    assert [finding.name for finding in machine._operator_cache()] == ["TORCH_EXTENSIONS_DIR"]


def packages():
    return [finding for finding in doctor.packages() if finding.level != "ok"]


def test_a_missing_requirement_is_a_problem_with_an_install_command(install):
    before = packages()
    install(
        "lightrft-odd",
        ["typer>=99", "no-such-package>=1; python_version>'3'", "typer>=0.1", "absent; extra=='more'"],
        ["more"],
    )
    got = [(finding.detail, finding.remedy) for finding in packages() if finding not in before]
    assert got == [
        (f"expected typer>=99, got {distribution('typer').version}", "pip install 'typer>=99'"),
        ("expected no-such-package>=1, it is not installed", "pip install 'no-such-package>=1'"),
    ]


def test_a_package_that_was_removed_in_part_is_passed_over_and_the_first_of_two_counts(install, tmp_path, monkeypatch):
    (tmp_path / "removed-1.0.dist-info").mkdir()
    install("lightrft-odd")
    first = tmp_path / "first"
    (first / "lightrft_odd-2.0.dist-info").mkdir(parents=True)
    (first / "lightrft_odd-2.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: lightrft-odd\nVersion: 2.0\n"
    )
    monkeypatch.syspath_prepend(first)
    ours = {installed.name: installed.version for installed in requirements.our_packages()}
    assert ours["lightrft-odd"] == "2.0"
    assert "lightrft-odd 2.0" in lightrft("--version").splitlines()


def test_an_extra_counts_when_all_that_it_names_is_installed(install):
    requires = ["base", "typer>=99; extra=='a'", "typer>=99; extra=='b'", "absent; extra=='b'"]
    odd = install("lightrft-odd", requires, ["a", "b"])
    assert requirements.extras_in_use(odd) == ["a"]
    assert [unmet.requirement for unmet in requirements.unmet_requirements(odd, "a")] == ["typer>=99"]
    assert [unmet.requirement for unmet in requirements.unmet_requirements(odd)] == ["base"]


def test_one_variant_of_an_extra_suffices(install):
    install("lightrft-odd", ["absent; extra=='fast'", "typer>=0.1; extra=='fast-cpu'"], ["fast", "fast-cpu"])
    assert requirements.missing_for("lightrft-odd[fast]") == []
    assert [unmet.requirement for unmet in requirements.missing_for("nothing[fast]")] == ["nothing[fast]"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_module_that_nobody_has", "No module named 'a_module_that_nobody_has'"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        ("", "has no attribute 'Engine'"),
    ],
)
def test_an_engine_that_cannot_be_imported_is_a_problem(install, source, said):
    install("odd-engine", points="[odd.engines]\nodd = odd_engine:Engine\n", source=source)
    (odd,) = registered.registered("odd.engines")
    assert odd.broken and said in odd.problem and odd.remedy == "pip install 'odd-engine'"


def test_an_engine_that_can_be_imported(install):
    install("odd-engine", points="[odd.engines]\nodd = odd_engine:Engine\n", source="class Engine: pass")
    assert registered.registered("odd.engines") == [registered.Registered("odd", "odd-engine", "1.0")]


def test_an_engine_without_its_library_is_not_installed_but_no_problem(install):
    install("odd-engine", ["absent>=2"], points="[odd.engines]\nodd = odd_engine:Engine\n")
    (odd,) = registered.registered("odd.engines")
    assert (odd.problem, odd.broken) == ("expected absent>=2, it is not installed", False)


def test_engines_lists_ours_with_the_command_to_install_each():
    rows = {row["name"]: row for row in listed("engines")}
    assert rows.keys() >= {"fake", "sglang", "transformers", "vllm"}
    assert rows["fake"]["status"] == "importable" and rows["fake"]["package"] == "lightrft-strategy-base"
    assert all(row["install"] or row["status"] == "importable" for row in rows.values())


def test_the_doctor_reports_each_topic_and_its_verdict_is_the_exit_code(monkeypatch, tmp_path):
    problem = machine.Finding(
        "network", "loopback", "problem", "expected to connect, got: refused", "ip link set lo up"
    )
    monkeypatch.setattr(doctor, "registrations", lambda: iter(()))  # imports everything: seen above
    healthy = not packages()
    report = listed("doctor", code=0 if healthy else 1)
    assert report["healthy"] == healthy
    assert {finding["topic"] for finding in report["findings"]} >= {"packages", "devices", "network", "memory"}
    monkeypatch.setattr(machine, "network", lambda: iter([problem]))
    said = lightrft("doctor", code=1)
    assert "problem: loopback: expected to connect, got: refused\n  to repair it: ip link set lo up" in said


def test_the_operator_cache_must_be_writable_and_free_of_locks_of_killed_builds(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam/cpu_adam.so").touch()
    (tmp_path / "cpu_adam/lock").touch()
    (fresh,) = machine._operator_cache()
    assert fresh.level == "ok" and "built: cpu_adam" in fresh.detail
    os.utime(tmp_path / "cpu_adam/lock", (0, 0))
    _, stale = machine._operator_cache()
    assert stale.remedy == f"rm {tmp_path}/cpu_adam/lock"
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file/below"))
    (refused,) = machine._operator_cache()
    assert refused.level == "problem" and "export TORCH_EXTENSIONS_DIR" in refused.remedy


def test_a_process_that_ends_without_a_message_reports_its_exit_code():
    assert error_of([sys.executable, "-c", "raise SystemExit(7)"]) == "exit status 7"
    assert error_of([sys.executable, "-c", "print('fine')"]) == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_is_one_line_and_leaves_no_import_running(install, tmp_path, number, code):
    started = tmp_path / "started"
    source = f"import os, time; open({str(started)!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(100)\n"
    install("slow-engine", points="[lightrft.engines]\nslow = slow_engine:Engine\n", source=source)
    with subprocess.Popen(
        [Path(sys.executable).with_name("lightrft"), "engines"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        deadline = time.monotonic() + 60
        while not (started.exists() and started.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.05)
        command.send_signal(number)
        printed, errors = command.communicate(timeout=60)
    assert (command.returncode, printed, errors) == (code, "", f"lightrft: interrupted by {number.name}\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
