"""The disk of a guest moves from one store to another while the guest writes and verifies."""
import json

from load import longest
from machine import disk

GRAPH = """
element Guest (type vhost_user_blk) (listen unix:vm.sock) (queues 2) (serial vm1)
element Disk (type file) (path disk.img) (size 128M)
Guest -> Disk
"""
STORE = """
element Guest (type nbd) (listen unix:nbd.sock)
element Disk (type file) (path disk.img) (size 128M)
Guest -> Disk
"""
# So slow that the guest writes a lot meanwhile. What is compared counts like what is copied, and is the whole disk.
RATE, COMPARED = "12M/s", "32M/s"
NBD = "nbd_client (uri nbd+unix:///?socket=store/nbd.sock)"


def volume(bench):
    """From a file to an NBD server, compared before; on to a file, and back at once; then to a file for good."""
    store = bench.serve(STORE, "store")
    daemon = bench.serve(GRAPH)
    guest = bench.boot("volume", disk("vm.sock"))
    guest.expect("mounted")
    guest.says("moves")
    there = copied(daemon, "--to", NBD, "--rate", COMPARED, "--verify")
    assert there["verified"] > 0, there
    kept = copied(daemon, "--to", "file (path kept.img)", "--rate", RATE, "--keep-mirror")
    assert kept["state"] == "mirroring", kept
    back = move(daemon, "--back")
    last = copied(daemon, "--to", "file (path last.img)", "--rate", RATE)
    assert [m["state"] for m in (there, back, last)] == ["done"] * 3, (there, back, last)
    guest.types()
    guest.expect("fio")
    rounds = guest.says("rounds")
    latency = guest.says("longest")
    for what in ("checksums", "trimmed", "checked", "errors"):
        guest.expect(what)
    guest.ends()
    daemon.stop()
    store.stop()
    pauses = [round(m["pause_seconds"] * 1000, 1) for m in (there, kept, back, last)]
    return f"cut over in {pauses} ms, fio ran {rounds} times; requests took {longest(latency)}"


def copied(daemon, *words):
    """Moves the disk, and makes sure that the guest has used it meanwhile."""
    before = requests(daemon)
    moved = move(daemon, *words)
    meanwhile = requests(daemon) - before
    assert meanwhile > 100, f"only {meanwhile} requests during {words}"
    return moved


def move(daemon, *words):
    return json.loads(daemon.ask("migrate", "vm", "Disk", *words, "--json"))


def requests(daemon):
    return int(daemon.ask("get", "Guest.requests"))
