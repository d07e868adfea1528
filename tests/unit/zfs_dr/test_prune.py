"""What is pruned at a target, and how."""

from tests.unit.zfs_dr.conftest import load_file

BESIDE = load_file("_modules/zfs_dr_choice.py").beside
SETS = [f"ksnap-20261125T222408.{number:06}Z-0a1b2c3d" for number in range(5000)]


def test_any_number_of_sets_is_pruned():
    """The kernel takes no word of more than 128 KiB, and 2 MiB in all."""
    target = load_file("_modules/zfs_dr_target.py")
    mark = {"stack": "web", "source": "machine", "members": 2, "creation": 0, "held": False}
    replica = {"stack": "web", "snapshots": [{"name": name, "creation": 0} for name in SETS]}
    ran = []

    def command(argv):
        ran.append(argv)
        return "".join(f"{name}\t0\t-\n" for name in argv[5:]) if argv[1] == "list" else ""

    target.__salt__ = {
        "zfs_dr.beside": BESIDE,
        "zfs_dr.target_listing": lambda *_: {
            "sets": [{**mark, "name": name} for name in SETS],
            "replicas": {"tank:web": replica, "tank:mail": replica},
        },
        "ksnap.command": command,
    }
    told = target.prune("backup/dr", "web", count=1)
    assert list(told["destroyed"]) == SETS[:-1]
    destroyed = [words[2].partition("@") for words in ran if words[1] == "destroy"]
    for place in ("backup/dr", "backup/dr/tank:web", "backup/dr/tank:mail"):
        assert [each for name, _, names in destroyed if name == place for each in names.split(",")] == SETS[:-1]
    assert max(len(word) for words in ran for word in words) < 128 * 1024
    assert max(sum(map(len, words)) for words in ran) < 2**21


def test_what_never_became_whole_goes_once_a_newer_one_is():
    target = load_file("_modules/zfs_dr_target.py")
    mark = {"stack": "web", "source": "machine", "members": 2, "creation": 0, "held": False}
    first, broken, newest, coming = SETS[:4]
    destroyed = []

    def command(argv):
        if argv[1] == "destroy":
            destroyed.append(argv[2])
            return ""
        return "".join(f"{name}\t{int(name.endswith(newest))}\t-\n" for name in argv[5:])

    def replica(*names, stack="web"):
        return {"stack": stack, "snapshots": [{"name": name, "creation": 0} for name in names]}

    target.__salt__ = {
        "zfs_dr.beside": BESIDE,
        "zfs_dr.target_listing": lambda *_: {
            "sets": [{**mark, "name": first}, {**mark, "name": newest}],
            "replicas": {
                "tank:web": replica(first, broken, "by-hand", newest, coming),
                "tank:mail": replica(first, newest),
                "tank:other": replica(broken, newest, stack="other"),
            },
        },
        "ksnap.command": command,
    }
    assert target.prune("backup/dr", "web", count=2, test=True)["destroyed"].keys() == {broken} and destroyed == []
    assert target.prune("backup/dr", "web", count=2)["kept"].keys() == {first, newest}
    assert destroyed == [f"backup/dr/tank:web@{broken}"]
