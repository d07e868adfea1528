#!/usr/bin/python3 -IS
"""
The forced command of zfs_dr's user on another machine
======================================================

This file is two things: functions of the module ``zfs_dr``, and, copied to the machine that is reached over ssh, the
program that sshd starts for the key of a replication. As a program it reads what was asked (``SSH_ORIGINAL_COMMAND``),
compares it word by word with the few commands that a replication consists of, and runs ``zfs`` itself: no shell ever
sees it. So it needs nothing but Python's own library, and takes nothing from the client but words.

Its arguments say what the key may do: ``target:backup/web1`` (receive below it), ``source:tank/web`` (send it and what
is below it).
"""

import fcntl
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.parse

__virtualname__ = "zfs_dr"

PATH = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"
NAME = r"[A-Za-z0-9_.:-]+"
PAIR = r"zfs_dr:[a-z_]+=[^\0\n]{0,8000}"
RECEIVED = rf"(readonly=on|canmount=noauto|mountpoint=none|{PAIR})"
COLUMNS = r"[a-z_:,]+"
TOKEN = r"1-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+"
TAG = rf"zfs_dr:{NAME}"
RECEIVE = ["zfs", "receive", "-s"]
RESUME = ["zfs", "send", "-t"]
# {d} is any dataset of the key's; {b} is one base itself; a word with * may come any number of times, with + at least
# once.
RULES = {
    "target": [
        f"zfs list -Hp -d 2 -t filesystem,volume,snapshot -o {COLUMNS} {{b}}",
        f"zfs list -Hp -d 1 -t filesystem,volume,snapshot -o {COLUMNS},written@{NAME} {{b}}",
        f"zfs list -Hp -t filesystem,snapshot -o {COLUMNS} {{b}} {{b}}@{NAME}",
        f"zfs receive -s -u (-o {RECEIVED})* {{b}}/{NAME}",
        f"zfs receive -A {{b}}/{NAME}",
        f"zfs get -H -o value receive_resume_token {{b}}/{NAME}",
        f"zfs get -Hp -s local,received -o property,value all {{b}}/{NAME}",
        f"zfs set ({RECEIVED})+ {{b}}/{NAME}",
        f"zfs snapshot (-o {PAIR})* {{b}}@{NAME}",
        f"zfs (hold|release) -r {TAG} {{b}}@{NAME}",
        f"zfs hold {TAG} {{b}}@{NAME} ({{b}}/{NAME}@{NAME})+",
        f"zfs rename -u {{b}}/{NAME} {{b}}/{NAME}",
        f"zfs rename {{b}}/{NAME} {{b}}/{NAME}",
        f"zfs clone (-o {RECEIVED})* {{b}}/{NAME}@{NAME} {{b}}/{NAME}",
        f"zfs promote {{b}}/{NAME}",
        f"zfs inherit zfs_dr:promoted {{b}}/{NAME}",
        f"lock {{b}} {NAME}",
    ],
    "source": [
        f"zfs list -Hp -d 1 -t filesystem,volume,snapshot,bookmark -o {COLUMNS} ({{d}})+",
        "zfs list -Hp -d 1 -t snapshot -o name,createtxg {d}",
        "zfs list -Hp -o name,guid ({d})+",
        "zfs get -Hp -s local,received -o name,property,value -t filesystem,volume all ({d})+",
        f"zfs send (-w|-Lec) {{d}}@{NAME}",
        f"zfs send (-w|-Lec) -i {{d}}[@#]{NAME} {{d}}@{NAME}",
        f"zfs send (-t|-nvt) {TOKEN}",
        f"zfs (hold|release) {TAG} ({{d}}@{NAME})+",
        f"zfs holds -H ({{d}}@{NAME})+",
        f"zfs bookmark {{d}}@{NAME} {{d}}#zfs_dr-{NAME}",
        f"zfs destroy {{d}}#zfs_dr-{NAME}",
    ],
}
COMPRESS = {
    "zstd": (["zstd", "-q", "-3", "-c"], ["zstd", "-q", "-d", "-c"]),
    "lz4": (["lz4", "-q", "-1", "-c"], ["lz4", "-q", "-d", "-c"]),
    "gzip": (["gzip", "-1", "-c"], ["gzip", "-d", "-c"]),
}
SILENCE = 20.0  # seconds without a beat after which a holder of the lock is dead
WAIT = 30.0  # seconds that one waits for the lock


def __virtual__():
    return __virtualname__


def permitted(grants, argv):
    """
    Tell whether a key may run a command. Pure.

    grants
        (list of strings) What the key may do: ``target:backup/web1``, ``source:tank/web``.
    argv
        (list of strings) The command.

    Returns True or False.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.permitted '[target:backup/web1]' '[zfs, destroy, -r, backup/web1]'
    """
    if not argv or any("\0" in word or "\n" in word or word == "" for word in argv):
        return False
    # No word of a rule has a line's end in it, so words are told apart by that.
    text = "\n".join(argv)
    return any(re.fullmatch(pattern, text) for pattern in _patterns(grants))


def _patterns(grants):
    for role, rules in RULES.items():
        granted = [re.escape(each.partition(":")[2]) for each in grants if each.startswith(f"{role}:")]
        # A stack may be of several datasets that are granted, and is asked for at once; never two bases.
        for base in granted if role == "target" else ["|".join(granted)] if granted else []:
            within = rf"(?:{base})(?:/{NAME})*"
            for rule in rules:
                # A space in a rule is the end of a word; a group that repeats takes the end of its words with it.
                pattern = re.sub(r" \(([^ ()]*(?: [^ ]*)?)\)([*+])", _repeated, rule.replace(f"({RECEIVED})", RECEIVED))
                yield pattern.replace(" ", "\n").replace("{b}", base).replace("{d}", within)


def _repeated(match):
    return f"(?: (?:{match[1]})){match[2]}"


def _asked(text):
    prefix, commands = {}, []
    for number, line in enumerate(text.split("\n")):
        words = [urllib.parse.unquote(word) for word in line.split(" ")]
        while number == 0 and words and re.fullmatch(r"(through|for)=[A-Za-z0-9_.:-]+", words[0]):
            name, _, value = words.pop(0).partition("=")
            prefix[name] = value
        commands.append(words)
    return prefix, commands


def _main(grants, asked):
    prefix, commands = _asked(asked)
    os.environ.clear()
    os.environ.update(PATH=PATH, LC_ALL="C.UTF-8")
    for argv in commands:
        # What is received is looked at afterwards, so nothing else may go with it.
        alone = argv[:3] != RECEIVE or len(commands) == 1
        if not (permitted(grants, argv) and alone and (argv[:3] != RESUME or _own(grants, argv[3]))):
            shown = " ".join(argv)[:200].encode("ascii", "backslashreplace").decode()
            sys.stderr.write(f"not permitted by the gate: {shown}\n")
            return 126
    if commands[0][0] == "lock":
        return _lock(*commands[0][1:])
    if "for" in prefix:
        os.environ["ZFS_DR_FOR"] = prefix["for"]
    through = prefix.get("through", "none")
    if commands[0][:3] == RECEIVE:
        return _received(COMPRESS.get(through), commands[0])
    if through != "none":
        return _through(COMPRESS[through], commands[0])
    for argv in commands[:-1]:
        code = subprocess.run(argv, check=False).returncode
        if code:
            return code
    return os.execvp(commands[-1][0], commands[-1])


def _own(grants, token):
    # ZFS takes a token's snapshot by its guid from anywhere in the pool, and asks only what the user may do, whose
    # other keys may be granted other datasets.
    done = subprocess.run(["zfs", "send", "-nvt", token], check=False, capture_output=True)
    guid, name = _told((done.stdout + done.stderr).decode(errors="replace"))
    granted = [each.partition(":")[2] for each in grants if each.startswith("source:")]
    within = rf"({'|'.join(map(re.escape, granted))})(/{NAME})*@{NAME}"
    if guid is None:
        return False
    # Its name is the one that it had; only where that is another one by now, all are to be looked at.
    named = [[name]] if re.fullmatch(within, name) else []
    return any(guid in _guids(words) for words in [*named, ["-r", *granted]])


def _told(said):
    # Who made the token may have put lines of his own into a name: what is told twice is not believed.
    guids = re.findall(r"^\s*toguid = (.+)$", said, re.MULTILINE)
    names = re.findall(r"^\s*toname = (.+)$", said, re.MULTILINE)
    if len(guids) != 1 or len(names) != 1 or not re.fullmatch("0x[0-9a-f]+", guids[0]):
        return None, ""
    return str(int(guids[0], 16)), names[0]


def _guids(words):
    argv = ["zfs", "list", "-Hp", "-t", "snapshot", "-o", "guid", *words]
    return subprocess.run(argv, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode().split()


def _received(programs, argv):
    # A stream may carry properties, and datasets below the one that is named: a mountpoint of the sender's choice would
    # be mounted at this machine's next start.
    code = _through(programs, argv) if programs else subprocess.run(argv, check=False).returncode
    listing = ["zfs", "list", "-H", "-r", "-t", "filesystem", "-o", "name,canmount,mountpoint", argv[-1]]
    done = subprocess.run(listing, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in done.stdout.decode().splitlines():
        name, canmount, mountpoint = line.split("\t")
        if name != argv[-1]:
            sys.stderr.write(f"{name}: not permitted by the gate: a stream of more than one dataset\n")
            code = 126
        if canmount == "on" or (name != argv[-1] and mountpoint.startswith("/")):
            done = subprocess.run(["zfs", "set", "canmount=noauto", "mountpoint=none", name], check=False)
            code = done.returncode or code
    return code


def _through(programs, argv):
    if argv[1] == "send":
        first, last = argv, programs[0]
    else:
        first, last = programs[1], argv
    head = subprocess.Popen(first, stdout=subprocess.PIPE)
    tail = subprocess.Popen(last, stdin=head.stdout)
    head.stdout.close()
    codes = [tail.wait(), head.wait()]
    return next((code if code > 0 else 1 for code in codes if code), 0)


def _lock(base, stack):
    home = os.path.join(os.path.expanduser(f"~{_user()}"), ".zfs_dr")
    os.makedirs(home, mode=0o700, exist_ok=True)
    key = f"{base.replace('/', ':')}-{stack}"
    end = time.monotonic() + WAIT
    with open(os.path.join(home, f"{key}.lock"), "a", encoding="ascii") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    sys.stderr.write(f"another replication of {stack} to {base} is at work; let it end\n")
                    return 1
                time.sleep(0.1)
        # A sender that lost its power leaves a receive that waits for ever, and keeps its dataset busy.
        _end_leftovers(stack, base)
        os.utime(file.fileno())
        sys.stdout.write("locked\n")
        sys.stdout.flush()
        while select.select([0], [], [], SILENCE)[0]:
            if not os.read(0, 4096):
                break
    return 0


def _user():
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _end_leftovers(stack, base):
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{number}").st_uid != os.getuid():
                continue
            with open(f"/proc/{number}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            with open(f"/proc/{number}/cmdline", "rb") as file:
                words = file.read().decode(errors="replace").split("\0")
            ours = any(word.startswith(f"{base}/") for word in words) and "receive" in words
            if ours and f"ZFS_DR_FOR={stack}".encode() in environment:
                os.kill(int(number), signal.SIGTERM)
        except OSError:
            continue


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:], os.environ.get("SSH_ORIGINAL_COMMAND", "")))
