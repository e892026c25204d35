"""A policy that may only look finds neither the gold change nor the hidden tests; where one is planted, the gate says so."""

from __future__ import annotations

from pathlib import Path

from rorqual.synthesis.code import CodeConfig
from rorqual.synthesis.code.acceptance import leak_gate
from rorqual.synthesis.code.candidates import make
from rorqual.tasks import open_episode

from .test_code import PAYLOAD, PROJECT, SOURCE
from .test_code_pairs import history

__all__ = ["history"]
LOOKS = {
    "git history": "git log --all -p 2>&1; git reflog 2>&1; git fsck --lost-found 2>&1; git show HEAD 2>&1",
    "git objects": "find / -path /proc -prune -o -path '*.git/*' -print 2>/dev/null; ls -a; ls -a .. /",
    "installed packages": "python3 -m pip show -f sums 2>&1; find / -path '*-packages*' -name '*sums*' 2>/dev/null",
    "package caches": "ls -aR ~/.cache /root /var/cache/pip 2>&1",
    "source archives": "find / \\( -name 'sums*.tar.gz' -o -name 'sums*.whl' -o -name 'sums*.zip' \\) 2>/dev/null",
    "test ids": "python3 -m pytest --collect-only -q 2>&1; cat tests/*.py; find / -name 'junit*.xml' 2>/dev/null",
    "bytecode": "find / -name '*sums*.pyc' 2>/dev/null",
    "other processes": "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' '",
    "environment": "env; set",
    "temporary files": "ls -aR /tmp /var/tmp /dev/shm 2>&1",
    "mounts": "cat /proc/mounts /proc/self/mountinfo",
    "contents": "grep -rlE 'value >= least|at the bound count' . /tmp /opt/packages /var /home /root 2>/dev/null",
    "network": "python3 -c 'import socket; socket.create_connection((\"1.1.1.1\", 53), 2)' 2>&1",
}


def test_who_only_looks_finds_no_gold_change_and_no_hidden_test(history: Path) -> None:
    made = make(CodeConfig(histories=(str(history),), releases=(), projects=()), 0)
    assert made.row and made.row.is_accepted, made
    episode = open_episode(made.row.task, made.world)
    try:
        episode.reset()
        for name, command in LOOKS.items():
            seen = episode.call("bash", {"command": command})
            assert "value >= least" not in seen and "def test_bound" not in seen and "::test_bound" not in seen, (name, seen)
            assert str(history) not in seen and "Fixes #7" not in seen, (name, seen)
            if name == "contents":
                assert seen.startswith("\n[exit"), seen
            if name == "network":
                assert "Network is unreachable" in seen, seen
        assert not episode.finish().passed
    finally:
        episode.close()


def test_a_planted_answer_fails_the_leak_gate() -> None:
    from rorqual.tasks import World

    for path in ("build/lib/sums/__init__.py", "backup/__init__.py"):
        planted = {**PROJECT, "files": {**PROJECT["files"], path: SOURCE}}
        gate = leak_gate(World("w", "code", planted), PAYLOAD, "bwrap")
        assert not gate.passed and "__init__.py" in gate.detail, gate
    assert leak_gate(World("w", "code", PROJECT), PAYLOAD, "bwrap").passed
