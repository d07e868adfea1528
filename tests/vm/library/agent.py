"""Runs in a machine as root and in Salt's Python, and does what the tests ask.

A request is a line of JSON, ``{"id": ..., "do": ..., ...}``; its answer is another, ``{"id": ..., "result": ...}`` or
``{"id": ..., "raised": ...}``. Each request that may take time is done by a process of its own, forked from this one;
it begins with Salt's loader as it was when the template was saved, disturbs no other, and many run at once.
"""

import base64
import contextlib
import fcntl
import json
import os
import pathlib
import pwd
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback

RNDRESEEDCRNG = 0x5207
EXTENSIONS = pathlib.Path("/var/cache/salt/minion/extmods")
LOCK = "/run/room.lock"
state = None


# At once, in the process that stays


def hello():
    """Say that it is there."""


def identity(name, seconds, seed, addresses, hardware, hosts, hostid, machine_id):
    """Become this machine: the template is the same for all."""
    global state
    time.clock_settime(time.CLOCK_REALTIME, seconds)
    with open("/dev/urandom", "wb") as file:
        file.write(bytes.fromhex(seed))
        file.flush()
        fcntl.ioctl(file, RNDRESEEDCRNG)
    socket.sethostname(name)
    pathlib.Path("/etc/hostname").write_text(f"{name}\n")
    pathlib.Path("/etc/hosts").write_text(hosts)
    with open("/etc/hostid", "wb") as file:
        file.write(struct.pack("<I", hostid))
        file.flush()
        # Also the boot after a power cut shall know it, or it would not import its own pools.
        os.fsync(file.fileno())
    subprocess.Popen(["modprobe", "zfs"])
    pathlib.Path("/etc/machine-id").write_text(f"{machine_id}\n")
    link = next(link for link in os.listdir("/sys/class/net") if link != "lo")
    commands = [f"link set {link} down", f"link set {link} address {hardware} mtu 9000", f"addr flush dev {link}"]
    commands += [f"addr add {address} dev {link}" for address in addresses]
    text = "\n".join([*commands, f"link set {link} up", ""])
    subprocess.run(["ip", "-force", "-batch", "-"], input=text, text=True, check=True)
    for loader in loaders():
        loader.pack["__grains__"].update(dict.fromkeys(("id", "host", "localhost", "nodename", "fqdn"), name))
        loader.pack["__opts__"]["id"] = name


def load(everything=False):
    """Load Salt, or Salt with everything in it, so that a call finds it ready."""
    global state
    if state:
        return
    import salt.config
    import salt.loader
    import salt.state

    options = salt.config.minion_config("/etc/salt/minion")
    options["grains"] = salt.loader.grains(options)
    state = salt.state.State(options, loader="states")
    if everything:
        for loader in loaders():
            loader._load_all()


def loaders():
    """Return what loads modules for calls, modules for modules (``__salt__``), and states, if Salt is loaded."""
    return (state.functions, state.functions._dunder_salt, state.states) if state else ()


def checkout(files):
    """Put the checkout's modules where ``saltutil.sync_all`` puts them, and let Salt know."""
    shutil.rmtree(EXTENSIONS, ignore_errors=True)
    for kind, contents in files.items():
        place = EXTENSIONS / kind
        place.mkdir(parents=True)
        for name, content in contents.items():
            (place / name).write_text(content)
        ours = {name.removesuffix(".py"): (str(place / name), ".py", 0) for name in contents}
        for loader in loaders():
            if loader.tag in (kind, kind.removesuffix("s")):
                loader.missing_modules = {}
                loader.file_mapping = {**ours, **loader.file_mapping}
                loader.loaded = False


# In a process of its own


def appear(devices):
    """Wait until OpenZFS is loaded and the disks are there."""
    loaded = pathlib.Path("/sys/module/zfs/initstate")
    while not (loaded.exists() and loaded.read_text() == "live\n" and all(map(os.path.exists, devices))):
        time.sleep(0.01)


def run(argv, input, env, user, timeout):
    """Run ``argv`` and return its code, output and errors."""
    options = {}
    if user:
        known = pwd.getpwnam(user)
        options = {"user": user, "group": known.pw_gid, "extra_groups": os.getgrouplist(user, known.pw_gid)}
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env}, cwd="/",
        start_new_session=True, **options,
    )  # fmt: skip
    try:
        output, errors = process.communicate(base64.b64decode(input), timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f"{argv[0]} was killed after {timeout} s") from None
    return process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")


def put(path, content, mode, owner):
    """Write a file as a whole."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(mode)
    shutil.chown(path, *owner.split(":"))
    path.write_bytes(base64.b64decode(content))


def get(path):
    """Return the content of a file."""
    return base64.b64encode(pathlib.Path(path).read_bytes()).decode()


def call(function, arguments, options, test, pillar, config):
    """Call a function of Salt."""
    prepare(test, pillar, config)
    return state.functions[function](*arguments, **options)


def apply(data, test, pillar, config):
    """Let Salt apply states, given as the data of an SLS file is."""
    prepare(test, pillar, config)
    # As state.high does, with the loader that is ready.
    result = state.call_high(data)
    if not isinstance(result, dict):
        raise RuntimeError("\n".join(result))
    return result


def prepare(test, pillar, config):
    load()
    for loader in loaders():
        own = loader.pack["__opts__"]
        own.update({**config, "test": test})
        own["pillar"] = pillar
        loader.pack["__pillar__"] = pillar
    state.opts.update({**config, "test": test, "pillar": pillar})


# The line to the tests


def answer(port, **message):
    """Send one answer; those of several processes do not mix."""
    data = json.dumps(message).encode() + b"\n"
    with open(LOCK, "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        while data:
            data = data[os.write(port, data) :]


def attempt(port, number, function, arguments):
    """Do one request and answer it."""
    try:
        answer(port, id=number, result=function(**arguments))
    except BaseException as error:
        kind = type(error)
        answer(port, id=number, raised=[kind.__name__, str(error), traceback.format_exc()])


def serve(port):
    """Do requests for ever."""
    buffer, children = b"", {}
    at_once = {function.__name__: function for function in (hello, identity, load, checkout)}
    forked = {function.__name__: function for function in (appear, run, put, get, call, apply)}
    answer(port, ready=True)
    while True:
        ready, _, _ = select.select([port, *children], [], [])
        for child in set(ready) - {port}:
            pid, number = children.pop(child)
            os.close(child)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code:
                answer(port, id=number, raised=["ChildProcessError", f"its process ended with {code}", ""])
        if port not in ready:
            continue
        data = os.read(port, 1 << 16)
        if not data:
            # Nobody is at the other end: the machine is being saved, or restored.
            buffer = b""
            time.sleep(0.02)
            continue
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            number, what = request.pop("id"), request.pop("do")
            if what in at_once:
                attempt(port, number, at_once[what], request)
                continue
            if what in ("call", "apply"):
                # Loaded here, it is there for the calls to come, too. What is wrong with it, the call itself will say.
                with contextlib.suppress(Exception):
                    load()
                    state.functions.get(request["function"])
            pid = os.fork()
            if pid == 0:
                attempt(port, number, forked[what], request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            children[os.pidfd_open(pid)] = pid, number


if __name__ == "agent":
    serve(port)  # noqa: F821 (start.py gives it)
