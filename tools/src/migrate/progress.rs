//! How far a move is, while somebody waits for it.

use crate::control::client::{Client, path};
use crate::failure::Outcome;
use crate::output::printable;
use crate::progress::{cells, watch};
use crate::units::{Bytes, Seconds};
use crate::view::{MoveState, MoveView};
use blockmason::rt;
use tokio::time::Instant;

/// Asks until the state is enough. Returns the last answer.
pub(super) fn follow(client: &Client, begun: MoveView, enough: fn(MoveState) -> bool) -> Outcome<MoveView> {
    follow_until(client, begun, enough, None)
}

/// The same, until then at the most.
pub(super) fn follow_until(
    client: &Client,
    begun: MoveView,
    enough: fn(MoveState) -> bool,
    end: Option<Instant>,
) -> Outcome<MoveView> {
    let at = path(&["v1", "graphs", &begun.graph, "moves", &begun.element]);
    let over = || end.is_some_and(|end| rt::now() >= end);
    watch(begun, || client.get(&at), |view| enough(view.state) || view.trouble.is_some() || over(), line)
}

/// Bytes that are likely to be written yet: where a part of what is done were holes, so is one of what is left.
fn to_write(view: &MoveView) -> f64 {
    let looked_at = (view.copied + view.skipped).max(1) as f64;
    view.remaining as f64 * (view.copied as f64 / looked_at)
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
            Seconds(to_write(view) / view.rate as f64)
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
            trouble: None,
            total: 100 << 20,
            remaining: 25 << 20,
            copied: 75 << 20,
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
        let sparse = MoveView { copied: 15 << 20, skipped: 60 << 20, ..view(MoveState::Copying) };
        assert!(line(&sparse, false).ends_with("25M left, about 1.0s"), "{}", line(&sparse, false));
        assert_eq!(line(&view(MoveState::Verifying), false), "verifying 50M of 100M");
        let paused = MoveView { message: "until\x1b[2J".to_owned(), passes: 3, ..view(MoveState::Paused) };
        assert_eq!(line(&paused, false), "paused 75M of 100M, pass 3; until?[2J");
        assert_eq!(cells(0, 0), format!("[{}]", ".".repeat(24)));
    }
}
