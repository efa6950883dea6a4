//! From a checked graph file to instances and a graph.

use super::{Connection, Graph, Instance};
use crate::describe::{Build, Catalogue, find};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::lang::{ElementSpec, Spec};
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
        let mut instances: Vec<Option<Arc<Instance>>> = vec![None; spec.elements.len()];
        let mut others = HashMap::with_capacity(spec.elements.len());
        for ix in self.referred_first(spec) {
            let element = &spec.elements[ix];
            let instance = match kept.get(&element.name) {
                Some(instance) => instance.clone(),
                None => self.make(spec, element, &others)?,
            };
            others.insert(element.name.clone(), instance.element.clone());
            instances[ix] = Some(instance);
        }
        Ok(instances.into_iter().flatten().collect())
    }

    fn make(
        &self,
        spec: &Spec,
        element: &ElementSpec,
        others: &HashMap<String, Arc<dyn Element>>,
    ) -> Result<Arc<Instance>> {
        let place = spec.place(element).to_string();
        let at = format!("{} ({place})", element.name);
        let ty = find(self.catalogue, &element.ty)
            .ok_or_else(|| Error::invalid(format!("there is no type {}", element.ty)).in_element(&at))?;
        let build = Build {
            name: &element.name,
            graph: self.name,
            params: &element.params,
            state_dir: self.state_dir,
            others,
        };
        let made = (ty.build)(&build).map_err(|error| error.in_element(&at))?;
        Ok(Instance::new(&element.name, ty, place, made))
    }

    /// The elements in the order of the file, but each after those that it refers to. The checker has seen to
    /// it that references do not go in circles.
    fn referred_first(&self, spec: &Spec) -> Vec<usize> {
        let mut order = Vec::with_capacity(spec.elements.len());
        let mut seen = vec![false; spec.elements.len()];
        // An element is left on the stack until what it refers to is done.
        let mut stack: Vec<(usize, bool)> = (0..spec.elements.len()).rev().map(|ix| (ix, false)).collect();
        while let Some((ix, ready)) = stack.pop() {
            if ready {
                order.push(ix);
            } else if !std::mem::replace(&mut seen[ix], true) {
                stack.push((ix, true));
                stack.extend(self.referred(spec, &spec.elements[ix]).map(|target| (target, false)));
            }
        }
        order
    }

    fn referred<'s>(&self, spec: &'s Spec, element: &'s ElementSpec) -> impl Iterator<Item = usize> + 's {
        let params = find(self.catalogue, &element.ty).map_or(&[][..], |ty| ty.params);
        let values = params.iter().filter(|param| param.refers.is_some());
        let values = values.flat_map(|param| element.params.get(param.name).into_iter().flatten());
        values.filter_map(|value| spec.find(value.target()))
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
