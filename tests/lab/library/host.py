"""One Debian host: systemd-nspawn on an overlay, with its own network namespace and cgroup."""

import contextlib
import hashlib
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import time

from . import roots

ENVIRONMENT = {
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
RESTART = 133  # how systemd-nspawn ends when the host rebooted itself
# As Debian does it when it halts: all processes but PID 1 and its companion get a signal and some time.
STOP_ALL = """
others() { for process in /proc/[0-9]*; do echo "${process#/proc/}"; done | grep -vwE "1|2|$$|$BASHPID"; }
kill -TERM $(others)
for i in {1..100}; do ps -p "$(others | paste -sd,)" >/dev/null || break; sleep .1; done
"""
AS_USER = 'exec setpriv --reuid="$0" --regid="$(id -g "$0")" --init-groups "$@"'
LOGS = ("var/log", "etc/ejabberd", "etc/nginx", "etc/salt")
# The kernel removes a namespace's links some time after the namespace: a name is not used twice.
numbers = itertools.count()


class CommandError(Exception):
    """A command on a host ended with another code than 0."""


class Host:
    """Made by ``Lab.host``; see there for the parameters.

    name, short_name, addresses, names
        As given; ``address`` is the first address.
    """

    def __init__(self, lab, name, addresses, names, layers, init):
        self.lab, self.name, self.addresses, self.names, self.init = lab, name, addresses, names, init
        self.short_name = name.split(".")[0]
        self.address = addresses[0]
        self.lower = roots.get(layers) if isinstance(layers, str) else list(layers)
        self.folder = lab.folder / name
        self.root = self.folder / "root"
        self._cgroup = lab.cgroup / name
        self._process = self._leader = None
        number = next(numbers)
        self._namespace, self._link = f"h{number}", f"v{number}"
        self._mount()
        self._connect()
        self.path("/etc/hostname").write_text(f"{self.short_name}\n")

    def __repr__(self):
        return f"<host {self.name} {' '.join(self.addresses)}>"

    # Power

    def start(self, wait=True):
        """Switch it on; wait until it is up unless told otherwise."""
        if self._process:
            raise RuntimeError(f"{self.name} is on already")
        self._cgroup.mkdir(exist_ok=True)
        self.uncut()
        command = [
            "systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={self.root}",
            f"--machine={self.short_name}", f"--hostname={self.short_name}",
            f"--network-namespace-path=/run/netns/{self._namespace}", "--capability=CAP_NET_ADMIN",
            "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe",
            *(f"--bind-ro={here}:{there}" for there, here in self.lab.mounts.items()),
            *(["--boot"] if self.init else ["--as-pid2", "sleep", "infinity"]),
        ]  # fmt: skip
        # A host that reboots itself makes systemd-nspawn end: start it again.
        again = f'while :; do "$@"; code=$?; [ $code = {RESTART} ] || exit $code; done'
        environment = {
            **os.environ,
            "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
            "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
        }
        with open(self.folder / "console.log", "ab") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", again, "host", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=lambda: enter_cgroup(self._cgroup),
                start_new_session=True,
            )
        if wait:
            self.wait_up()

    def wait_up(self, timeout=120):
        """Wait until it takes commands and, with systemd, until the boot is through; return systemd's word for it."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                code, self._process = self._process.returncode, None
                raise RuntimeError(f"{self.name}: ended with {code} instead of booting:\n{self.console()[-2000:]}")
            self._leader = self._find_leader()
            # Its companion runs: the root and the cgroups are made.
            if self._leader and not self.init and children(self._leader):
                return "running"
            if self._leader and os.path.exists(f"/proc/{self._leader}/root/run/systemd/private"):
                state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
                if state in ("running", "degraded"):
                    return state
            time.sleep(0.05)
        raise TimeoutError(f"{self.name} was not up after {timeout} s:\n{self.console()[-2000:]}")

    def wait_down(self, timeout=120):
        """Wait until the PID 1 that was seen last is gone, as after a reboot from inside."""
        end = time.monotonic() + timeout
        while os.path.exists(f"/proc/{self._leader}"):
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} was still up after {timeout} s")
            time.sleep(0.02)

    def stop(self, timeout=90):
        """Shut it down in good order."""
        if not self.init:
            self.sh(STOP_ALL, check=False)
            self.kill()
            return
        os.kill(self._leader, signal.SIGRTMIN + 4)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.name} did not shut down in {timeout} s") from None
        self.cut()
        self._process = self._leader = None

    def kill(self):
        """Cut its power: off the network at once, then every process killed. What it wrote stays written."""
        # First the link: a dead host's network would still answer.
        self.cut()
        self._leader = self._find_leader() or self._leader
        if self._leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader, signal.SIGKILL)
        else:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
        self._process = self._leader = None

    def restart(self):
        """Shut it down in good order and start it again."""
        self.stop()
        self.start()

    def destroy(self):
        """Take it off the lab and forget its disk."""
        if self._process:
            self.kill()
        subprocess.run(["umount", str(self.root)], check=True)
        subprocess.run(["ip", "netns", "del", self._namespace], check=True)
        shutil.rmtree(self.folder)
        del self.lab.hosts[self.name]

    def freeze(self, folder=None):
        """Shut it down, take it off the lab, and return layers with its disk on top, from which hosts can be made."""
        if self._process:
            self.stop()
        subprocess.run(["umount", str(self.root)], check=True)
        subprocess.run(["ip", "netns", "del", self._namespace], check=True)
        upper = self.folder / "upper"
        for name in ("etc/hostname", "etc/hosts"):
            (upper / name).unlink(missing_ok=True)
        if folder is None:
            folder = self.lab.folder.parent / f"frozen-{self.lab.folder.name}-{self.name}-{time.monotonic_ns()}"
        upper.rename(folder)
        shutil.rmtree(self.folder)
        del self.lab.hosts[self.name]
        return [str(folder), *self.lower]

    # Network

    def cut(self):
        """Pull its network cable."""
        subprocess.run(["ip", "link", "set", self._link, "down"], check=True)

    def uncut(self):
        """Plug its network cable in again."""
        subprocess.run(["ip", "link", "set", self._link, "up"], check=True)

    def block(self, other):
        """Drop silently all that it and ``other`` send to each other; both still reach everyone else."""
        rules = "add table netdev lab; "
        for here, there in ((self, other), (other, self)):
            chain = f"{here._link}-{there._link}"
            rules += f"add chain netdev lab {chain} {{ type filter hook ingress device {here._link} priority 0; }}; "
            for address in there.addresses:
                rules += f"add rule netdev lab {chain} {'ip6' if ':' in address else 'ip'} daddr {address} drop; "
        subprocess.run(["nft", rules], check=True)

    def unblock(self, other):
        """Undo ``block``."""
        for here, there in ((self, other), (other, self)):
            subprocess.run(["nft", f"delete chain netdev lab {here._link}-{there._link}"], check=True)

    # Work

    def popen(self, *argv, env=None, user=None, **options):
        """Start ``argv`` on it and return the ``subprocess.Popen``."""
        as_user = ["sh", "-c", AS_USER, user] if user else []
        variables = [f"{name}={value}" for name, value in {**ENVIRONMENT, **(env or {})}.items()]
        enter = [
            "nsenter",
            f"--target={self._leader}",
            *"--mount --uts --ipc --net --pid --cgroup --root --wdns=/ --".split(),
        ]
        cgroup = self._cgroup / "payload/lab.command"
        return subprocess.Popen(
            [*enter, *as_user, "env", "-i", *variables, *argv], preexec_fn=lambda: enter_cgroup(cgroup), **options
        )

    def run(self, *argv, input=None, env=None, user=None, timeout=300, check=True):
        """Run ``argv`` on it and return the ``subprocess.CompletedProcess`` with its output as text.

        input
            Text for its standard input.
        env
            Variables besides PATH and the like.
        user
            Name of the user who shall run it (default: root).
        timeout
            Seconds after which it is killed and ``subprocess.TimeoutExpired`` raised.
        check
            Whether a code other than 0 raises ``CommandError``.
        """
        pipe = subprocess.PIPE
        process = self.popen(
            *argv, env=env, user=user, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        try:
            output, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        if check and process.returncode:
            what = " ".join(argv)[:2000]
            raise CommandError(
                f"{self.name}: {what}\nended with {process.returncode}\n{output[-8000:]}\n{errors[-8000:]}"
            )
        return subprocess.CompletedProcess(argv, process.returncode, output, errors)

    def sh(self, script, **options):
        """Run ``script`` by bash, which stops at the first error; the options are those of ``run``."""
        return self.run("bash", "-euo", "pipefail", "-c", script, **options)

    def read(self, path):
        """Return the text of one of its files."""
        return self.run("cat", path).stdout

    def put(self, path, content, mode="0644", owner="root:root"):
        """Write ``content`` (text) to one of its files, making the folders above it."""
        user, group = owner.split(":")
        self.run(
            "install", "-D", f"--mode={mode}", f"--owner={user}", f"--group={group}", "/dev/stdin", path, input=content
        )

    def path(self, path):
        """Return where one of its files is for this process; also while it is off. Mind absolute symbolic links."""
        return self.root / path.lstrip("/")

    # Looking on

    def console(self):
        """Return what its console showed."""
        return (self.folder / "console.log").read_text(errors="replace")

    def save_logs(self, folder):
        """Copy its logs and the configuration of its services to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._leader:
            for name, argv in (
                ("journal", ["journalctl", "--no-pager"]),
                ("processes", ["ps", "-eo", "pid,ppid,user,stat,lstart,args"]),
            ):
                with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                    (folder / f"{name}.txt").write_text(self.run(*argv, check=False, timeout=30).stdout)
        for name in LOGS:
            # Files come and go while they are copied.
            with contextlib.suppress(shutil.Error, FileNotFoundError):
                shutil.copytree(
                    self.root / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("journal")
                )
        shutil.copy(self.folder / "console.log", folder)

    # How it is made

    def _mount(self):
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True)
        layers = f"lowerdir={':'.join(self.lower)},upperdir={self.folder}/upper,workdir={self.folder}/work,volatile"
        subprocess.run(["mount", "-t", "overlay", f"lab-{self.name}", "-o", layers, str(self.root)], check=True)

    def _connect(self):
        # As a machine keeps its card: who knows the address from a host that was there before reaches this one at once.
        mac = "02:" + hashlib.sha256(self.address.encode()).digest()[:5].hex(":")
        commands = [
            f"netns add {self._namespace}",
            f"link add {self._link} type veth peer name eth0 address {mac} netns {self._namespace}",
        ]
        commands += [f"link set {self._link} master lab"]
        inside = ["link set lo up"]
        inside += [f"addr add {a}/{64 if ':' in a else 24} dev eth0" + " nodad" * (":" in a) for a in self.addresses]
        inside += ["link set eth0 up", "route add default via 192.0.2.1", "-6 route add default via 2001:db8::1"]
        commands += [f"-n {self._namespace} {command}" for command in inside]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)

    def _find_leader(self):
        """Return its PID 1 as this process's namespace numbers it, or None while there is none."""
        with contextlib.suppress(IndexError, FileNotFoundError, ProcessLookupError):
            nspawn = children(self._process.pid)[-1]
            leader = children(nspawn)[-1]
            numbers = next(
                line
                for line in pathlib.Path(f"/proc/{leader}/status").read_text().splitlines()
                if line.startswith("NSpid")
            )
            return leader if numbers.split()[-1] == "1" else None
        return None


def children(pid):
    """Return the processes that ``pid`` started."""
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def enter_cgroup(path):
    """Move this process into the cgroup ``path``."""
    path.mkdir(exist_ok=True)
    (path / "cgroup.procs").write_text(str(os.getpid()))
