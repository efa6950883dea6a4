//! The terminal of `mason top`: raw while it runs, as it was when it ends, however that comes.

use super::rates::{Rates, View};
use super::screen::Screen;
use crate::control::client::Client;
use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long a key, a signal or a look may wait to be seen.
const TICK: Duration = Duration::from_millis(50);

/// Shows the daemon's graphs until somebody has seen enough.
pub(super) fn watch(control: &ControlArgs, interval: Duration) -> Outcome {
    // Said while the terminal is still as it was.
    let (client, _) = control.connect()?;
    let stop = Arc::new(AtomicBool::new(false));
    watch_signals(stop.clone())?;
    let (tx, looks) = sync_channel(1);
    let control = ControlArgs { control: Some(client.socket().to_owned()) };
    let poll = move || poll(&control, client, interval, &tx);
    std::thread::Builder::new().name("looks".to_owned()).spawn(poll).map_err(Failure::new)?;
    // Also restores the terminal when something panics.
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let shown = show(&mut terminal, &looks, &stop);
    ratatui::try_restore().map_err(failed)?;
    shown.map_err(failed)
}

fn failed(error: std::io::Error) -> Failure {
    Failure::new(format!("the terminal cannot be used: {error}"))
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    looks: &Receiver<Result<View, String>>,
    stop: &AtomicBool,
) -> std::io::Result<()> {
    let mut screen = Screen::default();
    let mut changed = true;
    while !stop.load(Ordering::Relaxed) {
        for look in looks.try_iter() {
            screen.look(look);
            changed = true;
        }
        if std::mem::take(&mut changed) {
            terminal.draw(|frame| screen.draw(frame))?;
        }
        if event::poll(TICK)? {
            changed = true;
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release && !screen.key(key) => break,
                _ => {}
            }
        }
    }
    Ok(())
}

/// Looks again and again, until nobody wants to see it. A daemon that has gone may come back.
fn poll(
    control: &ControlArgs,
    mut client: Client,
    interval: Duration,
    looks: &SyncSender<Result<View, String>>,
) {
    let mut rates = Rates::default();
    loop {
        let look =
            super::look(&client).map(|counters| rates.next(counters)).map_err(|failure| failure.to_string());
        if look.is_err()
            && let Ok((again, _)) = control.connect()
        {
            client = again;
        }
        if looks.send(look).is_err() {
            return;
        }
        super::wait(&client, interval);
    }
}

/// Sets `stop` when a signal wants the process to end.
fn watch_signals(stop: Arc<AtomicBool>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let body = move || {
        runtime.block_on(async {
            let watch = |kind| async move {
                match signal(kind) {
                    Ok(mut signal) => drop(signal.recv().await),
                    // Then it ends the process by itself.
                    Err(_) => std::future::pending().await,
                }
            };
            tokio::select! {
                () = watch(SignalKind::terminate()) => {}
                () = watch(SignalKind::interrupt()) => {}
                () = watch(SignalKind::hangup()) => {}
            }
        });
        stop.store(true, Ordering::Relaxed);
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(body).map_err(Failure::new)?;
    Ok(())
}
