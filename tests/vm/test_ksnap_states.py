"""The states of ksnap in a machine with OpenZFS: each in test mode, then for real, then again."""

import pytest
from salt.exceptions import SaltInvocationError

from .ksnap import ONE

CONFIG = {"ksnap": {"stacks": {"mail": {"datasets": ["tank/mail"], "children": True}}}}


def snapshots(machine):
    return machine.run("zfs", "list", "-H", "-t", "snapshot", "-o", "name").stdout.split()


@pytest.fixture
def tank(fresh):
    fresh.sh("zpool create tank $1; zfs create tank/mail; zfs create tank/mail/queue", fresh.devices[0])
    return fresh


def apply(machine, function, name, **options):
    """Test mode tells the truth and touches nothing; the first run changes, the second does not."""
    units = "cat /etc/systemd/system/ksnap-* || true"
    look = f"zfs list -H -p -t all -o name,guid; zfs get -H -s local all; ls -R /srv; {units}"
    before = machine.sh(look).stdout
    told = machine.state(function, name, test=True, config=CONFIG, **options)
    assert told["result"] is None and told["changes"], told
    assert machine.sh(look).stdout == before
    done = machine.state(function, name, config=CONFIG, **options)
    assert done["result"] is True and done["changes"], done
    for test in (True, False):
        again = machine.state(function, name, config=CONFIG, test=test, **options)
        assert (again["result"], again["changes"]) == (True, {}), again
    return told, done


@ONE
def test_present_and_absent(tank):
    _, done = apply(tank, "ksnap.present", "before-upgrade", stack="mail", reason="because", hold="audit")
    name = done["changes"]["snapshot"]["new"]
    assert snapshots(tank) == [f"tank/mail@{name}", f"tank/mail/queue@{name}"]
    held = tank.state("ksnap.absent", "before-upgrade", stack="mail", config=CONFIG)
    assert held["result"] is False and "held by audit" in held["comment"]
    tank.call("ksnap.release", "mail", name, "audit", config=CONFIG)
    told, done = apply(tank, "ksnap.absent", "before-upgrade", stack="mail")
    assert told["changes"] == done["changes"] == {"destroyed": [name]}
    assert snapshots(tank) == []
    # Pruned, what is taken only once would be taken again, after the change.
    _, done = apply(tank, "ksnap.present", "before-migration", stack="mail")
    name = done["changes"]["snapshot"]["new"]
    taken = tank.call("ksnap.periodic", "mail", count=1, config=CONFIG)
    assert taken["destroyed"] == [] and f"tank/mail@{name}" in snapshots(tank)
    assert tank.state("ksnap.present", "before-migration", stack="mail", config=CONFIG)["changes"] == {}
    tank.call("ksnap.hold", "mail", name, config=CONFIG)
    held = tank.state("ksnap.absent", "before-migration", stack="mail", config=CONFIG)
    assert held["result"] is False and "held by ksnap (" in held["comment"]
    tank.call("ksnap.release", "mail", name, config=CONFIG)
    apply(tank, "ksnap.absent", "before-migration", stack="mail")
    assert snapshots(tank) == [f"{dataset}@{taken['snapshot']}" for dataset in ("tank/mail", "tank/mail/queue")]


@ONE
def test_present_takes_a_new_one_when_the_newest_is_old(tank):
    tank.state("ksnap.present", "daily", stack="mail", config=CONFIG)
    assert not tank.state("ksnap.present", "daily", stack="mail", max_age=3600, config=CONFIG)["changes"]
    tank.sh("date -s '+2 hours'")
    assert tank.state("ksnap.present", "daily", stack="mail", max_age=3600, config=CONFIG)["changes"]
    assert len(tank.call("ksnap.list", "mail", config=CONFIG)) == 2


def test_prereq_takes_one_only_before_a_change(tank):
    data = {
        "before": {"ksnap.present": [{"stack": "mail"}, {"each_run": True}, {"prereq": [{"file": "/tank/mail/conf"}]}]},
        "/tank/mail/conf": {"file.managed": [{"contents": "one"}]},
    }
    told = tank.apply(data, test=True, config=CONFIG)
    assert [each["result"] for each in told.values()] == [None, None]
    assert snapshots(tank) == []
    tank.apply(data, config=CONFIG)
    (first,) = tank.call("ksnap.list", "mail", config=CONFIG)
    # It was taken before the change, not after it.
    assert tank.sh("ls /tank/mail/.zfs/snapshot/$1", first["snapshot"]).stdout.split() == ["queue"]
    tank.apply(data, config=CONFIG)
    assert len(tank.call("ksnap.list", "mail", config=CONFIG)) == 1
    data["/tank/mail/conf"]["file.managed"][0]["contents"] = "two"
    tank.apply(data, config=CONFIG)
    assert len(tank.call("ksnap.list", "mail", config=CONFIG)) == 2
    # Without its snapshot, the change is not made.
    data["before"]["ksnap.present"] += [{"before": ["false"]}]
    data["/tank/mail/conf"]["file.managed"] = [{"contents": "three"}, {"require": [{"ksnap": "before"}]}]
    data["before"]["ksnap.present"][2] = {"require_in": []}
    results = list(tank.apply(data, config=CONFIG).values())
    assert [each["result"] for each in results] == [False, False]
    assert tank.read("/tank/mail/conf").strip() == "two"


@ONE
def test_pruned(tank):
    names = [tank.call("ksnap.snapshot", "mail", config=CONFIG)["snapshot"] for _ in range(4)]
    told, done = apply(tank, "ksnap.pruned", "mail", count=2)
    assert sorted(done["changes"]["destroyed"]) == names[:2] == sorted(told["changes"]["destroyed"])
    assert len(snapshots(tank)) == 4
    wrong = tank.state("ksnap.pruned", "mail", grid="nonsense", config=CONFIG)
    assert wrong["result"] is False and "no interval of a grid" in wrong["comment"]


@ONE
def test_a_stack_is_made_and_data_moves_in(tank):
    tank.sh("""
        mkdir -p /srv/www/sub; echo text > /srv/www/sub/file
        ln -s sub/file /srv/www/link; ln /srv/www/sub/file /srv/www/hard; mkfifo /srv/www/pipe
        touch -d 2001-02-03 /srv/www/old; chown nobody:daemon /srv/www/old; chmod 2750 /srv/www
    """)
    # Links and sizes of a directory are its file system's affair.
    look = r"""
        cd /srv/www; find . -printf '%p %y %m %u %g %T@' \( -type d -printf '\n' -o -printf ' %n %s %l\n' \) | sort
    """
    before = tank.sh(look).stdout
    datasets = [
        {"tank/srv/www": {"mountpoint": "/srv/www", "recordsize": "16K", "atime": False, "quota": "1G"}},
        {"tank/mail": [{"compression": "lz4"}, {"com.example:note": "a b"}]},
        {"tank/vol": {"volsize": "8M"}},
        "tank/plain",
    ]
    told, done = apply(tank, "ksnap.stack", "web", datasets=datasets)
    assert done["changes"]["tank/srv/www"]["moved"] == told["changes"]["tank/srv/www"]["moved"] == 6
    assert tank.run("findmnt", "-no", "SOURCE", "/srv/www").stdout == "tank/srv/www\n"
    assert tank.sh(look).stdout == before
    assert tank.read("/srv/www/link") == "text\n"
    kept = done["changes"]["tank/srv/www"]["kept"]
    assert tank.read(f"{kept}/sub/file") == "text\n"
    has = tank.run(
        "zfs", "get", "-H", "-p", "-o", "value", "recordsize,atime,quota,canmount", "tank/srv/www"
    ).stdout.split()
    assert has == ["16384", "off", str(2**30), "on"]
    assert (
        tank.run("zfs", "get", "-H", "-o", "value", "compression,com.example:note", "tank/mail").stdout == "lz4\na b\n"
    )
    datasets[0]["tank/srv/www"]["quota"] = "2G"
    told, done = apply(tank, "ksnap.stack", "web", datasets=datasets)
    assert done["changes"] == {"tank/srv/www": {"quota": {"old": str(2**30), "new": "2G"}}}
    late = tank.state("ksnap.stack", "web", datasets=[{"tank/mail": {"casesensitivity": "insensitive"}}])
    assert late["result"] is False and "can only be set when it is made" in late["comment"]


@ONE
def test_files_in_use_are_not_moved_and_a_service_is_stopped(tank):
    tank.put("/etc/systemd/system/user.service", "[Service]\nWorkingDirectory=/srv/www\nExecStart=sleep infinity\n")
    tank.sh("mkdir /srv/www; echo text > /srv/www/file; systemctl daemon-reload; systemctl start user")
    datasets = [{"tank/www": {"mountpoint": "/srv/www"}}]
    busy = tank.state("ksnap.stack", "web", datasets=datasets)
    assert busy["result"] is False and "in use by sleep (process " in busy["comment"]
    assert "tank/www" not in tank.run("zfs", "list", "-H", "-o", "name").stdout
    assert tank.state("ksnap.stack", "web", datasets=datasets, services=["user"])["result"] is True
    tank.run("systemctl", "is-active", "user")
    assert tank.run("findmnt", "-no", "SOURCE", "/srv/www").stdout == "tank/www\n"
    tank.run("systemctl", "stop", "user")


@ONE
def test_a_power_cut_while_data_moves_in_loses_none(tank):
    """A copy that was not compared is made anew; one that was is mounted."""
    tank.sh("mkdir /srv/www; head -c 1M /dev/urandom > /srv/www/file; sha256sum /srv/www/file > /root/sum")
    datasets = [{"tank/www": {"mountpoint": "/srv/www"}}]
    tank.sh("zfs create -o canmount=noauto -o mountpoint=/srv/www -o ksnap:moving=/srv/www tank/www")
    assert tank.state("ksnap.stack", "web", test=True, datasets=datasets)["result"] is None
    assert tank.state("ksnap.stack", "web", datasets=datasets)["result"] is True
    tank.sh("sha256sum -c /root/sum")
    tank.sh('zfs unmount tank/www; zfs set "ksnap:moving=done $(echo /srv/www.before-*)" tank/www')
    done = tank.state("ksnap.stack", "web", datasets=datasets)
    assert done["result"] is True, done
    tank.sh("sha256sum -c /root/sum")
    assert not tank.state("ksnap.stack", "web", datasets=datasets)["changes"]


@ONE
def test_scheduled(tank):
    stack = {"name": "mail", "datasets": ["tank/mail"], "children": True}
    options = {"calendar": "*:*:0/2", "stack": stack, "grid": "1x1h(keep=all) | 24x1h", "count": 3, "free": "1%"}
    apply(tank, "ksnap.scheduled", "mail", **options)
    tank.sh("until zfs list -H -t snapshot -o name | grep -q periodic; do sleep .2; done", timeout=300)
    tank.sh(
        "systemctl stop ksnap-mail.timer; systemctl reset-failed; until ! systemctl is-active ksnap-mail.service; do "
        "sleep .2; done"
    )
    taken = tank.call("ksnap.list", "mail", config=CONFIG)
    assert {each["label"] for each in taken} == {"periodic"} and all(each["whole"] for each in taken)
    # Stopped by hand, it is started again.
    assert tank.state("ksnap.scheduled", "mail", **options)["changes"]
    tank.run("systemctl", "is-active", "ksnap-mail.timer")
    for wrong, match in (({"calendar": "sometimes"}, "no time for systemd"), ({"grid": "x"}, "no interval of a grid")):
        failed = tank.state("ksnap.scheduled", "mail", **{**options, **wrong})
        assert failed["result"] is False and match in failed["comment"]
    apply(tank, "ksnap.scheduled", "mail", enabled=False)
    assert tank.sh("ls /etc/systemd/system/*/ksnap-mail* /etc/systemd/system/ksnap-mail* || true").stdout == ""


@ONE
def test_without_boot_environments_it_says_so(tank):
    failed = tank.state("ksnap.be_active", "other")
    assert failed["result"] is False and "root is not on ZFS" in failed["comment"]
    with pytest.raises(SaltInvocationError, match="name must be of letters"):
        tank.call("ksnap.unschedule", "../x")


@ONE
def test_a_label_is_that_of_one_stack(tank):
    """Two stacks share a dataset: what one of them calls so is no snapshot of the other."""
    tank.sh("zfs create tank/pg; zfs create tank/db")
    stacks = {"mail": {"datasets": ["tank/mail", "tank/pg"]}, "db": {"datasets": ["tank/db", "tank/pg"]}}
    config = {"ksnap": {"stacks": stacks}}
    theirs = tank.call("ksnap.snapshot", "db", label="before-upgrade", config=config)["snapshot"]
    whole = [f"tank/db@{theirs}", f"tank/pg@{theirs}"]
    assert tank.state("ksnap.absent", "before-upgrade", stack="mail", config=config)["changes"] == {}
    for function in ("ksnap.destroy", "ksnap.rollback"):
        with pytest.raises(SaltInvocationError, match=rf"no snapshot before-upgrade of its own; .* {theirs} \(db\)"):
            tank.call(function, "mail", "before-upgrade", config=config)
    assert sorted(snapshots(tank)) == whole
    mine = tank.call("ksnap.snapshot", "mail", label="before-upgrade", config=config)["snapshot"]
    # Of each stack it is now the only one of this label; without a name, the stack is just the dataset.
    assert tank.call("ksnap.snapshot_name", "mail", "before-upgrade", config=config) == mine
    with pytest.raises(SaltInvocationError, match="2 snapshots have the label before-upgrade"):
        tank.call("ksnap.destroy", {"datasets": ["tank/pg"]}, "before-upgrade")
    done = tank.state("ksnap.absent", "before-upgrade", stack="mail", config=config)
    assert done["changes"] == {"destroyed": [mine]} and sorted(snapshots(tank)) == whole
    tank.call("ksnap.destroy", "db", "before-upgrade", config=config)
    assert snapshots(tank) == []
