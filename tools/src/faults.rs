//! What keeps elements of a running graph from doing their work.

use blockmason::Graph;
use blockmason::describe::Access;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The handler by which an element says so.
const HANDLER: &str = "error";

/// Why an element does not do its work: the key of `crypto` opens nothing, say.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Fault {
    pub(crate) element: String,
    pub(crate) error: String,
}

pub(crate) fn faults(graph: &Graph) -> Vec<Fault> {
    let may_say = graph.instances().filter(|instance| {
        let mut handlers = instance.ty.handlers.iter();
        handlers.any(|handler| handler.name == HANDLER && handler.access == Access::Read)
    });
    let said = may_say.map(|instance| (instance.name.clone(), graph.get(&instance.name, HANDLER)));
    said.filter_map(|(element, error)| error.ok().map(|error| Fault { element, error }))
        .filter(|fault| !fault.error.is_empty())
        .collect()
}
