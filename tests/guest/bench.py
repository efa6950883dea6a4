"""What a scenario works with: a folder, a daemon in it, and machines."""
import os, shutil, tempfile, threading

from daemon import Daemon
from machine import Machine


class Bench:
    def __init__(self, initrd):
        self.initrd = initrd
        self.home = tempfile.mkdtemp(prefix="mason-guest-")
        self.daemons, self.machines = [], []

    def serve(self, graph, folder=""):
        """A daemon in a folder of its own; without one in the folder of the machines, which know its sockets by name."""
        home = os.path.join(self.home, folder)
        os.makedirs(home, exist_ok=True)
        self.daemons.append(Daemon(home, graph))
        return self.daemons[-1]

    def path(self, name):
        return os.path.join(self.home, name)

    def boot(self, do, options):
        machine = Machine(self.home, self.initrd, do, options)
        self.machines.append(machine)
        machine.monitor.greet()
        return machine

    def close(self):
        for machine in self.machines:
            machine.kill()
        for daemon in self.daemons:
            daemon.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def last_words(self):
        """What there is to say when a scenario has failed."""
        for number, machine in enumerate(self.machines):
            yield f"--- guest {number}", *machine.tail[-20:], *machine.rest()
        for daemon in self.daemons:
            yield "--- mason", daemon.log()


class Beside:
    """Work beside a guest: `work` gets an event that is set when it has to end; `outcome` is what it returns."""

    def __init__(self, work):
        self.over = threading.Event()
        self.work, self.failure, self.said = work, None, None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            self.said = self.work(self.over)
        except Exception as failure:  # It belongs to whoever waits for the outcome.
            self.failure = failure

    def outcome(self):
        self.over.set()
        self.thread.join()
        if self.failure:
            raise self.failure
        return self.said
