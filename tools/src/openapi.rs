//! The hidden `mason openapi`: the description of the control socket.

use crate::control::routes;
use crate::failure::Outcome;
use crate::output;

/// Write the description of the control socket, docs/openapi.json.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn main(_: &Args) -> Outcome {
    output::json(&routes::document())
}
