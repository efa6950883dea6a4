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
