"""The system call filter of a sandbox: a classic BPF program that refuses what no ordinary program needs.

The filter is a list of refusals: what reaches kernel surface beyond files, memory, processes and sockets answers EPERM.
It is written out here rather than made by libseccomp, so that the sandbox needs no package and no library of the system;
the test compares every number with libseccomp's.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

from rorqual.errors import UserError

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""machine -> (the audit number that the kernel reports, the column of the tables below)."""

REFUSED: dict[str, tuple[int | None, int | None]] = {
    # namespaces and mounts: no way to a fresh set of capabilities
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # other processes' memory and descriptors
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    # large and often exploited kernel surface
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "lookup_dcookie": (212, 18),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "personality": (135, 92), "mbind": (237, 235),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    # the machine itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "iopl": (172, None),
    "ioperm": (173, None), "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None), "sethostname": (170, 161),
    "setdomainname": (171, 162), "vhangup": (153, 58), "modify_ldt": (154, None),
}  # fmt: skip
SHARED = {"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190)}
"""Kernel objects that outlive their maker, refused where no namespace of its own takes them along."""
JUDGED = {"clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "ioctl": (16, 29)}
"""Calls judged by an argument."""

NAMESPACE_FLAGS = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET. In clone(), NEWTIME's bit is part of the exit signal."""
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
NETLINK_ROUTE = 0
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
X32_BIT = 0x40000000

# Offsets into struct seccomp_data; the low half of a 64-bit argument comes first on both machines.
NUMBER, ARCH, ARG0, ARG1, ARG2 = 0, 4, 16, 24, 32
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


@functools.cache
def program(is_alone: bool = True, machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter, for `bwrap --seccomp` or prctl.

    is_alone: True allows sockets of the families unix, inet and inet6, and System V objects, for a sandbox with network
    and IPC namespaces of its own; False allows neither (socketpair stays), for a process that shares the machine's.
    AF_VSOCK in particular is refused always: no network namespace confines it.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise UserError(f"sandbox: the system call filter knows {known}, not {machine}; pass seccomp=False to go without it")
    audit, column = ARCHITECTURES[machine]
    numbers = {name: pair[column] for name, pair in JUDGED.items()}
    return b"".join(
        [
            _op(LOAD, ARCH),
            _op(JUMP_EQUAL, audit, 1, 0),
            _op(RETURN, KILL_PROCESS),
            _op(LOAD, NUMBER),
            *([_op(JUMP_GREATER_EQUAL, X32_BIT, 0, 1), _op(RETURN, KILL_PROCESS)] if column == 0 else []),
            *(_refuse(pair[column], errno.EPERM) for pair in REFUSED.values()),
            # The C library falls back to clone, whose flags a filter can read; those of clone3 lie behind a pointer.
            _refuse(numbers["clone3"], errno.ENOSYS),
            _judge(numbers["clone"], ARG0, [_op(JUMP_ANY_BIT, NAMESPACE_FLAGS, 0, 1), _fail(errno.EPERM)]),
            _judge(numbers["ioctl"], ARG1, [_refuse(TIOCSTI, errno.EPERM), _refuse(TIOCLINUX, errno.EPERM)]),
            _judge_sockets(numbers["socket"]) if is_alone else _refuse(numbers["socket"], errno.EPERM),
            *([] if is_alone else [_refuse(pair[column], errno.EPERM) for pair in SHARED.values()]),
            _op(RETURN, ALLOW),
        ]
    )


def _judge_sockets(number: int | None) -> bytes:
    """Local and internet sockets; of netlink only the routing one, which the C library asks for the list of interfaces."""
    allowed = [op for family in (AF_UNIX, AF_INET, AF_INET6) for op in (_op(JUMP_EQUAL, family, 0, 1), _op(RETURN, ALLOW))]
    routing = [_op(JUMP_EQUAL, AF_NETLINK, 0, 3), _op(LOAD, ARG2), _op(JUMP_EQUAL, NETLINK_ROUTE, 0, 1), _op(RETURN, ALLOW)]
    return _judge(number, ARG0, [*allowed, *routing, _fail(errno.EAFNOSUPPORT)])


def _judge(number: int | None, argument: int, verdict: list[bytes]) -> bytes:
    """Where the call is this one, load the argument and run the verdict; what falls through is allowed."""
    body = b"".join([_op(LOAD, argument), *verdict, _op(RETURN, ALLOW)])
    return _op(JUMP_EQUAL, number or 0, 0, len(body) // 8) + body


def _refuse(value: int | None, code: int) -> bytes:
    """Where the loaded word is this one, answer with an error. None: this machine has no such call."""
    return b"" if value is None else _op(JUMP_EQUAL, value, 0, 1) + _fail(code)


def _fail(code: int) -> bytes:
    return _op(RETURN, ERRNO | code)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
