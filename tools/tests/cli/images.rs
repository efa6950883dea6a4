//! `mason volume import` and `export`: what is in an image is in the volume, and QEMU reads what comes out.

use crate::harness::{Ended, Home, MASON};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

fn qemu(home: &Home, args: &[&str]) -> Ended {
    Ended::of(Command::new("qemu-img").args(args).current_dir(home.path("")).output().unwrap())
}

/// `disk.raw`: of that size, with something here and there, and in its last bytes.
fn disk(home: &Home, size: u64) {
    let file = std::fs::File::create_new(home.path("disk.raw")).unwrap();
    file.set_len(size).unwrap();
    let mut rng = fastrand::Rng::with_seed(size);
    for at in [0, 70_000, 1 << 20, (5 << 20) + 4095, size - 3000] {
        let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(3000).collect();
        file.write_all_at(&bytes, at).unwrap();
    }
}

#[test]
fn images_come_and_go() {
    for size in [8 << 20, (8 << 20) + 777] {
        let home = Home::new();
        disk(&home, size);
        home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
        for (image, args) in [("plain.qcow2", &[][..]), ("packed.qcow2", &["-c"])] {
            qemu(&home, &[&["convert", "-O", "qcow2"], args, &["disk.raw", image]].concat()).done();
        }
        for (volume, image) in [("a", "disk.raw"), ("b", "plain.qcow2"), ("c", "packed.qcow2")] {
            home.mason(&["volume", "import", "a.pool", volume, image]).done();
            for out in ["out.raw", "out.qcow2"] {
                home.mason(&["volume", "export", "a.pool", volume, out]).done();
                let compared = qemu(&home, &["compare", "disk.raw", out]);
                // A volume has whole blocks.
                assert!(compared.out.contains("Images are identical"), "{volume}, {out}: {compared:?}");
                if out.ends_with("qcow2") {
                    qemu(&home, &["check", "-q", out]).done();
                }
                std::fs::remove_file(home.path(out)).unwrap();
            }
        }
        let stat = home.mason(&["volume", "stat", "a.pool", "a", "--json"]).json();
        assert!(stat["mapped"].as_u64().unwrap() <= 8 * 4096, "holes take no room: {stat}");
        home.mason(&["volume", "snapshot", "a.pool", "a@s"]).done();
        home.mason(&["volume", "export", "a.pool", "a@s", "snap", "--as", "qcow2"]).done();
        assert!(qemu(&home, &["compare", "-F", "qcow2", "disk.raw", "snap"]).out.contains("identical"));
        assert_eq!(home.mason(&["pool", "check", "a.pool"]).code, Some(0));
    }
}

/// Text compresses, and noise does not; both come back, from the volume, a snapshot, a copy elsewhere, over a daemon and without one.
#[test]
fn what_is_compressed_takes_less_and_is_the_same() {
    let home = Home::new();
    let mut rng = fastrand::Rng::with_seed(4);
    let mut bytes: Vec<u8> = b"a guest's log says the same again and again\n".repeat(24_000);
    bytes.extend(std::iter::repeat_with(|| rng.u8(..)).take(1 << 20));
    std::fs::write(home.path("disk.raw"), &bytes).unwrap();
    for pool in ["a.pool", "b.pool"] {
        home.mason(&["pool", "create", pool, "--size", "128M"]).done();
    }
    let same = |pool: &str, volume: &str| {
        home.mason(&["volume", "export", pool, volume, "out.raw"]).done();
        let found = std::fs::read(home.path("out.raw")).unwrap();
        std::fs::remove_file(home.path("out.raw")).unwrap();
        assert!(found.starts_with(&bytes), "{pool}, {volume}");
    };
    for (how, format) in [("lz4", "1"), ("zstd", "1"), ("lz4", "2"), ("zstd", "2")] {
        let volume = format!("{how}{format}");
        let kept = ["--compress", how, "--format", format];
        home.mason(&[&["volume", "import", "a.pool", &volume, "disk.raw"], &kept[..]].concat()).done();
        let stat = home.mason(&["volume", "stat", "a.pool", &volume, "--json"]).json();
        let [data, takes] = ["data", "takes"].map(|key| stat["compressed"][key].as_u64().unwrap());
        assert!(data >= 1 << 20 && takes * 6 <= data, "{stat}");
        let freed = stat["freed_if_deleted"].as_u64().unwrap();
        assert!(freed < (1 << 20) + (512 << 10), "{stat}");
        same("a.pool", &volume);
        home.mason(&["volume", "snapshot", "a.pool", &format!("{volume}@s")]).done();
        let mut sender = home.command(MASON, &["volume", "send", "a.pool", &format!("{volume}@s")]);
        let mut sender = sender.stdout(Stdio::piped()).spawn().unwrap();
        let mut receiver = home.command(MASON, &["volume", "receive", "b.pool", &volume, "--compress", how]);
        Ended::of(receiver.stdin(sender.stdout.take().unwrap()).output().unwrap()).done();
        assert!(sender.wait().unwrap().success());
        same("b.pool", &format!("{volume}@s"));
        let there = home.mason(&["volume", "stat", "b.pool", &volume, "--json"]).json();
        assert_eq!(there["compressed"], stat["compressed"]);
    }
    for pool in ["a.pool", "b.pool"] {
        assert_eq!(home.mason(&["pool", "check", pool]).code, Some(0));
    }
}

#[test]
fn what_cannot_be_imported_leaves_nothing() {
    let home = Home::new();
    disk(&home, 8 << 20);
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    home.mason(&["volume", "create", "a.pool", "there", "--size", "1M"]).done();
    qemu(&home, &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "child.qcow2"]).done();
    qemu(&home, &["convert", "-O", "qcow2", "disk.raw", "d.qcow2"]).done();
    let whole = std::fs::read(home.path("d.qcow2")).unwrap();
    std::fs::write(home.path("cut.qcow2"), &whole[..100]).unwrap();
    let refused = |args: &[&str], why: &str| {
        let failed = home.mason(&[&["volume"], args].concat()).failed();
        assert!(failed.contains(why), "{args:?}: {failed}");
    };
    refused(&["import", "a.pool", "v", "child.qcow2"], "it needs other files");
    refused(&["import", "a.pool", "there", "disk.raw"], "there is a volume there already");
    refused(&["import", "a.pool", "v", "none.raw"], "none.raw: ");
    refused(&["import", "a.pool", "v", "cut.qcow2"], "cut.qcow2: ");
    refused(&["export", "a.pool", "there", "disk.raw"], "disk.raw is there already");
    refused(&["export", "a.pool", "v", "v.raw"], "there is no volume v");
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..40 {
        let mut bytes = whole.clone();
        for _ in 0..rng.usize(1..4) {
            let most = [104, bytes.len()][rng.usize(0..2)];
            let at = rng.usize(0..most);
            bytes[at] = rng.u8(..);
        }
        std::fs::write(home.path("bad.qcow2"), &bytes).unwrap();
        let ended = home.mason(&["volume", "import", "a.pool", "v", "bad.qcow2", "--as", "qcow2"]);
        match ended.code {
            Some(0) => drop(home.mason(&["volume", "delete", "a.pool", "v"]).done()),
            code => assert_eq!(code, Some(1), "{ended:?}"),
        }
    }
    let left = home.mason(&["volume", "list", "a.pool", "--json"]).json();
    assert_eq!(left["volumes"].as_array().unwrap().len(), 1, "{left}");
    assert_eq!(home.mason(&["pool", "check", "a.pool"]).code, Some(0));
}

/// What is no image that is read, or not all of one, is not taken for a disk.
#[test]
fn images_that_would_be_something_else_are_refused() {
    let home = Home::new();
    disk(&home, 8 << 20);
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    let refused = |image: &str, why: &str| {
        let failed = home.mason(&["volume", "import", "a.pool", "v", image]).failed();
        assert!(failed.contains(image) && failed.contains(why), "{image}: {failed}");
    };
    let secret = ["--object", "secret,id=k,data=secret"];
    let crypt = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    let make = [&["create", "-q", "-f", "qcow2"], &secret[..], &["-o", crypt, "locked.qcow2", "8M"]].concat();
    qemu(&home, &make).done();
    refused("locked.qcow2", "it is encrypted");
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed"] {
        let image = format!("d.{format}");
        qemu(&home, &["convert", "-O", format, "disk.raw", &image]).done();
        refused(&image, &format!("it is {format}, "));
    }
    qemu(&home, &["convert", "-O", "vpc", "-o", "subformat=fixed", "disk.raw", "fixed.vpc"]).done();
    refused("fixed.vpc", "it is vpc");
    qemu(&home, &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "1M"]).done();
    refused("flat.vmdk", "it is vmdk");
    std::fs::write(home.path("d.luks"), [b"LUKS\xba\xbe".to_vec(), vec![0; 8192]].concat()).unwrap();
    refused("d.luks", "it is LUKS");
    home.mason(&["volume", "import", "a.pool", "v", "d.luks", "--as", "raw"]);
    home.mason(&["volume", "delete", "a.pool", "v"]).done();
    std::fs::write(home.path("none.img"), b"").unwrap();
    refused("none.img", "it is empty");
    refused(".", "it is neither a file nor a block device");
    for options in ["compression_type=zstd", "extended_l2=on"] {
        qemu(&home, &["convert", "-c", "-O", "qcow2", "-o", options, "disk.raw", "new.qcow2"]).done();
        refused("new.qcow2", "");
    }
    assert_eq!(home.mason(&["volume", "list", "a.pool", "--json"]).json()["volumes"], serde_json::json!([]));
}

/// Wherever a qcow2 image ends early, it is refused; QEMU's own that are whole are not, however they were made.
#[test]
fn an_image_that_is_cut_is_refused() {
    let home = Home::new();
    disk(&home, (8 << 20) + 777);
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    let convert = |args: &[&str]| {
        qemu(&home, &[&["convert", "-O", "qcow2"], args, &["disk.raw", "d.qcow2"]].concat()).done()
    };
    let ways: &[&[&str]] = &[
        &[],
        &["-c"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "preallocation=metadata"],
        &["-o", "compat=0.10"],
        &["-c", "-o", "cluster_size=4k"],
    ];
    for args in ways {
        convert(args);
        home.mason(&["volume", "import", "a.pool", "v", "d.qcow2"]).code.filter(|code| *code == 0).unwrap();
        home.mason(&["volume", "export", "a.pool", "v", "out.raw"]).done();
        let compared = qemu(&home, &["compare", "disk.raw", "out.raw"]);
        assert!(compared.out.contains("identical"), "{args:?}: {compared:?}");
        std::fs::remove_file(home.path("out.raw")).unwrap();
        home.mason(&["volume", "delete", "a.pool", "v"]).done();
        if args.contains(&"preallocation=metadata") {
            continue;
        }
        let whole = std::fs::read(home.path("d.qcow2")).unwrap();
        for part in [1, 8, 20, 50, 90, 99] {
            std::fs::write(home.path("cut.qcow2"), &whole[..whole.len() * part / 100]).unwrap();
            let failed =
                home.mason(&["volume", "import", "a.pool", "v", "cut.qcow2", "--as", "qcow2"]).failed();
            assert!(failed.contains("cut.qcow2: "), "{args:?}, {part}: {failed}");
        }
    }
    // What a guest has written last, in the midst of a cluster.
    qemu(&home, &["create", "-q", "-f", "qcow2", "written.qcow2", "8M"]).done();
    let writes = ["-f", "qcow2", "-c", "write -q -P 7 1M 4k", "-c", "write -q -P 8 5M 512", "written.qcow2"];
    Ended::of(Command::new("qemu-io").args(writes).current_dir(home.path("")).output().unwrap()).done();
    home.mason(&["volume", "import", "a.pool", "v", "written.qcow2"]).done();
}

/// A terabyte of holes takes no time, and an image of odd length is said to have become longer.
#[test]
fn holes_are_not_read() {
    let home = Home::new();
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    let file = std::fs::File::create_new(home.path("large.raw")).unwrap();
    let size = (1 << 40) + 5000;
    file.set_len(size).unwrap();
    for at in [123_456, 1 << 39, size - 9] {
        file.write_all_at(b"something", at).unwrap();
    }
    let said = home.mason(&["volume", "import", "a.pool", "v", "large.raw"]).done();
    let rounded = (1u64 << 40) + 8192;
    assert_eq!(said, format!("v has {rounded} bytes: the {size} of the image, rounded up\n"));
    home.mason(&["volume", "export", "a.pool", "v", "out.raw"]).done();
    let out = std::fs::File::open(home.path("out.raw")).unwrap();
    for at in [123_456, 1 << 39, size - 9] {
        let mut found = [0; 9];
        out.read_exact_at(&mut found, at).unwrap();
        assert_eq!(&found, b"something");
    }
    let stat = home.mason(&["volume", "stat", "a.pool", "v", "--json"]).json();
    assert!(stat["mapped"].as_u64().unwrap() <= 4 * 4096, "{stat}");
}

/// What a command has left that was killed stands in nobody's way without a word about it.
#[test]
fn what_is_left_over_is_called_that() {
    let home = Home::new();
    disk(&home, 8 << 20);
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    home.mason(&["volume", "import", "a.pool", "v", "disk.raw"]).done();
    for part in ["w.importing", "w.restoring"] {
        home.mason(&["volume", "create", "a.pool", part, "--size", "1M"]).done();
    }
    std::fs::write(home.path("out.raw.part"), b"x").unwrap();
    std::fs::write(home.path("v.txt"), home.mason(&["volume", "dump", "a.pool", "v"]).done()).unwrap();
    let failed = home.mason(&["volume", "export", "a.pool", "v", "out.raw"]).failed();
    assert!(failed.contains("out.raw.part, which an interrupted export has left"), "{failed}");
    let failed = home.mason(&["volume", "import", "a.pool", "w", "disk.raw"]).failed();
    assert!(failed.contains("w.importing, which an interrupted command has left"), "{failed}");
    let dump = std::fs::File::open(home.path("v.txt")).unwrap();
    let mut restore = home.command(MASON, &["volume", "restore", "a.pool", "w"]);
    let failed = Ended::of(restore.stdin(dump).output().unwrap()).failed();
    assert!(failed.contains("w.restoring, which an interrupted command has left"), "{failed}");
    home.mason(&["volume", "delete", "a.pool", "w.importing"]).done();
    home.mason(&["volume", "import", "a.pool", "w", "disk.raw"]).done();
}
