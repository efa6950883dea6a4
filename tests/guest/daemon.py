"""`mason run`, in a folder of its own."""
import json, os, select, signal, subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
MASON = os.environ.get("MASON_BIN", os.path.join(TARGET, "release", "mason"))


class Daemon:
    def __init__(self, home, graph):
        self.home = home
        self.write_graph(graph)
        self.start()

    def write_graph(self, text):
        with open(os.path.join(self.home, "vm.mason"), "w") as graph:
            graph.write(text)
        # Each export has a line when it is ready.
        self.exports = text.count("(listen ")

    def start(self):
        command = [MASON, "run", "vm.mason", "--state", "state", "--control", "c.sock"]
        with open(self.path("daemon.log"), "a") as log:
            self.child = subprocess.Popen(command, cwd=self.home, stdout=subprocess.PIPE, stderr=log, text=True)
        self.process = os.pidfd_open(self.child.pid)
        self.ready = [self.child.stdout.readline() for _ in range(self.exports)]
        assert all(line.startswith("ready ") for line in self.ready), f"the daemon said {self.ready}"

    def path(self, name):
        return os.path.join(self.home, name)

    def log(self):
        """What it has said of itself."""
        with open(self.path("daemon.log")) as log:
            return log.read()

    def kill(self):
        self.end(signal.SIGKILL)

    def stop(self):
        self.end(signal.SIGTERM)
        # One that another handed over to is not our child.
        assert self.child.returncode == 0, "the daemon did not end well"

    def end(self, signal_number):
        if self.process is None:
            return
        signal.pidfd_send_signal(self.process, signal_number)
        self.wait()

    def wait(self):
        ended, _, _ = select.select([self.process], [], [], 10)
        assert ended, "the daemon did not end"
        os.close(self.process)
        self.process = None
        self.child.wait(10)

    def hand_over(self):
        """Another process goes on. It is nobody's child that we could wait for."""
        to = json.loads(self.ask("handover", "--json"))["to"]
        heir = os.pidfd_open(to)
        self.wait()
        self.process = heir

    def ask(self, *words):
        """What `mason` with these words says."""
        done = subprocess.run(
            [MASON, *words, "--control", "c.sock"], cwd=self.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"mason {' '.join(words)}: {done.stderr}"
        return done.stdout
