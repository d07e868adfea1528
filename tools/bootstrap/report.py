"""The last words: what is there now, or what failed and what to do."""

import re
import subprocess

import hints
import ports

LINES = 24  # the whole of the last words
WIDTH = 150


def failed_states(states):
    """The states that failed by themselves, not for want of another, nor of packages in test mode."""
    return [s for s in states if s["result"] is False and s.get("__state_ran__", True) and not s["unknown"]]


def failure(states, plan, again):
    """Lines about every state that failed: the state, its reason, what to do."""
    failed = failed_states(states)
    waiting = sum(1 for s in states if s["result"] is False) - len(failed)
    # One id may stand for many alike (`names`): the first of them tells.
    first = list({state["id"]: state for state in reversed(failed)}.values())[::-1]
    lines = []
    for state in first[:3]:
        reason = _short(state.get("comment"))
        said = _service_says(state) or (_short(state["said"]) if state["said"] else [])
        said = [line for line in said if line not in reason]
        lines += ["", f"FAILED:  {state['id']}  ({state['function']} in {state.get('__sls__')})"]
        lines += _labelled("reason:", reason + said)
        lines += _labelled("do:", [hints.do_about("\n".join(reason + said)) or "mend what the reason names"])
    if len(first) > 3:
        lines += ["", f"FAILED:  {', '.join(state['id'] for state in first[3:])}"]
    lines += _in_the_way(plan)
    lines += ["", f"{len(failed)} of {len(states)} states failed; {waiting} that need them were not tried."]
    return [*lines, f"Then run again: {again}    It goes on from there. Logs: /var/log/salt/xmpp/"]


def not_proven(report, plan, again):
    """Lines about every probe that failed."""
    failed = [probe for probe in report["probes"] if probe["result"] == "failed"]
    lines = []
    for probe in failed[:5]:
        lines += ["", f"FAILED:  {probe['what']}"]
        lines += _labelled("seen:", _short(probe["seen"])) + _labelled("do:", _short(probe["do"]))
    lines += _in_the_way(plan)
    lines += ["", f"Everything is set up, but {len(failed)} of {len(report['probes'])} probes failed."]
    return [*lines, f"Then run again: {again}    Logs: /var/log/salt/xmpp/"]


def success(plan, report, records, minion, changed):
    """What a person has now, in less than 25 lines."""
    number = plan["ports"]
    lines = [
        "",
        f"{plan['domain']} serves XMPP, and was proven to. {changed}",
        "",
        f"  administrator   {plan['admin']}",
        f"  password        in {plan['paths']['secrets']}/admin_password",
        f"  XMPP            ports {number['c2s']} (STARTTLS), {number['c2s_tls']}, {number['https']} (TLS)",
        f"  web             {plan['urls']['web']}  {plan['urls']['websocket']}",
    ]
    if plan["tls"]["source"] == "internal":
        lines.append(f"  certificate     by this machine's own CA; clients must trust {plan['paths']['ca']}")
    unproven = _unproven(report["probes"])
    if plan["domain"].endswith(".localhost"):
        lines += ["", f"{plan['domain']} is a name for trying out: it leads nobody else here. See --domain."]
    elif records:
        room = LINES - len(lines) - len(unproven) - 3
        more = f"; {len(records) - room} more: " if len(records) > room else "; whenever you want them again: "
        lines += ["", "DNS records still to be made:", *(f"  {record}" for record in records[:room])]
        lines.append(f"  {more}{minion.command} xmpp.dns_records format=zone")
    return [line[:WIDTH] for line in lines + unproven]


def _unproven(probes):
    """What could not be proven from here, and why; the DNS in one line, because the missing records are listed."""
    probes = [probe for probe in probes if probe["result"] == "not proven"]
    lines = [f"  {probe['what']}: {_short(probe['seen'])[0]}" for probe in probes if "DNS" not in probe["what"]]
    if len(lines) > 3:
        lines = [*lines[:2], f"  and {len(lines) - 2} more: `xmpp.check` tells them"]
    dns = [probe for probe in probes if "DNS" in probe["what"]]
    if dns:
        lines.append("  that others find it by DNS: it does not lead here, or not yet")
    return ["", "Not proven from here:", *lines] if lines else []


def _in_the_way(plan):
    """Lines about ports that another program holds."""
    lines = []
    for port, program, process in ports.taken(set(plan["ports"].values())):
        lines += ["", f"IN THE WAY: {program} (process {process}) holds port {port}"]
        lines += _labelled("do:", ["stop it, or move it to another port"])
    return lines


def _labelled(label, lines):
    return [f"  {label if not index else '':8} {line}" for index, line in enumerate(lines)]


def _short(text):
    """The telling lines of a long text: its first ones and its last ones."""
    lines = [line.rstrip() for line in str(text or "").splitlines() if line.strip()]
    if len(lines) > 10:
        lines = [*lines[:4], f"({len(lines) - 9} lines left out)", *lines[-5:]]
    return [line if len(line) <= 400 else line[:400] + "..." for line in lines] or ["(it gave none)"]


def _service_says(state):
    """The last words of a service that did not start: systemd's journal has them, Salt has not."""
    if not state["function"].startswith("service."):
        return []
    name = str(state.get("name", "")).removesuffix(".service")
    if not re.fullmatch(r"[\w@.-]+", name):
        return []
    try:
        argv = ["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", "6", "-u", name]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _short(done.stdout) if done.stdout.strip() else []
