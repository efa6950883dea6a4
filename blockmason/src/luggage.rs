//! What an element gives to its successor in another process: see
//! [`Element::hand_over`](crate::Element::hand_over).

use crate::error::{Error, Kind, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::{AsFd, OwnedFd};

/// Something to say, and descriptors that go with it, which it names by their place.
#[derive(Debug, Default)]
pub struct Luggage {
    /// The form of `value`, from 1; counted by each type of element for itself. 0 if there is nothing.
    pub version: u32,
    /// Whatever the type has agreed on with itself.
    pub value: serde_json::Value,
    /// Copies of descriptors: the element keeps its own until the process ends.
    pub fds: Vec<OwnedFd>,
}

impl Luggage {
    /// Nothing: the successor finds all it needs below it, or in its parameters.
    pub fn none() -> Luggage {
        Luggage::default()
    }

    /// A value without descriptors.
    ///
    /// # Errors
    /// It is nothing that JSON can say.
    pub fn of(version: u32, value: &impl Serialize) -> Result<Luggage> {
        let value = serde_json::to_value(value)
            .map_err(|error| Error::internal(format!("it cannot be written down: {error}")))?;
        Ok(Luggage { version, value, fds: Vec::new() })
    }

    /// True if there is nothing in it.
    pub fn is_none(&self) -> bool {
        self.version == 0 && self.value.is_null() && self.fds.is_empty()
    }

    /// The value, if it has that version.
    ///
    /// # Errors
    /// It has another one, or is not what that version says.
    pub fn read<T: DeserializeOwned>(&self, version: u32) -> Result<T> {
        if self.version != version {
            let message = format!("its luggage has version {}, and {version} is known", self.version);
            return Err(Error::new(Kind::Unsupported, message));
        }
        serde_json::from_value(self.value.clone())
            .map_err(|error| Error::invalid(format!("its luggage is damaged: {error}")))
    }
}

/// Descriptors that something written down names by their place.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Adds a copy. Returns its place.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn put(&mut self, fd: impl AsFd) -> Result<usize> {
        let copy = fd.as_fd().try_clone_to_owned();
        self.0.push(Some(copy.map_err(|error| Error::io(error, "a descriptor cannot be copied"))?));
        Ok(self.0.len() - 1)
    }

    /// Takes the one at a place, which can be done once.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&mut self, place: usize) -> Result<OwnedFd> {
        let taken = self.0.get_mut(place).and_then(Option::take);
        taken.ok_or_else(|| Error::invalid(format!("descriptor {place} was not handed over")))
    }

    /// All that have not been taken, in order.
    pub fn into_fds(self) -> Vec<OwnedFd> {
        self.0.into_iter().flatten().collect()
    }
}

impl From<Vec<OwnedFd>> for Descriptors {
    fn from(fds: Vec<OwnedFd>) -> Descriptors {
        Descriptors(fds.into_iter().map(Some).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_taken_once() {
        let mut fds = Descriptors::default();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!((fds.put(&file).unwrap(), fds.put(&file).unwrap()), (0, 1));
        let mut fds = Descriptors::from(fds.into_fds());
        fds.take(1).unwrap();
        assert_eq!(fds.take(1).unwrap_err().kind(), Kind::Invalid);
        assert!(fds.take(2).is_err() && fds.into_fds().len() == 1);
    }

    #[test]
    fn only_the_version_that_is_known_is_read() {
        let luggage = Luggage::of(2, &[1, 2, 3]).unwrap();
        assert_eq!(luggage.read::<Vec<u8>>(2).unwrap(), [1, 2, 3]);
        assert_eq!(luggage.read::<Vec<u8>>(1).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(luggage.read::<Vec<String>>(2).unwrap_err().kind(), Kind::Invalid);
        assert!(Luggage::none().is_none() && !luggage.is_none());
    }
}
