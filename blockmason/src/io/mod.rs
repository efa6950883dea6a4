//! File I/O for sinks: an engine chosen for each operation, and images that are opened once.

mod fence;
mod file;
mod opened;
mod pool;
mod registry;
mod replace;
mod ring;

pub use file::{FileIo, FileOptions};
pub use opened::Opened;
pub use registry::{Access, Carried, Claims, Image, Registry};
pub use replace::{Replacement, remove_file, replace_file};
pub use ring::Ring;
