"""The other side of `sandbox.py`: confines itself, starts the program, and ends everything.

Run as a file (`python -I -S sandbox_keeper.py ORDER REPORT_FD`), never imported.  Three processes:

    keeper    outside: the clock, the memory of all together; makes the namespaces
    first     process 1 of the process namespace: waits for the program; when it ends, the kernel ends all that is left
    program   gives up everything, then becomes Python

Two lines go to REPORT_FD: {"held": {protection: by what}} before the program starts, {"status", "late"} at the end.
Whatever the system refuses is left out of `held`; without "files" and "processes" nothing is started.
"""

# ruff: noqa: PTH112, PTH116, PTH118, PTH120, PTH123, PTH208
# pathlib takes long to load, and this starts once for every program
from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
PDEATHSIG, DUMPABLE, CAPBSET_DROP, SUBREAPER, NO_NEW_PRIVS, SECCOMP = 1, 4, 24, 36, 38, 22
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 0x4000, 1 << 18
WORK_BYTES, WORK_FILES = 64 << 20, 1024  # of the folder, where it can have a file system of its own
READ_ONLY = ("/usr", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")
POLL_SECONDS = 0.02  # seconds

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def syscall(number: int, *arguments: Any) -> int:
    found = libc.syscall(number, *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


# ── the keeper ──


def keep(order: dict[str, Any], report: int) -> None:
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    held = {} if "namespaces" in order["without"] else namespaces()
    if "mounts" in held:
        own_folder(order, held)
    end = time.monotonic() + order["timeout"]
    first = os.fork()
    if first == 0:
        wait_for_program(order, held, report)
    late = False
    while True:
        done, _ = os.waitpid(first, os.WNOHANG)
        if done:
            break
        running = descendants()
        if time.monotonic() > end:
            late = True
            break
        # root is above RLIMIT_NPROC, and RLIMIT_AS is each process's own: so all together are watched from here
        if len(running) > order["processes"] + 2 or memory_of(running) > order["memory"]:
            break
        if "disk" not in held and folder_bytes(order) > WORK_BYTES:
            break
        time.sleep(POLL_SECONDS)
    end_all()
    if late:
        os.write(report, b'{"late": true}\n')
    os._exit(0)


def namespaces() -> dict[str, str]:
    """As many as the system gives; those of processes and networks at once or one by one."""
    held: dict[str, str] = {}
    kinds = {"network": NEWNET, "processes": NEWPID, "mounts": NEWNS, "ipc": NEWIPC, "names": NEWUTS}
    uid, gid = os.geteuid(), os.getegid()
    together = 0
    for flag in kinds.values():
        together |= flag
    with contextlib.suppress(OSError):
        if uid != 0:
            call("unshare", NEWUSER | together)
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        else:
            call("unshare", together)
        return {name: "namespace" for name in kinds}
    for name, flag in kinds.items():
        with contextlib.suppress(OSError):
            call("unshare", flag)
            held[name] = "namespace"
    return held


def descendants() -> list[int]:
    """All processes below this one, whoever they call their parent now."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    mine, found = {os.getpid()}, list[int]()
    while True:
        more = [pid for pid, parent in parents.items() if parent in mine and pid not in mine]
        if not more:
            return found
        mine.update(more)
        found += more


def memory_of(pids: list[int]) -> int:
    """Bytes that these processes hold together; pages they share count for each."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm", "rb") as file:
            fields = file.read().split()
            total += (int(fields[1]) - int(fields[2])) * resource.getpagesize()  # resident, without what files back
    return total


def folder_bytes(order: dict[str, Any]) -> int:
    """What lies in the folder."""
    total = 0
    for path, _, names in os.walk(order["folder"]):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def end_all() -> None:
    """Stop all first, so that none forks meanwhile, then kill them."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for _ in range(100):
            pids = descendants()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                break
            with contextlib.suppress(OSError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            time.sleep(0.005)


# ── the first process of the namespace ──


def wait_for_program(order: dict[str, Any], held: dict[str, str], report: int) -> None:
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    call("prctl", SUBREAPER, 1, 0, 0, 0)
    call("prctl", DUMPABLE, 0, 0, 0, 0)
    os.set_inheritable(report, False)
    program = os.fork()
    if program == 0:
        try:
            confine(order, held)
            os.write(report, json.dumps({"held": held}).encode() + b"\n")
            if "files" not in held or "processes" not in held:
                os._exit(97)
            os.chdir(order["folder"])
            os.closerange(3, report)
            os.closerange(report + 1, 4096)
            executable = os.path.realpath(sys.executable)
            environment = {
                "HOME": order["folder"],
                "TMPDIR": order["folder"],
                "LC_ALL": "C.UTF-8",
                "PATH": "/nonexistent",
            }
            os.execve(executable, [executable, "-I", "-S", "-B", "-X", "utf8", "program.py"], environment)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(1, f"the program was not started: {error!r}\n".encode())
            os._exit(98)
    while True:
        pid, status = os.wait()
        if pid == program:
            os.write(report, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
            os._exit(0)


def own_folder(order: dict[str, Any], held: dict[str, str]) -> None:
    """A small file system in memory instead of the folder; everything else can only be read."""
    folder = order["folder"].encode()
    with contextlib.suppress(OSError):
        call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
        with open(f"{order['folder']}/program.py", "rb") as file:
            program = file.read()
        attributes = struct.pack("QQQQ", 1, 0, 0, 0)  # MOUNT_ATTR_RDONLY
        with contextlib.suppress(OSError):
            syscall(442, -100, b"/", 0x8000, attributes, len(attributes))
            held["files"] = "read-only mounts"
        options = f"size={WORK_BYTES},nr_inodes={WORK_FILES},mode=0700".encode()
        call("mount", b"tmpfs", folder, b"tmpfs", MS_NOSUID | MS_NODEV, options)
        with open(f"{order['folder']}/program.py", "wb") as file:
            file.write(program)
        held["disk"] = "own file system"


# ── the program, before it is one ──


def confine(order: dict[str, Any], held: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name, value in {
        "RLIMIT_AS": order["memory"], "RLIMIT_CPU": int(order["timeout"]) + 1, "RLIMIT_FSIZE": order["file_size"],
        "RLIMIT_NOFILE": order["files"], "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0,
    }.items():  # fmt: skip
        resource.setrlimit(getattr(resource, name), (value, value))
    os.umask(0o077)
    drop_rights(order, held)
    resource.setrlimit(resource.RLIMIT_NPROC, (order["processes"], order["processes"]))
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    if "landlock" not in order["without"]:
        landlock(order, held)
    forbid_calls(held)


def drop_rights(order: dict[str, Any], held: dict[str, str]) -> None:
    """Another user where we are root (its number is its own, so that limits count only its processes), and no
    capabilities in any case."""
    root = os.geteuid() == 0 and not (uid_mapped())
    for capability in range(64):
        libc.prctl(CAPBSET_DROP, capability, 0, 0, 0)
    if root and reachable(os.path.realpath(sys.executable)):
        user = 200_000 + int.from_bytes(os.urandom(4), "little") % 1_000_000_000
        for number in (user, 65_534):
            with contextlib.suppress(OSError, OverflowError):
                for path in (order["folder"], f"{order['folder']}/program.py"):
                    os.chown(path, number, number)
                os.setgroups([])
                os.setresgid(number, number, number)
                os.setresuid(number, number, number)
                held["rights"] = "user of its own"
                held.setdefault("processes", "user of its own")
                break
    header, nothing = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    with contextlib.suppress(OSError):
        call("capset", header, nothing)
        held.setdefault("rights", "no capabilities")


def uid_mapped() -> bool:
    """Whether this root is only the root of a user namespace of ours."""
    with open("/proc/self/uid_map") as file:
        return file.read().split()[2] == "1"


def reachable(path: str) -> bool:
    """Whether any user may go there."""
    while path != "/":
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def landlock(order: dict[str, Any], held: dict[str, str]) -> None:
    try:
        abi = syscall(444, None, 0, 1)
    except OSError:
        return
    everything = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    net, scope = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall(444, struct.pack("QQQ", everything, net, scope)[:size], size, 0)
    read, files_only = 0b1101, 0b111 | (1 << 14 if abi >= 3 else 0) | (1 << 15 if abi >= 5 else 0)
    rules = [(path, read) for path in (*READ_ONLY, *order["prefixes"])]
    rules += [("/dev/null", 0b110), (order["folder"], everything & ~(1 << 6 | 1 << 11))]
    for path, access in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            access &= files_only
        syscall(445, ruleset, 1, struct.pack("=Qi", access & everything, descriptor), 0)
        os.close(descriptor)
    syscall(446, ruleset, 0)
    os.close(ruleset)
    held["files"] = "Landlock"
    if net:
        held.setdefault("network", "Landlock (TCP)")
    if scope:
        held.setdefault("processes", "Landlock (signals)")


# system calls that a benchmark's program has no use for; numbers of x86_64 and aarch64
FORBIDDEN = {
    "x86_64": (0xC000003E, [41, 53, 101, 165, 166, 155, 161, 246, 248, 249, 250, 272, 298, 308, 310, 311, 321, 323, 425,
                            428, 429, 430, 440, 442]),
    "aarch64": (0xC00000B7, [198, 199, 117, 40, 39, 41, 51, 104, 217, 218, 219, 97, 241, 268, 270, 271, 280, 282, 425,
                             428, 429, 430, 440, 442]),
}  # fmt: skip


def forbid_calls(held: dict[str, str]) -> None:
    """seccomp: no sockets of any kind, no ptrace, mounts, namespaces, keys, bpf, io_uring."""
    known = FORBIDDEN.get(platform.machine())
    if known is None:
        return
    arch, numbers = known
    refuse = 0x00050000 | 1  # errno EPERM
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    code += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, refuse)]  # the x32 numbers of x86_64
    for number in numbers:
        code += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    code.append((0x06, 0, 0, 0x7FFF0000))
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    pointer = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    with contextlib.suppress(OSError):
        call("prctl", SECCOMP, 2, pointer, 0, 0)
        held["calls"] = "seccomp"
        if held.get("network") != "namespace":
            held["network"] = "seccomp"


if __name__ == "__main__":
    keep(json.loads(sys.argv[1]), int(sys.argv[2]))
