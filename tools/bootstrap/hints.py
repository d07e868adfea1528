"""What a person can do about a failure whose text comes from a program that does not say it."""

import re

HINTS = [
    (r"No space left on device|not enough free space|don't have enough free space", "free some disk space: df -h"),
    (r"Address (already )?in use|eaddrinuse|port \d+ is (in use|taken)",
     "see which program holds the port (`ss -lntup`), and stop it or move it"),
    (r"Could not get lock|is held by process|another process using it|database is locked",
     "wait until the other apt or dpkg has ended"),
    (r"Temporary failure (resolving|in name resolution)|Name or service not known|Network is unreachable"
     r"|Could not connect|Connection timed out|Failed to fetch|NewConnectionError",
     "see whether this machine has a network and a working resolver (/etc/resolv.conf)"),
    (r"Unable to locate package|has no installation candidate|Unable to find a match|No matching distribution found",
     "see whether the mirror in /etc/apt/sources.list, or the one of pip, is complete and reachable"),
    (r"dpkg was interrupted|unmet dependencies", "mend the package system: dpkg --configure -a; apt-get -f install"),
    (r"Permission denied", "see who owns that file, and whether its file system is mounted read-only"),
]


def do_about(text):
    """Return what to do about a failure with this text, or None where its text has to speak for itself."""
    return next((do for pattern, do in HINTS if re.search(pattern, text)), None)
