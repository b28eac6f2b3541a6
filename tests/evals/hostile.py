"""Thirty programs that a model might write on a bad day.

name → (program, what it prints when the sandbox held: "HELD" where the program itself finds out, or "" where the
clock, the memory or the kernel ends it).  `{outside}` is a folder of the test, `{victim}` a process of it.
"""

# ruff: noqa: E501
# prints HELD when everything in the body was refused
TRY = """
def attempts():
{body}
refused = 0
for attempt in attempts():
    try:
        attempt()
    except BaseException as error:
        refused += 1
    else:
        print("ESCAPED", attempt)
print("HELD" if refused else "NOTHING TRIED")
"""


def tries(*lines: str, imports: str = "") -> str:
    body = "\n".join(f"    yield lambda: {line}" for line in lines)
    return f"import os, signal, socket, ctypes, subprocess, sys\n{imports}\n" + TRY.replace("{body}", body)


PROGRAMS = {
    "fork bomb": ("import os\nwhile True:\n    os.fork()", ""),
    "fork bomb that minds no error": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", ""),
    "threads without end": (
        "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(60,)).start()", ""),
    "endless output": ("while True:\n    print('x' * 100000)", ""),
    "endless output to stderr": ("import sys\nwhile True:\n    sys.stderr.write('x' * 100000)", ""),
    "memory": ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))", ""),
    "memory in children": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(b'1' * (700 << 20))\n"
        "        time.sleep(60)\ntime.sleep(60)", ""),
    "a huge number": ("print(9 ** (9 ** (9 ** 9)))", ""),
    "endless loop": ("while True:\n    pass", ""),
    "sleeping": ("import time\ntime.sleep(3600)", ""),
    "ignores signals": (
        "import signal, time\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    time.sleep(1)", ""),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1)\nf(0)", ""),
    "crashes the interpreter": ("import ctypes\nctypes.string_at(0)", ""),
    "kills its parent": (
        "import os, signal\ntry:\n    os.kill(os.getppid(), signal.SIGKILL)\nexcept OSError:\n    pass\n"
        "import time\ntime.sleep(0.2)\nprint('HELD')", "HELD"),
    "kills everybody": (
        "import os, signal\nfor pid in list(range(2, 5000)) + [{victim}]:\n    if pid != os.getpid():\n        try:\n"
        "            os.kill(pid, 9)\n        except OSError:\n            pass\nprint('HELD')", "HELD"),
    "kills all at once": ("import os\nos.kill(-1, 9)\nos.killpg(0, 9)", ""),
    "a daemon that stays": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 3)\n"
        "        while True:\n            time.sleep(0.05)\n    os._exit(0)\nprint('HELD')", "HELD"),
    "a daemon that holds the pipe": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(3600)\n"
        "    os._exit(0)\nprint('HELD')", "HELD"),
    "reads the environment": (
        "import os\nprint('HELD' if 'SECRET' not in str(dict(os.environ)) else 'ESCAPED')", "HELD"),
    "reads others' environments": (tries(*[f"open('/proc/{pid}/environ', 'rb').read()" for pid in ("{victim}", "1", "self")]),
                                   "HELD"),
    "reads a secret file": (tries("open('{outside}/secret').read()", "open('/etc/shadow').read()", "os.listdir('/root')",
                                  "os.listdir('/home')"), "HELD"),
    "writes to /tmp": (tries("open('/tmp/tiercel-was-here', 'w')", "os.mkdir('/tmp/tiercel-was-here')",
                             "open('/var/tmp/tiercel-was-here', 'w')", "open('/dev/shm/tiercel-was-here', 'w')"), "HELD"),
    "writes to home and beside its folder": (
        tries("open('{outside}/new', 'w')", "open('{outside}/secret', 'a')", "os.remove('{outside}/secret')",
              "open('../x', 'w')", "open('/root/x', 'w')", "os.truncate('{outside}/secret', 0)"), "HELD"),
    "a symlink out": (
        "import os\nos.symlink('{outside}/secret', 'link')\ntry:\n    open('link', 'w')\nexcept OSError:\n"
        "    print('HELD')", "HELD"),
    "a hard link and a rename out": (tries("os.link('{outside}/secret', 'mine')", "os.rename('program.py', '{outside}/x')",
                                           "os.rename('{outside}/secret', 'mine')"), "HELD"),
    "the network": (tries("socket.create_connection(('127.0.0.1', {port}), 2)", "socket.socket(socket.AF_UNIX)",
                          "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "socket.socket(socket.AF_NETLINK)"), "HELD"),
    "fills the disk": (
        "n = 0\ntry:\n    while True:\n        with open(f'f{n}', 'wb') as f:\n            f.write(b'x' * (8 << 20))\n"
        "        n += 1\nexcept OSError:\n    print('HELD' if n < 20 else 'ESCAPED')", "HELD"),
    "files without end": (
        "n = 0\ntry:\n    while True:\n        open(f'f{n}', 'w').close()\n        n += 1\nexcept OSError:\n"
        "    print('HELD' if n < 5000 else 'ESCAPED')", "HELD"),
    "runs other programs": (tries("subprocess.run(['/bin/sh', '-c', 'echo x > {outside}/new'], check=True)",
                                  "subprocess.run(['/usr/bin/nothing'], check=True)"), "HELD"),
    "asks for rights": (tries("os.setuid(0) if os.getuid() else os.mount('x')", "os.chroot('/')",
                              "open('/proc/sys/kernel/hostname', 'w').write('x')", "os.chown('{outside}/secret', 1, 1)",
                              "os.mknod('dev', 0o60600, 0)"), "HELD"),
    "system calls by number": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "found = [libc.mount(b'none', b'/', b'tmpfs', 0, None), libc.unshare(0x10000000), libc.ptrace(16, 1, 0, 0),\n"
        "         libc.prctl(23, 21, 0, 0, 0)]\nprint('HELD' if found[:3] == [-1, -1, -1] and found[3] != 1 else found)",
        "HELD"),
    "raises its limits": (
        "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nexcept (ValueError, OSError):\n"
        "    print('HELD')", "HELD"),
    "closes its pipes and goes on": ("import os\nos.closerange(0, 100)\nwhile True:\n    pass", ""),
    "pretends to have passed": ("import os\nos._exit(0)", ""),
}  # fmt: skip
QUICK = ("fork bomb", "kills its parent", "a daemon that stays", "reads others' environments", "reads a secret file",
         "writes to /tmp", "writes to home and beside its folder", "a symlink out", "the network", "asks for rights",
         "system calls by number")  # fmt: skip
