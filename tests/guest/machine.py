"""QEMU with a guest: what its console says comes line by line, and its monitor (QMP) is asked."""
import json, queue, re, socket, subprocess, threading, time

from initrd import kernel

# How long a guest may take for anything, in seconds: it is emulated, on a machine that has other work.
PATIENCE = 240

MEMORY = ["-m", "512", "-object", "memory-backend-memfd,id=mem,size=512M,share=on", "-numa", "node,memdev=mem"]
# One below a port of its own, which it can be unplugged from.
PORT = ["-device", "pcie-root-port,id=slot1,chassis=1,slot=1"]
DISK = {"driver": "vhost-user-blk-pci", "id": "disk", "chardev": "vm", "num-queues": 2, "bus": "slot1"}
NETWORK = ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]


def chardev(path):
    return ["-chardev", f"socket,id=vm,path={path},reconnect-ms=50"]


def disk(path):
    """Options of a machine whose disk is served at a socket."""
    return chardev(path) + PORT + ["-device", json.dumps(DISK)]


class Machine:
    def __init__(self, home, initrd, do, options):
        """Boots a guest that does what its command line says, or with `-incoming` waits for one."""
        ours, theirs = socket.socketpair()
        command = ["qemu-system-x86_64", "-M", "q35,accel=tcg", "-smp", "2", *MEMORY, "-nodefaults", "-display", "none"]
        command += ["-serial", "stdio", "-chardev", f"socket,id=monitor,fd={theirs.fileno()}"]
        command += ["-mon", "chardev=monitor,mode=control", *options, "-kernel", kernel()[0], "-initrd", initrd]
        command += ["-append", f"console=ttyS0 quiet panic=-1 mason.do={do}"]
        self.child = subprocess.Popen(
            command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", pass_fds=[theirs.fileno()])
        theirs.close()
        self.lines, self.tail = queue.Queue(), []
        threading.Thread(target=self.read, daemon=True).start()
        self.monitor = Monitor(ours)

    def read(self):
        for line in self.child.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(None)

    def says(self, what):
        """Waits until the guest says `what`; returns the rest of that line."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                line = self.lines.get(timeout=max(0, end - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"the guest did not say {what!r}"
            self.tail.append(line)
            found = re.search(r"SAYS " + what + r" ?(.*)", line)
            if found:
                return found.group(1)

    def expect(self, what, value="0"):
        said = self.says(what)
        assert said == value, f"{what}: {said!r} instead of {value!r}"

    def types(self):
        """What the guest waits for in `host_does`."""
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def rest(self):
        """Lines that nobody has waited for."""
        lines = [self.lines.get() for _ in range(self.lines.qsize())]
        return [line for line in lines if line is not None]

    def ends(self):
        self.says("done")
        self.child.wait(20)

    def kill(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()


class Monitor:
    def __init__(self, connection):
        connection.settimeout(PATIENCE)
        self.lines, self.to = connection.makefile("r"), connection
        self.events = []

    def greet(self):
        self.next()
        self.ask("qmp_capabilities")

    def next(self):
        line = self.lines.readline()
        assert line, "QEMU has ended"
        return json.loads(line)

    def ask(self, command, **arguments):
        # Names of QEMU have hyphens, which those of arguments cannot.
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.to.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            said = self.next()
            if "event" in said:
                self.events.append(said)
                continue
            assert "return" in said, f"{command}: {said}"
            return said["return"]

    def event(self, name, matches=lambda data: True):
        """Waits for an event, passing over all others; returns its data."""
        while True:
            said = self.events.pop(0) if self.events else self.next()
            if said.get("event") == name and matches(said.get("data", {})):
                return said.get("data", {})
