//! `mason top`.

use crate::guest::Guest;
use crate::harness::{Home, MASON, run_to_end};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

#[test]
fn for_scripts() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let child =
        home.command(MASON, &["top", "--json", "--count", "2", "--interval", "500ms"]).spawn().unwrap();
    let mut guest = Guest::connect(&home, "vm.nbd");
    // Requests come all the while.
    while home.ask("mason/vm.sock", "GET", "/v1/daemon", "").contains("200 OK") {
        (0..100).for_each(|_| guest.read(0, 512));
        if home.mason(&["show", "vm", "--json"]).json()[0]["edges"][0]["requests"].as_u64().unwrap() > 500 {
            break;
        }
    }
    let out = run_to_end(child).done();
    let looks: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(looks.len(), 2);
    let rows = looks[1]["graphs"][0]["rows"].as_array().unwrap();
    assert_eq!((&rows[0]["kind"], &rows[0]["operation"]), (&"source".into(), &"read".into()), "{rows:#?}");
    assert_eq!((&rows[1]["kind"], &rows[1]["name"]), (&"edge".into(), &"Guest -> Disk".into()), "{rows:#?}");
    let table = home.mason(&["top", "--once", "--interval", "50ms"]).done();
    assert!(table.contains("vm  vm.mason, 0 in flight") && table.contains(" Guest -> Disk "), "{table}");
    home.mason(&["top", "--interval", "1ms"]).misused();
    drop(guest);
    daemon.stop();
    assert!(home.mason(&["top"]).failed().contains("no daemon runs"));
}

/// A terminal, with what has come from it.
struct Terminal {
    master: File,
    slave: File,
    before: Termios,
    came: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    fn new() -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = File::options().read(true).write(true).open(path).unwrap();
        let (before, master) = (tcgetattr(&slave).unwrap(), File::from(master));
        let (tx, came) = channel();
        let mut reader = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                if tx.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        let terminal = Terminal { master, slave, before, came, seen: String::new() };
        terminal.resize(100);
        terminal
    }

    fn start(&self, home: &Home) -> Child {
        let mut command = home.command(MASON, &["top", "--interval", "50ms"]);
        let end = || Stdio::from(self.slave.try_clone().unwrap());
        command.env("TERM", "xterm").stdin(end()).stdout(end()).spawn().unwrap()
    }

    /// Waits until the terminal shows that. What stands there already is not drawn again, character by character, so
    /// that a sentence over another one may come with gaps: now and then the width changes, and all is drawn.
    fn until(&mut self, wanted: &str) {
        let mut looks = 0;
        let end = loop {
            if let Some(at) = self.seen.find(wanted) {
                break at + wanted.len();
            }
            let came = self.came.recv_timeout(Duration::from_secs(20));
            let came = came.unwrap_or_else(|_| panic!("no {wanted:?} in {:?}", self.seen));
            self.seen += &String::from_utf8_lossy(&came);
            looks += 1;
            assert!(looks < 1000, "no {wanted:?} in {:?}", self.seen);
            if looks % 20 == 0 {
                self.resize(100 + looks / 20 % 2);
            }
        };
        self.seen.drain(..end);
    }

    fn resize(&self, columns: u16) {
        tcsetwinsize(&self.slave, Winsize { ws_row: 20, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
            .unwrap();
    }

    #[track_caller]
    fn is_restored(&mut self) {
        self.until("\x1b[?1049l");
        let now = tcgetattr(&self.slave).unwrap();
        let modes = |termios: &Termios| (termios.local_modes, termios.input_modes, termios.output_modes);
        assert_eq!(modes(&now), modes(&self.before));
    }
}

#[test]
fn on_a_terminal() {
    let home = Home::new();
    home.memory_graph("vm");
    let mut terminal = Terminal::new();
    let daemon = home.run(&["vm.mason"], 1);
    let child = terminal.start(&home);
    terminal.until("vm.mason");
    terminal.until("sampled");
    daemon.stop().done();
    terminal.until("no daemon runs there");
    let daemon = home.run(&["vm.mason"], 1);
    terminal.until("quit");
    terminal.master.write_all(b"h").unwrap();
    terminal.until("keys");
    terminal.master.write_all(b"q").unwrap();
    run_to_end(child).done();
    terminal.is_restored();
    for signal in [Signal::TERM, Signal::INT] {
        let child = terminal.start(&home);
        terminal.until("sampled");
        kill_process(Pid::from_child(&child), signal).unwrap();
        run_to_end(child).done();
        terminal.is_restored();
    }
    daemon.stop().done();
}
