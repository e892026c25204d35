"""The panel of escape attempts: programs that try to leave a sandbox or to use more than their share.

A program that reaches its end says BROKEN: the barrier did not hold. One that is stopped, fails, or calls `held()` did not
pass. Where success would show outside as well, a witness named here looks there, and the program's own word is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = """
import ctypes, os, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def held():
    sys.stdout.flush()
    os._exit(3)
def syscall(name, *args):
    number = NUMBERS[name]
    if number is None: held()
    value = libc.syscall(number, *[a if isinstance(a, bytes) else ctypes.c_long(a) for a in args])
    if value < 0: raise OSError(ctypes.get_errno(), name)
    return value
def count(action, most):
    for n in range(most):
        try: action(n)
        except (OSError, RuntimeError, MemoryError): return n
    return most
def reach(family, address):
    s = socket.socket(family)
    s.settimeout(1)
    s.connect(address)
    s.sendall(b'out')
def child(n):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
"""
END = "\nprint('BROKEN', flush=True)\n"


@dataclass(frozen=True)
class Attempt:
    """One attempt. `name` in words; `barrier` is the group it belongs to in the table.

    The program sees the stage's facts as globals: SECRET_FILE, OPEN_DIRECTORY, TCP4, TCP6, UDP4, UDP6 (ports), ABSTRACT and
    UNIX_PATH (sockets), VICTIM (a pid), MARK (a word for command lines), OWNER_HOME, LIMITS, NUMBERS (of system calls).
    """

    name: str
    barrier: str
    program: str
    witness: str = ""
    """Which outside look the panel takes after the run: a method of panel.Stage."""


def _group(barrier: str, *rows: tuple[str, ...]) -> list[Attempt]:
    return [Attempt(row[0], barrier, row[1].strip(), row[2] if len(row) > 2 else "") for row in rows]


def _denied_call(name: str, arguments: str) -> tuple[str, str]:
    """A call that no ordinary program makes. An error other than a refusal shows that it reached the kernel."""
    return (f"call {name}", f"try: syscall('{name}', {arguments})\nexcept OSError as e: e.errno in (1, 13, 38) and held()")


NETWORK = _group(
    "network",
    ("TCP to the machine's loopback", "reach(socket.AF_INET, ('127.0.0.1', TCP4))", "received"),
    ("TCP over IPv6", "reach(socket.AF_INET6, ('::1', TCP6))", "received"),
    ("UDP to the machine's loopback", "socket.socket(2, 2).sendto(b'out', ('127.0.0.1', UDP4)); held()", "received"),
    ("UDP over IPv6", "socket.socket(10, 2).sendto(b'out', ('::1', UDP6)); held()", "received"),
    ("abstract unix socket", "reach(socket.AF_UNIX, b'\\0' + ABSTRACT)", "received"),
    ("unix socket on a path", "reach(socket.AF_UNIX, UNIX_PATH)", "received"),
    ("UDP to the internet", "s = socket.socket(2, 2); s.connect(('192.0.2.1', 53)); s.send(b'out')"),
    ("TCP to the internet", "socket.create_connection(('192.0.2.1', 80), 1)"),
    ("raw ICMP socket", "socket.socket(2, 3, 1)"),
    ("packet socket", "socket.socket(17, 3, 768)"),
    ("netfilter socket", "socket.socket(16, 3, 12)"),
    ("change the network's devices", """
s = socket.socket(16, 3, 0)
s.send(struct.pack('IHHIIBBHiII', 32, 16, 5, 1, 0, 0, 0, 0, 1, 0, 1))
if struct.unpack('i', s.recv(64)[16:20])[0] < 0: held()
"""),
    ("socket to the hypervisor (vsock)", "socket.socket(40, 1)"),
    ("kernel crypto socket", "socket.socket(38, 5)"),
    ("bluetooth socket", "socket.socket(31, 3, 1)"),
    ("see the machine's network devices", """
names = set(os.listdir('/sys/class/net')) if os.path.isdir('/sys/class/net') else set()
names |= {l.split(':')[0].strip() for l in open('/proc/net/dev').read().splitlines()[2:]}
if not names - {'lo'}: held()
"""),
)  # fmt: skip

FILES = _group(
    "files",
    ("read a file that all may read", "print(open(SECRET_FILE).read())", "secret_out"),
    ("write where all may write", "open(OPEN_DIRECTORY + '/planted', 'w').write('x')", "planted"),
    ("delete outside", "os.unlink(OPEN_DIRECTORY + '/bystander')", "planted"),
    ("rename outside", "os.rename(OPEN_DIRECTORY + '/bystander', OPEN_DIRECTORY + '/planted')", "planted"),
    ("list a directory outside", "print(os.listdir(OPEN_DIRECTORY))"),
    ("read /etc/passwd", "if 'root:' not in open('/etc/passwd').read(): held()"),
    ("read /etc/shadow", "print(open('/etc/shadow').read())"),
    ("list the owner's home", "if not os.listdir(OWNER_HOME): held()"),
    ("symlink for the owner to download", "os.symlink(SECRET_FILE, 'loot'); held()", "downloaded"),
    ("hard link for the owner to download", "os.link(SECRET_FILE, 'loot'); held()", "downloaded"),
    ("symlinked directory for the owner to upload into", "os.symlink(OPEN_DIRECTORY, 'drop'); held()", "uploaded"),
    ("pipe in place of a file, to hang the owner", "os.mkfifo('loot'); held()", "downloaded"),
    ("archive with a path that climbs out", """
import io, tarfile
data = io.BytesIO()
with tarfile.open(fileobj=data, mode='w') as t:
    for prefix in ('../' * 12, '/'):
        member = tarfile.TarInfo(prefix + OPEN_DIRECTORY.lstrip('/') + '/planted'); member.size = 1
        t.addfile(member, io.BytesIO(b'x'))
data.seek(0)
tarfile.open(fileobj=data).extractall('.', filter='fully_trusted')
held()
""", "planted"),
    ("archive with a link, then a file through it", """
import io, tarfile
data = io.BytesIO()
with tarfile.open(fileobj=data, mode='w') as t:
    link = tarfile.TarInfo('way'); link.type = tarfile.SYMTYPE; link.linkname = OPEN_DIRECTORY; t.addfile(link)
    member = tarfile.TarInfo('way/planted'); member.size = 1; t.addfile(member, io.BytesIO(b'x'))
data.seek(0)
tarfile.open(fileobj=data).extractall('.', filter='fully_trusted')
held()
""", "planted"),
    ("climb from an inherited directory descriptor", """
for name in os.listdir('/proc/self/fd'):
    try: fd = os.open('../' * 12 + SECRET_FILE.lstrip('/'), os.O_RDONLY, dir_fd=int(name))
    except OSError: continue
    print(os.read(fd, 999)); break
else: held()
""", "secret_out"),
    ("read through other processes' roots", """
for pid in [p for p in os.listdir('/proc') if p.isdigit()]:
    for way in ('root', 'cwd'):
        try: print(open(f'/proc/{pid}/{way}{"/.." * 12 if way == "cwd" else ""}{SECRET_FILE}').read()); sys.exit()
        except OSError: pass
held()
""", "secret_out"),
    ("change the system", "open('/usr/bin/rorqual-was-here', 'w')"),
    ("change the interpreter", "import json; open(json.__file__, 'a').write('#')"),
    ("write to the root directory", "open('/rorqual-was-here', 'w')"),
    ("make a device node of a disk", "os.mknod('disk', 0o60666, os.makedev(8, 0))"),
    ("open the machine's memory", "open('/dev/mem', 'rb')"),
    ("open a disk", """
import glob
for path in glob.glob('/dev/[svn]d*') + glob.glob('/dev/nvme*') + glob.glob('/dev/loop*'):
    if open(path, 'rb').read(16): print('BROKEN'); break
held()
"""),
)  # fmt: skip

PROCESSES = _group(
    "processes",
    ("kill a process outside", "os.kill(VICTIM, 9)", "victim"),
    ("kill a process group outside", "os.killpg(VICTIM, 9)", "victim"),
    ("signal by process descriptor", "import signal; signal.pidfd_send_signal(os.pidfd_open(VICTIM), 9)", "victim"),
    ("trace a process outside", "syscall('ptrace', 16, VICTIM, 0, 0)"),
    ("trace a process inside", "pid = os.fork() or time.sleep(5) or held(); syscall('ptrace', 16, pid, 0, 0)"),
    ("read a process's memory", """
buffer = ctypes.create_string_buffer(8)
vector = struct.pack('QQ', ctypes.addressof(buffer), 8)
syscall('process_vm_readv', VICTIM, vector, 1, vector, 1, 0)
"""),
    ("read other processes' environments", """
for pid in [p for p in os.listdir('/proc') if p.isdigit()]:
    try: print(open(f'/proc/{pid}/environ', errors='replace').read())
    except OSError: pass
held()
""", "secret_out"),
    ("read other processes' command lines", """
if b'sleep' not in open(f'/proc/{VICTIM}/cmdline', 'rb').read(): held()
"""),
    ("change another's priority", "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)"),
    ("raise one's own priority", "os.setpriority(os.PRIO_PROCESS, 0, -10)"),
    ("take a real-time schedule", "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))"),
    ("a grandchild that stays behind", """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: os.execv('/bin/sleep', ['sleep-' + MARK, '30'])
    os._exit(0)
time.sleep(.2); held()
""", "stragglers"),
    ("children that ignore every signal", """
import signal
for n in range(4):
    if os.fork() == 0:
        for s in range(1, 65):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        os.execv('/bin/sleep', ['sleep-' + MARK, '30'])
time.sleep(.2); held()
""", "stragglers"),
    ("children left as zombies", """
for n in range(8):
    if os.fork() == 0: os._exit(0)
os.execv('/bin/sleep', ['sleep-' + MARK, '0.1'])
""", "stragglers"),
    ("shared memory that outlives its maker", "if libc.shmget(SHM_KEY, 4096, 0o1666) < 0: held()\nheld()", "shared_memory"),
)  # fmt: skip

PRIVILEGES = _group(
    "privileges",
    ("become root", "os.setuid(0)"),
    ("take another group", "os.setgroups([0])"),
    ("hold a capability", "if int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16) == 0: held()"),
    ("gain privileges from a set-uid program", "if libc.prctl(39, 0, 0, 0, 0) == 1: held()"),
    ("a user namespace of one's own", "syscall('unshare', 0x10000000)"),
    ("a user namespace by clone", "if syscall('clone', 0x10000000 | 17, 0, 0, 0, 0) == 0: os._exit(0)"),
    ("a user namespace by clone3", """
if syscall('clone3', struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64) == 0: os._exit(0)
"""),
    ("a mount namespace", "syscall('unshare', 0x20000)"),
    ("enter another's namespace", "syscall('setns', os.open('/proc/1/ns/net', 0), 0)"),
    ("mount", "syscall('mount', b'none', b'/tmp', b'tmpfs', 0, 0)"),
    ("unmount what hides the machine", "syscall('umount2', b'/proc', 2)"),
    ("change the root directory", "syscall('chroot', b'.')"),
    ("pivot the root directory", "syscall('pivot_root', b'.', b'.')"),
    ("open a file by handle", "syscall('open_by_handle_at', -100, struct.pack('iiQ', 8, 1, 2), 0)"),
    ("raise one's own limits", """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))
"""),
    ("system calls of the x32 kind", "if libc.syscall(ctypes.c_long(0x40000000 | 39)) <= 0: held()"),
    ("type into the terminal", "import fcntl, termios; fcntl.ioctl(os.open('/dev/tty', os.O_RDWR), termios.TIOCSTI, b'x')"),
)  # fmt: skip

KERNEL = _group(
    "kernel",
    _denied_call("bpf", "5, bytes(128), 128"),
    _denied_call("perf_event_open", "bytes(128), 0, -1, -1, 0"),
    _denied_call("io_uring_setup", "8, bytes(256)"),
    _denied_call("userfaultfd", "1"),
    _denied_call("add_key", "b'user', b'rorqual', b'x', 1, -3"),
    _denied_call("keyctl", "0, -3, 1"),
    _denied_call("syslog", "10, 0, 0"),
    _denied_call("personality", "0x0040000"),
    _denied_call("quotactl", "0x800007 << 8, 0, 0, bytes(64)"),
    ("call reboot", "try: syscall('reboot', 1, 1, 1, 0)\nexcept OSError as e: e.errno == 22 or held()"),
    ("load a module", "try: syscall('init_module', bytes(8), 8, b'')\nexcept OSError as e: e.errno == 8 or held()"),
    ("set the clock", "syscall('clock_settime', 0, struct.pack('qq', int(time.time()), 0))"),
    ("rename the machine", "syscall('sethostname', b'rorqual-was-here', 16)", "machine_name"),
    ("set a kernel parameter", "open('/proc/sys/kernel/core_pattern', 'r+').write('core')"),
    ("trigger a system request", "open('/proc/sysrq-trigger', 'w')"),
    ("read the kernel's memory", "open('/proc/kcore', 'rb').read(64)"),
    ("leave the control group", """
import glob
for path in glob.glob('/sys/fs/cgroup/cgroup.procs') + glob.glob('/sys/fs/cgroup/*/cgroup.procs'):
    open(path, 'w').write('0'); break
else: held()
"""),
)  # fmt: skip

RESOURCES = _group(
    "resources",
    ("fork bomb", "if count(child, 400) < LIMITS['processes']: held()"),
    ("fork bomb that never waits", "while True:\n    try: os.fork()\n    except OSError: pass", "ended_in_time"),
    ("thread bomb", """
import threading
if count(lambda n: threading.Thread(target=time.sleep, args=(20,), daemon=True).start(), 400) < LIMITS['processes']: held()
"""),
    ("memory in one process", "x = bytearray(b'x') * (LIMITS['memory_mb'] * 2 << 20)"),
    ("memory in many processes", """
done, ready = os.pipe()
for n in range(8):
    if os.fork() == 0:
        x = bytearray(b'x') * (LIMITS['memory_mb'] // 2 << 20)
        os.write(ready, b'.')
        time.sleep(20)
        os._exit(0)
time.sleep(1)
os.set_blocking(done, False)
if len(os.read(done, 8)) < 4: held()
"""),
    ("disk: the working directory", """
for n in range(LIMITS['disk_mb'] * 2): open(f'{n}', 'wb').write(bytes(1 << 20))
"""),
    ("disk: everywhere else", """
roots = [d for d in ('/tmp', '/dev/shm', '/var/tmp', '/dev', '/', '/run', '/home', '/proc') if os.access(d, os.W_OK)]
def fill(n): open(f'{roots[n % len(roots)]}/{MARK}{n}', 'wb').write(bytes(1 << 20))
if not roots or count(fill, LIMITS['disk_mb'] * 2 * len(roots)) < LIMITS['disk_mb'] * 2: held()
"""),
    ("one huge file", "open('huge', 'wb').truncate((LIMITS['file_mb'] << 20) + 1)"),
    ("a flood of small files", "for n in range(60000): os.close(os.open(f'f{n}', os.O_CREAT, 0o600))"),
    ("open files", "keep = []\nif count(lambda n: keep.append(os.open('/dev/null', 0)), 5000) < LIMITS['open_files']: held()"),
    ("processor time by spinning", "while True: pass", "ended_in_time"),
    ("wall time by sleeping", "time.sleep(600)", "ended_in_time"),
    ("wall time with every signal ignored", """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""", "ended_in_time"),
    ("closing its output and staying", "os.close(1); os.close(2); time.sleep(600)", "ended_in_time"),
    ("flood of standard output", "while True: os.write(1, b'x' * 65536)", "output_bounded"),
    ("flood of standard error", "while True: os.write(2, b'x' * 65536)", "output_bounded"),
    ("flood from children that stay", "os.fork() or os.fork()\nwhile True: os.write(1, b'x' * 4096)", "output_bounded"),
    ("locked memory", "import mmap; m = mmap.mmap(-1, 8 << 20)\nif libc.mlockall(3): held()"),
    ("message queues", "if libc.mq_open(b'/' + MARK.encode(), 0o102, 0o600, None) < 0: held()"),
)  # fmt: skip

ATTEMPTS = [*NETWORK, *FILES, *PROCESSES, *PRIVILEGES, *KERNEL, *RESOURCES]
