"""What a guest boots: Debian's kernel for virtual machines, and a first file system with the programs that it runs."""
import glob, os, re, shutil, subprocess

HERE = os.path.dirname(os.path.abspath(__file__))
MODULES = "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk".split()
MODULES += "failover net_failover virtio_net nbd".split()
PROGRAMS = "mkfs.ext4 e2fsck fio nbd-client".split()


def kernel():
    """The newest kernel for virtual machines: its image, and the folder of its modules."""
    image = sorted(glob.glob("/boot/vmlinuz-*cloud*"))[-1]
    return image, "/lib/modules/" + os.path.basename(image).removeprefix("vmlinuz-")


def make_initrd(home):
    """The guest's first file system, with its programs and their libraries."""
    root = os.path.join(home, "root")
    for folder in "bin mod proc sys dev mnt tmp".split():
        os.makedirs(os.path.join(root, folder))
    shutil.copy(shutil.which("busybox"), os.path.join(root, "bin/busybox"))
    shutil.copy(os.path.join(HERE, "init"), os.path.join(root, "init"))
    os.chmod(os.path.join(root, "init"), 0o755)
    for module in MODULES:
        found = subprocess.run(["find", kernel()[1], "-name", module + ".ko"], capture_output=True, text=True).stdout
        shutil.copy(found.split()[0], os.path.join(root, "mod"))
    for program in PROGRAMS:
        add_program(root, program)
    initrd = os.path.join(home, "initrd")
    pack = "find . | cpio --quiet -o -H newc > " + initrd
    subprocess.run(["sh", "-c", pack], cwd=root, check=True)
    return initrd


def add_program(root, name):
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    shutil.copy(path, os.path.join(root, "bin"))
    for library in re.findall(r"/\S+", subprocess.run(["ldd", path], capture_output=True, text=True).stdout):
        os.makedirs(root + os.path.dirname(library), exist_ok=True)
        shutil.copy(library, root + library)
