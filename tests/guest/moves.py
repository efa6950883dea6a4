"""A guest whose machine changes: it migrates, its disk is unplugged, it is reset, and loses its power."""
import time

from machine import DISK, chardev, disk

TWO_EXPORTS = """
element A (type vhost_user_blk) (listen unix:a.sock) (queues 2) (serial vm1)
element B (type vhost_user_blk) (listen unix:b.sock) (queues 2) (serial vm1)
element Disk (type file) (path disk.img) (size 256M)
A -> Disk
B -> Disk
"""
ONE_EXPORT = """
element Guest (type vhost_user_blk) (listen unix:vm.sock) (queues 2) (serial vm1)
element Disk (type %s) (size 256M)
Guest -> Disk
"""

# Passes over the guest's memory before a migration may come to its end.
PASSES = 4
MEGABYTE = 1 << 20


def migrate(bench):
    """From one QEMU to another at an export of its own, and on to a third at the same export."""
    daemon = bench.serve(TWO_EXPORTS)
    guest = bench.boot("migrate", disk("a.sock"))
    guest.expect("mounted")
    guest.says("migrates")
    passes, pauses = [], []
    for _ in range(2):
        there = bench.boot("migrate", disk("b.sock") + ["-incoming", "defer"])
        result = move(guest, there, f"unix:{bench.home}/migration.sock")
        passes.append(result["ram"]["dirty-sync-count"])
        pauses.append(result["downtime"])
        guest.monitor.ask("quit")
        guest = there
    # Otherwise nobody has migrated.
    before = int(daemon.ask("get", "A.requests"))
    guest.types()
    guest.expect("fio")
    rounds = guest.says("rounds")
    for what in ("cached", "checksums", "checked", "errors"):
        guest.expect(what)
    guest.ends()
    assert int(daemon.ask("get", "A.requests")) == before, "the first export is still in use"
    daemon.stop()
    return f"{passes} passes, stopped for {pauses} ms, fio ran {rounds} times"


def move(here, there, uri):
    """Migrates. Until its memory has been gone through a few times, the guest writes to it faster than it is copied.

    So pages that our daemon writes are copied before, and again because it has logged them: one that is missing in the
    log arrives as it was. The guest compares what it read from the disk meanwhile and never wrote, in its page cache,
    before it reads anything again. (The pages of the rings prove nothing: QEMU copies those at its stop in any case.)
    """
    there.monitor.ask("migrate-incoming", uri=uri)
    here.monitor.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    here.monitor.ask("migrate-set-parameters", max_bandwidth=48 * MEGABYTE, downtime_limit=1)
    here.monitor.ask("migrate", uri=uri)
    here.monitor.event("MIGRATION_PASS", lambda data: data["pass"] >= PASSES)
    here.monitor.ask("migrate-set-parameters", max_bandwidth=1024 * MEGABYTE, downtime_limit=300)
    here.monitor.event("MIGRATION", lambda data: data["status"] in ("completed", "failed"))
    result = here.monitor.ask("query-migrate")
    assert result["status"] == "completed", result
    assert result["ram"]["dirty-sync-count"] >= PASSES, result
    there.monitor.event("RESUME")
    return result


def unplug(bench):
    """The disk is unplugged at rest and under load, and plugged in again."""
    daemon = bench.serve(ONE_EXPORT % "file) (path disk.img")
    guest = bench.boot("unplug", disk("vm.sock"))
    guest.expect("mounted")
    guest.says("unplugs")
    take_out(guest)
    guest.monitor.ask("device_add", **DISK)
    guest.types()
    for what in ("mounted", "checksums", "errors"):
        guest.expect(what)
    guest.says("unplugs")
    take_out(guest)
    guest.types()
    guest.says("writer stopped")
    guest.says("plugs")
    # As libvirt does it: with another connection.
    guest.monitor.ask("chardev-remove", id="vm")
    guest.monitor.ask("chardev-add", id="vm", backend=socket_of("vm.sock"))
    guest.monitor.ask("device_add", **DISK)
    guest.types()
    for what in ("mounted", "checksums", "checked"):
        guest.expect(what)
    guest.ends()
    daemon.stop()
    log = daemon.log()
    assert log.count("\n") <= 1, f"the daemon has more than a line to say:\n{log}"
    return "unplugged at rest and under load"


def take_out(guest):
    guest.monitor.ask("device_del", id="disk")
    guest.monitor.event("DEVICE_DELETED", lambda data: data.get("device") == "disk")


def socket_of(path):
    address = {"type": "unix", "data": {"path": path}}
    return {"type": "socket", "data": {"addr": address, "server": False, "reconnect-ms": 50}}


def restart(bench):
    """The guest reboots; then QEMU dies and the disk loses what was not flushed."""
    daemon = bench.serve(ONE_EXPORT % "volatile) (seed 7) (lossy yes")
    guest = bench.boot("restart", disk("vm.sock"))
    guest.expect("mounted")
    guest.says("reboots")
    guest.monitor.event("RESET", lambda data: data["guest"])
    for what in ("checksums", "checked", "errors", "mounted"):
        guest.expect(what)
    guest.says("flushed")
    wait_for(lambda: int(daemon.ask("get", "Disk.unflushed")) > 1000)
    guest.kill()
    lost = daemon.ask("call", "Disk.lose_power")
    assert not lost.startswith("0 "), lost
    guest = bench.boot("recover", disk("vm.sock"))
    guest.expect("mounted")
    guest.expect("replayed", "1")
    for what in ("checksums", "checked", "errors"):
        guest.expect(what)
    guest.ends()
    daemon.stop()
    return f"rebooted, and recovered when {lost.strip()}"


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
