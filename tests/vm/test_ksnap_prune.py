"""Pruning on real OpenZFS."""

from .ksnap import DATASETS, MAIL, ONE, dry, snapshots


@ONE
def test_pruning_takes_what_it_made_itself_and_nothing_else(mail):
    names = [mail.call("ksnap.snapshot", MAIL, label=f"n{number}")["snapshot"] for number in range(5)]
    other = mail.call("ksnap.snapshot", {"name": "other", "datasets": ["tank/db"]})["snapshot"]
    alike = names[0].replace("n0", "alike")
    mail.sh("zfs snapshot tank/db@ksnap-nothing; zfs snapshot tank/db@daily; zfs snapshot -r tank/mail@$1", alike)
    mail.call("ksnap.hold", MAIL, "n1", "me")
    before = sorted(snapshots(mail))
    told = dry(mail, "ksnap.prune", MAIL, count=2)
    assert [(each["snapshot"], each["action"]) for each in told] == list(
        zip(names, ["destroy", "keep", "destroy", "keep", "keep"], strict=True)
    )
    assert told[1]["reasons"] == [f"it is held by me ({dataset}@{names[1]}; ksnap.release)" for dataset in DATASETS]
    assert sorted(snapshots(mail)) == before
    assert mail.call("ksnap.prune", MAIL, count=2) == told
    left = {name.split("@")[1] for name in snapshots(mail)}
    assert left == {names[1], names[3], names[4], other, alike, "ksnap-nothing", "daily"}
    assert all(each["action"] == "keep" for each in mail.call("ksnap.prune", MAIL, count=2))
