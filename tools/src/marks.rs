//! Which backup a disk holds, by the heads of its volumes.

use blockmason::graph::Graph;
use blockmason::heads::{Backup, Volume};
use blockmason::lang::Spec;
use std::collections::HashSet;

/// The backup that a disk holds as it is read from its first element on; None if nothing says so.
///
/// # Errors
/// Its parts do not belong together.
pub(crate) fn held(
    spec: &Spec,
    graph: &Graph,
    volumes: &[Volume],
    top: &str,
) -> Result<Option<Backup>, String> {
    let known = Known { spec, graph, volumes };
    spec.find(top).map_or(Ok(None), |top| known.held(top))
}

/// The elements of a disk that are written when it is: what is below the base of a `cow` is not.
pub(crate) fn written(spec: &Spec, top: &str) -> HashSet<String> {
    let (mut seen, mut work) = (HashSet::new(), Vec::from_iter(spec.find(top)));
    while let Some(ix) = work.pop() {
        if seen.insert(ix) {
            let below =
                spec.edges.iter().filter(|edge| edge.from == ix && !is_base(spec, ix, &edge.from_port));
            work.extend(below.map(|edge| edge.to));
        }
    }
    seen.into_iter().map(|ix| spec.elements[ix].name.clone()).collect()
}

fn is_base(spec: &Spec, element: usize, port: &str) -> bool {
    spec.elements[element].ty == "cow" && port == "base"
}

struct Known<'a> {
    spec: &'a Spec,
    graph: &'a Graph,
    volumes: &'a [Volume],
}

impl Known<'_> {
    fn volume(&self, element: usize) -> Option<&Volume> {
        let name = &self.spec.elements[element].name;
        let at = self.graph.instances().find(|instance| instance.name == *name)?.element.head()?;
        self.volumes.iter().find(|volume| volume.at.path == at.path)
    }

    fn held(&self, element: usize) -> Result<Option<Backup>, String> {
        if let Some(volume) = self.volume(element) {
            return Ok(volume.found.as_ref().and_then(|head| head.backup.clone()));
        }
        let edges: Vec<_> = self.spec.edges.iter().filter(|edge| edge.from == element).collect();
        let base = edges.iter().find(|edge| is_base(self.spec, element, &edge.from_port));
        let others = edges.iter().filter(|edge| !is_base(self.spec, element, &edge.from_port));
        let others: Vec<usize> = others.map(|edge| edge.to).collect();
        match base {
            Some(base) => self.above(base.to, &others),
            None => self.alike(&others),
        }
    }

    /// That of an overlay above a base.
    fn above(&self, base: usize, overlay: &[usize]) -> Result<Option<Backup>, String> {
        let under = self.held(base)?;
        // One that is still to be made changes nothing of its base.
        if overlay.iter().all(|ix| self.volume(*ix).is_some_and(|it| it.at.missing.is_some())) {
            return Ok(under);
        }
        let over = self.alike(overlay)?;
        match (&over, &under) {
            (None, _) => Ok(None),
            (Some(over), Some(under)) if over.account == under.account && over.number >= under.number => {
                Ok(Some(over.clone()))
            }
            (Some(_), _) => {
                let base = &self.spec.elements[base].name;
                Err(format!("{base} is not any more what the overlay above it was made on"))
            }
        }
    }

    fn alike(&self, parts: &[usize]) -> Result<Option<Backup>, String> {
        let held = parts.iter().map(|part| self.held(*part)).collect::<Result<Vec<_>, _>>()?;
        match held.windows(2).all(|pair| pair[0] == pair[1]) {
            true => Ok(held.into_iter().next().flatten()),
            false => Err("its parts do not hold the same backup".to_owned()),
        }
    }
}
