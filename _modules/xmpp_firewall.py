"""
What the firewall must never close
==================================
"""

import re

__virtualname__ = "xmpp"


def __virtual__():
    return __virtualname__


def ssh_ports():
    """
    List the TCP ports by which this machine is administered.

    Every port that an sshd or dropbear, or systemd for it, listens on, every port that sshd's configuration names,
    and 22.

    Returns a rising list of port numbers.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.ssh_ports
    """
    ports = {22}
    # What is configured counts too: it holds after the next restart of sshd.
    if __salt__["cmd.which"]("sshd"):
        shown = _run("sshd", "-T")
        ports.update(int(port) for port in re.findall(r"^port (\d+)$", shown, re.MULTILINE))
        ports.update(int(port) for port in re.findall(r"^listenaddress \S+:(\d+)\b", shown, re.MULTILINE))
    # systemd holds the port where ssh is started by its socket.
    if __salt__["cmd.which"]("systemctl"):
        shown = _run("systemctl", "show", "--property=Listen", "ssh.socket", "sshd.socket")
        ports.update(int(port) for port in re.findall(r"^Listen=(?:\S+:)?(\d+) \(Stream\)", shown, re.MULTILINE))
    if __salt__["cmd.which"]("ss"):
        for line in _run("ss", "--no-header", "--listening", "--tcp", "--numeric", "--processes").splitlines():
            if re.search(r'"(sshd|dropbear)"', line):
                ports.update(int(port) for port in re.findall(r":(\d+)\s", line)[:1])
    return sorted(ports)


def _run(*command):
    return __salt__["cmd.run_stdout"](list(command), python_shell=False, ignore_retcode=True, output_loglevel="quiet")
