"""The filter's numbers are libseccomp's, and its program does what its tables say."""

from __future__ import annotations

import struct

import pytest

from rorqual.errors import UserError
from rorqual.sandbox import seccomp


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_system_call_numbers_are_those_of_libseccomp(machine: str, column: int) -> None:
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"libseccomp is not here: {error}")
    architecture = {"x86_64": pyseccomp.Arch.X86_64, "aarch64": pyseccomp.Arch.AARCH64}[machine]
    young = {"set_mempolicy_home_node"}  # libseccomp 2.5.4 is older than it
    for name, numbers in {**seccomp.REFUSED, **seccomp.JUDGED, **seccomp.SHARED}.items():
        if name in young:
            continue
        number = pyseccomp.resolve_syscall(architecture, name)
        assert (number if number >= 0 else None) == numbers[column], name


def evaluate(program: bytes, number: int, *arguments: int, audit: int = 0xC000003E) -> int:
    """A small interpreter of classic BPF, over one struct seccomp_data."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *(list(arguments) + [0] * 6)[:6])
    at, word = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, at * 8)
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            word = struct.unpack_from("<I", data, value)[0]
        else:
            claim = {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[code]
            at += if_true if claim else if_false


ALLOWED, EPERM, ENOSYS, FAMILY = 0x7FFF0000, 0x50001, 0x50000 | 38, 0x50000 | 97


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        (0, (), ALLOWED), (59, (), ALLOWED), (101, (), EPERM), (272, (), EPERM), (435, (), ENOSYS),
        (56, (17,), ALLOWED), (56, (0x10000000 | 17,), EPERM), (56, (0x3D0F00,), ALLOWED),
        (16, (0, 0x5401), ALLOWED), (16, (0, 0x5412), EPERM), (16, (0, 0x100005412), EPERM),
        (41, (1,), ALLOWED), (41, (2,), ALLOWED), (41, (10,), ALLOWED), (41, (40,), FAMILY), (41, (38,), FAMILY),
        (41, (16, 3, 0), ALLOWED), (41, (16, 3, 12), FAMILY), (29, (), ALLOWED),
    ],
)  # fmt: skip
def test_verdicts_inside_own_namespaces(number: int, arguments: tuple[int, ...], verdict: int) -> None:
    assert evaluate(seccomp.program(True, "x86_64"), number, *arguments) == verdict


@pytest.mark.parametrize("number", [41, 29, 68, 64])
def test_without_own_namespaces_no_socket_and_no_lasting_object(number: int) -> None:
    assert evaluate(seccomp.program(False, "x86_64"), number, 1) == EPERM


def test_another_architecture_and_the_x32_kind_are_killed() -> None:
    program = seccomp.program(True, "x86_64")
    assert evaluate(program, 0, audit=0x40000003) == 0x80000000
    assert evaluate(program, 0x40000000 | 39) == 0x80000000


def test_an_unknown_machine_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UserError, match="seccomp=False"):
        seccomp.program(True, "riscv64")
