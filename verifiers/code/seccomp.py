"""The system-call filter of a sandboxed program: what no honest solution needs and what escapes are made of is refused."""

from __future__ import annotations

import ctypes
import errno

from verifiers.code import kernel

# Numbers by machine: (x86_64, aarch64); None where the machine has no such call.
_REFUSED: dict[str, tuple[int | None, int]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "vhangup": (153, 58),
    "iopl": (172, None),  # type: ignore[dict-item]
    "ioperm": (173, None),  # type: ignore[dict-item]
    "modify_ldt": (154, None),  # type: ignore[dict-item]
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "clone3": (435, 435),
}
_CLONE, _SOCKET, _IOCTL = (56, 220), (41, 198), (16, 29)
# glibc falls back to older calls on ENOSYS: from clone3 to clone, whose flags this filter can read.
_AS_IF_ABSENT = {"clone3", "memfd_create", "memfd_secret", "io_uring_setup", "io_uring_enter", "io_uring_register"}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80
_AF_UNIX, _TIOCSTI, _TIOCLINUX = 1, 0x5412, 0x541C
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
_Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _refuse(number: int, code: int) -> list[_Instruction]:
    return [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | code)]


def instructions(machine: str) -> list[_Instruction]:
    """The filter as classic BPF instructions (code, jump if true, jump if false, operand)."""
    column = list(_ARCHITECTURE).index(machine)
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _ARCHITECTURE[machine]), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NR)]
    if machine == "x86_64":  # the x32 calls are the same ones under other numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for name, numbers in _REFUSED.items():
        if (number := numbers[column]) is not None:
            program += _refuse(number, errno.ENOSYS if name in _AS_IF_ABSENT else errno.EPERM)
    # Each of these blocks ends with a return either way, so that what was loaded last does not matter.
    program += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _ARG0), (_ANY_BIT, 0, 1, _NAMESPACES)]
    program += [(_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 4, _SOCKET[column]), (_LOAD, 0, 0, _ARG0), (_EQUAL, 1, 0, _AF_UNIX)]
    program += [(_RETURN, 0, 0, _ERRNO | errno.EACCES), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 4, _IOCTL[column]), (_LOAD, 0, 0, _ARG1)]
    program += [(_EQUAL, 1, 0, _TIOCSTI), (_EQUAL, 0, 1, _TIOCLINUX), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


class Filter:
    """The filter, assembled once; raises OSError on a machine whose system calls are not listed here."""

    def __init__(self) -> None:
        if kernel.MACHINE not in _ARCHITECTURE:
            raise OSError(errno.ENOSYS, f"no system-call filter for {kernel.MACHINE}")
        listing = instructions(kernel.MACHINE)
        self._code = b"".join(
            code.to_bytes(2, "little") + bytes((yes, no)) + operand.to_bytes(4, "little")
            for code, yes, no, operand in listing
        )
        self._program = _Program(len(listing), self._code)

    def install(self) -> None:
        """Filter this process and all its children from now on; `no_new_privs` must be set."""
        pointer = ctypes.cast(ctypes.pointer(self._program), ctypes.c_void_p)
        kernel.prctl(kernel.PR_SET_SECCOMP, kernel.SECCOMP_MODE_FILTER, pointer.value or 0)
