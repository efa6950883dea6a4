//! Changes the graph of a disk while it is written and read, with the elements of the library and a seed.
#![allow(clippy::unwrap_used, reason = "tests panic")]

use blockmason::describe::Catalogue;
use blockmason::live::{Fate, Heads, Live, Options, Report};
use blockmason::testing::{CLIENT, TestDisk, checked, live, run};
use blockmason::{Data, Host, Kind, Op, Request};
use blockmason_elements::ALL;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};

static CATALOGUE: LazyLock<Catalogue> =
    LazyLock::new(|| Box::leak([&CLIENT].into_iter().chain(ALL.iter().copied()).collect()));

async fn start(host: &Arc<Host>, text: &str) -> (Arc<Live>, TestDisk) {
    live(host, *CATALOGUE, text).await.unwrap()
}

async fn reload(live: &Live, text: &str) -> blockmason::Result<Report> {
    // These layouts come to the same; their elements are others.
    let options = Options { heads: Heads::Ignore, ..Options::default() };
    live.reload(checked(*CATALOGUE, text).unwrap(), &options).await
}

/// Bytes of the disk that all graphs below serve.
const SIZE: u64 = 1 << 20;

/// Graphs that show the same disk. `A` is the image, which need not be the same instance in all.
fn same_disk(folder: &Path) -> Vec<String> {
    let image = |more: &str| {
        format!(
            "element Client (type client) element A (type file) (path {}/a.img) (size 1M) {more}\n",
            folder.display()
        )
    };
    let halves = "element Low (type slice) (length 512k) element High (type slice) (offset 512k)
        element Both (type linear) (Both, low) -> Low (Both, high) -> High Low -> A High -> A\n";
    vec![
        format!("{} Client -> A", image("")),
        format!("{} element P (type probe) Client -> P -> A", image("")),
        format!("{} {halves} Client -> Both", image("")),
        format!(
            "{} {halves} element P (type probe) element Q (type probe) Client -> P -> Q -> Both",
            image("")
        ),
        format!("{} element D (type delay) (all 1ms) (jitter 1ms) Client -> D -> A", image("")),
        format!("{} element D (type delay) (all 2ms) Client -> D -> A", image("")),
        format!(
            "{} element E (type error) (probability 0%) element P (type probe) Client -> E -> P -> A",
            image("")
        ),
        format!("{} Client -> A", image("(direct yes)")),
    ]
}

#[test]
fn a_file_becomes_a_linear_of_two_slices_of_it_and_back() {
    let folder = tempfile::tempdir_in(".").unwrap();
    run(1, async |host| {
        // A deadline must not pass while the kernel is at work.
        tokio::time::resume();
        let graphs = same_disk(folder.path());
        let (live, disk) = start(&host, &graphs[0]).await;
        disk.write(SIZE / 2 - 3, b"across").await.unwrap();
        let report = reload(&live, &graphs[2]).await.unwrap();
        assert!(report.diff.gate);
        assert_eq!(report.diff.fate("A"), Some(Fate::Kept));
        assert_eq!(disk.read(SIZE / 2 - 3, 6).await.unwrap(), b"across");
        disk.write(SIZE / 2 - 3, b"ACROSS").await.unwrap();
        let report = reload(&live, &graphs[1]).await.unwrap();
        assert_eq!(report.diff.fate("Both"), None);
        assert_eq!(disk.read(SIZE / 2 - 3, 6).await.unwrap(), b"ACROSS");
        live.stop().await.unwrap();
    });
}

/// What an element derives from its neighbours belongs to the graph: the same `linear` over a child of
/// another size.
#[test]
fn a_shared_instance_sees_the_sizes_of_its_own_graph() {
    run(1, async |host| {
        let graph = |size: &str| {
            format!("element Client (type client) element A (type mem) (size {size}) element B (type mem) (size 64k)
                element L (type linear) Client -> L (L, a) -> A (L, b) -> B")
        };
        let (live, disk) = start(&host, &graph("64k")).await;
        disk.write(64 << 10, b"first of B").await.unwrap();
        let report = reload(&live, &graph("128k")).await.unwrap();
        assert_eq!((report.diff.fate("L"), report.diff.fate("B")), (Some(Fate::Kept), Some(Fate::Kept)));
        assert_eq!(disk.read(128 << 10, 10).await.unwrap(), b"first of B");
        assert_eq!(disk.size(), 192 << 10);
    });
}

#[test]
fn what_a_graph_would_break_is_refused_before_anything_stops() {
    let folder = tempfile::tempdir_in(".").unwrap();
    run(1, async |host| {
        let graphs = same_disk(folder.path());
        let (live, disk) = start(&host, &graphs[0]).await;
        let missing = graphs[0].replace("a.img) (size 1M)", "b.img)");
        let error = reload(&live, &missing).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.to_string().ends_with("b.img: there is no such file"), "{error}");
        // One that would have to be made is not, if another cannot be built.
        let half = format!(
            "{} element C (type file) (path {}/new.img) (size 1M) element L (type linear)
            (L, a) -> A (L, c) -> C Client -> L",
            missing.replace("Client -> A", ""),
            folder.path().display()
        );
        reload(&live, &half).await.unwrap_err();
        assert!(!folder.path().join("new.img").exists());
        disk.write(0, b"still here").await.unwrap();
        live.stop().await.unwrap();
    });
}

/// Writers that each own every fourth block, stamp it with a count, and read it back; a reload at every
/// instant. No request fails, none is lost or done twice.
async fn write_and_change(host: &Arc<Host>, seed: u64, folder: &Path, changes: usize) {
    const WRITERS: u64 = 4;
    const BLOCK: u64 = 4096;
    tokio::time::resume();
    let graphs = same_disk(folder);
    let (live, disk) = start(host, &graphs[0]).await;
    let disk = Rc::new(disk);
    let over = Rc::new(std::cell::Cell::new(false));
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let (disk, over) = (disk.clone(), over.clone());
        let mut rng = fastrand::Rng::with_seed(seed * WRITERS + writer);
        writers.push(tokio::task::spawn_local(async move {
            let mut model = vec![0u64; (SIZE / BLOCK / WRITERS) as usize];
            let mut count = 0u64;
            while !over.get() {
                count += 1;
                let ix = rng.usize(..model.len());
                let offset = (ix as u64 * WRITERS + writer) * BLOCK;
                if rng.bool() {
                    let mut stamp =
                        Data::copy_of(&[count.to_le_bytes(), writer.to_le_bytes()].concat().repeat(256));
                    match rng.u8(..8) {
                        0 => {
                            model[ix] = 0;
                            disk.op(Op::WriteZeroes, offset, BLOCK).await.unwrap();
                            continue;
                        }
                        1 => disk.op(Op::Flush, 0, 0).await.unwrap(),
                        // In two halves that are in flight at once.
                        2 => {
                            let (low, high) = (stamp.slice(0..2048), stamp.slice(2048..4096));
                            let low = disk.send(Request::write(offset, low));
                            disk.submit(Request::write(offset + 2048, high)).await.unwrap();
                            low.await.unwrap().unwrap();
                            stamp = Data::empty();
                        }
                        _ => {}
                    }
                    if !stamp.is_empty() {
                        disk.submit(Request::write(offset, stamp)).await.unwrap();
                    }
                    model[ix] = count;
                } else {
                    let found = disk.read(offset, BLOCK).await.unwrap();
                    let expected = match model[ix] {
                        0 => vec![0; BLOCK as usize],
                        count => [count.to_le_bytes(), writer.to_le_bytes()].concat().repeat(256),
                    };
                    assert!(found == expected, "block {ix} of writer {writer} is not at {}", model[ix]);
                }
            }
        }));
    }
    let mut rng = fastrand::Rng::with_seed(seed);
    for _ in 0..changes {
        for _ in 0..rng.usize(..200) {
            tokio::task::yield_now().await;
        }
        let text = &graphs[rng.usize(..graphs.len())];
        reload(&live, text).await.unwrap_or_else(|error| panic!("{error}: {text}"));
    }
    over.set(true);
    for writer in writers {
        writer.await.unwrap();
    }
    live.stop().await.unwrap();
}

#[test]
fn graphs_change_under_writers_and_nothing_is_lost() {
    for seed in 0..4 {
        let folder = tempfile::tempdir_in(".").unwrap();
        run(seed, async |host| write_and_change(&host, seed, folder.path(), 60).await);
    }
}
