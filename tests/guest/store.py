"""Ceph's S3, in a folder of its own: `mason-bucket rgw` keeps it, and ends it with us."""
import json, os, subprocess

from daemon import MASON, TARGET

PROGRAM = os.path.join(TARGET, "debug", "mason-bucket")


class Store:
    def __init__(self, folder):
        os.makedirs(folder)
        self.log = os.path.join(folder, "said")
        assert os.path.exists(PROGRAM), f"{PROGRAM} is missing: cargo build --workspace --all-targets"
        command = [PROGRAM, "rgw", "--folder", os.path.join(folder, "ceph")]
        with open(self.log, "w") as log:
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        said = self.says()
        self.endpoint, self.keys = said["endpoint"], os.path.join(folder, "keys")
        with open(self.keys, "w") as keys:
            keys.write(f"[default]\naws_access_key_id={said['access']}\naws_secret_access_key={said['secret']}\n")

    def says(self):
        line = self.child.stdout.readline()
        assert line, "the store has ended: " + open(self.log).read()
        return json.loads(line)

    def restart(self):
        """The gateway dies in the midst of whatever it does. The objects stay."""
        self.child.stdin.write("restart\n")
        self.child.stdin.flush()
        self.says()

    def bucket(self, verb, url, *words):
        """What `mason bucket` says."""
        command = [MASON, "bucket", verb, url, "--endpoint", self.endpoint, "--credentials", self.keys, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"mason bucket {verb}: {done.stdout}{done.stderr}"
        return done.stdout

    def end(self):
        self.child.stdin.close()
        self.child.wait(30)
