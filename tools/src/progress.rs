//! How far something is, while somebody waits for it: a bar on a terminal, a line from time to time elsewhere.

use crate::failure::Outcome;
use blockmason::rt;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::time::Instant;

/// How often it is asked for.
const EVERY: Duration = Duration::from_millis(100);

/// Between two lines where there is no terminal.
const LINES: Duration = Duration::from_secs(2);

/// Cells of the bar.
const CELLS: u64 = 24;

/// Asks by `next` until that is enough. Returns the last answer. `line` says how far it is, with a bar or without.
#[expect(clippy::disallowed_methods, reason = "no shard is blocked: this thread only waits")]
pub(crate) fn watch<V>(
    first: V,
    mut next: impl FnMut() -> Outcome<V>,
    enough: impl Fn(&V) -> bool,
    line: impl Fn(&V, bool) -> String,
) -> Outcome<V> {
    let terminal = std::io::stderr().is_terminal();
    let (mut view, mut said, mut last) = (first, rt::now(), String::new());
    while !enough(&view) {
        std::thread::sleep(EVERY);
        let answer = next();
        if terminal {
            eprint!("\r\x1b[K");
        }
        view = answer?;
        if terminal {
            eprint!("{}", line(&view, true));
        } else if due(&mut said) && !enough(&view) {
            let next = line(&view, false);
            if next != last {
                eprintln!("{next}");
            }
            last = next;
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    Ok(view)
}

/// One line that says how far something is: it stays where it is on a terminal, and is written from time to time elsewhere.
pub(crate) struct Line {
    terminal: bool,
    said: Instant,
}

impl Line {
    pub(crate) fn new() -> Line {
        Line { terminal: std::io::stderr().is_terminal(), said: rt::now() }
    }

    pub(crate) fn say(&mut self, what: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{what}");
        } else if due(&mut self.said) {
            eprintln!("{what}");
        }
    }

    /// Something else is to be said.
    pub(crate) fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

fn due(said: &mut Instant) -> bool {
    let due = rt::now() - *said >= LINES;
    if due {
        *said = rt::now();
    }
    due
}

/// Says from time to time how many of something are done, for whoever is called with that.
pub(crate) fn lines(what: &'static str) -> impl Fn(u64, u64) + Send + Sync + 'static {
    let said = std::sync::Mutex::new(rt::now());
    move |done, of| {
        if due(&mut said.lock().unwrap_or_else(std::sync::PoisonError::into_inner)) {
            eprintln!("{done} of {of} {what}");
        }
    }
}

/// A bar.
pub(crate) fn cells(done: u64, of: u64) -> String {
    let full = (u128::from(done) * u128::from(CELLS) / u128::from(of.max(1))).min(u128::from(CELLS)) as usize;
    let cell = |ix: usize| if ix < full { '#' } else { '.' };
    format!("[{}]", (0..CELLS as usize).map(cell).collect::<String>())
}
