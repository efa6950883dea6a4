//! The ledger in its file.

use super::Ledger;
use super::format::{self, SLOT};
use crate::cloud::counts::Sum;
use blockmason::io::{Access, Image, Registry, replace_file};
use blockmason::{Error, Kind, Result};
use rustix::fs::{FileType, Mode, OFlags};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// A ledger that is kept in a file.
pub(crate) struct Book {
    path: PathBuf,
    graph: String,
    /// The element that keeps it.
    owner: Mutex<String>,
    /// Set once the file is open: when it is found, or made.
    image: OnceLock<Arc<Image>>,
    ledger: Mutex<Ledger>,
    /// The slot that is written next, and its number. Held while it is.
    next: Mutex<(usize, u64)>,
}

/// Those of this process: successive elements of one name share theirs.
static BOOKS: Mutex<Vec<Weak<Book>>> = Mutex::new(Vec::new());

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is complete before anything can panic.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_image(path: &Path, graph: &str) -> Result<Arc<Image>> {
    Registry::of_process().open(path, Access { write: true, direct: false }, graph)
}

impl Book {
    /// The ledger of a file, or an empty one where there is no file. Changes nothing.
    ///
    /// # Errors
    /// It is something else, damaged, or another volume's; somebody else has it.
    pub(crate) fn find(path: &Path, graph: &str, owner: &str, volume: [u8; 16]) -> Result<Arc<Book>> {
        let image = if path.exists() { Some(open_image(path, graph)?) } else { None };
        let mut books = locked(&BOOKS);
        books.retain(|book| book.strong_count() > 0);
        let same = |book: &Arc<Book>| match (book.image.get(), &image) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => book.path == path && book.graph == graph,
        };
        let wrong = |kind, message: String| Err(Error::new(kind, message).with_path(path));
        if let Some(book) = books.iter().filter_map(Weak::upgrade).find(same) {
            let other = locked(&book.owner).clone();
            if other != owner {
                return wrong(
                    Kind::Busy,
                    format!("the element {other} keeps its ledger there: name another file"),
                );
            }
            return fits(&book, volume).map(|()| book.clone());
        }
        let (slot, number, ledger) = match &image {
            Some(image) => {
                format::read(&read_all(image.file(), path)?).map_err(|error| error.with_path(path))?
            }
            None => (1, 0, Ledger::new(volume)),
        };
        if image.is_none()
            && !path.parent().is_none_or(|folder| folder.as_os_str().is_empty() || folder.is_dir())
        {
            return wrong(Kind::Unavailable, "its folder does not exist".to_owned());
        }
        let book = Arc::new(Book {
            path: path.to_owned(),
            graph: graph.to_owned(),
            owner: Mutex::new(owner.to_owned()),
            image: image.map_or_else(OnceLock::new, OnceLock::from),
            ledger: Mutex::new(ledger),
            next: Mutex::new((1 - slot, number + 1)),
        });
        fits(&book, volume)?;
        books.push(Arc::downgrade(&book));
        Ok(book)
    }

    /// Makes the file, if there is none. Blocks.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn open(&self) -> Result<()> {
        if self.image.get().is_some() {
            return Ok(());
        }
        if self.path.exists() {
            return Err(Error::new(Kind::Busy, "it has been made by somebody else").with_path(&self.path));
        }
        let mut next = locked(&self.next);
        let mut bytes = format::encode(&self.ledger(), next.1);
        bytes.resize(2 * SLOT, 0);
        let made = replace_file(&self.path, &bytes);
        made.map_err(|error| Error::io(error, "it cannot be made").with_path(&self.path))?;
        let image = open_image(&self.path, &self.graph)?;
        self.image.get_or_init(|| image);
        *next = (1, next.1 + 1);
        Ok(())
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        locked(&self.ledger)
    }

    /// The element that keeps it has another name.
    pub(crate) fn renamed(&self, owner: &str) {
        *locked(&self.owner) = owner.to_owned();
    }

    /// Writes what it says now, durably. Blocks.
    ///
    /// # Errors
    /// It cannot be written: what it said before is still there.
    pub(crate) fn write(&self) -> Result<()> {
        let Some(image) = self.image.get() else { return Ok(()) };
        let mut next = locked(&self.next);
        let (slot, number) = *next;
        let bytes = format::encode(&self.ledger(), number);
        let failed = |errno| Error::os(errno, "the ledger cannot be written").with_path(&self.path);
        let mut done = 0;
        while done < bytes.len() {
            let at = (slot * SLOT + done) as u64;
            done += rustix::io::pwrite(image.file(), &bytes[done..], at).map_err(failed)?;
        }
        rustix::fs::fdatasync(image.file()).map_err(failed)?;
        *next = (1 - slot, number + 1);
        Ok(())
    }

    /// What comes after everything else: leaving the volume costs, too. Blocks.
    pub(crate) fn finish(&self, more: &Sum) -> Result<()> {
        self.ledger().count(more);
        self.write()
    }
}

/// # Errors
/// It is that of another volume.
fn fits(book: &Book, volume: [u8; 16]) -> Result<()> {
    if book.ledger().volume == volume {
        return Ok(());
    }
    Err(Error::invalid("it is the ledger of another volume: name another file").with_path(&book.path))
}

/// All of a file that may be a ledger, and one byte more than one has.
fn read_all(file: impl AsFd, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 2 * SLOT + 1];
    let mut done = 0;
    while done < bytes.len() {
        let read = rustix::io::pread(&file, &mut bytes[done..], done as u64);
        match read.map_err(|errno| Error::os(errno, "the ledger cannot be read").with_path(path))? {
            0 => break,
            more => done += more,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// What a file says that somebody else may keep.
///
/// # Errors
/// It is no ledger.
pub(super) fn look(path: &Path) -> Result<Ledger> {
    let refused = |errno| Error::os(errno, "the ledger cannot be read").with_path(path);
    // A pipe in its place must not hold anybody up.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(refused)?;
    let stat = rustix::fs::fstat(&file).map_err(refused)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::invalid("it is no ledger, but no regular file").with_path(path));
    }
    let mut bytes = Vec::new();
    let read = File::from(file).take(2 * SLOT as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| Error::io(error, "the ledger cannot be read").with_path(path))?;
    format::read(&bytes).map(|(_, _, ledger)| ledger).map_err(|error| error.with_path(path))
}
