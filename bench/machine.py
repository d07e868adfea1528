"""Where a benchmark of OpenZFS runs: in a virtual machine of the tests' machine room, made for it."""

import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
# As tests/run does: when this process dies, the machine goes with it.
ROOM = "unshare --mount --pid --fork --kill-child --mount-proc --propagation private -- /usr/bin/python3".split()


def run(release, disks, words):
    """Run this program in a machine with ``disks`` empty disks, as root and in Salt's Python; return its exit code.

    words
        Its arguments there, after ``--here`` and the disks.
    """
    if os.environ.get("BENCH") != "inside":
        os.execvpe(ROOM[0], [*ROOM, *sys.argv], {**os.environ, "BENCH": "inside", "PYTHONDONTWRITEBYTECODE": "1"})
    sys.path.insert(0, str(ROOT))
    from tests.vm.library import Room

    with Room(release) as room:
        machine = room.machine(disks=disks, size="16G")
        # Two processors, as the least that one would replicate from; those of the tests are restored, and have one.
        machine.run("sync")
        machine.kill()
        machine.boot(processors="2")
        for file in pathlib.Path(__file__).parent.glob("*.py"):
            machine.put(f"/root/bench/{file.name}", file.read_text())
        # As OpenZFS has it by itself; for tests the machine room allows it less.
        machine.sh("echo $(($(free -b | awk '/^Mem/ {print $2}') / 2)) > /sys/module/zfs/parameters/zfs_arc_max")
        script = 'exec /opt/salt-xmpp/bin/python3 -u /root/bench/$1 "${@:2}" >/root/said 2>&1'
        machine.put("/root/said", "")
        argv = [pathlib.Path(sys.argv[0]).name, "--here", *machine.devices, *words]
        running, shown = machine.begin(machine.sh, script, *argv, timeout=3000, check=False), 0
        while True:
            ended = running.done()
            said = machine.read("/root/said")
            print(said[shown:], end="", flush=True)
            shown = len(said)
            if ended:
                return running.result().returncode
            time.sleep(5)


def salt_modules():
    """Return Salt's functions."""
    import salt.config
    import salt.loader

    options = salt.config.minion_config("/etc/salt/minion")
    options["file_client"] = "local"
    options["grains"] = salt.loader.grains(options)
    return salt.loader.minion_mods(options)
