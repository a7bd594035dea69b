"""The sandbox's calls of the Linux kernel, with ctypes. Runs in a script, so it uses only the standard library.

Namespaces (separate mounts, processes, network, IPC and host name), a root with only the allowed paths, a seccomp
filter, and limits. See namespaces(7), pivot_root(2), seccomp(2), user_namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_RDONLY, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 32, 1, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9
MOUNT_SETATTR, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, AT_RECURSIVE, AT_FDCWD = 442, 1, 2, 0x8000, -100
EPERM, ENOSYS = 1, 38
AF_UNIX = 1

FORBIDDEN = {
    # name: (x86_64, aarch64)
    "shmget": (29, 194),  # like memfd, memory that no process limit counts
    "semget": (64, 190),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "mq_open": (240, 180),
    "perf_event_open": (298, 241),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "finit_module": (313, 273),
    "bpf": (321, 280),
    "memfd_create": (319, 279),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_open": (434, 434),  # gives access to another process, and with pidfd_getfd to its files
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
}
MACHINES = {"x86_64": (0, 0xC000003E, 56, 41), "aarch64": (1, 0xC00000B7, 220, 198)}
"""By machine: the column above, AUDIT_ARCH, and the numbers of the system calls clone and socket."""
PIVOT_ROOT = FORBIDDEN["pivot_root"]
CLONE3 = 435

_libc = ctypes.CDLL(None, use_errno=True)


def is_root() -> bool:
    """Whether this user is the machine's root, who may become any user. Root of an unprivileged container is not."""
    if os.getuid() != 0:
        return False
    inside, outside, count = Path("/proc/self/uid_map").read_text().split()[:3]
    return inside == outside == "0" and int(count) >= 1 << 31


def isolate(root: bool) -> None:
    """Enter new namespaces, including a user namespace unless this is root. The next child is process 1 in them."""
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    user, group = os.getuid(), os.getgid()
    if root:
        _checked("unshare", _libc.unshare(flags))
        return
    _checked("unshare", _libc.unshare(flags | NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"65534 {user} 1")
    Path("/proc/self/gid_map").write_text(f"65534 {group} 1")


def die_with_parent() -> None:
    """Have this process killed when its parent ends, for any reason."""
    _checked("prctl", _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))


def enter_root(at: Path, readable: list[str], home: str, home_bytes: int) -> None:
    """Make `at` the root, with the `readable` paths (read-only), an empty writable `home`, and a few devices."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", str(at), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for path in readable:
        _show(path, at)
    for device in ("null", "zero", "random", "urandom"):
        _bind(f"/dev/{device}", at)
    inside = at / home.lstrip("/")
    inside.mkdir(parents=True)
    _mount("tmpfs", str(inside), "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={home_bytes},nr_inodes=4096")
    old = at / ".old"
    old.mkdir()
    number = PIVOT_ROOT[MACHINES[platform.machine()][0]]
    _checked("pivot_root", _libc.syscall(number, bytes(at), bytes(old)))
    os.chdir("/")
    with contextlib.suppress(OSError):  # the folder is not needed any more, and its creator may be killed
        os.rmdir(f"/.old{at}")
    _checked("umount2", _libc.umount2(b"/.old", MNT_DETACH))
    os.rmdir("/.old")
    _mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(home)


def limit(cpu_seconds: int | None, memory: int | None, file_size: int, files: int, processes: int | None) -> None:
    """Set the limits of each process, in seconds, bytes and open files. `processes` limits all of them together.

    None means no limit.
    """
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: processes,
    }
    if sys.platform == "darwin":
        del limits[resource.RLIMIT_AS]  # macOS defines it but refuses to set it
    for what, bound in limits.items():
        if bound is not None:
            resource.setrlimit(what, (bound, bound))


def drop_privileges(user: int | None) -> None:
    """Drop privileges permanently: another user, no new privileges, and no system calls that reach outside."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _checked("prctl", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    program = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _checked("prctl", _libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0))


def _filter(machine: str) -> bytes:
    """A classic BPF program: EPERM for the forbidden calls, for new namespaces, and for sockets except local ones."""
    column, architecture, clone, socket = MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x50000 | EPERM, 0x50000 | ENOSYS, 0x80000000
    number, arch, first_argument = 0, 4, 16
    lines = [
        (load, 0, 0, arch),
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, 0x40000000),  # the x32 ABI
        (give, 0, 0, kill),
        (equal, 0, 1, CLONE3),  # a filter cannot see its flags in memory; libc falls back to clone
        (give, 0, 0, absent),
    ]
    for numbers in FORBIDDEN.values():
        lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    lines += [
        (equal, 0, 3, clone),
        (load, 0, 0, first_argument),
        (any_bit, 0, 5, NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS),
        (give, 0, 0, refuse),
        (equal, 0, 3, socket),
        (load, 0, 0, first_argument),
        (equal, 1, 0, AF_UNIX),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _show(path: str, root: Path) -> None:
    """Make a file, a folder or a link appear under `root`, read-only."""
    target = root / path.lstrip("/")
    if target.exists() or target.is_symlink() or not os.path.lexists(path):
        return
    if os.path.islink(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(path))
        return
    _bind(path, root)
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    _checked(
        f"mount_setattr {path}",
        _libc.syscall(MOUNT_SETATTR, AT_FDCWD, bytes(target), AT_RECURSIVE, attributes, len(attributes)),
    )


def _bind(path: str, root: Path) -> None:
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.isdir(path):
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount(path, str(target), None, MS_BIND | MS_REC)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    done = _libc.mount(*arguments, ctypes.c_ulong(flags), None if data is None else data.encode())
    _checked(f"mount {target}", done)


def _checked(what: str, result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
