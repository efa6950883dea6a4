//! From a checked graph file to instances and a graph.

use super::{Connection, Graph, Instance};
use crate::describe::{Build, Catalogue, find};
use crate::error::{Error, Result};
use crate::lang::Spec;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// What a graph is built with.
#[derive(Clone, Copy)]
pub struct Builder<'a> {
    /// The table of types.
    pub catalogue: Catalogue,
    /// The graph's name: the stem of its file.
    pub name: &'a str,
    /// Where state is kept.
    pub state_dir: &'a Path,
    /// How many shards will carry its requests.
    pub shards: usize,
}

impl Builder<'_> {
    /// Makes every element of `spec` and assembles them. Files and sockets are opened; nothing is
    /// spawned or changed, so dropping the result undoes everything.
    ///
    /// # Errors
    /// The first element that fails, with its name and its place in the graph file.
    pub fn build(&self, spec: &Spec) -> Result<Graph> {
        self.assemble(&self.instances(spec, &HashMap::new())?, &connections(spec))
    }

    /// Makes every element of `spec` but those that are `kept`, by name.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn instances(
        &self,
        spec: &Spec,
        kept: &HashMap<String, Arc<Instance>>,
    ) -> Result<Vec<Arc<Instance>>> {
        let mut instances = Vec::with_capacity(spec.elements.len());
        for element in &spec.elements {
            if let Some(instance) = kept.get(&element.name) {
                instances.push(instance.clone());
                continue;
            }
            let place = spec.place(element).to_string();
            let at = format!("{} ({place})", element.name);
            let ty = find(self.catalogue, &element.ty)
                .ok_or_else(|| Error::invalid(format!("there is no type {}", element.ty)).in_element(&at))?;
            let build = Build {
                name: &element.name,
                graph: self.name,
                params: &element.params,
                state_dir: self.state_dir,
            };
            let made = (ty.build)(&build).map_err(|error| error.in_element(&at))?;
            instances.push(Instance::new(&element.name, ty, place, made));
        }
        Ok(instances)
    }

    /// Assembles instances into a graph.
    pub fn assemble(&self, instances: &[Arc<Instance>], connections: &[Connection]) -> Result<Graph> {
        Graph::assemble(self.name, instances, connections, self.shards)
    }
}

/// The edges of `spec`.
pub fn connections(spec: &Spec) -> Vec<Connection> {
    let edge = |edge: &crate::lang::EdgeSpec| Connection {
        from: edge.from,
        port: edge.from_port.clone(),
        to: edge.to,
    };
    spec.edges.iter().map(edge).collect()
}
