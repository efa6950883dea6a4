//! Overlays that somebody has made up.

use super::super::format::{Header, Layout, Map, State};
use super::kit::{CATALOGUE, Served, share, text};
use blockmason::testing::{TestDisk, run};
use proptest::prelude::*;

fn header(layout: Layout) -> Header {
    Header {
        layout,
        id: [5; 16],
        generation: 7,
        maps: [3, 4],
        state: State::Committing,
        incarnation: Some("boot x".to_owned()),
    }
}

fn region(header: &Header) -> Vec<u8> {
    let mut region = header.encode();
    region.resize(4096, 0);
    region
}

proptest! {
    #[test]
    fn a_header_comes_back(block in 12u32..21, size in 0u64..1 << 40, generation: u64, maps: [u64; 2], text in "[a-z0-9 ]{0,64}") {
        let layout = Layout { block: 1 << block, size };
        let incarnation = (!text.is_empty()).then_some(text);
        let header = Header { generation, maps, incarnation, ..header(layout) };
        prop_assert_eq!(Header::decode(&region(&header), layout).unwrap(), Some(header));
    }

    #[test]
    fn any_changed_byte_of_a_header_is_noticed(at in 0usize..512, change in 1u8..) {
        let layout = Layout { block: 4096, size: 100_000 };
        let mut region = region(&header(layout));
        region[at] ^= change;
        prop_assert!(Header::decode(&region, layout).is_err());
    }

    #[test]
    fn any_changed_byte_of_a_map_is_noticed(at in 0usize..512, change in 1u8.., sector in 0u64..3) {
        let layout = Layout { block: 4096, size: 3 * 3968 * 4096 };
        let header = header(layout);
        let mut bytes = header.encode_map(Map::Durable, sector, &[0x55; 62]);
        prop_assert!(header.decode_map(Map::Durable, sector, &bytes).unwrap() == [0x55; 62]);
        prop_assert!(header.decode_map(Map::Claimed, sector, &bytes).is_err(), "it is of the other map");
        prop_assert!(header.decode_map(Map::Durable, sector + 1, &bytes).is_err(), "it is of another place");
        bytes[at] ^= change;
        prop_assert!(header.decode_map(Map::Durable, sector, &bytes).is_err());
    }

    #[test]
    fn random_sectors_are_refused(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
        let layout = Layout { block: 4096, size: 1 << 30 };
        prop_assert!(Header::decode(&bytes, layout).is_err());
        prop_assert!(header(layout).decode_map(Map::Durable, 0, &bytes[..512]).is_err());
    }

    #[test]
    fn places_do_not_overlap(block in 12u32..21, size in 0u64..1 << 42) {
        let layout = Layout::new(1 << block, size).unwrap();
        let last = |map| layout.place(map, layout.sectors());
        prop_assert!(layout.place(Map::Durable, 0) == 4096);
        prop_assert!(last(Map::Durable) <= layout.place(Map::Claimed, 0));
        prop_assert!(last(Map::Claimed) <= layout.data() && layout.data().is_multiple_of(layout.block));
        prop_assert!(layout.needed() == layout.data() + size);
        prop_assert!(layout.blocks() * layout.block >= size && layout.blocks() <= layout.sectors() * 3968);
        // What the reference promises, but for rounding: 1024 bytes for 3968 blocks.
        prop_assert!(layout.data() <= 4096 * 3 + layout.sectors() * 1024 + layout.block);
    }
}

#[test]
fn generations_and_bits_past_the_end() {
    let layout = Layout { block: 4096, size: 10 * 4096 };
    let now = header(layout);
    let words = |bit: u32| std::array::from_fn(|ix| if ix == 0 { 1 << bit } else { 0 });
    let older = Header { maps: [2, 4], ..now.clone() }.encode_map(Map::Durable, 0, &words(3));
    assert_eq!(now.decode_map(Map::Durable, 0, &older).unwrap(), [0; 62], "forgotten");
    let newer = Header { maps: [4, 4], ..now.clone() }.encode_map(Map::Durable, 0, &words(3));
    assert!(now.decode_map(Map::Durable, 0, &newer).unwrap_err().to_string().contains("newer"));
    let past = now.encode_map(Map::Durable, 0, &words(10));
    assert!(now.decode_map(Map::Durable, 0, &past).unwrap_err().to_string().contains("past the end"));
    assert_eq!(
        now.decode_map(Map::Durable, 0, &now.encode_map(Map::Durable, 0, &words(9))).unwrap(),
        words(9)
    );
}

#[test]
fn a_damaged_overlay_is_refused_and_nothing_panics() {
    for seed in 0..300 {
        run(seed, async |host| {
            let mut rng = fastrand::Rng::with_seed(seed);
            share(&host, "O", "(type mem) (size 300k)");
            let graph = text("4k", "(type mem) (size 200000)", "(type shared)");
            let served = Served::new(&host, &graph).await.unwrap();
            for _ in 0..10 {
                served.disk.write(rng.u64(0..199_000), &[1; 1000]).await.unwrap();
            }
            served.disk.op(blockmason::Op::Flush, 0, 0).await.unwrap();
            let overlay = TestDisk::new(&host, CATALOGUE, "element O (type shared)", "O").await.unwrap();
            // In the header, or in the first sector of a map.
            let at = [0, 4096, 8192][rng.usize(0..3)] + rng.u64(0..512);
            let mut bytes = overlay.read(at, rng.u64(1..20)).await.unwrap();
            let before = bytes.clone();
            rng.fill(&mut bytes);
            overlay.write(at, &bytes).await.unwrap();
            let again = Served::new(&host, &graph).await.unwrap();
            let reached =
                at / 4096 == (at + bytes.len() as u64 - 1) / 4096 && at % 4096 + bytes.len() as u64 <= 512;
            let read = again.disk.read(0, 200_000).await;
            if reached && before != bytes {
                let error = read.unwrap_err().to_string();
                assert!(error.contains("overlay"), "seed {seed}: {error}");
            }
            assert!(!again.disk.disk.graph().is_failed(), "seed {seed}");
        });
    }
}
