//! Reads and writes nodes, each of which is kept twice, and keeps some in memory.

use super::below::Below;
use super::format::{BLOCK, Body, Format, Id, NODE, Node, Ptr, damaged};
use blockmason::{Data, Result};
use lru::LruCache;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) struct Nodes {
    id: Id,
    cache: Mutex<Cache>,
}

/// Nodes that are in memory, by the block of their first copy.
struct Cache {
    nodes: LruCache<u64, Arc<Node>>,
    /// Bytes that they take, and may take. One node is there whatever it takes.
    bytes: u64,
    most: u64,
}

impl Cache {
    fn put(&mut self, at: u64, node: Arc<Node>) {
        self.bytes += node.body.memory();
        if let Some(old) = self.nodes.put(at, node) {
            self.bytes -= old.body.memory();
        }
        while self.bytes > self.most && self.nodes.len() > 1 {
            let Some((_, oldest)) = self.nodes.pop_lru() else { break };
            self.bytes -= oldest.body.memory();
        }
    }
}

/// What a node belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tree {
    Volume(Format),
    Catalog,
    DeadList,
}

/// A node as it is pointed to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) tree: Tree,
    pub(super) ptr: Ptr,
    pub(super) level: u8,
    pub(super) index: u64,
}

impl Place {
    /// Whether a node is what is pointed to. A pointer that leads to another one is damage that no checksum finds.
    fn is(&self, node: &Node) -> bool {
        let fits = match (self.tree, &node.body) {
            (Tree::Volume(Format::One) | Tree::Catalog, Body::Inner(_)) => self.level > 0,
            (Tree::Volume(Format::Two), Body::Inner(_)) => self.level > 1,
            (Tree::Volume(Format::Two), Body::Map(_)) => self.level == 1,
            (Tree::Volume(_), Body::Leaf(_)) | (Tree::Catalog, Body::Catalog(_)) => self.level == 0,
            (Tree::DeadList, Body::Dead(..)) => self.level == 0,
            _ => false,
        };
        fits && (node.level, node.index) == (self.level, self.index)
    }

    /// Blocks that a copy has at least.
    pub(super) fn least(&self) -> u64 {
        let is_map = matches!(self.tree, Tree::Volume(Format::Two)) && self.level == 1;
        if is_map { 1 } else { NODE }
    }

    /// The bytes of a copy.
    async fn bytes(&self, at: u64, below: Below<'_>) -> Result<Vec<u8>> {
        let first = self.least() * BLOCK;
        let mut bytes = below.read(at * BLOCK, first).await?.to_vec();
        let rest = Node::len(&bytes).map_or(0, |len| (len as u64).saturating_sub(first));
        if rest > 0 {
            bytes.extend(below.read(at * BLOCK + first, rest).await?.to_vec());
        }
        Ok(bytes)
    }
}

impl Nodes {
    /// Keeps nodes in that many bytes.
    pub(super) fn new(id: Id, memory: u64) -> Nodes {
        let cache = Cache { nodes: LruCache::unbounded(), bytes: 0, most: memory };
        Nodes { id, cache: Mutex::new(cache) }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node that is in memory.
    pub(super) fn cached(&self, place: &Place) -> Option<Arc<Node>> {
        self.cache().nodes.get(&place.ptr.at[0]).filter(|node| place.is(node)).cloned()
    }

    /// The node at a place. Whoever asks keeps its blocks from being used for something else meanwhile.
    ///
    /// # Errors
    /// Both copies are damaged, or it is another one.
    pub(super) async fn get(&self, place: &Place, below: Below<'_>) -> Result<Arc<Node>> {
        match self.cached(place) {
            Some(node) => Ok(node),
            None => self.read(place, below).await,
        }
    }

    async fn read(&self, place: &Place, below: Below<'_>) -> Result<Arc<Node>> {
        let ptr = place.ptr;
        let mut bad = Vec::new();
        for at in ptr.at {
            let bytes = place.bytes(at, below).await;
            let node = bytes.as_ref().ok().and_then(|bytes| Node::decode(bytes, &self.id, ptr.at));
            let (Some(node), Ok(bytes)) = (node, bytes) else {
                bad.push(at);
                continue;
            };
            if !place.is(&node) {
                let message = format!("the node at block {at} is another one than was expected there");
                return Err(damaged(message));
            }
            for at in bad {
                tracing::warn!(block = at, "a copy of a node is damaged; it is written anew from the other");
                // The other copy is good: nothing is lost if this fails.
                let _ = below.write(at * BLOCK, Data::copy_of(&bytes)).await;
            }
            return Ok(self.keep(ptr, node));
        }
        Err(damaged(format!("both copies of a node are damaged, at blocks {} and {}", ptr.at[0], ptr.at[1])))
    }

    /// The node at a place as the device has it; and the block of a copy that is damaged, or cannot be read, and whether it could
    /// be written anew.
    ///
    /// # Errors
    /// As those of [`get`](Self::get).
    pub(super) async fn examine(
        &self,
        place: &Place,
        below: Below<'_>,
    ) -> Result<(Arc<Node>, Option<(u64, bool)>)> {
        let ptr = place.ptr;
        let (mut good, mut bad) = (None, None);
        for at in ptr.at {
            let bytes = place.bytes(at, below).await;
            let node = bytes.as_ref().ok().and_then(|bytes| Node::decode(bytes, &self.id, ptr.at));
            match (node.filter(|node| place.is(node)), bytes) {
                (Some(node), Ok(bytes)) => good = Some((node, bytes)),
                _ => bad = Some(at),
            }
        }
        let Some((node, bytes)) = good else { return Ok((self.read(place, below).await?, None)) };
        let mended = match bad {
            Some(at) => Some((at, below.write(at * BLOCK, Data::shared(bytes)).await.is_ok())),
            None => None,
        };
        Ok((self.keep(ptr, node), mended))
    }

    fn keep(&self, ptr: Ptr, node: Node) -> Arc<Node> {
        let node = Arc::new(node);
        self.cache().put(ptr.at[0], node.clone());
        node
    }

    /// Writes a node to where the pointer says, twice.
    pub(super) async fn write(&self, ptr: Ptr, node: Node, below: Below<'_>) -> Result<()> {
        let data = Data::shared(node.encode(&self.id, ptr.at));
        for at in ptr.at {
            below.write(at * BLOCK, data.clone()).await?;
        }
        self.keep(ptr, node);
        Ok(())
    }
}
