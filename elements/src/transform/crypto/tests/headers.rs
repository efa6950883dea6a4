//! Headers that are damaged, hostile, half written, or somebody else's.

use super::super::format::{COPIES, Cost, DataKey, Fault, HEADER, Header, Opener, SLOTS, Slot, layout};
use super::super::format::{Cipher, Entry};
use super::super::keys::Wrapped;
use super::kit::{Bench, call, get, tapped};
use blockmason::testing::run;
use proptest::prelude::*;

#[test]
fn one_damaged_copy_is_repaired_and_two_are_refused() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        disk.disk.stop().await.unwrap();
        let whole = bench.image("Disk").await;
        for copy in COPIES {
            for at in [0, 8, 40, 130, 1200, 3000, 4070, 4095] {
                let mut image = whole.clone();
                image[copy as usize + at] ^= 4;
                bench.set("Disk", &image).await;
                let disk = bench.open("Disk", "(block 512)").await;
                assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
                assert!(bench.image("Disk").await == image, "a reader writes nothing");
                disk.write(0, &[2; 512]).await.unwrap();
                disk.disk.stop().await.unwrap();
                let image = bench.image("Disk").await;
                let [first, second] = COPIES.map(|copy| &image[copy as usize..][..HEADER]);
                assert!(first == second && Header::decode(first).is_ok(), "repaired");
            }
        }
        let key = "(key_file @/a.key) (block 512) (create yes)";
        let mut image = whole.clone();
        COPIES.into_iter().for_each(|copy| image[copy as usize + 100] ^= 1);
        bench.set("Disk", &image).await;
        let said = bench.refusal("Disk", key).await;
        assert!(said.contains("not encrypted, or the header is lost"), "{said}");
        COPIES.into_iter().for_each(|copy| image[copy as usize..][..HEADER].fill(0));
        bench.set("Disk", &image).await;
        let said = bench.refusal("Disk", key).await;
        assert!(said.contains("the header is lost: both copies are zeros"), "{said}");
        let mut foreign = vec![0; image.len()];
        foreign[510..512].copy_from_slice(&[0x55, 0xaa]);
        bench.set("Disk", &foreign).await;
        let said = bench.refusal("Disk", key).await;
        assert!(said.contains("not encrypted, or the header is lost"), "{said}");
        assert!(bench.image("Disk").await == foreign, "and nothing is overwritten");
    });
}

#[test]
fn what_does_not_fit_the_header_is_said() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let said = bench.refusal("Disk", "(key_file @/a.key) (block 512)").await;
        assert!(said.contains("(create yes) makes an encrypted disk of it"), "{said}");
        bench.open("Disk", "(block 512)").await.disk.stop().await.unwrap();
        for (params, wanted) in [
            ("(key_file @/a.key)", "set (block 512)"),
            ("(key_file @/a.key) (block 512) (cipher aes-256-gcm-siv)", "set (cipher aes-256-gcm)"),
            ("(key_file @/b.key) (block 512)", "no key slot opens with this key"),
            ("(passphrase_file @/a.key) (block 512)", "no key slot opens with this key"),
        ] {
            let said = bench.refusal("Disk", params).await;
            assert!(said.contains(wanted), "{params}: {said}");
        }
        let mut image = bench.image("Disk").await;
        image.truncate(image.len() - 544);
        bench.set("Disk", &image).await;
        let said = bench.refusal("Disk", "(key_file @/a.key) (block 512)").await;
        assert!(said.contains("had 8192 bytes, and on the disk below is room for 7680"), "{said}");
        image.extend([0; 3 * 544]);
        bench.set("Disk", &image).await;
        let larger = bench.open("Disk", "(block 512)").await;
        assert_eq!(larger.read(0, 18 * 512).await.unwrap(), [0; 18 * 512]);
    });
}

#[test]
fn a_header_of_a_later_version_is_left_alone() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.read(0, 512).await.unwrap();
        let backup = bench.path("header");
        assert_eq!(call(&disk, "backup_header", backup.to_str().unwrap()).await, "");
        disk.disk.stop().await.unwrap();
        let whole = bench.image("Disk").await;
        for (at, byte) in [(8, 2), (12, 1)] {
            let mut image = whole.clone();
            let header = changed(image[..HEADER].to_vec(), &[(at, byte)]);
            image[..HEADER].copy_from_slice(&header);
            bench.set("Disk", &image).await;
            let params = "(key_file @/a.key) (block 512) (header @/header)";
            let said = bench.refusal("Disk", params).await;
            assert!(said.contains("this program knows version 1"), "{said}");
        }
    });
}

/// Somebody without a key cannot even lower a number.
#[test]
fn a_header_that_was_changed_with_a_right_checksum_is_refused() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        bench.open("Disk", "(block 512)").await.disk.stop().await.unwrap();
        let mut image = bench.image("Disk").await;
        for copy in COPIES.map(|copy| copy as usize) {
            image[copy + 48..copy + 56].copy_from_slice(&512u64.to_le_bytes());
            let sum = crc32fast::hash(&image[copy..copy + 4092]);
            image[copy + 4092..copy + 4096].copy_from_slice(&sum.to_le_bytes());
        }
        bench.set("Disk", &image).await;
        let said = bench.refusal("Disk", "(key_file @/a.key) (block 512)").await;
        assert!(said.contains("was changed by someone who does not have a key"), "{said}");
    });
}

/// The process dies before each request of a change of keys, and the one that it dies at is lost.
#[test]
fn a_crash_at_any_moment_of_a_change_leaves_a_volume_that_opens() {
    for (handler, argument) in
        [("add_passphrase_file", "words"), ("remove_slot", "1"), ("rotate", ""), ("erase", "")]
    {
        for left in 0..12 {
            run(1, async |host| {
                let bench = Bench::new(&host, 16, 512);
                let disk = bench.open("Disk", "(block 512)").await;
                disk.write(0, &[1; 1024]).await.unwrap();
                let added = bench.path("b.key");
                assert_eq!(call(&disk, "add_key_file", added.to_str().unwrap()).await, "");
                let argument = match handler {
                    "add_passphrase_file" => bench.path(argument).display().to_string(),
                    "erase" => get(&disk, "volume"),
                    _ => argument.to_owned(),
                };
                tapped(|tapped| tapped.changes_left = Some(left));
                let said = call(&disk, handler, &argument).await;
                let dead = tapped(|tapped| tapped.changes_left) == Some(0);
                tapped(|tapped| tapped.changes_left = Some(0));
                let _ = disk.disk.stop().await;
                tapped(|tapped| tapped.changes_left = None);
                let reopened = bench.serve("Disk", "(key_file @/a.key) (block 512)").await.unwrap();
                match reopened.read(0, 1024).await {
                    Ok(found) => assert!(found == [1; 1024] && (handler != "erase" || dead)),
                    Err(error) => {
                        let gone = error.to_string().contains("was erased");
                        assert!(handler == "erase" && gone && left > 0, "{handler}, {left}: {error}");
                        let image = bench.image("Disk").await;
                        let [first, second] = COPIES.map(|copy| &image[copy as usize..][..HEADER]);
                        assert!(first == second, "what was begun is ended");
                        return;
                    }
                }
                reopened.write(512, &[2; 512]).await.unwrap();
                assert_eq!(reopened.read(0, 1024).await.unwrap(), [[1; 512], [2; 512]].concat());
                if said.is_empty() && handler == "add_passphrase_file" {
                    assert_eq!(get(&reopened, "slots"), "0 key, 1 key, 2 passphrase");
                }
            });
        }
    }
}

#[test]
fn a_format_that_was_cut_off_begins_again_or_is_whole() {
    for left in 0..6 {
        run(1, async |host| {
            let bench = Bench::new(&host, 16, 512);
            tapped(|tapped| tapped.changes_left = Some(left));
            let disk = bench.open("Disk", "(block 512)").await;
            let _ = disk.write(0, &[1; 512]).await;
            let _ = disk.disk.stop().await;
            tapped(|tapped| tapped.changes_left = None);
            let disk = bench.open("Disk", "(block 512)").await;
            disk.write(0, &[2; 512]).await.unwrap();
            assert_eq!(disk.read(0, 1024).await.unwrap(), [[2; 512], [0; 512]].concat());
        });
    }
}

fn wrapped() -> impl Strategy<Value = Wrapped> {
    (any::<[u8; 12]>(), any::<[u8; 16]>(), any::<[u8; 32]>())
        .prop_map(|(nonce, a, b)| Wrapped { nonce, bytes: [&a[..], &b].concat().try_into().unwrap() })
}

fn slot() -> impl Strategy<Value = Option<Slot>> {
    let cost = (8u32..200, 1u32..16).prop_map(|(memory, passes)| Cost { memory, passes, lanes: 1 });
    let opener = prop_oneof![Just(Opener::Key), cost.prop_map(Opener::Passphrase)];
    proptest::option::of((opener, any::<[u8; 32]>(), wrapped()).prop_map(|(opener, salt, master)| Slot {
        opener,
        salt,
        master,
    }))
}

fn header() -> impl Strategy<Value = Header> {
    let slots = proptest::collection::vec(slot(), SLOTS);
    let keys = (wrapped(), proptest::option::of(wrapped()), 1u32..1000);
    (any::<[u8; 16]>(), any::<[u64; 2]>(), 1u64..1 << 40, slots, keys).prop_map(
        |(id, [sequence, rotated], blocks, slots, (old, new, first))| Header {
            id,
            sequence,
            cipher: if rotated % 2 == 0 { Cipher::Gcm } else { Cipher::GcmSiv },
            layout: layout(4096, blocks * 4096),
            erased: false,
            rotated,
            slots: slots.try_into().unwrap(),
            keys: std::iter::once(old).chain(new).zip(first..).map(|(key, id)| DataKey { id, key }).collect(),
        },
    )
}

/// Sets bytes, and the checksum that belongs to them.
fn changed(mut bytes: Vec<u8>, changes: &[(usize, u8)]) -> Vec<u8> {
    for (at, byte) in changes {
        bytes[at % 4092] = *byte;
    }
    let sum = crc32fast::hash(&bytes[..4092]);
    bytes[4092..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

proptest! {
    #[test]
    fn a_header_is_read_as_it_was_written(header in header()) {
        let bytes = header.encode(None);
        prop_assert_eq!(bytes.len(), HEADER);
        prop_assert_eq!(Header::decode(&bytes).unwrap(), header);
    }

    #[test]
    fn a_hostile_header_is_refused_or_sane(
        header in header(),
        changes in proptest::collection::vec((8usize..1320, any::<u8>()), 0..20),
    ) {
        let bytes = changed(header.encode(None), &changes);
        match Header::decode(&bytes) {
            Ok(read) => {
                prop_assert!(read.keys.len() == 2 || read.keys.len() == 1);
                for slot in read.slots.iter().flatten() {
                    if let Opener::Passphrase(cost) = slot.opener {
                        prop_assert!(cost.memory <= 1 << 20 && cost.passes <= 16 && cost.lanes <= 16);
                    }
                }
            }
            Err(Fault::Refused(_)) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
        let _ = Header::decode(&bytes);
        let _ = Entry::decode_all(&[0; 16], &bytes);
    }
}
