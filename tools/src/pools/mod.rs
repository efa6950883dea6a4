//! `mason pool` and `mason volume`: pools of thin volumes, served or not.

mod dump;
mod history;
mod image;
pub(crate) mod pool;
mod qcow2;
mod reach;
mod receive;
mod repair;
mod scrub;
mod send;
mod stream;
mod tidy;
pub(crate) mod volume;

use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::view::PoolRequest;
use blockmason::Kind;
use blockmason_elements::parallax::tool::{self, Operation};
use serde_json::Value;
use std::path::Path;

/// Does something with a pool: here if nobody has it open, else by the daemon that serves it.
fn ask(pool: &Path, operation: &Operation, control: &ControlArgs) -> Outcome<Value> {
    let failed = |error| Failure::from_error(&error);
    let here = match operation {
        Operation::List => tool::list(pool).map(Ok),
        _ => tool::open(pool).map(|open| open.carry_out(operation)),
    };
    match here {
        Ok(done) => done.map_err(failed),
        Err(error) if error.kind() == Kind::NoSpace => match operation {
            Operation::Grow { size } => tool::grow_closed(pool, *size).map_err(failed),
            _ => Err(Failure::new(format!("{error}; make it larger with mason pool grow"))),
        },
        Err(error) if error.kind() == Kind::Busy => {
            let (client, _) = match control.connect() {
                Ok(daemon) => daemon,
                Err(Failure::Failed(why) | Failure::Usage(why)) => {
                    return Err(Failure::new(format!("{error}; which daemon has it is not known: {why}")));
                }
                Err(Failure::Said) => return Err(Failure::Said),
            };
            let path = pool.canonicalize().map_err(Failure::new)?;
            let operation = serde_json::to_value(operation).map_err(Failure::new)?;
            let wanted = PoolRequest { pool: path.to_string_lossy().into_owned(), operation };
            client.post("/v1/pools", &wanted)
        }
        Err(error) => Err(failed(error)),
    }
}

/// A snapshot as it is named: `VOLUME@SNAPSHOT`.
#[derive(Clone, Debug)]
struct Named {
    volume: String,
    snapshot: String,
}

fn named(text: &str) -> Result<Named, String> {
    match text.split_once('@') {
        Some((volume, snapshot)) if !volume.is_empty() && !snapshot.is_empty() => {
            Ok(Named { volume: volume.to_owned(), snapshot: snapshot.to_owned() })
        }
        _ => Err(format!("expected VOLUME@SNAPSHOT, as in vm1@monday, found `{text}`")),
    }
}
