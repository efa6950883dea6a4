"""What a scenario works with: a folder, a daemon in it, and machines."""
import shutil, tempfile, threading

from daemon import Daemon
from machine import Machine


class Bench:
    def __init__(self, initrd):
        self.initrd = initrd
        self.home = tempfile.mkdtemp(prefix="mason-guest-")
        self.daemon, self.machines = None, []

    def serve(self, graph):
        self.daemon = Daemon(self.home, graph)
        return self.daemon

    def boot(self, do, options):
        machine = Machine(self.home, self.initrd, do, options)
        self.machines.append(machine)
        machine.monitor.greet()
        return machine

    def close(self):
        for machine in self.machines:
            machine.kill()
        if self.daemon:
            self.daemon.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def last_words(self):
        """What there is to say when a scenario has failed."""
        for number, machine in enumerate(self.machines):
            yield f"--- guest {number}", *machine.tail[-20:], *machine.rest()
        if self.daemon:
            yield "--- mason", self.daemon.log()


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
