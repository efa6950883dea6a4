"""A guest boots from a clone of a template, and is kept as it is several times while it writes."""
import hashlib, os, shutil, subprocess, time

from daemon import MASON
from machine import disk

SIZE, SNAPSHOTS = 192, 4

GUEST = """
element Guest (type vhost_user_blk) (listen unix:vm.sock) (queues 2) (serial vm1)
element Disk (type parallax) (pool vms.pool) (volume vm1)
Guest -> Disk
"""
EXPORT = """
element Export (type nbd) (listen unix:export.sock)
element Disk (type parallax) (pool ../vms.pool) %s
Export -> Disk
"""


def clones(bench):
    """What each snapshot holds is a file system that is sound once its journal has been replayed; the template is as it was."""
    template, kept = make_template(bench)
    mason(bench, "pool", "create", "vms.pool", "--size", "1G")
    mason(bench, "volume", "create", "vms.pool", "template", "--size", f"{SIZE}M")
    copy(bench, template, True, "(volume template)")
    mason(bench, "volume", "snapshot", "vms.pool", "template@gold")
    mason(bench, "volume", "clone", "vms.pool", "template@gold", "vm1")
    daemon = bench.serve(GUEST)
    guest = bench.boot("clone mason.root=yes", disk("vm.sock"))
    guest.expect("booted", "from the disk")
    guest.expect("checksums")
    guest.says("snapshots")
    names = [f"vm1@s{number}" for number in range(SNAPSHOTS)]
    slowest = max(snapshot(daemon, name) for name in names)
    guest.types()
    guest.expect("fio")
    rounds = guest.says("rounds")
    for what in ("checksums", "errors"):
        guest.expect(what)
    guest.ends()
    daemon.stop()
    live = [look(bench, kept, "(volume vm1) (snapshot %s)" % name.split("@")[1]) for name in names]
    assert all(live), "a snapshot has no journal to replay"
    assert not look(bench, kept, "(volume vm1)"), "the guest has ended, and its journal is still to be replayed"
    again = copy(bench, bench.path("again.img"), False, "(volume template)")
    assert digest(again) == digest(template), "the template has changed"
    mason(bench, "pool", "check", "vms.pool")
    return f"{SNAPSHOTS} snapshots within {slowest * 1000:.0f} ms each, fio ran {rounds} times"


def mason(bench, *words):
    done = subprocess.run([MASON, *words], cwd=bench.home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"mason {' '.join(words)}: {done.stdout}{done.stderr}"


def make_template(bench):
    """An image of a file system from which the guest can boot, and the checksum of a file in it."""
    root, image = bench.path("template"), bench.path("template.img")
    shutil.copytree(os.path.join(os.path.dirname(bench.initrd), "root"), root, symlinks=True)
    with open(os.path.join(root, "from-disk"), "w") as mark:
        mark.write("from the disk\n")
    content = os.urandom(8 << 20)
    kept = hashlib.md5(content).hexdigest()
    with open(os.path.join(root, "mnt/kept"), "wb") as file:
        file.write(content)
    with open(os.path.join(root, "mnt/kept.sum"), "w") as file:
        file.write(f"{kept}  kept\n")
    subprocess.run(["mkfs.ext4", "-q", "-d", root, image, f"{SIZE}M"], check=True, capture_output=True, env=with_sbin())
    return image, kept


def with_sbin():
    return {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


def copy(bench, image, there, what):
    """Copies an image into a volume, or out of one."""
    server = bench.serve(EXPORT % what, "export")
    uri = "nbd+unix:///?socket=" + server.path("export.sock")
    subprocess.run(["nbdcopy", "--flush", *([image, uri] if there else [uri, image])], check=True, timeout=60)
    server.stop()
    return image


def snapshot(daemon, name):
    time.sleep(0.4)
    begun = time.monotonic()
    daemon.ask("volume", "snapshot", "vms.pool", name)
    return time.monotonic() - begun


def look(bench, kept, what):
    """The file system is sound once its journal has been replayed, and the file is there. Whether it had to be."""
    image = copy(bench, bench.path("look.img"), False, what)
    said = subprocess.run(["dumpe2fs", "-h", image], check=True, capture_output=True, text=True, env=with_sbin()).stdout
    replayed = "needs_recovery" in said
    assert fsck(image, "-p") in (0, 1), f"{what}: e2fsck cannot mend it"
    assert fsck(image, "-fn") == 0, f"{what}: the file system is damaged"
    out = bench.path("kept")
    subprocess.run(["debugfs", "-R", f"dump /mnt/kept {out}", image], check=True, capture_output=True, env=with_sbin())
    assert digest(out, "md5") == kept, f"{what}: the file is another one"
    os.remove(image)
    return replayed


def fsck(image, how):
    return subprocess.run(["e2fsck", how, image], capture_output=True, env=with_sbin()).returncode


def digest(path, how="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, how).hexdigest()
