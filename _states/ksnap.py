"""
Snapshots, boot environments and datasets
=========================================

A snapshot just before a change, and only then; ``prereq`` looks ahead, in test mode, whether it will come:

.. code-block:: yaml

    before-upgrade:
      ksnap.present:
        - stack: mail
        - each_run: True
        - prereq:
          - pkg: postfix
"""

import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

# What is taken only once is held: were it pruned, the next run would take another one, of the time after the change.
ONCE = "ksnap.present"


def __virtual__():
    return __virtualname__


def present(
    name, stack, reason=None, hold=None, each_run=False, before=None, after=None, timeout=None, max_age=None
):  # fmt: skip
    """
    There is a snapshot of a stack.

    name
        (string) Its label.
    stack
        (string or dict) The stack, see ``ksnap.stack``.
    reason
        (string) Why, for those who read the list. Default: none
    hold
        (string) A tag to hold it with. Default: ``ksnap.present`` for what is taken only once, so that no pruning
        takes it; otherwise none
    each_run
        (bool) Take a new one whenever this state runs, as before a change (``prereq``). Default: False: once
    before, after, timeout
        Commands around it, see ``ksnap.snapshot``. Default: the stack's
    max_age
        (number, seconds) Take a new one if the newest of this label is older. Default: never

    Changes: ``snapshot`` with the name of the new one, or ``hold`` with the tag. Fails when it cannot be taken; what
    requires it is then not done.
    """
    ret = {"name": name, "result": True, "changes": {}, "comment": ""}
    if hold is None and not each_run and max_age is None:
        hold = ONCE
    try:
        there = [
            each
            for each in __salt__["ksnap.list"](stack)
            if each["label"] == name and each["whole"] and each["stack"] == __salt__["ksnap.stack"](stack)["name"]
        ]
        if there and not each_run and (max_age is None or time.time() - there[-1]["created"] <= max_age):
            ret["comment"] = f"There is a snapshot {there[-1]['snapshot']}."
            if hold and not all(hold in has["holds"] for has in there[-1]["datasets"].values()):
                if not __opts__["test"]:
                    __salt__["ksnap.hold"](stack, there[-1]["snapshot"], hold)
                return _changed(
                    ret, {"hold": {"old": None, "new": hold}}, f"{there[-1]['snapshot']} is held by {hold}."
                )
            return ret
        taken = __salt__["ksnap.snapshot"](
            stack,
            label=name,
            reason=reason,
            hold=hold,
            before=before,
            after=after,
            timeout=timeout,
            test=__opts__["test"],
            jid=__opts__.get("jid"),
        )
        return _changed(ret, {"snapshot": {"old": None, "new": taken["snapshot"]}}, "A snapshot was taken.")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _failed(ret, error)


def absent(name, stack):
    """
    There is no snapshot of this name or label on a stack.

    name
        (string) The snapshot's name or label; of a label, all of them go that were taken of this very stack.
    stack
        (string or dict) The stack.

    Changes: ``destroyed`` with the names. Fails, before one is destroyed, for what is cloned or needed, or held by
    something else than :func:`present`.
    """
    ret = {"name": name, "result": True, "changes": {}, "comment": f"There is no snapshot {name}."}
    try:
        owner = __salt__["ksnap.stack"](stack)["name"]
        there = [
            each
            for each in __salt__["ksnap.list"](stack, all=True)
            # Two stacks may share a dataset, and what the other one calls so would be left on the rest of its own.
            if each["snapshot"] == name or (each["own"] and each["label"] == name and each["stack"] == owner)
        ]
        if not there:
            return ret
        held = []
        for each in there:
            for has in each["datasets"].values():
                if ONCE in has["holds"] and each["stack"] == owner:
                    has["holds"].remove(ONCE)
                    held.append(each["snapshot"])
        kept = [why for each in there for why in __salt__["ksnap.kept_by"](each)]
        if kept:
            raise CommandExecutionError(f"{name} was not destroyed: it is {'; '.join(kept)}")
        if not __opts__["test"]:
            for each in there:
                if each["snapshot"] in held:
                    __salt__["ksnap.release"](stack, each["snapshot"], ONCE)
                __salt__["ksnap.destroy"](stack, each["snapshot"])
        return _changed(ret, {"destroyed": [each["snapshot"] for each in there]}, "Destroyed.")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _failed(ret, error)


def pruned(name, stack=None, grid=None, count=None, free=None):
    """
    A stack has no more snapshots than are wanted.

    name
        (string) The stack, if none is given.
    stack
        (string or dict) The stack. Default: that of the name ``name``
    grid, count, free
        What to keep, see ``ksnap.prune``.

    Changes: ``destroyed``, a dict of the names to the reasons.
    """
    ret = {"name": name, "result": True, "changes": {}, "comment": "Nothing is to be destroyed."}
    try:
        chosen = __salt__["ksnap.prune"](stack or name, grid, count, free, test=__opts__["test"])
        gone = {each["snapshot"]: "; ".join(each["reasons"]) for each in chosen if each["action"] == "destroy"}
        if not gone:
            return ret
        return _changed(ret, {"destroyed": gone}, f"{len(gone)} of {len(chosen)} snapshots are destroyed.")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _failed(ret, error)


def stack(name, datasets, services=None):
    """
    Datasets exist with their properties; files that stand where one is mounted are moved into it.

    The old files are kept beside it, see ``ksnap.dataset_create``.

    name
        (string) What to call it.
    datasets
        (list) Each a dataset, or a dict of a dataset to its properties; parents first.
    services
        (list) What uses the files, and is stopped while they are moved. Default: none

    Changes: each dataset to what is new of it. Fails when files are in use; they are then where they were. Fails before
    the first change where a dataset that is there already would be mounted over files that are not its own.
    """
    ret = {"name": name, "result": True, "changes": {}, "comment": "All datasets are as they shall be."}
    try:
        wanted = {}
        for each in datasets:
            entry = each if isinstance(each, dict) else {each: {}}
            if len(entry) != 1:
                raise SaltInvocationError(
                    f"datasets are a list of names, or of one name with its properties, not {each!r}"
                )
            ((dataset, properties),) = entry.items()
            if isinstance(properties, list):
                properties = {key: value for pair in properties for key, value in pair.items()}
            wanted[dataset] = properties or {}
        # Every mistake before the first change.
        found = {
            dataset: __salt__["ksnap.dataset_differs"](dataset, properties) for dataset, properties in wanted.items()
        }
        for dataset, properties in wanted.items():
            differs = found[dataset]
            if differs is None or "ksnap:moving" in differs:
                ret["changes"][dataset] = __salt__["ksnap.dataset_create"](
                    dataset, properties, services=services, test=__opts__["test"]
                )
            elif differs:
                if not __opts__["test"]:
                    __salt__["ksnap.dataset_set"](dataset, properties)
                ret["changes"][dataset] = differs
        if not ret["changes"]:
            return ret
        return _changed(ret, ret["changes"], f"{', '.join(ret['changes'])}: made, or its properties set.")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _failed(ret, error)


def scheduled(name, calendar=None, stack=None, label="periodic", grid=None, count=None, free=None, enabled=True):
    """
    A systemd timer takes snapshots of a stack, and prunes them; see ``ksnap.schedule`` for why it is no schedule of
    Salt's.

    name
        (string) Its name, and the stack if none is given.
    calendar
        (string) When, as systemd.time(7) has it: ``hourly``, ``*:0/15``, ``03:30``.
    stack
        (string or dict) The stack; a name must be in the minion's own configuration. Default: that of the name ``name``
    label, grid, count, free
        See ``ksnap.periodic``.
    enabled
        (bool) False: there is no such timer. Default: True

    Changes: each unit's old and new text.
    """
    ret = {"name": name, "result": True, "changes": {}, "comment": "The timer is as it shall be."}
    test = __opts__["test"]
    try:
        if enabled:
            changes = __salt__["ksnap.schedule"](name, calendar, stack, label, grid, count, free, test=test)
        else:
            changes = {unit: {"old": "there", "new": None} for unit in __salt__["ksnap.unschedule"](name, test=test)}
        return _changed(ret, changes, "The timer is set." if enabled else "The timer is gone.") if changes else ret
    except (CommandExecutionError, SaltInvocationError) as error:
        return _failed(ret, error)


def be_active(name, once=False):
    """
    A boot environment is the one that is booted next.

    name
        (string) The environment.
    once
        (bool) Only for the next start; once it is up, nothing is left to do. Applied while another one runs, it is for
        the next start again. Default: False

    Changes: ``next``, the old and the new one. Fails when there is no such environment, or it could not be booted.
    """
    ret = {"name": name, "result": True, "changes": {}, "comment": f"{name} is booted next."}
    try:
        there = {each["name"]: each for each in __salt__["ksnap.be_list"]()}
        if name in there and there[name]["next"] and there[name]["once"] == once:
            return ret
        if once and name in there and there[name]["running"]:
            # Its start has been, and chose the former one again; chosen anew at each run, it would stay for good.
            ret["comment"] = f"{name} is running."
            return ret
        done = __salt__["ksnap.be_activate"](name, once, test=__opts__["test"])
        return _changed(ret, {"next": {"old": done["previous"], "new": name}}, f"{name} is booted next; reboot for it.")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _failed(ret, error)


def _changed(ret, changes, comment):
    return {
        **ret,
        "changes": changes,
        "result": None if __opts__["test"] else True,
        "comment": f"In test mode, nothing was done. It would be: {comment}" if __opts__["test"] else comment,
    }


def _failed(ret, error):
    return {**ret, "result": False, "comment": str(error)}
