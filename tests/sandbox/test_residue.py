"""Nothing is left behind: no process, mount, file, control group or uid, not even where the owner is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.prove_sandbox import Residue
from rorqual.sandbox import Limits, create
from rorqual.sandbox.protocol import SandboxError
from rorqual.sandbox.uids import UidLease

pytestmark = pytest.mark.usefixtures("confinement")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another uid")

BAD_ENDS = [
    ["/bin/true"],
    ["/bin/sh", "-c", "(sleep 77 & sleep 77 &) ; exit 3"],
    ["/bin/sleep", "77"],
    ["/bin/sh", "-c", "yes | head -c 300000"],
    ["/no/such"],
]


def test_runs_of_every_end_leave_nothing() -> None:
    before = Residue.look()
    for command in BAD_ENDS * 2:
        with create(limits=Limits(timeout_s=0.4, output_bytes=1000)) as sandbox:
            sandbox.upload("file", b"x" * 10000)
            sandbox.run(command)
            sandbox.start(["/bin/cat"])
    assert Residue.look() == before


def test_a_killed_owner_leaves_nothing() -> None:
    before = Residue.look()
    code = (
        "from rorqual.sandbox import *\ns = create(limits=Limits(timeout_s=60))\ns.upload('file', b'x')\n"
        "h = s.start(['/bin/sleep', '78'])\nprint('up', flush=True)\ns.run(['/bin/sh', '-c', '(sleep 78 &); sleep 78'])"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
    time.sleep(0.3)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    # Its control groups hold nothing and are swept by the next owner.
    while (now := Residue.look(with_groups=False)) != (was := before.without_groups()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now == was


@needs_root
def test_uids_are_leased_once_across_processes_and_come_back() -> None:
    first, last = 61180, 61183
    code = (
        "import sys; from rorqual.sandbox.uids import UidLease\n"
        f"leases = [UidLease({first}, {last}) for _ in range(2)]\n"
        "print(*(lease.uid for lease in leases), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin and other.stdout
    theirs = set(map(int, other.stdout.readline().split()))
    ours = [UidLease(first, last) for _ in range(2)]
    assert {lease.uid for lease in ours} | theirs == set(range(first, last + 1))
    with pytest.raises(SandboxError, match="in use"):
        UidLease(first, last)
    other.kill()
    other.wait()
    again = [UidLease(first, last) for _ in range(2)]
    assert {lease.uid for lease in again} == theirs
    for lease in ours + again:
        lease.close()
    other.stdin.close()
    other.stdout.close()


@needs_root
def test_it_works_without_root_too(tmp_path: Path) -> None:
    """As nobody, with the system's interpreter: the same back end through a user namespace."""
    python = "/usr/bin/python3"
    check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not os.path.exists(python) or subprocess.run(check).returncode:
        pytest.skip("needs a system Python of 3.11 or newer, since ours may lie below root's home")
    copy = Path("/var/tmp") / f"rorqual-{os.getpid()}"
    source = Path(__file__).parents[2] / "rorqual"
    try:
        copy.mkdir()
        subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
        copy.chmod(0o755)
        subprocess.run(["chmod", "-R", "a+rX", str(copy)], check=True)
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]
        if subprocess.run([*nobody, "unshare", "--user", "true"], capture_output=True).returncode:
            pytest.skip("user namespaces are off for others than root")
        code = (
            "from rorqual.sandbox import *\nfrom rorqual.sandbox.panel import *\n"
            "more = ('fork bomb', 'disk: everywhere else')\n"
            "few = [a for a in ATTEMPTS if a.barrier in ('files', 'privileges') or a.name in more]\n"
            "assert len(few) > 20\n"
            "for f in run_panel(SandboxConfig(), few): print(f) if not f.holds else None\n"
        )
        answer = subprocess.run([*nobody, python, "-c", code], cwd=copy, capture_output=True, text=True, timeout=200)
        assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr[-2000:]
    finally:
        subprocess.run(["rm", "-rf", str(copy)], check=True)
