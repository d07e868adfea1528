"""
How fast ``ejabberd.users_present`` makes accounts: against a loop of ``ejabberdctl register``, and against the bare
work that no way around it can save (hash, and copy into the table). All in one run, in turn, on the same host.

Run it on a host that may be thrown away:

    tests/run host trixie+salt+apps+functional -- /opt/salt-xmpp/bin/python3 /srv/xmpp-formula/bench/users_present.py
"""

import argparse
import base64
import concurrent.futures
import hashlib
import hmac
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tests.functional.ejabberd.conftest import ctl, minion, sql, start_server


def timed(function, *arguments):
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def loop(count, turn):
    for number in range(count):
        ctl("register", f"loop{turn}x{number}", "example.org", f"password {number}")


def row(account):
    name, password = account
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 4096)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    values = [base64.b64encode(value).decode() for value in (stored, server, salt)]
    return "\t".join([name, "example.net", "sha256:" + values[0], *values[1:], "4096"])


def hash_and_copy(count, turn):
    accounts = [(f"bare{turn}x{number}", f"password {number}") for number in range(count)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = "\n".join(pool.map(row, accounts))
    columns = "username, server_host, password, serverkey, salt, iterationcount"
    script = f"COPY users ({columns}) FROM STDIN;\n{rows}\n\\.\n"
    command = ["psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-d", "ejabberd"]
    subprocess.run(command, input=script, text=True, user="ejabberd", extra_groups=[], cwd="/", env={}, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accounts", type=int, default=10000, help="how many at once (default: 10000)")
    parser.add_argument("--sample", type=int, default=20, help="how many by the loop, in each turn (default: 20)")
    parser.add_argument("--turns", type=int, default=3, help="how often each is done; the median counts (default: 3)")
    arguments = parser.parse_args()

    loaders = minion(pathlib.Path(tempfile.mkdtemp()))
    start_server(loaders)
    seconds = {"ejabberdctl register": [], "hash and COPY": [], "users_present": [], "users_present again": []}
    for turn in range(arguments.turns):
        users = [
            {"jid": f"user{turn}x{number}@example.org", "password": f"password {number}"}
            for number in range(arguments.accounts)
        ]

        def present(users=users, turn=turn):
            ret = loaders.states.ejabberd.users_present(f"turn {turn}", users=users)
            assert ret.result is True, ret.comment
            return len(ret.changes.get("made", []))

        seconds["ejabberdctl register"].append(timed(loop, arguments.sample, turn)[0] / arguments.sample)
        seconds["hash and COPY"].append(timed(hash_and_copy, arguments.accounts, turn)[0])
        took, made = timed(present)
        assert made == arguments.accounts
        seconds["users_present"].append(took)
        took, made = timed(present)
        assert made == 0
        seconds["users_present again"].append(took)
        there = sql(f"SELECT count(*) FROM users WHERE username LIKE 'user{turn}x%'")
        assert there == [(str(arguments.accounts),)], there
        for user in random.sample(users, 20):
            name, host = user["jid"].split("@")
            assert loaders.modules.ejabberd.check_password(name, host, password=user["password"]), user["jid"]

    each = {
        "ejabberdctl register": seconds["ejabberdctl register"],
        "hash and COPY": [value / arguments.accounts for value in seconds["hash and COPY"]],
        "users_present": [value / arguments.accounts for value in seconds["users_present"]],
    }

    def against(name, other):
        """How many times as fast, turn by turn: what slows the machine down slows both."""
        return statistics.median(theirs / ours for ours, theirs in zip(each[name], each[other], strict=True))

    print(f"{arguments.accounts} accounts, {os.cpu_count()} cores, median (and range) of {arguments.turns} turns")
    print(f"{'':22}{'accounts/s':>12}{'':22}{'against the loop':>18}{'against the bare work':>24}")
    for name, values in each.items():
        spread = f"({1 / max(values):.1f} to {1 / min(values):.1f})"
        loop_times, bare_times = against(name, "ejabberdctl register"), against(name, "hash and COPY")
        print(f"{name:22}{1 / statistics.median(values):12.1f}{spread:>22}{loop_times:18.1f}{bare_times:24.2f}")
    again = max(seconds["users_present again"])
    print(f"users_present again, nothing to do: at most {again:.2f} s")
    goals = {
        "500 times the loop": against("users_present", "ejabberdctl register") >= 500,
        "0.8 of hash and COPY": against("users_present", "hash and COPY") >= 0.8,
        "again in under 1 s": again < 1,
    }
    for goal, reached in goals.items():
        print(f"{'reached' if reached else 'MISSED '}  {goal}")
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
