"""The disk of a guest is encrypted in a bucket of Ceph's S3; the daemon dies, and the store, while the guest writes."""
import os, subprocess, time

from bench import Beside
from clones import fsck, with_sbin
from daemon import ROOT
from load import longest
from machine import disk
from store import Store

KILLS, URL = 3, "s3://vms/vm1"
GUEST = "(type vhost_user_blk) (listen unix:vm.sock) (queues 2) (serial vm1)"
EXPORT = "(type nbd) (listen unix:cloud.sock)"


def cloud(bench):
    """Whatever dies, the guest only waits; what is in the bucket in the end is a sound file system without the SSD."""
    store = Store(bench.path("store"))
    try:
        return served_from(store, bench)
    finally:
        store.end()


def served_from(store, bench):
    store.bucket("create", URL, "--size", "160M", "--make-bucket")
    with open(bench.path("vm1.key"), "wb") as key:
        key.write(os.urandom(32))
    # Much goes to the bucket while the guest runs.
    daemon = bench.serve(graph(store, GUEST).replace("(size 256M)", "(size 96M) (dirty_time 200ms)"))
    guest = bench.boot("volume", disk("vm.sock"))
    guest.expect("mounted")
    guest.says("moves")
    said = trouble(daemon, store)
    guest.types()
    guest.expect("fio")
    rounds = guest.says("rounds")
    latency = guest.says("longest")
    for what in ("checksums", "trimmed", "checked", "errors"):
        guest.expect(what)
    guest.ends()
    daemon.ask("call", "Ssd.flush")
    wait_until_all_is_there(daemon)
    sent = int(daemon.ask("get", "Disk.sent"))
    assert sent > 0 and daemon.ask("get", "Disk.epoch").strip() == str(2 * KILLS + 1), "no such thing has happened"
    daemon.stop()
    store.bucket("check", URL)
    look(store, bench)
    return f"{said}; fio ran {rounds} times, {sent >> 20} MB were sent at last; requests took {longest(latency)}"


def graph(store, export):
    """The graph that ships, from this store, with another export."""
    with open(os.path.join(ROOT, "graphs", "cloud.mason")) as file:
        text = file.read()
    where = f"(endpoint {store.endpoint}) (credentials {store.keys})"
    for old, new in (("(endpoint http://127.0.0.1:9000)", where), (EXPORT, export)):
        assert old in text, f"there is no {old} in the graph"
        text = text.replace(old, new)
    return text


def trouble(daemon, store):
    """The daemon, the gateway, and both at once, again and again."""
    slowest = 0
    for _ in range(KILLS):
        time.sleep(1)
        slowest = max(slowest, dies(daemon))
        time.sleep(1)
        store.restart()
        time.sleep(1)
        both = Beside(lambda over: store.restart())
        slowest = max(slowest, dies(daemon))
        both.outcome()
    return f"daemon and store died {2 * KILLS} times each, the daemon served again within {slowest * 1000:.0f} ms"


def dies(daemon):
    begun = time.monotonic()
    daemon.kill()
    daemon.start()
    return time.monotonic() - begun


def wait_until_all_is_there(daemon):
    end = time.monotonic() + 60
    while daemon.ask("get", "Ssd.dirty").strip() != "0":
        assert time.monotonic() < end, "changes do not get to the bucket"
        time.sleep(0.1)


def look(store, bench):
    """From the bucket alone, without the SSD."""
    lines = graph(store, "(type nbd) (listen unix:look.sock)").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("element Ssd ")).replace("-> Ssd ", "")
    os.makedirs(bench.path("look"))
    os.link(bench.path("vm1.key"), bench.path("look/vm1.key"))
    daemon, image = bench.serve(text + "\n", "look"), bench.path("look.img")
    uri = "nbd+unix:///?socket=" + daemon.path("look.sock")
    subprocess.run(["nbdcopy", uri, image], check=True, timeout=60)
    daemon.stop()
    assert fsck(image, "-fn") == 0, "the file system is damaged"
    for name in ("kept", "kept.sum"):
        dump = ["debugfs", "-R", f"dump /{name} {bench.path(name)}", image]
        subprocess.run(dump, check=True, capture_output=True, env=with_sbin())
    subprocess.run(["md5sum", "--status", "-c", "kept.sum"], cwd=bench.home, check=True)
