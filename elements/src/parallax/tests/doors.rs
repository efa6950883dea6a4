//! Trees that reach their block store through elements: what each of them may do, and what not.

use super::super::format::BLOCK;
use super::super::tool::{self, Operation};
use super::kit::find;
use super::rig::{self, HOLD, Rig, failure};
use blockmason::describe::{Catalogue, ElementType, Family, Outs, Ports};
use blockmason::testing::{TestDisk, graph, play_against_model, run};
use blockmason::{Children, Cx, Data, Element, Flow, Geometry, Host, Kind, Op, Prepared, Request, Result};
use std::sync::{Arc, LazyLock, Mutex};

const STORE: [&str; 2] = ["I (type isolation) (key v1)", "S (type block_store) (region 2M)"];

/// The first half of it is one disk, the second half another one.
struct Fork;

/// Bytes of each of them.
const HALF: u64 = 512 << 20;

impl Element for Fork {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let first = children.iter().next().expect("it has two");
        Ok(Prepared::of(Geometry { size: 2 * HALF, ..first.above() }))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op == Op::Flush {
            return cx.broadcast(req);
        }
        let port = req.offset / HALF;
        req.offset %= HALF;
        cx.forward(port as usize, req)
    }
}

static FORK: ElementType = ElementType {
    name: "fork",
    family: Family::Fault,
    ports: Ports { input: true, out: Outs::Named(&["one", "other"]) },
    build: |_| Ok(Arc::new(Fork)),
    ..ElementType::BASE
};

/// A bug: one write goes elsewhere, with something else.
#[derive(Default)]
struct Stray(Mutex<Option<(u64, Vec<u8>)>>);

impl Element for Stray {
    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op == Op::Write
            && let Some((offset, bytes)) = self.0.lock().unwrap().take()
        {
            (req.offset, req.len, req.data) = (offset, bytes.len() as u64, Data::shared(bytes));
        }
        cx.forward(0, req)
    }
}

static STRAY: ElementType = ElementType {
    name: "stray",
    family: Family::Fault,
    build: |_| Ok(Arc::new(Stray::default())),
    ..ElementType::BASE
};

static TYPES: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&FORK, &STRAY, &HOLD]).collect()));

/// Two volumes of one pool, of a key each.
const TWO: &str = "element F (type fork) \
    element A (type radix) (volume v) (size 512M) element B (type radix) (volume v) (size 512M) (format 2) \
    element X (type stray) element I (type isolation) (key old) element J (type isolation) (key new) \
    element S (type block_store) (region 4M) element D (type mem) (size 160M) \
    (F, one) -> A -> X -> I -> S  (F, other) -> B -> J -> S  S -> D";

async fn serve(host: &Arc<Host>, text: &str) -> (Arc<blockmason::Graph>, TestDisk) {
    let graph = graph(host, *TYPES, text, text.split(' ').nth(1).unwrap()).unwrap();
    (graph.clone(), TestDisk::serve(host, graph).await)
}

#[test]
fn behaves_like_a_vector_and_is_a_pool_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    let text = format!(
        "element R (type radix) (volume v) (size 3M) element I (type isolation) element S (type block_store) \
         element D (type file) (path {}) (size 64M) R -> I -> S -> D",
        path.display()
    );
    run(1, async |host| {
        let (graph, disk) = serve(&host, &text).await;
        play_against_model(&disk, 1, 400).await;
        disk.write(4096, &[9; 8192]).await.unwrap();
        let volume = find(&graph, "R").element.clone();
        let call = |verb: &'static str, argument: &'static str| {
            let volume = volume.clone();
            blockmason::rt::blocking(move || volume.call(verb, argument))
        };
        assert_eq!(call("snapshot", "s").await.unwrap().unwrap(), "v@s");
        assert_eq!(call("snapshot", "s").await.unwrap().unwrap_err().kind(), Kind::Busy);
        assert_eq!(call("snapshot", "t").await.unwrap().unwrap(), "v@t");
        call("delete_snapshot", "s").await.unwrap().unwrap();
        assert_eq!(volume.get("snapshots").unwrap(), "t");
        assert_eq!(call("checkpoint", "").await.unwrap().unwrap(), "done");
        disk.write(4096, &[8; 8192]).await.unwrap();
    });
    let findings = tool::open(&path).unwrap().carry_out(&Operation::Check).unwrap();
    assert_eq!(findings["problems"], serde_json::json!([]));
    let text = format!("element D (type parallax) (pool {}) (volume v) (snapshot t)", path.display());
    run(2, async |host| {
        let (_, disk) = serve(&host, &text).await;
        assert_eq!(disk.read(4096, 8192).await.unwrap(), [9; 8192]);
    });
}

#[test]
fn tools_tell_the_volumes_of_keys_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    let file = format!("element D (type file) (path {}) (size 160M)", path.display());
    run(1, async |host| {
        let text = TWO.replace("element D (type mem) (size 160M)", &file);
        let (_, disk) = serve(&host, &text).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.write(HALF, &[2; 4096]).await.unwrap();
    });
    let pool = tool::open(&path).unwrap();
    let new = |name: &str| Operation::Rename { name: "new:v".into(), to: name.into() };
    pool.carry_out(&new("w")).unwrap_err();
    pool.carry_out(&new("old:v")).unwrap_err();
    pool.carry_out(&new("new:w")).unwrap();
    let listed = pool.carry_out(&Operation::List).unwrap();
    let names: Vec<&str> =
        listed["volumes"].as_array().unwrap().iter().map(|said| said["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["old:v", "new:w"]);
    let findings = pool.carry_out(&Operation::Check).unwrap();
    assert_eq!((&findings["problems"], &findings["volumes"]), (&serde_json::json!([]), &2.into()));
    drop(pool);
    for (name, byte) in [("old:v", 1), ("new:w", 2)] {
        let text = format!("element D (type parallax) (pool {}) (volume {name})", path.display());
        run(2, async |host| {
            let (_, disk) = serve(&host, &text).await;
            assert_eq!(disk.read(0, 4096).await.unwrap(), [byte; 4096]);
        });
    }
}

/// What one version has let go of, another one gets.
#[test]
fn two_versions_share_the_room_of_a_pool() {
    run(1, async |host| {
        let (graph, disk) = serve(&host, TWO).await;
        let piece = vec![7; 1 << 20];
        let fill = async |from: u64| {
            let mut at = from;
            while at < from + HALF {
                match disk.write(at, &piece).await {
                    Ok(()) => at += 1 << 20,
                    Err(error) => {
                        assert_eq!(error.kind(), Kind::NoSpace, "{error}");
                        break;
                    }
                }
            }
            (at - from) >> 20
        };
        disk.write(HALF, &[1; 4096]).await.unwrap();
        let first = fill(0).await;
        assert!((80..150).contains(&first), "{first} MiB went into a pool of 160");
        let none = fill(HALF + (256 << 20)).await;
        assert!(none < 30, "{none} MiB beside them");
        disk.op(Op::Discard, 0, HALF).await.unwrap();
        // Whoever tends the pool gives back what nobody sees any more, some seconds later.
        blockmason::rt::sleep(std::time::Duration::from_secs(20)).await;
        let second = fill(HALF + (256 << 20)).await;
        assert!(second > first / 2, "{second} MiB went where {first} had been");
        assert_eq!(disk.read(HALF, 4096).await.unwrap(), [1; 4096]);
        let grants: u64 = find(&graph, "S").element.get("grants").unwrap().parse().unwrap();
        assert!(grants >= (first + second) / 4, "{grants}");
        for door in ["I", "J"] {
            assert_eq!(find(&graph, door).element.get("refused").unwrap(), "0");
        }
    });
}

/// What a disk below holds.
async fn bytes(disk: &TestDisk) -> Vec<u8> {
    let mut bytes = Vec::new();
    for at in (0..disk.size()).step_by(1 << 20) {
        bytes.extend(disk.read(at, 1 << 20).await.unwrap());
    }
    bytes
}

type Target = fn(&[u8], [u8; 2]) -> (u64, Vec<u8>);

/// The first version writes to where it must not: `target` says where, and what, of all that the disk below holds. The owners
/// are those of the two versions.
async fn goes_astray(host: &Arc<Host>, target: Target) {
    let (graph, disk) = serve(host, TWO).await;
    // In this order: their owners have the numbers 3 and 4.
    disk.write(0, &[2; 4096]).await.unwrap();
    disk.write(HALF, &vec![1; 8 << 20]).await.unwrap();
    disk.op(Op::Flush, 0, 0).await.unwrap();
    let below = rig::below(host, TWO, &find(&graph, "D"), *TYPES).await;
    let before = bytes(&below).await;
    let last = before.chunks(BLOCK as usize).rposition(|block| block.iter().all(|byte| *byte == 1)).unwrap();
    let theirs = before[record_of(last as u64 / 512)];
    let (offset, stray) = target(&before, [7 - theirs, theirs]);
    let element = find(&graph, "X").element.clone();
    let bug = (&*element as &dyn std::any::Any).downcast_ref::<Stray>().unwrap();
    let range = offset as usize..offset as usize + stray.len();
    *bug.0.lock().unwrap() = Some((offset, stray));
    let failed = failure(disk.write(0, &[3; 4096]).await);
    assert!(failed.to_string().contains("not been given"), "{failed}");
    assert_eq!(find(&graph, "I").element.get("refused").unwrap(), "1", "to {offset}");
    assert!(bytes(&below).await[range.clone()] == before[range], "{offset} has been written");
    assert_eq!(disk.read(HALF, 8 << 20).await.unwrap(), vec![1; 8 << 20]);
    disk.write(HALF, &[5; 4096]).await.unwrap();
}

/// Where the record of an extent is.
fn record_of(extent: u64) -> usize {
    (2 << 20) + 128 * extent as usize
}

/// The record of the last extent of an owner.
fn last_record(bytes: &[u8], owner: u8) -> usize {
    (0..80).rev().map(record_of).find(|at| bytes[*at] == owner).unwrap()
}

#[test]
fn one_version_cannot_damage_another() {
    let cases: [Target; 9] = [
        // Blocks of theirs, and of nobody.
        |bytes, [_, theirs]| {
            let extent = (0..80).find(|at| bytes[record_of(*at)] == theirs).unwrap();
            (extent << 21, vec![0xee; 4096])
        },
        |bytes, [ours, theirs]| {
            let end =
                (1..80).find(|at| bytes[record_of(*at)] == theirs && bytes[record_of(at - 1)] != theirs);
            let _ = ours;
            ((end.unwrap() << 21) - 2048, vec![0xee; 4096])
        },
        |bytes, _| (bytes.len() as u64 - 4096, vec![0xee; 4096]),
        // The label, and the owners.
        |_, _| (0, vec![0xee; 4096]),
        |_, _| (4096, vec![0xee; 4096]),
        // The record of theirs, as it is; ours as if it were theirs; ours as if it were nobody's; a part of ours.
        |bytes, [_, theirs]| {
            let at = last_record(bytes, theirs);
            (at as u64, bytes[at..at + 128].to_vec())
        },
        |bytes, [ours, theirs]| {
            let at = last_record(bytes, theirs);
            (last_record(bytes, ours) as u64, bytes[at..at + 128].to_vec())
        },
        |bytes, [ours, _]| (last_record(bytes, ours) as u64, vec![0; 128]),
        |bytes, [ours, _]| {
            let at = last_record(bytes, ours);
            (at as u64, bytes[at..at + 64].to_vec())
        },
    ];
    for (seed, case) in cases.into_iter().enumerate() {
        run(seed as u64, async |host| goes_astray(&host, case).await);
    }
}

#[test]
fn what_is_revoked_is_waited_for_and_nothing_comes_after_it() {
    run(1, async |host| {
        let way = [STORE[0], STORE[1], "H (type hold)"];
        let rig = Rig::new(&host, "(size 8M)", &way, "(type mem) (size 64M)").await;
        rig.fill(0, 1, 1).await.unwrap();
        // It is written in place from then on.
        rig.checkpoint().await.unwrap();
        let at = rig.image().await;
        let door = rig.element("I");
        let block = (0..16384).find(|block| {
            let mut bytes = [0; 4096];
            std::os::unix::fs::FileExt::read_exact_at(&at, &mut bytes, block * BLOCK).unwrap();
            bytes == [1; 4096]
        });
        rig.hold(Op::Write, block.unwrap());
        let late = rig.disk.send(Request::write(0, Data::shared(vec![2; 4096])));
        rig.stands().await;
        let (revoking, done) = (door.clone(), Arc::new(Mutex::new(false)));
        let said = done.clone();
        let thread = std::thread::spawn(move || {
            revoking.set("revoked", "yes").unwrap();
            *said.lock().unwrap() = true;
        });
        while door.get("revoked").unwrap() == "no" {
            std::thread::yield_now();
        }
        assert!(!*done.lock().unwrap(), "a write is still on its way");
        let refused = failure(rig.fill(8, 1, 3).await);
        assert!(refused.to_string().contains("may not change anything any more"), "{refused}");
        rig.let_go();
        late.await.unwrap().unwrap();
        thread.join().unwrap();
        assert_eq!(rig.filled(0).await.unwrap(), 2);
    });
}

#[test]
fn what_leads_to_the_same_trees_twice_is_refused() {
    let one_door = "(F, one) -> A -> I  (F, other) -> B -> I  I -> S -> D";
    let one_key =
        "element J (type isolation) (key old) (F, one) -> A -> I -> S  (F, other) -> B -> J -> S -> D";
    let no_door = "(F, one) -> A -> S  (F, other) -> B -> I -> S -> D";
    let cases = [
        (one_door, "another element has opened the trees"),
        (one_key, "leads to the same trees"),
        (no_door, "through an isolation element only"),
    ];
    run(1, async |host| {
        for (edges, expected) in cases {
            let text = format!(
                "element F (type fork) element A (type radix) (volume v) (size 512M) \
                 element B (type radix) (volume v) (size 512M) element I (type isolation) (key old) \
                 element S (type block_store) element D (type mem) (size 64M) {edges}"
            );
            let (_, disk) = serve(&host, &text).await;
            let answers = [disk.read(0, 4096).await, disk.read(HALF, 4096).await];
            let refused = answers.into_iter().filter_map(|answer| Some(answer.err()?.to_string()));
            let refused: Vec<String> = refused.collect();
            assert!(refused.len() == 1 && refused[0].contains(expected), "{refused:?}, not {expected}");
        }
    });
}

/// A graph that is changed without a pause is in use beside the next one for a while: what trees are given through one of
/// them they have in both.
#[test]
fn two_graphs_are_in_use_at_once() {
    run(1, async |host| {
        let text = "element R (type radix) (volume v) (size 512M) element I (type isolation) (key k) \
            element S (type block_store) (region 2M) element D (type mem) (size 160M) R -> I -> S -> D";
        let (old, through_old) = serve(&host, text).await;
        let names = ["Client", "R", "I", "S", "D"];
        let parts = names.map(|name| find(&old, name));
        let edge = |from| blockmason::Connection { from, port: "out".into(), to: from + 1 };
        let next = blockmason::Graph::assemble("next", &parts, &[0, 1, 2, 3].map(edge), host.shards());
        let through_next = TestDisk::serve(&host, Arc::new(next.unwrap())).await;
        through_next.write(0, &[1; 4096]).await.unwrap();
        for (round, disk) in [&through_old, &through_next, &through_old].into_iter().enumerate() {
            let at = (round as u64 + 1) * (64 << 20);
            disk.write(at, &vec![2; 16 << 20]).await.unwrap();
            for other in [&through_old, &through_next] {
                other.write(at, &vec![3; 16 << 20]).await.unwrap();
            }
        }
        assert_eq!(find(&old, "I").element.get("refused").unwrap(), "0");
    });
}

/// A graph is changed so that another pool is below: what trees know is not written to that one.
#[test]
fn another_pool_is_not_taken_for_the_one_before() {
    run(1, async |host| {
        for (way, row) in [
            ("", vec!["R", "D"]),
            ("element I (type isolation) element S (type block_store) ", vec!["R", "I", "S", "D"]),
        ] {
            let chain = row.join(" -> ");
            let text = format!(
                "element R (type radix) (volume v) (size 8M) {way}element D (type mem) (size 64M) {chain}"
            );
            let (one, _) = serve(&host, &text).await;
            let (other, of_other) = serve(&host, &text).await;
            let (_, of_one) = (&one, TestDisk::serve(&host, one.clone()).await);
            of_one.write(0, &[1; 8192]).await.unwrap();
            of_other.write(0, &[2; 8192]).await.unwrap();
            // The trees of the one over the disk of the other, with a store that has been opened for that.
            let names: Vec<&str> = ["Client"].into_iter().chain(row).collect();
            let part = |name: &&str| find(if ["D", "S"].contains(name) { &other } else { &one }, name);
            let parts: Vec<_> = names.iter().map(part).collect();
            let edge = |from| blockmason::Connection { from, port: "out".into(), to: from + 1 };
            let edges: Vec<_> = (0..names.len() - 1).map(edge).collect();
            let mixed = blockmason::Graph::assemble("mixed", &parts, &edges, host.shards()).unwrap();
            let mixed = TestDisk::serve(&host, Arc::new(mixed)).await;
            let refused = failure(mixed.write(0, &[3; 4096]).await);
            assert!(refused.to_string().contains("another pool is below"), "{refused}");
            assert_eq!(of_other.read(0, 8192).await.unwrap(), [2; 8192]);
        }
    });
}
