//! A leg that does not answer: guests go on without it, and what it misses is marked.

use super::*;

/// Time passes, and what it wakes has its turn.
async fn pass(seconds: f64) {
    rt::sleep(Duration::from_secs_f64(seconds)).await;
    settle().await;
}

#[test]
fn guests_go_on_without_a_leg_that_does_not_answer() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(log L) (lag 128k)").await;
        let mut events = host.events().follow(0);
        setup.disk.write(0, b"a").await.unwrap();
        setup.disk.write(64 << 10, b"b").await.unwrap();
        let since = rt::now();
        // There is no room for this one.
        setup.disk.write(128 << 10, b"c").await.unwrap();
        assert_eq!((rt::now() - since).as_secs(), 2);
        assert_eq!(setup.map().dirty_bytes(), 3 * (64 << 10), "what is on its way there is marked, too");
        setup.disk.write(1, b"d").await.unwrap();
        setup.disk.op(Op::Flush, 0, 0).await.unwrap();
        assert_eq!((rt::now() - since).as_secs(), 2, "nobody waits again");
        assert_eq!(parked("New"), ["write 0+1 -", "write 65536+1 -"]);
        let told: Vec<_> = events.take(10).events.iter().map(|event| event.message.clone()).collect();
        assert!(told.len() == 1 && told[0].contains("has not answered for 2s"), "{told:?}");
        release("New", true).await;
        setup.disk.write(2, b"e").await.unwrap();
        assert_eq!(parked("New"), ["write 65536+1 -"], "not before all has ended");
        release("New", true).await;
        setup.disk.write(3, b"f").await.unwrap();
        assert_eq!(parked("New"), ["write 3+1 -"], "it takes part again");
        assert_eq!(setup.map().dirty_bytes(), 3 * (64 << 10), "what it lacks is marked still");
    });
}

#[test]
fn what_was_let_go_makes_nothing_clean_when_it_lands() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(log L)").await;
        setup.disk.write(0, &[1; 64 << 10]).await.unwrap();
        // Behind the first one.
        setup.disk.write(0, &[2; 64 << 10]).await.unwrap();
        pass(3.0).await;
        setup.disk.write(0, &[3; 64 << 10]).await.unwrap();
        assert_eq!(parked("New").len(), 1);
        assert!(!setup.is_settled(), "a copier has to wait for what may land yet");
        release("New", true).await;
        assert_eq!(parked("New").len(), 0, "the second one is not sent any more");
        assert!(setup.is_settled() && setup.map().is_dirty(0..1));
        setup.disk.write(0, &[4; 64 << 10]).await.unwrap();
        release("New", true).await;
        assert!(!setup.map().is_dirty(0..1) && bytes("New") == bytes("Old"));
    });
}

#[test]
fn a_leg_that_answers_is_never_let_go_and_one_without_a_log_neither() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(log L) (lag 128k)").await;
        for at in 0..10 {
            setup.disk.write(at, b"a").await.unwrap();
            pass(1.9).await;
            release("New", true).await;
        }
        assert_eq!((setup.map().dirty_bytes(), setup.get("skipped")), (0, "new 0".to_owned()));
    });
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(lag 64k)").await;
        setup.disk.write(0, b"a").await.unwrap();
        let mut second = setup.disk.send(write(1, b"b"));
        pass(60.0).await;
        assert!(second.try_recv().is_err());
        release("New", true).await;
        second.await.unwrap().unwrap();
    });
}

#[test]
fn a_change_of_graph_leaves_behind_what_it_is_told_to() {
    run(1, async |host| {
        let before = "element Client (type client) element T (type tee) element Old (type mem) (size 64k)\n\
            element D (type delay) (all 20s) element New (type mem) (size 64k)\n\
            Client -> T (T, old) -> Old (T, new) -> D -> New";
        let (live, disk) = live(&host, *CATALOGUE, before).await.unwrap();
        disk.write(0, b"a").await.unwrap();
        let alone = "element Client (type client) element Old (type mem) (size 64k) Client -> Old";
        let next = || checked(*CATALOGUE, alone).unwrap();
        let options = |leave_behind: &[&str]| Options {
            heads: blockmason::live::Heads::Ignore,
            flush_by: Some(Vec::new()),
            leave_behind: leave_behind.iter().map(|name| (*name).to_owned()).collect(),
            ..Options::default()
        };
        for others in [&[][..], &["D"]] {
            let refused = live.reload(next(), &options(others)).await.unwrap_err().to_string();
            assert!(refused.contains("have not ended"), "{refused}");
        }
        let since = rt::now();
        live.reload(next(), &options(&["T"])).await.unwrap();
        assert_eq!((rt::now() - since).as_millis(), 0);
        assert!(disk.disk.has_left_behind().await.unwrap());
        disk.write(1, b"b").await.unwrap();
        assert_eq!(disk.read(0, 2).await.unwrap(), b"ab");
        pass(20.0).await;
        assert!(!disk.disk.has_left_behind().await.unwrap());
    });
}

#[test]
fn a_disk_stops_without_what_was_left_behind() {
    run(1, async |host| {
        let before = "element Client (type client) element T (type tee) element Old (type mem) (size 64k)\n\
            element D (type delay) (all 1000s) element New (type mem) (size 64k)\n\
            Client -> T (T, old) -> Old (T, new) -> D -> New";
        let (live, disk) = live(&host, *CATALOGUE, before).await.unwrap();
        disk.write(0, b"a").await.unwrap();
        let alone = "element Client (type client) element Old (type mem) (size 64k) Client -> Old";
        let options = Options {
            heads: blockmason::live::Heads::Ignore,
            flush_by: Some(Vec::new()),
            leave_behind: vec!["T".to_owned()],
            ..Options::default()
        };
        live.reload(checked(*CATALOGUE, alone).unwrap(), &options).await.unwrap();
        let since = rt::now();
        disk.disk.stop().await.unwrap();
        assert!((rt::now() - since).as_secs() < 1);
    });
}
