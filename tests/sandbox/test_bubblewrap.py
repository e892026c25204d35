"""The bubblewrap back end: results name why a run ended, limits bind, files stay inside, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from rorqual.sandbox import Bind, Ended, Limits, Sandbox, SandboxError, create


def python(sandbox: Sandbox, source: str, **options):
    return sandbox.run([sandbox.python, "-I", "-c", source], **options)


def test_output_and_exit_code_come_back(sandbox: Sandbox) -> None:
    result = python(sandbox, "import sys; print(input()[::-1]); print('e', file=sys.stderr); sys.exit(7)", stdin="abc\n")
    assert (result.ended, result.exit_code, result.stdout, result.stderr) == (Ended.EXITED, 7, "cba\n", "e\n")
    assert not result.is_ok
    assert result.cpu_s is not None and 0 < result.cpu_s < 5


@pytest.mark.parametrize(
    ("ended", "source", "limits"),
    [
        (Ended.TIMEOUT, "import time; time.sleep(60)", Limits(timeout_s=0.5)),
        (Ended.TIMEOUT, "while True: pass", Limits(timeout_s=0.5)),
        (Ended.CPU, "while True: pass", Limits(timeout_s=20, cpu_s=1)),
        (Ended.MEMORY, "x = bytearray(1 << 30)", Limits(memory_mb=128)),
        (Ended.OUTPUT, "while True: print('x' * 1000)", Limits(output_bytes=5000)),
        (Ended.OUTPUT, "import sys\nwhile True: sys.stderr.write('x' * 1000)", Limits(output_bytes=5000)),
        (Ended.KILLED, "import os; os.kill(os.getpid(), 11)", Limits()),
    ],
)
def test_each_end_has_its_name(sandbox: Sandbox, ended: Ended, source: str, limits: Limits) -> None:
    result = python(sandbox, source, limits=limits)
    assert result.ended is ended, result
    assert len(result.stdout_bytes) <= limits.output_bytes and len(result.stderr_bytes) <= limits.output_bytes
    assert (result.signal == "SIGSEGV") == (ended is Ended.KILLED)
    assert "Killed" not in result.stderr and "fault" not in result.stderr


def test_a_command_that_is_not_there_is_a_value(sandbox: Sandbox) -> None:
    result = sandbox.run(["/no/such/program"])
    assert result.ended is Ended.SPAWN_FAILED and result.exit_code is None and "not found" in result.detail
    assert python(sandbox, "import sys; sys.exit(127)").ended is Ended.EXITED


def test_files_go_in_and_out_and_stay_between_runs(sandbox: Sandbox) -> None:
    sandbox.upload("deep/er/in.bin", bytes(range(256)))
    code = "d = open('deep/er/in.bin', 'rb').read(); open('out.bin', 'wb').write(d[::-1]); open('/tmp/note', 'w').write('kept')"
    assert python(sandbox, code).is_ok
    assert sandbox.download("out.bin") == bytes(range(255, -1, -1))
    assert python(sandbox, "print(open('/tmp/note').read())").stdout == "kept\n"


def test_an_environment_given_for_the_program_reaches_only_it(sandbox: Sandbox) -> None:
    result = python(sandbox, "import os; print(os.environ['A B' if 0 else 'GREETING'])", env={"GREETING": "a b\n$x'"})
    assert result.stdout == "a b\n$x'\n"
    assert sandbox.run(["/bin/true"], env={"LD_PRELOAD": "/box/absent.so"}).ended is Ended.EXITED


def test_cancelling_kills(sandbox: Sandbox) -> None:
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    began = time.monotonic()
    assert sandbox.run(["/bin/sleep", "60"], cancel=cancel).ended is Ended.CANCELLED
    assert time.monotonic() - began < 5


def test_many_runs_wait_at_once_without_blocking_the_loop(sandbox: Sandbox) -> None:
    async def together() -> float:
        began = time.monotonic()
        results = await asyncio.gather(*(sandbox.run_async(["/bin/sleep", "1"]) for _ in range(8)))
        assert all(result.is_ok for result in results)
        return time.monotonic() - began

    assert asyncio.run(together()) < 6


def test_a_cancelled_task_leaves_no_process(sandbox: Sandbox) -> None:
    async def withdraw() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.run_async(["/bin/sleep", "61"]), 0.5)

    asyncio.run(withdraw())
    assert not [p for p in command_lines() if p.endswith("/bin/sleep\x0061\x00")]


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:
            continue
    return found


def test_a_server_answers_line_by_line_and_dies_on_close(sandbox: Sandbox) -> None:
    server = "import sys, os\nprint(os.getpid(), flush=True)\nfor line in sys.stdin: print(line.strip().upper(), flush=True)"
    handle = sandbox.start([sandbox.python, "-c", server])
    assert int(handle.receive(10)) > 1
    assert [handle.ask(word, 10) for word in ("one", "two")] == ["ONE", "TWO"]
    with pytest.raises(SandboxError) as caught:
        handle.receive(0.1)
    assert caught.value.reason == "timeout"
    assert handle.is_running
    assert handle.close().ended is Ended.KILLED
    assert not handle.is_running


def test_a_server_survives_the_thread_that_started_it(sandbox: Sandbox) -> None:
    handles = []
    thread = threading.Thread(target=lambda: handles.append(sandbox.start(["/bin/cat"])))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert handles[0].ask("still here", 5) == "still here"
    handles[0].close()


def test_a_server_that_dies_or_floods_is_a_named_error(sandbox: Sandbox) -> None:
    with sandbox.start([sandbox.python, "-c", "import sys; sys.exit('broken')"]) as handle, pytest.raises(SandboxError) as caught:
        handle.receive(10)
    assert caught.value.reason == "closed" and "broken" in str(caught.value)
    with sandbox.start(["/bin/sh", "-c", "tr '\\0' x </dev/zero"]) as handle, pytest.raises(SandboxError) as caught:
        handle.receive(10)
    assert caught.value.reason == "output"


def test_a_program_may_serve_itself_on_localhost(sandbox: Sandbox) -> None:
    code = (
        "import socket, multiprocessing\n"
        "server = socket.create_server(('localhost', 0))\n"
        "client = socket.create_connection(('localhost', server.getsockname()[1]), 5)\n"
        "server.accept()[0].sendall(b'hello'); print(client.recv(5).decode(), multiprocessing.Lock() is not None)"
    )
    result = python(sandbox, code)
    assert result.stdout == "hello True\n", result.stderr


def test_packages_and_binds_are_shown_and_nothing_beside_them(confinement: None, tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "shown_module.py").write_text("WORD = 'shown'")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a note")
    (tmp_path / "scratch").mkdir(mode=0o777)
    (tmp_path / "scratch").chmod(0o777)
    binds = (Bind(str(tmp_path / "notes"), "/data/notes"), Bind(str(tmp_path / "scratch"), "/data/scratch", is_writable=True))
    with create(packages=(str(tmp_path / "library"),), binds=binds) as made:
        code = (
            "import os, shown_module; print(shown_module.WORD, open('/data/notes/a.txt').read(), os.listdir('/data'))\n"
            "open('/data/scratch/made', 'w').write('x')\n"
            "open('/data/notes/b.txt', 'w')"
        )
        result = made.run([made.python, "-c", code])
    assert result.stdout.startswith("shown a note ['") and result.exit_code == 1
    assert "Read-only file system" in result.stderr or "Permission denied" in result.stderr
    assert (tmp_path / "scratch" / "made").read_text() == "x" and not (tmp_path / "notes" / "b.txt").exists()


def test_a_closed_sandbox_says_so(confinement: None) -> None:
    made = create()
    made.close()
    made.close()
    assert made.run(["/bin/true"]).ended is Ended.SPAWN_FAILED
    with pytest.raises(SandboxError) as caught:
        made.upload("x", b"")
    assert caught.value.reason == "closed"


@pytest.mark.parametrize("path", ["../x", "/etc/x", "", "a/../../x", "a\0b"])
def test_paths_that_leave_the_working_directory_are_refused(sandbox: Sandbox, path: str) -> None:
    with pytest.raises(SandboxError):
        sandbox.upload(path, b"x")
    with pytest.raises(SandboxError):
        sandbox.download(path)


def test_directories_are_uploaded_with_their_modes_and_links_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "run.sh").write_text("#!/bin/sh\necho ran")
    (tmp_path / "deep" / "run.sh").chmod(0o755)
    sandbox.upload("tree", tmp_path)
    assert sandbox.run(["/box/tree/deep/run.sh"]).stdout == "ran\n"
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(SandboxError, match="link"):
        sandbox.upload("tree", tmp_path)


def test_a_command_line_too_long_is_a_value(sandbox: Sandbox) -> None:
    assert sandbox.run(["/bin/echo", "x" * (1 << 20)]).ended is Ended.SPAWN_FAILED
    assert sandbox.run([]).ended is Ended.SPAWN_FAILED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives each sandbox a uid of its own")
def test_two_sandboxes_never_share_a_uid() -> None:
    with create() as one, create() as two:
        uids = {box.run(["/usr/bin/id", "-u"]).stdout for box in (one, two)}
        assert len(uids) == 2 and "0\n" not in uids


def test_descriptors_of_high_numbers_and_none_left_are_no_crash(confinement: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this process may not open enough files")
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
        with create() as made:
            assert made.run(["/bin/echo", "x"]).stdout == "x\n"
            with made.start(["/bin/cat"]) as handle:
                assert handle.ask("high", 10) == "high"
            used = len(os.listdir("/proc/self/fd"))
            for spare in (0, 3, 8, 10, 12):
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + spare, hard))
                assert made.run(["/bin/echo", "x"]).ended in (Ended.SPAWN_FAILED, Ended.EXITED)
            resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
            assert len(os.listdir("/proc/self/fd")) == used
            assert made.run(["/bin/echo", "x"]).stdout == "x\n"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
