//! A daemon with two exports: what the guest of one does must not be seen by that of the other.

use crate::{Daemon, Running};
use blockmason_tests::control::Control;
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, Shape};
use blockmason_vhost_tests::model::{BLOCK, contents};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Sectors of the disks.
pub(crate) const SECTORS: u64 = 1 << 18;

/// A daemon with an export for guests with bad manners, and one for a guest that works all the time.
pub(crate) struct Two {
    pub(crate) daemon: Daemon,
    bystander: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    /// Requests that the bystander has made.
    served: Arc<AtomicU64>,
}

impl Two {
    pub(crate) fn new() -> Two {
        let mut daemon = Daemon::new();
        let bytes = SECTORS * 512;
        let running = daemon.run(&format!(
            "element Evil (type vhost_user_blk) (listen unix:vm.sock) (queues 2)\n\
             element Good (type vhost_user_blk) (listen unix:good.sock) (queues 1)\n\
             element One (type file) (path disk.img) (size {bytes})\n\
             element Two (type file) (path good.img) (size {bytes})\n\
             Evil -> One\nGood -> Two\n"
        ));
        let Running::Mason(mut mason) = running else { unreachable!() };
        // The second export's.
        mason.line();
        daemon.running = Some(Running::Mason(mason));
        let good = crate::socket_in(daemon.home.path(), "good.sock");
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), served.clone());
        let thread = std::thread::spawn(move || work(good, &stopped, &count));
        Two { daemon, bystander: Some(thread), stop, served }
    }

    /// The bad guest's export.
    pub(crate) fn socket(&self) -> PathBuf {
        self.daemon.socket()
    }

    /// Serves a guest with good manners through the same export, and has said nothing about a panic.
    pub(crate) fn is_well(&self, after: &str) {
        assert!(self.daemon.is_alive(), "{after}: the daemon is dead\n{}", self.daemon.log());
        let mut blk = Blk::new(Shape::default());
        let connected = blk.connect(&self.socket());
        assert!(connected.is_ok(), "{after}: no guest can connect any more: {connected:?}");
        let data = contents(7, 77);
        blk.write(56, &data);
        assert!(blk.read(56, BLOCK as u32) == data, "{after}: a guest reads something else");
        let log = self.daemon.log();
        assert!(!log.contains("panicked"), "{after}: {log}");
        let before = self.served.load(Ordering::Relaxed);
        until("the other guest goes on", || {
            assert!(!self.bystander.as_ref().unwrap().is_finished(), "{after}: the other guest has failed");
            self.served.load(Ordering::Relaxed) > before
        });
    }

    /// Gives the bad guest's export a disk of another size.
    pub(crate) fn resize(&self, bytes: u64) {
        let folder = self.daemon.home.path();
        let name = format!("{bytes}.img");
        std::fs::File::create(folder.join(&name)).unwrap().set_len(bytes).unwrap();
        let edit = json!({ "edit": "replace", "element": "One", "by": format!("(type file) (path {name})") });
        let body = json!({ "edits": [edit], "folder": folder });
        Control::connect(&folder.join("c.sock")).done("POST", "/v1/graphs/vm/edits", &body);
    }

    pub(crate) fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Err(panic) = self.bystander.take().unwrap().join() {
            std::panic::resume_unwind(panic);
        }
        self.daemon.stop();
    }
}

/// The other guest.
fn work(socket: PathBuf, stop: &AtomicBool, served: &AtomicU64) {
    let mut blk = Blk::connected(Shape::default(), &socket);
    while !stop.load(Ordering::Relaxed) {
        let count = served.fetch_add(1, Ordering::Relaxed) + 1;
        let block = count % 512;
        let data = contents(block, count);
        blk.write(block * 8, &data);
        assert!(blk.read(block * 8, BLOCK as u32) == data, "the other guest reads something else");
    }
}
