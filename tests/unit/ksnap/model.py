"""
OpenZFS as far as a rollback uses it, in memory, with power cuts
================================================================

A command is made whole or not at all, as on a real pool, but for two: ``zfs clone -o`` makes the clone first, and then
sets its properties; ``zfs set`` goes from dataset to dataset. ``Zfs.cut_after`` counts such steps until the power goes.
"""

import itertools
import re

from salt.exceptions import CommandExecutionError


class PowerCut(BaseException):
    """Not an ``Exception``: nothing of the code under test gets to handle it."""


class Dataset:
    def __init__(self, guid, content, origin=None, kind="filesystem"):
        self.guid, self.content, self.origin, self.kind = guid, content, origin, kind
        self.local, self.snapshots = {}, []


class Snapshot:
    def __init__(self, guid, name, txg, content):
        self.guid, self.name, self.txg, self.content, self.holds = guid, name, txg, content, []


class Zfs:
    def __init__(self):
        self.numbers = itertools.count(1000)
        self.datasets, self.mounted = {"tank": Dataset(1, "root")}, []
        self.cut_after, self.fail_on, self.commands, self.steps = None, None, [], 0

    # For the tests

    def create(self, name, content, kind="filesystem", **local):
        self.datasets[name] = Dataset(next(self.numbers), content, kind=kind)
        self.datasets[name].local.update(local)

    def snapshot(self, name, *datasets):
        txg = next(self.numbers)
        for each in datasets:
            dataset = self.datasets[each]
            dataset.snapshots.append(Snapshot(next(self.numbers), name, txg, dataset.content))

    def boot(self):
        self.mounted = []
        for name in sorted(self.datasets):
            if self.value(name, "canmount") == "on":
                self.mount(name)

    def mount(self, name):
        self.mounted.append((self.datasets[name], self.value(name, "mountpoint")))

    def mounts(self):
        names = {id(dataset): name for name, dataset in self.datasets.items()}
        return [
            {"path": path, "source": names[id(dataset)], "type": "zfs", "root": "/"} for dataset, path in self.mounted
        ]

    def umount(self, path):
        # The one mounted last; what lies below it keeps it busy.
        index = max(index for index, (_, each) in enumerate(self.mounted) if each == path)
        if any(each.startswith(f"{path}/") for _, each in self.mounted):
            raise CommandExecutionError(f"{path} is busy")
        del self.mounted[index]

    # What it answers

    def step(self):
        if self.cut_after is not None:
            if self.cut_after == 0:
                raise PowerCut
            self.cut_after -= 1
        self.steps += 1

    def __call__(self, argv, stdin=None):
        assert argv[0] == "zfs", argv
        self.step()
        self.commands.append(argv[1:])
        if self.fail_on and self.fail_on(argv):
            raise CommandExecutionError("it was told to fail")
        words, options, flags = argv[2:], {}, set()
        plain = []
        while words:
            word = words.pop(0)
            if word in ("-o", "-t", "-d", "-s"):
                options.setdefault(word, []).append(words.pop(0))
            elif re.fullmatch("-[A-Za-z]", word):
                flags.add(word)
            else:
                plain.append(word)
        return getattr(self, f"do_{argv[1]}")(plain, options, flags) or ""

    def find(self, name):
        dataset, _, snapshot = name.partition("@")
        if dataset in self.datasets:
            if not snapshot:
                return self.datasets[dataset]
            for each in self.datasets[dataset].snapshots:
                if each.name == snapshot:
                    return each
        raise CommandExecutionError(f"cannot open '{name}': dataset does not exist")

    def value(self, name, key):
        found = self.find(name)
        if key == "guid":
            return str(found.guid)
        if isinstance(found, Snapshot):
            raise KeyError(key)
        if key == "origin":
            return next(
                (f"{owner}@{each.name}" for owner, has in self.datasets.items() for each in has.snapshots
                 if each.guid == found.origin), "-"
            )  # fmt: skip
        if key == "type":
            return found.kind
        if key in found.local:
            return found.local[key]
        if key == "canmount":
            return "on" if found.kind == "filesystem" else "-"
        if key == "mountpoint":
            return self.inherited(name, key, f"/{name}")
        if key in ("reservation", "refreservation"):
            return "0"
        return self.inherited(name, key, "-")

    def inherited(self, name, key, default):
        parts = name.split("/")
        for end in range(len(parts) - 1, 0, -1):
            above = self.datasets["/".join(parts[:end])]
            if key in above.local:
                rest = "/".join(parts[end:])
                return f"{above.local[key].rstrip('/')}/{rest}" if key == "mountpoint" else above.local[key]
        return default

    def below(self, names):
        return sorted(
            each for each in self.datasets if any(each == name or each.startswith(f"{name}/") for name in names)
        )

    def do_get(self, plain, options, flags):
        keys, *names = plain
        columns, local = options["-o"][0].split(","), "local" in options.get("-s", [])
        if not names:
            names = ["tank"] if options.get("-d") == ["0"] else sorted(self.datasets)
        elif "-r" in flags:
            names = self.below(names)
        rows = []
        for name in names:
            found = self.find(name)
            known = ["type", "guid", "origin", "canmount", "mountpoint", "reservation", "refreservation"]
            wanted = keys.split(",") if keys != "all" else [*known, *(set(getattr(found, "local", {})) - set(known))]
            for key in wanted:
                own = key in getattr(found, "local", {})
                if not local or own:
                    row = {
                        "name": name,
                        "property": key,
                        "value": self.value(name, key),
                        "source": "local" if own else "-",
                    }
                    rows.append("\t".join(row[column] for column in columns))
        return "".join(f"{row}\n" for row in rows)

    def do_list(self, plain, options, flags):
        columns, kinds = options["-o"][0].split(","), options.get("-t", ["filesystem,volume"])[0]
        if kinds == "bookmark":
            return ""
        if kinds == "snapshot" and "-d" in options:
            plain = [f"{name}@{each.name}" for name in plain for each in self.datasets[name].snapshots]
        elif kinds != "snapshot":
            plain = self.below(plain) if "-r" in flags else plain or sorted(self.datasets)
            if kinds == "all":
                plain = [full for name in plain for full in
                         (name, *(f"{name}@{each.name}" for each in self.datasets[name].snapshots))]  # fmt: skip
        missing = []
        for name in plain:
            try:
                self.find(name)
            except CommandExecutionError as error:
                missing.append(str(error))
        if missing:
            raise CommandExecutionError("\n".join(missing))
        return "".join("\t".join(self.column(name, column) for column in columns) + "\n" for name in plain)

    def column(self, name, column):
        found = self.find(name)
        if column == "name":
            return name
        if isinstance(found, Snapshot):
            clones = [each for each, has in self.datasets.items() if has.origin == found.guid]
            return {
                "guid": str(found.guid), "createtxg": str(found.txg), "creation": str(found.txg), "used": "0",
                "referenced": "0", "userrefs": "0", "clones": ",".join(clones), "type": "snapshot",
            }.get(column, "-")  # fmt: skip
        return {"usedbydataset": "0", "usedbysnapshots": "0"}.get(column) or self.value(name, column)

    def do_set(self, plain, options, flags):
        settings = [word for word in plain if "=" in word]
        for number, name in enumerate(word for word in plain if "=" not in word):
            self.find(name)
            if number:
                self.step()
            for setting in settings:
                key, _, value = setting.partition("=")
                assert len(value) < 8192
                if key in ("reservation", "refreservation") and value in ("none", "0"):
                    self.datasets[name].local.pop(key, None)
                else:
                    self.datasets[name].local[key] = value

    def do_inherit(self, plain, options, flags):
        for name in plain[1:]:
            self.find(name).local.pop(plain[0], None)

    def do_rename(self, plain, options, flags):
        old, new = plain
        self.find(old)
        self.find(new.rpartition("/")[0])
        if new in self.datasets:
            raise CommandExecutionError(f"cannot rename '{old}': {new} exists")
        for name in self.below([old]):
            self.datasets[new + name[len(old) :]] = self.datasets.pop(name)

    def do_clone(self, plain, options, flags):
        snapshot, name = plain
        found = self.find(snapshot)
        self.find(name.rpartition("/")[0])
        if name in self.datasets:
            raise CommandExecutionError(f"cannot create '{name}': it exists")
        kind = self.find(snapshot.split("@")[0]).kind
        self.datasets[name] = Dataset(next(self.numbers), found.content, found.guid, kind)
        self.step()
        self.datasets[name].local.update(option.split("=", 1) for option in options.get("-o", []))

    def do_promote(self, plain, options, flags):
        clone = self.find(plain[0])
        owner, _, name = self.value(plain[0], "origin").partition("@")
        if owner == "-" or not name:
            raise CommandExecutionError(f"cannot promote '{plain[0]}': not a cloned filesystem")
        owner = self.datasets[owner]
        index = next(index for index, each in enumerate(owner.snapshots) if each.guid == clone.origin)
        moving = owner.snapshots[: index + 1]
        if {each.name for each in moving} & {each.name for each in clone.snapshots}:
            raise CommandExecutionError("snapshot name conflict")
        clone.snapshots, owner.snapshots = moving + clone.snapshots, owner.snapshots[index + 1 :]
        clone.origin, owner.origin = owner.origin, clone.origin

    def do_destroy(self, plain, options, flags):
        (name,) = plain
        found = self.find(name)
        if self.below([name]) != [name] or (found.snapshots and "-r" not in flags):
            raise CommandExecutionError(f"cannot destroy '{name}': it has children")
        if any(dataset is found for dataset, _ in self.mounted):
            raise CommandExecutionError(f"cannot destroy '{name}': dataset is busy")
        held = {each.guid for each in found.snapshots}
        if any(each.origin in held for each in self.datasets.values()):
            raise CommandExecutionError(f"cannot destroy '{name}': it has dependent clones")
        del self.datasets[name]

    def do_mount(self, plain, options, flags):
        self.mount(plain[0])

    def do_allow(self, plain, options, flags):
        return ""

    def do_holds(self, plain, options, flags):
        return ""
