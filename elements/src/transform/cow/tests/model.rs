//! One process that does not die: reads, writes, commit, discard, handlers, refusals.

use super::super::format::Layout;
use super::kit::{CATALOGUE, Served, share, text};
use blockmason::request::Extra;
use blockmason::testing::{TestDisk, play_against_model, run};
use blockmason::{Answer, ExtentState, Flags, Kind, Op, Request};

fn mem(size: u64) -> String {
    format!("(type mem) (size {size})")
}

/// A cow over memory, the overlay as small as can be.
fn small(block: &str, size: u64) -> String {
    let bytes = block.parse::<blockmason::lang::value::Size>().unwrap().0;
    text(block, &mem(size), &mem(Layout::new(bytes, size).unwrap().needed()))
}

#[test]
fn behaves_like_a_vector_before_while_and_after_it_is_merged() {
    let cases =
        [("4k", 70_001), ("4k", 4096), ("4k", 511), ("64k", 300_000), ("64k", 65_536), ("1M", 3_000_001)];
    for (seed, (block, size)) in (0..).zip(cases) {
        run(seed, async |host| {
            let served = Served::new(&host, &small(block, size)).await.unwrap();
            assert_eq!(served.disk.size(), size);
            play_against_model(&served.disk, seed, 200).await;
            served.cow.call("commit", "").unwrap();
            play_against_model(&served.disk, seed + 1, 200).await;
            served.reaches("committed").await;
            assert_eq!((served.get("blocks"), served.get("bytes")), ("0".to_owned(), "0".to_owned()));
            play_against_model(&served.disk, seed + 2, 200).await;
            assert_eq!(served.get("blocks"), "0", "everything goes to the base");
            served.cow.call("discard", "").unwrap();
            served.reaches("overlaying").await;
            play_against_model(&served.disk, seed + 3, 200).await;
        });
    }
}

#[test]
fn behaves_like_a_vector_over_disks_with_demands_and_without_an_incarnation() {
    let all = [
        "element B (type coarse) element BM (type mem) (size 70001) B -> BM\n\
         element O (type coarse) element OM (type mem) (size 200k) O -> OM",
        "element B (type volatile) (size 70001) element O (type volatile) (size 200001)",
        // Two memories do not agree on an incarnation: the map waits for the data.
        "element B (type mem) (size 70001) element O (type linear)\n\
         element O1 (type mem) (size 30001) element O2 (type mem) (size 200k) (O, a) -> O1 (O, b) -> O2",
    ];
    for (seed, below) in (0..).zip(all) {
        run(seed, async |host| {
            let graph = format!("element C (type cow) (block 4k) (C, base) -> B (C, overlay) -> O\n{below}");
            let served = Served::new(&host, &graph).await.unwrap();
            play_against_model(&served.disk, seed, 300).await;
            served.cow.call("commit", "").unwrap();
            play_against_model(&served.disk, seed, 100).await;
            served.reaches("committed").await;
        });
    }
}

#[test]
fn the_base_is_not_written_before_a_commit_and_has_everything_after() {
    run(1, async |host| {
        share(&host, "B", &mem(100_000));
        share(&host, "O", &mem(300_000));
        let base = TestDisk::new(&host, CATALOGUE, "element B (type shared)", "B").await.unwrap();
        let image: Vec<u8> = (0..100_000u32).map(|ix| (ix % 251) as u8).collect();
        base.write(0, &image).await.unwrap();
        let graph = text("4k", "(type shared)", "(type shared)");
        let served = Served::new(&host, &graph).await.unwrap();
        play_against_model(&served.disk, 1, 200).await;
        assert!(base.read(0, 100_000).await.unwrap() == image, "the base has been changed");
        let seen = served.disk.read(0, 100_000).await.unwrap();
        assert!(seen != image);
        served.cow.set("merge_rate", "50k/s").unwrap();
        let before = blockmason::rt::now();
        assert!(served.cow.call("commit", "").unwrap().starts_with("moving to the base"));
        blockmason::rt::sleep(std::time::Duration::from_millis(10)).await;
        assert_eq!(served.get("state"), "committing");
        assert_ne!(served.get("remaining"), "0");
        assert_eq!(served.cow.call("discard", "yes").unwrap_err().kind(), Kind::Busy);
        served.reaches("committed").await;
        let took = (blockmason::rt::now() - before).as_millis();
        assert!((400..2100).contains(&took), "{took} ms for 100 kB at 50 kB/s");
        assert!(base.read(0, 100_000).await.unwrap() == seen, "the base has not everything");
    });
}

#[test]
fn a_discard_brings_the_base_back_and_wants_to_be_meant() {
    run(1, async |host| {
        let served = Served::new(&host, &small("4k", 20_000)).await.unwrap();
        served.disk.write(5000, b"new").await.unwrap();
        assert_eq!((served.get("blocks"), served.get("bytes")), ("1".to_owned(), "4096".to_owned()));
        served.disk.write(19_999, b"x").await.unwrap();
        assert_eq!(served.get("bytes"), (4096 + 20_000 - 16_384).to_string(), "the last block is short");
        let refused = served.cow.call("discard", "").unwrap_err().to_string();
        assert!(refused.contains("2 blocks") && refused.contains("`yes`"), "{refused}");
        served.cow.call("discard", "yes").unwrap();
        assert_eq!(served.get("state"), "discarding");
        assert_eq!(served.cow.call("commit", "").unwrap_err().kind(), Kind::Busy);
        served.reaches("overlaying").await;
        assert_eq!(served.disk.read(0, 20_000).await.unwrap(), [0; 20_000]);
        served.disk.write(5001, b"n").await.unwrap();
        let mut expected = [0; 4096];
        expected[5001 - 4096] = b'n';
        assert_eq!(served.disk.read(4096, 4096).await.unwrap(), expected, "nothing of before comes back");
    });
}

#[test]
fn requests_are_few() {
    run(1, async |host| {
        let served = Served::new(&host, &small("4k", 1 << 20)).await.unwrap();
        served.disk.write(0, &[1; 100]).await.unwrap();
        let count = async |req: Request| {
            let to = |to: &str| {
                let edges = served.disk.disk.graph().read_edges();
                edges.iter().find(|edge| edge.from == "C" && edge.to == to).unwrap().requests
            };
            let before = (to("B"), to("O"));
            served.disk.submit(req).await.unwrap();
            (to("B") - before.0, to("O") - before.1)
        };
        let write = |offset, len: usize| Request::write(offset, blockmason::Data::copy_of(&vec![2; len]));
        assert_eq!(count(write(8192, 40_960)).await, (0, 2), "whole blocks: data and map");
        assert_eq!(count(write(8192, 40_960)).await, (0, 1), "they are there");
        assert_eq!(count(write(0, 40_960)).await, (0, 2), "there and not, in one");
        assert_eq!(
            count(write(100_000, 10_000)).await,
            (2, 2),
            "the rest of the first and of the last block"
        );
        assert_eq!(
            count(Request::new(Op::WriteZeroes, 524_288, 262_144)).await,
            (0, 2),
            "zeros are not copied"
        );
        assert_eq!(count(Request::new(Op::Discard, 900_000, 50_000)).await, (0, 0), "the base is let alone");
        assert_eq!(count(Request::read(0, 1 << 20)).await, (3, 3), "runs");
        assert_eq!(count(Request::flush()).await, (1, 4), "flush, incarnation, map, flush");
        assert_eq!(count(Request::flush()).await, (1, 1), "nothing new");
        assert_eq!(count(write(0, 10).with(Flags::FUA)).await, (0, 1), "it is durable that it is there");
        assert_eq!(count(write(300_000, 4096).with(Flags::FUA)).await, (2, 6));
    });
}

#[test]
fn extents_are_those_of_where_the_blocks_are() {
    run(1, async |host| {
        share(&host, "B", &mem(1 << 20));
        share(&host, "O", &mem(2 << 20));
        let base = TestDisk::new(&host, CATALOGUE, "element B (type shared)", "B").await.unwrap();
        base.write(0, &[1; 16 << 10]).await.unwrap();
        base.write(64 << 10, &[1; 16 << 10]).await.unwrap();
        let served = Served::new(&host, &text("4k", "(type shared)", "(type shared)")).await.unwrap();
        served.disk.write(32 << 10, &[2; 4096]).await.unwrap();
        served.disk.op(Op::WriteZeroes, 64 << 10, 8192).await.unwrap();
        let found = served.disk.extents(0, 1 << 20).await.unwrap();
        let found: Vec<_> = found.iter().map(|extent| (extent.len >> 10, extent.state)).collect();
        let (data, hole) = (ExtentState::DATA, ExtentState::HOLE);
        let expected = [(16, data), (16, hole), (4, data), (36, hole), (8, data), (1024 - 80, hole)];
        assert_eq!(found, expected);
        let mut dirty = Request::new(Op::Extents, 0, 4096);
        dirty.extra = Some(Box::new(Extra { map: Some("x".to_owned()), ..Extra::default() }));
        assert_eq!(served.disk.submit(dirty).await.unwrap_err().kind(), Kind::Unsupported);
    });
}

#[test]
fn what_is_refused_is_said_in_numbers() {
    run(1, async |host| {
        let made = async |text: String| Served::new(&host, &text).await.err().unwrap().to_string();
        let needed = Layout::new(65_536, 1_000_000).unwrap().needed();
        let error = made(text("64k", &mem(1_000_000), &mem(needed - 1))).await;
        assert!(error.contains(&format!("it needs {needed}")) && error.contains("1000000"), "{error}");
        let error = made(text("4k", "(type null) (size 1048576T)", "(type null) (size 2097152T)")).await;
        assert!(error.contains("make blocks larger"), "{error}");
        for (block, says) in [("2k", "from 4k"), ("2M", "to 1M"), ("5000", "power of two"), ("x", "a size")] {
            let error = made(text(block, &mem(4096), &mem(65_536))).await;
            assert!(error.contains(says), "{error}");
        }
    });
}

#[test]
fn an_overlay_of_something_else_is_refused_and_not_overwritten() {
    run(1, async |host| {
        share(&host, "O", &mem(2 << 20));
        let overlay = TestDisk::new(&host, CATALOGUE, "element O (type shared)", "O").await.unwrap();
        overlay.write(4000, b"mine").await.unwrap();
        let refused = async |block: &str, size: u64| {
            let before = overlay.read(0, 2 << 20).await.unwrap();
            let served = Served::new(&host, &text(block, &mem(size), "(type shared)")).await.unwrap();
            for op in [Op::Read, Op::Write, Op::Flush, Op::Discard] {
                let mut req = Request::new(op, 0, if op == Op::Flush { 0 } else { 512 });
                if op == Op::Write {
                    req.data = blockmason::Data::zeros(512);
                }
                assert!(served.disk.submit(req).await.is_err(), "{op}");
            }
            assert!(overlay.read(0, 2 << 20).await.unwrap() == before, "it has been written to");
            assert_eq!(served.cow.get("state").unwrap_err().kind(), Kind::Unavailable);
            served.get("error")
        };
        let error = refused("4k", 1 << 20).await;
        assert!(error.contains("not overwritten"), "{error}");
        overlay.op(Op::WriteZeroes, 0, 4096).await.unwrap();
        let served = Served::new(&host, &text("4k", &mem(1 << 20), "(type shared)")).await.unwrap();
        served.disk.write(0, b"abc").await.unwrap();
        let error = refused("8k", 1 << 20).await;
        assert!(error.contains("4096") && error.contains("8192"), "{error}");
        let error = refused("4k", 1 << 19).await;
        assert!(error.contains("1048576") && error.contains("524288"), "{error}");
    });
}

#[test]
fn a_graph_that_is_only_built_formats_nothing() {
    run(1, async |host| {
        share(&host, "O", &mem(2 << 20));
        let overlay = TestDisk::new(&host, CATALOGUE, "element O (type shared)", "O").await.unwrap();
        let text = text("4k", &mem(1 << 20), "(type shared)");
        drop(blockmason::testing::graph(&host, CATALOGUE, &text, "C").unwrap());
        assert_eq!(overlay.read(0, 4096).await.unwrap(), [0; 4096]);
        Served::new(&host, &text).await.unwrap().disk.read(0, 1).await.unwrap();
        assert_ne!(overlay.read(0, 4096).await.unwrap(), [0; 4096]);
    });
}

#[test]
fn a_failed_merge_says_why_and_goes_on() {
    run(1, async |host| {
        let graph = text("4k", "(type mem) (size 64k)", "(type volatile) (size 256k)");
        let served = Served::new(&host, &graph).await.unwrap();
        served.disk.write(0, &[1; 10_000]).await.unwrap();
        let overlay = served.disk.disk.graph();
        let overlay = &overlay.instances().find(|found| found.name == "O").unwrap().element;
        served.cow.set("merge_rate", "4k/s").unwrap();
        served.cow.call("commit", "").unwrap();
        while served.get("blocks") == "3" {
            blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
        }
        overlay.call("cut", "").unwrap();
        blockmason::rt::sleep(std::time::Duration::from_secs(5)).await;
        assert_eq!((served.get("state"), served.get("blocks")), ("committing".to_owned(), "2".to_owned()));
        assert!(served.get("error").contains("power"), "{}", served.get("error"));
        for (handler, value) in [("merge_rate", "0/s"), ("merge_rate", "fast"), ("state", "committed")] {
            assert!(served.cow.set(handler, value).is_err());
        }
        assert_eq!(served.get("merge_rate"), "4k/s");
        served.cow.set("merge_rate", "unlimited").unwrap();
        assert_eq!(served.get("merge_rate"), "unlimited");
    });
}

#[test]
fn a_read_only_base_is_never_merged_into() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, [7; 100_000]).unwrap();
    run(1, async |host| {
        let base = format!("(type file) (path {}) (readonly yes)", image.display());
        let served = Served::new(&host, &text("4k", &base, &mem(200_000))).await.unwrap();
        served.disk.write(0, b"abc").await.unwrap();
        served.cow.call("commit", "").unwrap();
        blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
        assert!(served.get("error").contains("read-only"), "{}", served.get("error"));
        assert_eq!(served.get("state"), "overlaying");
        served.disk.write(3, b"def").await.unwrap();
        assert_eq!(served.disk.read(0, 7).await.unwrap(), b"abcdef\x07");
        let only = Served::new(&host, &text("4k", &mem(1000), &base)).await.err().unwrap();
        assert!(only.to_string().contains("read-only"), "{only}");
    });
}

#[test]
fn control_requests_reach_both() {
    run(1, async |host| {
        let served = Served::new(&host, &small("4k", 4096)).await.unwrap();
        let mut ask = Request::new(Op::Control, 0, 0);
        ask.extra = Some(Box::new(Extra {
            control: Some(("incarnation".to_owned(), String::new())),
            ..Extra::default()
        }));
        // Two memories are two.
        assert_eq!(served.disk.submit(ask.clone()).await.unwrap_err().kind(), Kind::Unsupported);
        let folder = tempfile::tempdir().unwrap();
        let file = |name| format!("(type file) (path {}) (size 1M)", folder.path().join(name).display());
        let graph = text("4k", &file("a").replace("1M", "4k"), &file("b"));
        let served = Served::new(&host, &graph).await.unwrap();
        let Answer::Text(boot) = served.disk.submit(ask).await.unwrap() else { panic!("no text") };
        assert!(boot.starts_with("boot "), "{boot}");
    });
}

#[test]
fn two_graphs_in_a_row_have_one_idea_of_what_is_in_the_overlay() {
    use blockmason::graph::{Connection, Graph};
    run(1, async |host| {
        let graph = blockmason::testing::graph(&host, CATALOGUE, &small("4k", 65_536), "C").unwrap();
        let instances: Vec<_> = graph.instances().cloned().collect();
        let at = |name: &str| instances.iter().position(|found| found.name == name).unwrap();
        let edge = |from, port: &str, to| Connection { from: at(from), port: port.to_owned(), to: at(to) };
        let edges = [edge("Client", "out", "C"), edge("C", "base", "B"), edge("C", "overlay", "O")];
        let again = std::sync::Arc::new(Graph::assemble("test", &instances, &edges, host.shards()).unwrap());
        let (first, second) = (TestDisk::serve(&host, graph).await, TestDisk::serve(&host, again).await);
        first.write(0, &[1; 100]).await.unwrap();
        assert_eq!(second.read(50, 100).await.unwrap()[..60], [&[1; 50][..], &[0; 10]].concat());
        second.write(100, &[2; 100]).await.unwrap();
        first.write(200, &[3; 10]).await.unwrap();
        let expected = [&[1; 100][..], &[2; 100], &[3; 10]].concat();
        assert_eq!(second.read(0, 210).await.unwrap(), expected);
    });
}
