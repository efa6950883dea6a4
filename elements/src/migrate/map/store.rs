//! The map's file: marks in mapped memory, and what makes them durable.

use super::bits::{Bits, mask, words};
use super::format::{BLOCK, Boot, HEADER, Header, Layout, this_boot};
use super::mapping::Mapping;
use blockmason::io::{Access, Image, Registry, replace_file};
use blockmason::{Errno, Error, Kind, Result};
use rustix::fs::FallocateFlags;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// Which file an element keeps its map in.
pub(super) struct Place {
    path: PathBuf,
    graph: String,
    element: String,
    /// Set once the file is open: when it is found, or made.
    image: OnceLock<Arc<Image>>,
}

/// The files of this process, and the elements that have them.
static OWNERS: Mutex<Vec<(Weak<Image>, String)>> = Mutex::new(Vec::new());

impl Place {
    /// Takes the file, if there is one, and looks whether it is a map. Changes nothing.
    ///
    /// # Errors
    /// It is something else, has another granule, or somebody else has it.
    pub(super) fn new(path: &Path, graph: &str, element: &str, granule: u64) -> Result<Place> {
        let image = OnceLock::new();
        let place =
            Place { path: path.to_owned(), graph: graph.to_owned(), element: element.to_owned(), image };
        if path.exists() {
            let own = place.header()?.layout;
            if own.granule != granule {
                let wanted = Layout { granule, ..own };
                place.header()?.fits(wanted).map_err(|error| error.with_path(path))?;
            }
        } else if !path.parent().is_none_or(|folder| folder.as_os_str().is_empty() || folder.is_dir()) {
            return Err(Error::new(Kind::Unavailable, "its folder does not exist").with_path(path));
        }
        Ok(place)
    }

    /// True if the two keep the same file.
    pub(super) fn is(&self, other: &Place) -> bool {
        self.path == other.path
    }

    fn image(&self) -> Result<&Arc<Image>> {
        if let Some(image) = self.image.get() {
            return Ok(image);
        }
        let access = Access { write: true, direct: false };
        let image = Registry::of_process().open(&self.path, access, &self.graph)?;
        let mut owners = OWNERS.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|(image, _)| image.strong_count() > 0);
        let same = |other: &&(Weak<Image>, String)| std::ptr::eq(other.0.as_ptr(), &*image);
        match owners.iter().find(same) {
            Some((_, owner)) if *owner != self.element => {
                let message = format!("the element {owner} keeps its map there: name another file");
                return Err(Error::new(Kind::Busy, message).with_path(&self.path));
            }
            Some(_) => {}
            None => owners.push((Arc::downgrade(&image), self.element.clone())),
        }
        drop(owners);
        Ok(self.image.get_or_init(|| image))
    }

    fn refused(&self, errno: Errno, what: &'static str) -> Error {
        Error::os(errno, what).with_path(&self.path)
    }

    /// What the file says of itself.
    fn header(&self) -> Result<Header> {
        let (mut bytes, mut done) = ([0; HEADER], 0);
        while done < HEADER {
            let read = rustix::io::pread(self.image()?.file(), &mut bytes[done..], done as u64);
            match read.map_err(|errno| self.refused(errno, "it cannot be read"))? {
                0 => {
                    let message =
                        "it is too short to be a map of changes, and is not overwritten: name another file";
                    return Err(Error::invalid(message).with_path(&self.path));
                }
                more => done += more,
            }
        }
        Header::decode(&bytes).map_err(|error| error.with_path(&self.path))
    }

    /// Whether the file, if there is one, is the map of such a disk. Changes nothing.
    ///
    /// # Errors
    /// It is another one's.
    pub(super) fn fits(&self, layout: Layout) -> Result<()> {
        if self.image.get().is_none() {
            return Ok(());
        }
        self.header()?.fits(layout).map_err(|error| error.with_path(&self.path))?;
        let len = rustix::fs::fstat(self.image()?.file())
            .map_err(|e| self.refused(e, "it cannot be looked at"))?
            .st_size;
        match len as u64 == layout.len() {
            true => Ok(()),
            false => {
                let message = format!(
                    "it has {len} bytes, and its header speaks of {}: it was cut off or appended to",
                    layout.len()
                );
                Err(Error::invalid(message).with_path(&self.path))
            }
        }
    }

    /// Opens the file for a map that is used from now on. Makes one that says what `bits` say if there is none.
    pub(super) fn open(&self, layout: Layout, bits: &Bits) -> Result<Opened> {
        let found = self.image.get().is_some();
        if !found {
            if self.path.exists() {
                return Err(Error::new(Kind::Busy, "it has been made by somebody else").with_path(&self.path));
            }
            let made = replace_file(&self.path, &image_of(layout, bits));
            made.map_err(|error| Error::io(error, "it cannot be made").with_path(&self.path))?;
        }
        self.fits(layout)?;
        let image = self.image()?.clone();
        allocate(&image, layout.len())
            .map_err(|errno| self.refused(errno, "there is no room for all of it"))?;
        let words = Mapping::new(image.file(), layout.len() as usize);
        let words = words.map_err(|errno| self.refused(errno, "it cannot be mapped into memory"))?;
        let same_boot = self.header()?.boot == this_boot() && this_boot() != [0; 36];
        Ok(Opened { store: Store::new(layout, words, image), found, same_boot })
    }
}

/// A file as it was found.
pub(super) struct Opened {
    pub(super) store: Store,
    /// It was there already.
    pub(super) found: bool,
    /// The kernel's memory has outlived whoever had it before.
    pub(super) same_boot: bool,
}

/// A new file, whole.
fn image_of(layout: Layout, bits: &Bits) -> Vec<u8> {
    let mut bytes = vec![0; layout.len() as usize];
    bytes[..HEADER].copy_from_slice(&Header { layout, boot: this_boot() }.encode());
    let marks = layout.places()[1] * 8;
    for (word, place) in bytes[marks..].chunks_exact_mut(8).take(bits.words.len()).enumerate() {
        place.copy_from_slice(&bits.word(word).to_le_bytes());
    }
    bytes
}

/// Makes sure that no page of a file lacks its place on the disk: a store there would end the process.
fn allocate(image: &Image, len: u64) -> Result<(), Errno> {
    match rustix::fs::fallocate(image.file(), FallocateFlags::empty(), 0, len) {
        // The file system cannot say so: what is written has its place.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let mut block = [0; BLOCK as usize];
            for at in (0..len).step_by(BLOCK as usize) {
                let read = rustix::io::pread(image.file(), &mut block, at)?;
                if rustix::io::pwrite(image.file(), &block[..read], at)? != block.len() {
                    return Err(Errno::IO);
                }
            }
            Ok(())
        }
        allocated => allocated,
    }
}

/// What makes durable whatever was stored before.
pub(super) trait Durable: Send + Sync {
    /// Waits for it: not to be called on a shard.
    fn sync(&self) -> Result<()>;
    /// Writes the header.
    fn head(&self, bytes: &[u8; HEADER]) -> Result<()>;
}

impl Durable for Image {
    fn sync(&self) -> Result<()> {
        let failed = |errno| Error::os(errno, "marks could not be made durable").with_path(self.path());
        rustix::fs::fdatasync(self.file()).map_err(failed)
    }

    fn head(&self, bytes: &[u8; HEADER]) -> Result<()> {
        let failed = |errno| Error::os(errno, "its header could not be written").with_path(self.path());
        match rustix::io::pwrite(self.file(), bytes, 0).map_err(failed)? {
            HEADER => Ok(()),
            _ => Err(failed(Errno::IO)),
        }
    }
}

/// A mapped file. Changed only by whoever holds the map's lock.
pub(super) struct Store {
    layout: Layout,
    words: Mapping,
    disk: Arc<dyn Durable>,
}

impl Store {
    pub(super) fn new(layout: Layout, words: Mapping, disk: Arc<dyn Durable>) -> Store {
        Store { layout, words, disk }
    }

    fn area(&self, which: usize) -> &[AtomicU64] {
        let places = self.layout.places();
        &self.words[places[which]..places[which + 1]]
    }

    pub(super) fn regions(&self) -> &[AtomicU64] {
        self.area(0)
    }

    pub(super) fn marks(&self) -> &[AtomicU64] {
        self.area(1)
    }

    pub(super) fn frozen(&self) -> &[AtomicU64] {
        self.area(2)
    }

    pub(super) fn has_region(&self, region: usize) -> bool {
        get(&self.regions()[region / 64]) >> (region % 64) & 1 != 0
    }

    pub(super) fn set_region(&self, region: usize, set: bool) {
        let (word, bit) = (&self.regions()[region / 64], 1 << (region % 64));
        put(word, if set { get(word) | bit } else { get(word) & !bit });
    }

    /// Sets marks.
    pub(super) fn raise(&self, granules: &Range<u64>) {
        for ix in words(granules) {
            let word = &self.marks()[ix];
            put(word, get(word) | mask(ix, granules));
        }
    }

    /// What is dirty by what was found: also every granule of regions that are set, if power may have been lost.
    pub(super) fn load(&self, same_boot: bool) -> Bits {
        let bits = Bits::new(self.layout.granules(), false);
        for (ix, _) in bits.words.iter().enumerate() {
            let all = mask(ix, &(0..self.layout.granules()));
            bits.put(ix, (get(&self.marks()[ix]) | get(&self.frozen()[ix])) & all);
        }
        let each = self.layout.region / self.layout.granule;
        for region in (0..self.layout.regions()).filter(|region| !same_boot && self.has_region(*region)) {
            let start = region as u64 * each;
            bits.change(start..(start + each).min(self.layout.granules()), true);
        }
        bits
    }

    /// The file is this process's from now on, in this life of the kernel.
    pub(super) fn adopt(&self, boot: Boot) -> Result<()> {
        self.disk.sync()?;
        self.disk.head(&Header { layout: self.layout, boot }.encode())?;
        self.disk.sync()
    }

    /// What [`Durable::sync`] does, for another thread.
    pub(super) fn disk(&self) -> Arc<dyn Durable> {
        self.disk.clone()
    }
}

pub(super) fn get(word: &AtomicU64) -> u64 {
    u64::from_le(word.load(Ordering::Acquire))
}

pub(super) fn put(word: &AtomicU64, value: u64) {
    word.store(value.to_le(), Ordering::Release);
}
