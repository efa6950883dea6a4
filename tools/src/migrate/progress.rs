//! How far a move is, while somebody waits for it: a bar on a terminal, a line from time to time elsewhere.

use crate::control::client::{Client, path};
use crate::failure::Outcome;
use crate::output::printable;
use crate::units::{Bytes, Seconds};
use crate::view::{MoveState, MoveView};
use blockmason::rt;
use std::io::IsTerminal;
use std::time::Duration;
use tokio::time::Instant;

/// How often the daemon is asked.
const EVERY: Duration = Duration::from_millis(100);

/// Between two lines where there is no terminal.
const LINES: Duration = Duration::from_secs(2);

/// Cells of the bar.
const CELLS: u64 = 24;

/// Asks until the state is enough. Returns the last answer.
pub(super) fn follow(client: &Client, begun: MoveView, enough: fn(MoveState) -> bool) -> Outcome<MoveView> {
    let at = path(&["v1", "graphs", &begun.graph, "moves", &begun.element]);
    let terminal = std::io::stderr().is_terminal();
    let (mut view, mut said) = (begun, rt::now());
    while !enough(view.state) {
        pause();
        let next = client.get(&at);
        if terminal {
            eprint!("\r\x1b[K");
        }
        view = next?;
        if terminal {
            eprint!("{}", line(&view, true));
        } else if due(&mut said) && !enough(view.state) {
            eprintln!("{}", line(&view, false));
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    Ok(view)
}

#[expect(clippy::disallowed_methods, reason = "no shard is here")]
fn pause() {
    std::thread::sleep(EVERY);
}

fn due(said: &mut Instant) -> bool {
    let due = rt::now() - *said >= LINES;
    if due {
        *said = rt::now();
    }
    due
}

fn line(view: &MoveView, bar: bool) -> String {
    let (done, of) = match view.state {
        MoveState::Verifying => (view.verified, view.total),
        _ => (view.total.saturating_sub(view.remaining), view.total),
    };
    let bar = if bar { cells(done, of) + " " } else { String::new() };
    let what = view.state.name();
    let mut line = format!("{bar}{what} {} of {}", Bytes(done), Bytes(of));
    if view.state == MoveState::Copying && view.rate > 0 {
        line += &format!(", {}/s", Bytes(view.rate));
        line += &format!(
            ", {} left, about {}",
            Bytes(view.remaining),
            Seconds(view.remaining as f64 / view.rate as f64)
        );
    }
    if view.passes > 1 {
        line += &format!(", pass {}", view.passes);
    }
    if !view.message.is_empty() {
        line += &format!("; {}", view.message);
    }
    printable(&line)
}

fn cells(done: u64, of: u64) -> String {
    let full = (u128::from(done) * u128::from(CELLS) / u128::from(of.max(1))).min(u128::from(CELLS)) as usize;
    let cell = |ix: usize| if ix < full { '#' } else { '.' };
    format!("[{}]", (0..CELLS as usize).map(cell).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(state: MoveState) -> MoveView {
        MoveView {
            graph: "vm1".to_owned(),
            element: "Disk".to_owned(),
            to: "null".to_owned(),
            state,
            message: String::new(),
            total: 100 << 20,
            remaining: 25 << 20,
            copied: 0,
            skipped: 0,
            rate: 5 << 20,
            verified: 50 << 20,
            passes: 1,
            pause_seconds: None,
            seconds: 1.0,
        }
    }

    #[test]
    fn a_line_says_how_far_it_is() {
        assert_eq!(
            line(&view(MoveState::Copying), true),
            "[##################......] copying 75M of 100M, 5M/s, 25M left, about 5.0s"
        );
        assert_eq!(line(&view(MoveState::Verifying), false), "verifying 50M of 100M");
        let paused = MoveView { message: "until\x1b[2J".to_owned(), passes: 3, ..view(MoveState::Paused) };
        assert_eq!(line(&paused, false), "paused 75M of 100M, pass 3; until?[2J");
        assert_eq!(cells(0, 0), format!("[{}]", ".".repeat(24)));
    }
}
