//! What was changed below is never given out.

use super::kit::{Bench, KEY_A, Oracle, events, place, share};
use blockmason::testing::{TestDisk, run};
use blockmason::{Errno, Kind};
use std::time::Duration;

/// A read of a block, which must fail by itself alone.
async fn refused(disk: &TestDisk, block: u64, len: u64) {
    let error = disk.read(block * len, len).await.unwrap_err();
    assert_eq!((error.kind(), error.errno()), (Kind::Io, Errno::IO), "{error}");
    assert!(error.to_string().contains(&format!("block {block} ")), "{error}");
}

#[test]
fn a_flipped_bit_anywhere_in_a_slot_is_noticed() {
    for params in ["(block 512)", "(block 512) (cipher aes-256-gcm-siv)"] {
        run(1, async |host| {
            let bench = Bench::new(&host, 8, 512);
            let disk = bench.open("Disk", params).await;
            disk.write(0, &[7; 2048]).await.unwrap();
            let raw = bench.raw("Disk").await;
            for at in 0..544 {
                let place = place(2, 512) + at;
                let was = raw.read(place, 1).await.unwrap();
                raw.write(place, &[was[0] ^ 1 << (at % 8)]).await.unwrap();
                refused(&disk, 2, 512).await;
                assert_eq!(disk.read(512, 512).await.unwrap(), [7; 512], "its neighbours are whole");
                raw.write(place, &was).await.unwrap();
            }
            assert_eq!(disk.read(0, 2048).await.unwrap(), [7; 2048]);
            // A block that was never written.
            raw.write(place(5, 512) + 3, &[1]).await.unwrap();
            blockmason::rt::sleep(Duration::from_secs(11)).await;
            refused(&disk, 5, 512).await;
            let said = events(&host);
            assert!(said.iter().any(|event| event.contains("block 5 is not what was written there")));
        });
    }
}

#[test]
fn a_block_of_another_place_session_or_volume_does_not_open() {
    run(1, async |host| {
        let bench = Bench::new(&host, 8, 512);
        share(&host, "Other", super::kit::room(8, 512));
        let (disk, other) =
            (bench.open("Disk", "(block 512)").await, bench.open("Other", "(block 512)").await);
        disk.write(0, &[7; 2048]).await.unwrap();
        other.write(0, &[7; 2048]).await.unwrap();
        let (raw, foreign) = (bench.raw("Disk").await, bench.raw("Other").await);
        let slots = raw.read(place(0, 512), 4 * 544).await.unwrap();
        let swapped: Vec<u8> = [&slots[544..1088], &slots[..544], &slots[1088..]].concat();
        raw.write(place(0, 512), &swapped).await.unwrap();
        refused(&disk, 0, 512).await;
        refused(&disk, 1, 512).await;
        raw.write(place(0, 512), &slots).await.unwrap();
        assert_eq!(disk.read(0, 2048).await.unwrap(), [7; 2048]);
        raw.write(place(3, 512), &foreign.read(place(3, 512), 544).await.unwrap()).await.unwrap();
        refused(&disk, 3, 512).await;
        // Sessions that the table does not have.
        for session in [2u32, 4096, 4097, u32::MAX] {
            let mut slot = slots[..544].to_vec();
            slot[512..516].copy_from_slice(&session.to_le_bytes());
            raw.write(place(0, 512), &slot).await.unwrap();
            refused(&disk, 0, 512).await;
        }
    });
}

/// The known limit, as documented: a block that is made zero below, and an old state of a block.
#[test]
fn what_is_known_not_to_be_noticed() {
    run(1, async |host| {
        let bench = Bench::new(&host, 8, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        let raw = bench.raw("Disk").await;
        disk.write(0, &[1; 1024]).await.unwrap();
        let old = raw.read(place(0, 512), 544).await.unwrap();
        disk.write(0, &[2; 1024]).await.unwrap();
        raw.write(place(0, 512), &old).await.unwrap();
        raw.write(place(1, 512), &[0; 544]).await.unwrap();
        assert_eq!(disk.read(0, 1024).await.unwrap(), [[1; 512], [0; 512]].concat());
    });
}

#[test]
fn no_plain_byte_is_stored() {
    run(1, async |host| {
        let bench = Bench::new(&host, 64, 4096);
        let disk = bench.open("Disk", "").await;
        disk.write(0, &b"a secret that is easy to find ".repeat(5000)).await.unwrap();
        let image = bench.image("Disk").await;
        assert!(!image.windows(15).any(|bytes| bytes == b"a secret that i"));
        assert!(Oracle::new(&image, KEY_A).session(3).is_some());
    });
}
