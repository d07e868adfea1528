"""Boot environments: what be_activate refuses, of which a machine shows only a part."""

import contextlib

import pytest
from salt.exceptions import CommandExecutionError

ROOT = "rpool/ROOT/debian"
ZBM = "name\norg.zfsbootmenu:commandline\n"


@pytest.fixture
def module(load, zfs):
    mounts = [{"path": "/", "source": ROOT, "type": "zfs"}]
    return load("_modules/ksnap_be.py", __salt__={"ksnap.command": zfs, "ksnap.mounts": lambda: mounts})


@pytest.mark.parametrize(
    ("line", "properties", "refused"),
    [
        ("BOOT_IMAGE=/vmlinuz root=zfs:AUTO", "", False),
        ("root=/dev/vda1 rw", "", False),
        # GRUB, and systemd-boot; also where ZFSBootMenu was used once.
        (f"BOOT_IMAGE=/vmlinuz root=ZFS={ROOT} ro quiet", ZBM, True),
        (f"initrd=EFI-initrd.img root=ZFS={ROOT} spl.spl_hostid=0x1", ZBM, True),
        (f"root=ZFS={ROOT} rw", "", True),
        # ZFSBootMenu, with a property of it, or as it is.
        (f"root=zfs:{ROOT} rw quiet", ZBM, False),
        (f"root=zfs:{ROOT} quiet loglevel=4 spl.spl_hostid=0x5a000001", "", False),
        (f"root=ZFS={ROOT} quiet loglevel=4 spl_hostid=00000000", "", False),
    ],
)
def test_a_root_that_the_command_line_names(module, zfs, tmp_path, monkeypatch, line, properties, refused):
    (tmp_path / "cmdline").write_text(f"{line}\n")
    monkeypatch.setattr(module, "COMMAND_LINE", str(tmp_path / "cmdline"))
    zfs.answers[f"zfs get -H -o property all {ROOT}"] = properties
    if refused:
        with pytest.raises(CommandExecutionError, match="bootfs is not asked"):
            module._refuse_fixed_root()
    else:
        module._refuse_fixed_root()


def test_what_is_chosen_again_after_one_start_is_not_destroyed(module, zfs, monkeypatch):
    there = [{"name": name, "dataset": f"rpool/ROOT/{name}", "running": False, "next": False, "mounted": None}
             for name in ("former", "other")]  # fmt: skip
    monkeypatch.setattr(module, "be_list", lambda: there)
    module.__salt__["ksnap.locked"] = lambda test: contextlib.nullcontext()
    zfs.answers["zfs get -H -p -o value ksnap:boot_once rpool"] = "rpool/ROOT/once rpool/ROOT/former\n"
    with pytest.raises(CommandExecutionError, match="former is chosen again once rpool/ROOT/once was booted"):
        module.be_destroy("former")
    assert not [argv for argv in zfs.calls if argv[1] == "destroy"]
    module.be_destroy("other")
    assert ["zfs", "destroy", "-r", "rpool/ROOT/other"] in zfs.calls


@pytest.mark.parametrize(
    ("below", "refused"),
    [
        # Each: whether of the one that is activated, canmount, mountpoint.
        ([], False),
        ([(True, "on", "/var")], True),
        ([(True, "noauto", "/var")], True),
        ([(False, "on", "/var")], True),
        # Of another one, nothing changes.
        ([(False, "noauto", "/var")], False),
        ([(True, "off", "/var"), (True, "on", "none"), (True, "on", "legacy")], False),
    ],
)
@pytest.mark.parametrize("initrd", [False, True])
def test_what_only_zfs_initramfs_mounts(module, zfs, tmp_path, below, refused, initrd):
    there = {name: {"name": name, "dataset": f"rpool/ROOT/{name}", "mounted": str(tmp_path)} for name in ("a", "ab")}
    if initrd:
        (tmp_path / module.INITRD).parent.mkdir(parents=True)
        (tmp_path / module.INITRD).touch()
    rows = [("rpool/ROOT/a", "noauto", "/"), ("rpool/ROOT/ab", "on", "/")]
    rows += [(f"rpool/ROOT/{'a' if own else 'ab'}/{index}", *row) for index, (own, *row) in enumerate(below)]
    zfs.answers["zfs list"] = "".join("\t".join(row) + "\n" for row in rows)
    if refused and not initrd:
        with pytest.raises(CommandExecutionError, match=r"/0 would not be mounted.*Install zfs-initramfs"):
            module._refuse_unmounted("a", there)
    else:
        module._refuse_unmounted("a", there)
    assert not [call for call in zfs.calls if call[1] != "list"]
