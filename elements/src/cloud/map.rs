//! Which object each block of the disk is in.

use super::format::PART;
use std::ops::Range;

/// The versions of all blocks, in parts as they are stored.
#[derive(Debug, Default)]
pub(crate) struct Map {
    parts: Vec<Part>,
    /// How many blocks have an object.
    objects: u64,
}

#[derive(Debug, Default)]
struct Part {
    /// None if all are 0.
    versions: Option<Box<[u64]>>,
    /// That of its object; 0 if it has none.
    stored: u64,
    changed: bool,
}

impl Map {
    /// A map of so many blocks, none of which has an object.
    pub(crate) fn new(blocks: u64) -> Map {
        let mut parts = Vec::new();
        parts.resize_with(blocks.div_ceil(PART) as usize, Part::default);
        Map { parts, objects: 0 }
    }

    /// Makes room for so many blocks: those that are new have no object.
    pub(crate) fn grow(&mut self, blocks: u64) {
        let parts = blocks.div_ceil(PART) as usize;
        if parts > self.parts.len() {
            self.parts.resize_with(parts, Part::default);
        }
    }

    /// How many parts there are.
    pub(crate) fn parts(&self) -> u64 {
        self.parts.len() as u64
    }

    /// What is stored as a part of that version.
    pub(crate) fn load(&mut self, part: u64, version: u64, versions: Vec<u64>) {
        if let Some(to) = self.parts.get_mut(part as usize) {
            let count = |versions: &[u64]| versions.iter().filter(|version| **version != 0).count() as u64;
            self.objects -= to.versions.as_deref().map_or(0, count);
            self.objects += count(&versions);
            *to = Part { versions: Some(versions.into()), stored: version, changed: false };
        }
    }

    /// The version of a block; 0 if it has no object.
    pub(crate) fn get(&self, block: u64) -> u64 {
        let part = self.parts.get((block / PART) as usize).and_then(|part| part.versions.as_ref());
        part.map_or(0, |versions| versions[(block % PART) as usize])
    }

    /// Gives a block another version, and returns the one before.
    pub(crate) fn set(&mut self, block: u64, version: u64) -> u64 {
        let Some(part) = self.parts.get_mut((block / PART) as usize) else { return 0 };
        if part.versions.is_none() && version == 0 {
            return 0;
        }
        let versions = part.versions.get_or_insert_with(|| vec![0; PART as usize].into());
        part.changed = true;
        let before = std::mem::replace(&mut versions[(block % PART) as usize], version);
        self.objects = self.objects + u64::from(version != 0) - u64::from(before != 0);
        before
    }

    /// How many blocks have an object.
    pub(crate) fn objects(&self) -> u64 {
        self.objects
    }

    /// Takes the versions of a range of blocks away, and tells each that there was.
    pub(crate) fn clear(&mut self, blocks: Range<u64>, mut each: impl FnMut(u64, u64)) {
        for number in blocks.start / PART..blocks.end.div_ceil(PART) {
            let Some(part) = self.parts.get_mut(number as usize) else { break };
            let Some(versions) = &mut part.versions else { continue };
            let first = number * PART;
            let within = blocks.start.max(first) - first..blocks.end.min(first + PART) - first;
            for at in within {
                let version = std::mem::take(&mut versions[at as usize]);
                if version != 0 {
                    part.changed = true;
                    self.objects -= 1;
                    each(first + at, version);
                }
            }
        }
    }

    /// The blocks of a range that have an object, with its version, in order.
    pub(crate) fn versions(&self, blocks: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
        let parts = blocks.start / PART..blocks.end.div_ceil(PART).min(self.parts());
        parts.filter(|part| self.parts[*part as usize].versions.is_some()).flat_map(move |part| {
            let within = blocks.start.max(part * PART)..blocks.end.min((part + 1) * PART);
            within.map(|block| (block, self.get(block))).filter(|(_, version)| *version != 0)
        })
    }

    /// The parts as they are stored now: number and version.
    pub(crate) fn stored(&self) -> Vec<(u64, u64)> {
        let numbered = self.parts.iter().enumerate();
        numbered.filter(|(_, part)| part.stored != 0).map(|(at, part)| (at as u64, part.stored)).collect()
    }

    /// What is to be stored anew: each part that has changed is given a version by `next` and returned with its contents,
    /// unless it is all 0. The versions before go to `gone`.
    pub(crate) fn take_changed<E>(
        &mut self,
        mut next: impl FnMut() -> Result<u64, E>,
        gone: &mut Vec<(u64, u64)>,
    ) -> Result<Vec<(u64, u64, Vec<u64>)>, E> {
        let mut changed = Vec::new();
        for (at, part) in self.parts.iter_mut().enumerate().filter(|(_, part)| part.changed) {
            let empty = part.versions.as_ref().is_none_or(|versions| versions.iter().all(|one| *one == 0));
            let version = if empty { 0 } else { next()? };
            if part.stored != 0 {
                gone.push((at as u64, part.stored));
            }
            match (&part.versions, empty) {
                (Some(versions), false) => changed.push((at as u64, version, versions.to_vec())),
                _ => part.versions = None,
            }
            (part.stored, part.changed) = (version, false);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_changed_is_stored_anew() {
        let mut map = Map::new(3 * PART + 5);
        assert_eq!((map.parts(), map.get(9), map.set(9, 4)), (4, 0, 0));
        map.set(2 * PART, 5);
        let mut next = 100;
        let mut version = || {
            next += 1;
            Ok::<u64, ()>(next)
        };
        let mut gone = Vec::new();
        let stored = map.take_changed(&mut version, &mut gone).unwrap();
        assert_eq!(
            stored.iter().map(|(part, version, _)| (*part, *version)).collect::<Vec<_>>(),
            [(0, 101), (2, 102)]
        );
        assert_eq!((map.stored(), gone.len()), (vec![(0, 101), (2, 102)], 0));
        let mut found = Vec::new();
        map.clear(0..3 * PART + 5, |block, version| found.push((block, version)));
        assert_eq!(found, [(9, 4), (2 * PART, 5)]);
        map.set(2 * PART + 1, 6);
        assert_eq!(map.versions(0..9 * PART).collect::<Vec<_>>(), [(2 * PART + 1, 6)]);
        assert_eq!((map.versions(0..2 * PART + 1).count(), map.objects()), (0, 1));
        let stored = map.take_changed(&mut version, &mut gone).unwrap();
        assert_eq!(stored.len(), 1);
        assert_eq!((map.stored(), gone), (vec![(2, 103)], vec![(0, 101), (2, 102)]));
        let mut other = Map::new(3 * PART);
        other.load(2, 103, stored[0].2.clone());
        assert_eq!((other.get(2 * PART + 1), other.objects()), (6, 1));
    }
}
