"""A guest has fio write and verify, while the host does things to the daemon."""
import os, re, time

from bench import Beside
from machine import NETWORK, disk

SIZE = 256 << 20
CHANGES, KILLS, HANDOVERS = 3, 10, 5

GRAPH = """
element Guest (type vhost_user_blk) (listen unix:vm.sock) (queues 2) (serial vm1)
element Disk (type file) (path disk.img) (size %dM)
Guest -> Disk
"""
NBD = GRAPH.replace("(type vhost_user_blk) (listen unix:vm.sock) (queues 2) (serial vm1)",
                    "(type nbd) (listen tcp:127.0.0.1:0) (name disk)")


def edits(bench):
    """Elements come and go, and the graph is replaced behind the gate; then the disk grows."""
    return grow(bench, change)


def kills(bench):
    """SIGKILL and a start, ten times; then the disk grows."""
    return grow(bench, kill)


def handovers(bench):
    """Another process goes on, five times; then the disk grows."""
    return grow(bench, hand_over)


def nbd(bench):
    """The disk is one of the kernel's own NBD client, and is edited like the others."""
    daemon = bench.serve(NBD % (SIZE >> 20))
    port = re.search(r":(\d+)/", daemon.ready[0]).group(1)
    guest = bench.boot(f"nbd mason.port={port} mason.size=2M", NETWORK)
    said = work(guest, lambda over: change(daemon, over, NBD))
    guest.expect("disconnected")
    guest.ends()
    daemon.stop()
    return said


def grow(bench, trouble):
    daemon = bench.serve(GRAPH % (SIZE >> 20))
    guest = bench.boot("grow mason.size=20M", disk("vm.sock"))
    guest.expect("queues", "2")
    guest.expect("cache", "write back")
    said = work(guest, lambda over: trouble(daemon, over))
    guest.expect("size", str(SIZE // 512))
    guest.says("resizable")
    os.truncate(daemon.path("disk.img"), 2 * SIZE)
    daemon.write_graph(GRAPH % (2 * SIZE >> 20))
    daemon.ask("reload", "vm.mason")
    guest.expect("size", str(2 * SIZE // 512))
    guest.ends()
    daemon.stop()
    return said


def work(guest, trouble):
    """What every guest does here, with trouble meanwhile."""
    guest.expect("mounted")
    guest.says("working")
    beside = Beside(trouble)
    try:
        guest.expect("fio")
    finally:
        said = beside.outcome()
    latency = guest.says("longest")
    for what in ("checksums", "trimmed", "checked", "errors"):
        guest.expect(what)
    return f"{said}; requests took {longest(latency)}"


def change(daemon, over, graph=GRAPH):
    count = 0
    while not over.wait(0.3):
        daemon.ask("insert", "probe", "between", "Guest", "and", "Disk")
        daemon.ask("remove", "Probe")
        # Behind the gate: the sink is another instance.
        daemon.write_graph(graph % ((SIZE >> 20) + count % 2))
        daemon.ask("reload", "vm.mason")
        count += 1
    assert count >= CHANGES, f"only {count} changes"
    return f"{count} rounds of changes"


def kill(daemon, over):
    """At instants that nobody has chosen with care."""
    return "killed " + times(KILLS, over, lambda: (daemon.kill(), daemon.start()))


def hand_over(daemon, over):
    return "handed over " + times(HANDOVERS, over, daemon.hand_over)


def times(count, over, trouble):
    slowest = 0
    for _ in range(count):
        assert not over.wait(0.7), "the guest was done too early"
        begun = time.monotonic()
        trouble()
        slowest = max(slowest, time.monotonic() - begun)
    return f"{count} times, served again within {slowest * 1000:.0f} ms"


def longest(latency):
    """The longest request of what fio says, in milliseconds."""
    scale = {"nsec": 1e6, "usec": 1e3, "msec": 1}
    found = re.findall(r"lat \((\w+)\): min=\S+\s+max=\s*([\d.]+)(k?)", latency.replace(",", " "))
    return f"{max(float(n) * (1000 if k else 1) / scale[unit] for unit, n, k in found):.0f} ms at most"
