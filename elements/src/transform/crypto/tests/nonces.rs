//! No pair of key and nonce is used twice, whatever becomes of the disk below.

use super::super::Crypto;
use super::super::format::{Entry, SESSIONS, array};
use super::kit::{Bench, KEY_A, Oracle, call, events, get};
use blockmason::testing::{TestDisk, run};
use std::any::Any;
use std::collections::HashMap;

/// All that was ever encrypted: by key and nonce, the slot and its block.
#[derive(Default)]
struct Seen(HashMap<(Vec<u8>, u64), (u64, Vec<u8>)>);

impl Seen {
    fn add(&mut self, image: &[u8]) {
        let oracle = Oracle::new(image, KEY_A);
        for block in 0..oracle.blocks() {
            let Some((_, key, salt)) = oracle.session(block) else { continue };
            // The key of a session follows from these two.
            let key = [&key.to_le_bytes(), salt].concat();
            let slot = (block, oracle.slot(block).to_vec());
            let before = self.0.entry((key, oracle.counter(block))).or_insert_with(|| slot.clone());
            assert!(*before == slot, "a nonce was used twice");
        }
    }
}

async fn scribble(disk: &TestDisk, rng: &mut fastrand::Rng, seen: &mut Seen, bench: &Bench, name: &str) {
    for _ in 0..5 {
        let at = rng.u64(0..16);
        let mut bytes = vec![0; (rng.u64(1..=16 - at) * 512) as usize];
        rng.fill(&mut bytes);
        disk.write(at * 512, &bytes).await.unwrap();
        seen.add(&bench.image(name).await);
    }
}

#[test]
fn copies_and_old_states_are_written_with_keys_of_their_own() {
    for seed in 0..3 {
        run(seed, async |host| {
            let bench = Bench::new(&host, 16, 512);
            let (mut rng, mut seen) = (fastrand::Rng::with_seed(seed), Seen::default());
            let open = async |name: &str| bench.open(name, "(block 512)").await;
            let disk = open("Disk").await;
            scribble(&disk, &mut rng, &mut seen, &bench, "Disk").await;
            disk.disk.stop().await.unwrap();
            let old = bench.image("Disk").await;
            // Once more, then set back to before, which it does not know.
            let disk = open("Disk").await;
            scribble(&disk, &mut rng, &mut seen, &bench, "Disk").await;
            disk.disk.stop().await.unwrap();
            bench.set("Disk", &old).await;
            bench.set("Copy", &old).await;
            // The old state and a copy of it, both at once.
            let (disk, copy) = (open("Disk").await, open("Copy").await);
            for _ in 0..2 {
                scribble(&disk, &mut rng, &mut seen, &bench, "Disk").await;
                scribble(&copy, &mut rng, &mut seen, &bench, "Copy").await;
            }
            assert_eq!(
                (get(&disk, "sessions"), get(&copy, "sessions")),
                ("2 of 4096".into(), "2 of 4096".into())
            );
            assert!(seen.0.len() > 100);
        });
    }
}

/// The element's volume in a graph that is served.
fn with<T>(disk: &TestDisk, look: impl FnOnce(&Crypto) -> T) -> T {
    let graph = disk.disk.graph();
    let element = graph.instances().find(|found| found.name == "X").unwrap().element.clone();
    look((&*element as &dyn Any).downcast_ref().unwrap())
}

#[test]
fn a_session_ends_before_its_nonces_do() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        let session = with(&disk, |crypto| crypto.opened().unwrap().session(1).unwrap().unwrap());
        // One is used; ten are left.
        assert_eq!(session.take((1 << 32) - 11), Some(1));
        disk.write(512, &[2; 5120]).await.unwrap();
        assert_eq!(get(&disk, "sessions"), "1 of 4096");
        disk.write(0, &[3; 512]).await.unwrap();
        assert_eq!(get(&disk, "sessions"), "2 of 4096");
        assert_eq!(session.take(1), None);
        let image = bench.image("Disk").await;
        let oracle = Oracle::new(&image, KEY_A);
        assert_eq!(oracle.counter(10), (1 << 32) - 1);
        assert_eq!((oracle.session(0).unwrap().0, oracle.counter(0)), (2, 0));
        assert_eq!(disk.read(0, 1024).await.unwrap(), [[3; 512], [2; 512]].concat());
    });
}

#[test]
fn a_full_table_warns_then_refuses_writes_and_a_rotation_makes_room() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        disk.disk.stop().await.unwrap();
        let image = bench.image("Disk").await;
        let raw = bench.raw("Disk").await;
        let fill = async |sessions: std::ops::Range<u32>| {
            for session in sessions {
                let entry = Entry::encode(&array(&image, 16), session, 1, &[session as u8; 32]);
                raw.write(Entry::place(session), &entry).await.unwrap();
            }
        };
        fill(2..3686).await;
        let disk = bench.open("Disk", "(block 512)").await;
        let events = |what: &str| events(&host).iter().filter(|it| it.contains(what)).count();
        assert_eq!(events("sessions are used"), 0);
        disk.write(0, &[2; 512]).await.unwrap();
        assert_eq!((events("3686 of 4096 sessions are used"), events("sessions are used")), (0, 0));
        disk.disk.stop().await.unwrap();
        fill(3687..4033).await;
        let disk = bench.open("Disk", "(block 512)").await;
        let error = disk.write(0, &[3; 512]).await.unwrap_err();
        assert!(error.to_string().contains("4032 of 4096 are used: call `rotate`"), "{error}");
        assert_eq!(disk.read(0, 512).await.unwrap(), [2; 512]);
        assert_eq!(call(&disk, "rotate", "").await, "");
        while get(&disk, "rotation") != "none" {
            blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
        }
        assert!(events("sessions are used") > 0);
        assert_eq!(get(&disk, "sessions"), format!("1 of {SESSIONS}"));
        disk.write(0, &[3; 512]).await.unwrap();
        assert_eq!(disk.read(0, 1024).await.unwrap(), [[3; 512], [0; 512]].concat());
    });
}
