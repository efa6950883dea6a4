//! Key slots, and that nothing tells what is in them.

use super::super::keys::{Secret, Source};
use super::kit::{Bench, CATALOGUE, KEY_A, KEY_B, WORDS, call, events, get, share};
use blockmason::testing::{TestDisk, checked, run};
use std::os::unix::fs::PermissionsExt;

#[test]
fn key_slots_come_and_go_and_the_last_one_stays() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let path = |name: &str| bench.path(name).display().to_string();
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        assert_eq!(get(&disk, "slots"), "0 key");
        assert!(call(&disk, "remove_slot", "0").await.contains("the last key slot"));
        assert_eq!(call(&disk, "add_passphrase_file", &path("words")).await, "");
        assert_eq!(call(&disk, "add_key_file", &path("b.key")).await, "");
        assert_eq!(get(&disk, "slots"), "0 key, 1 passphrase, 2 key");
        assert_eq!(call(&disk, "remove_slot", "0").await, "");
        assert!(call(&disk, "remove_slot", "0").await.contains("there is no key slot 0"));
        assert!(call(&disk, "remove_slot", "8").await.contains("there is no key slot 8"));
        assert!(call(&disk, "add_key_file", "b.key").await.contains("begin with a `/`"));
        assert!(call(&disk, "add_key_file", &path("none")).await.contains("cannot be read"));
        disk.disk.stop().await.unwrap();
        let said = bench.refusal("Disk", "(key_file @/a.key) (block 512)").await;
        assert!(said.contains("no key slot opens with this key"), "{said}");
        for params in ["(key_file @/b.key)", "(passphrase_file @/words)", "(key_command /bin/cat @/b.key)"] {
            let disk = bench.serve("Disk", &format!("{params} (block 512)")).await.unwrap();
            assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512], "{params}");
            disk.disk.stop().await.unwrap();
        }
        let disk = bench.serve("Disk", "(key_file @/b.key) (block 512)").await.unwrap();
        disk.read(0, 512).await.unwrap();
        for _ in 0..6 {
            assert_eq!(call(&disk, "add_key_file", &path("a.key")).await, "");
        }
        assert!(call(&disk, "add_key_file", &path("a.key")).await.contains("all 8 key slots are used"));
    });
}

#[test]
fn a_backup_of_the_header_opens_a_volume_that_has_lost_both() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        let path = bench.path("header");
        assert_eq!(call(&disk, "backup_header", path.to_str().unwrap()).await, "");
        assert!(call(&disk, "backup_header", path.to_str().unwrap()).await.contains("cannot be written"));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        disk.disk.stop().await.unwrap();
        let mut image = bench.image("Disk").await;
        image[..32 << 10].fill(0xee);
        bench.set("Disk", &image).await;
        let params = "(key_file @/a.key) (block 512) (header @/header)";
        let disk = bench.serve("Disk", params).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
        disk.write(512, &[2; 512]).await.unwrap();
        disk.disk.stop().await.unwrap();
        let disk = bench.serve("Disk", "(key_file @/a.key) (block 512)").await.unwrap();
        assert_eq!(disk.read(0, 1024).await.unwrap(), [[1; 512], [2; 512]].concat());
    });
}

#[test]
fn what_is_erased_is_gone_at_once_and_for_ever() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        assert!(call(&disk, "erase", "").await.contains("the id that `volume` says"));
        let id = get(&disk, "volume");
        assert_eq!(call(&disk, "erase", &id).await, "");
        for error in [
            disk.read(0, 512).await.unwrap_err(),
            disk.write(0, &[1; 512]).await.unwrap_err(),
            disk.op(blockmason::Op::WriteZeroes, 0, 512).await.unwrap_err(),
        ] {
            assert!(error.to_string().contains("the volume was erased"), "{error}");
        }
        disk.disk.stop().await.unwrap();
        let said = bench.refusal("Disk", "(key_file @/a.key) (block 512) (create yes)").await;
        assert!(said.contains("was erased: nothing opens it"), "{said}");
        let image = bench.image("Disk").await;
        assert!(
            [128..1312, 16384 + 128..16384 + 1312]
                .into_iter()
                .all(|keys| image[keys].iter().all(|it| *it == 0))
        );
    });
}

#[test]
fn commands_print_keys_or_say_why_not() {
    let command = |text: &str| Source::Command(text.split_whitespace().map(str::to_owned).collect());
    for (text, wanted) in [
        ("/bin/false", "has failed"),
        ("/no/such/program", "cannot be run"),
        ("/bin/echo short", "32 bytes at least, and this one has 6"),
        ("/bin/cat /dev/zero", "65536 bytes at most"),
    ] {
        let said = command(text).read().unwrap_err().to_string();
        assert!(said.contains(wanted), "{text}: {said}");
    }
    command("/bin/echo thirty-two_bytes_and_then_some_more").read().unwrap();
}

#[test]
fn exactly_one_parameter_says_where_the_key_is() {
    for (params, good) in [
        ("", false),
        ("(key_file a)", true),
        ("(passphrase_file a)", true),
        ("(key_command a b c)", true),
        ("(key_file a) (passphrase_file b)", false),
        ("(key_file a) (key_command b)", false),
    ] {
        let text = format!("element X (type crypto) {params} element M (type mem) (size 4M) X -> M");
        let found = checked(crate::ALL, &format!("element N (type nbd) (listen unix:x) {text} N -> X"));
        assert_eq!(found.is_ok(), good, "{params}: {:?}", found.err());
    }
}

#[test]
fn a_key_file_that_will_not_do_is_found_before_anything_is_served() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        for (name, bytes, wanted) in [
            ("none", None, "the secret cannot be read"),
            (
                "short",
                Some(&b"31 bytes are one less than need"[..]),
                "32 bytes at least, and this one has 31",
            ),
            ("long", Some(&[1; 65537]), "65536 bytes at most"),
        ] {
            if let Some(bytes) = bytes {
                std::fs::write(bench.path(name), bytes).unwrap();
            }
            let path = bench.path(name);
            let text = format!(
                "element X (type crypto) (key_file {}) element Disk (type shared) X -> Disk",
                path.display()
            );
            let said = TestDisk::new(&host, CATALOGUE, &text, "X").await.err().unwrap().to_string();
            assert!(said.contains(wanted) && said.contains(name), "{said}");
        }
    });
}

/// True if a text has a piece of a secret, plain or as numbers.
fn tells(text: &str, secret: &[u8]) -> bool {
    secret.windows(6).any(|piece| {
        let hex: String = piece.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{piece:?}");
        let plain = String::from_utf8_lossy(piece).into_owned();
        [hex.as_str(), list.trim_matches(['[', ']']), &plain].iter().any(|form| text.contains(form))
    })
}

#[test]
fn nothing_that_is_printed_tells_a_key() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let mut printed = String::new();
        for (name, source) in [
            ("a.key", Source::Key as fn(_) -> _),
            ("words", Source::Passphrase),
            ("b.key", |path: std::path::PathBuf| {
                Source::Command(vec!["/bin/cat".to_owned(), path.display().to_string()])
            }),
        ] {
            let source: Source = source(bench.path(name));
            // Commands are waited for on threads that may wait.
            let read = std::thread::spawn(move || format!("{source:?} {:?}", source.read().unwrap()));
            printed += &read.join().unwrap();
        }
        let drawn = Secret::draw().unwrap();
        printed += &format!("{drawn:?}");
        share(&host, "Disk", super::kit::room(16, 512));
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        printed += &call(&disk, "add_passphrase_file", bench.path("words").to_str().unwrap()).await;
        for reading in disk.disk.graph().readings() {
            printed += &format!("{:?}", reading.value);
        }
        disk.disk.stop().await.unwrap();
        printed += &bench.refusal("Disk", "(key_file @/b.key) (block 512)").await;
        printed += &events(&host).concat();
        for secret in [KEY_A, KEY_B, WORDS] {
            assert!(!tells(&printed, secret), "{printed}");
        }
        assert!(tells(&format!("{:?}", KEY_A), KEY_A), "it would be noticed");
    });
}

#[test]
fn a_volume_that_cannot_be_opened_is_not_tried_for_each_request() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        bench.open("Disk", "(block 512)").await.disk.stop().await.unwrap();
        let script = "echo x >> @/tries; echo thirty-two_bytes_and_then_some_more";
        std::fs::write(bench.path("script"), script.replace('@', bench.path("").to_str().unwrap())).unwrap();
        let disk = bench.serve("Disk", "(key_command /bin/sh @/script) (block 512)").await.unwrap();
        for _ in 0..20 {
            let error = disk.read(0, 512).await.unwrap_err().to_string();
            assert!(error.contains("no key slot opens with this key"), "{error}");
        }
        assert_eq!(std::fs::read_to_string(bench.path("tries")).unwrap(), "x\n");
        disk.disk.stop().await.unwrap();
    });
}
