//! `mason volume import` and `export`: volumes from and to image files, raw or qcow2.

use super::pool::{number, same};
use super::qcow2;
use super::reach::{Pool, half_received};
use super::send::snapshot_of;
use super::stream::MOST_DATA;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::progress::lines;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason_elements::parallax::tool::{Operation, Settings};
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, Storage,
    StorageOpenOptions,
};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

const BLOCK: u64 = 4096;

/// How an image file is laid out.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Layout {
    /// The bytes of the disk, with holes where they are zeros
    Raw,
    /// That of QEMU
    Qcow2,
}

/// What the name of a volume ends in that is being imported.
const PART: &str = ".importing";

/// Makes a volume of an image. What has been made is deleted if that fails.
pub(super) fn import(
    pool: &Pool<'_>,
    (name, settings): (&str, Settings),
    path: &Path,
    layout: Option<Layout>,
) -> Outcome {
    let source = Source::open(path, layout)?;
    let size = match source.size()? {
        0 => return Err(named(path, "it is empty")),
        size => size.div_ceil(BLOCK).saturating_mul(BLOCK),
    };
    let part = format!("{name}{PART}");
    for there in [name, &part] {
        if pool.find(there)?.is_some() {
            return Err(match there == part {
                true => unfinished(&part),
                false => Failure::new(format!("there is a volume {name} already")),
            });
        }
    }
    pool.ask(&Operation::CreateVolume { name: part.clone(), size, settings })?;
    let done = fill(pool, &part, &source).and_then(|()| {
        let (name, to) = (part.clone(), name.to_owned());
        pool.ask(&Operation::Rename { name, to }).map(drop)
    });
    done.inspect_err(|_| _ = pool.ask(&Operation::DeleteVolume { name: part }))?;
    match source.size()? {
        exact if exact == size => Ok(()),
        odd => output::text(&format!("{name} has {size} bytes: the {odd} of the image, rounded up\n")),
    }
}

/// What somebody has left who was ended, or is about to make.
pub(super) fn unfinished(part: &str) -> Failure {
    Failure::new(format!(
        "there is {part}, which an interrupted command has left, unless one is at work: delete it with mason volume delete, and try again"
    ))
}

fn named(path: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::new(format!("{}: {what}", path.display()))
}

/// Where an image has something: from there to there. None to the end.
type Next = Option<(u64, u64)>;

/// An image that is being read.
struct Source<'a> {
    path: &'a Path,
    reader: Reader,
}

enum Reader {
    /// The file, and whether its file system knows of holes.
    Raw(File, Cell<bool>),
    Qcow2(FormatAccess<ImageFile>),
}

impl<'a> Source<'a> {
    fn open(path: &'a Path, layout: Option<Layout>) -> Outcome<Source<'a>> {
        let failed = |error| named(path, error);
        let found = path.metadata().map_err(failed)?.file_type();
        if !found.is_file() && !found.is_block_device() {
            return Err(named(path, "it is neither a file nor a block device"));
        }
        let file = File::open(path).map_err(failed)?;
        let layout = layout.map_or_else(|| layout_of(&file, path), Ok)?;
        let reader = match layout {
            Layout::Raw => Reader::Raw(file, Cell::new(true)),
            Layout::Qcow2 => {
                let image = open_qcow2(path)?;
                qcow2::check(&file).map_err(|failure| named(path, failure))?;
                Reader::Qcow2(image)
            }
        };
        Ok(Source { path, reader })
    }

    fn size(&self) -> Outcome<u64> {
        match &self.reader {
            Reader::Raw(file, _) => {
                seek(file, SeekFrom::End(0)).map_err(|errno| named(self.path, std::io::Error::from(errno)))
            }
            Reader::Qcow2(image) => Ok(image.size()),
        }
    }

    /// The next of it that may be no zeros.
    fn next(&self, at: u64, size: u64) -> std::io::Result<Next> {
        match &self.reader {
            Reader::Raw(file, holes) if holes.get() => match next_data(file, at) {
                Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                    holes.set(false);
                    Ok(Some((at, size)))
                }
                found => Ok(found?),
            },
            Reader::Raw(..) => Ok(Some((at, size))),
            Reader::Qcow2(image) => {
                let mut at = at;
                while at < size {
                    let (mapping, len) = image.get_mapping(at, size - at)?;
                    if !matches!(mapping, Mapping::Zero { .. }) || len == 0 {
                        return Ok(Some((at, at + len.max(1))));
                    }
                    at += len;
                }
                Ok(None)
            }
        }
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
        match &self.reader {
            Reader::Raw(file, _) => file.read_exact_at(bytes, at),
            Reader::Qcow2(image) => image.read(bytes, at),
        }
    }
}

fn next_data(file: &File, at: u64) -> rustix::io::Result<Next> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?))),
        // There is nothing behind that.
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn open_qcow2(path: &Path) -> Outcome<FormatAccess<ImageFile>> {
    let failed = |error: std::io::Error| named(path, error);
    let file = ImageFile::open(StorageOpenOptions::new().filename(path).write(false)).map_err(failed)?;
    // What an image names is not opened: it may have come from a guest, and name anything.
    let none = DenyImplicitOpenGate::default();
    let image = Qcow2::<ImageFile>::builder(file).write(false).open(none).map(FormatAccess::new);
    image.map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => {
            let message = "it needs other files: make one image of them with qemu-img convert";
            Failure::new(format!("{}: {message} ({error})", path.display()))
        }
        _ => failed(error),
    })
}

/// What images of other programs have somewhere, which would be taken for the bytes of a disk otherwise.
const OTHERS: [(u64, &[u8], &str); 8] = [
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "LUKS"),
];

/// What an image begins with says what it is.
fn layout_of(file: &File, path: &Path) -> Outcome<Layout> {
    let failed = |error| named(path, error);
    let size = seek(file, SeekFrom::End(0)).map_err(|errno| failed(errno.into()))?;
    let has = |at: u64, what: &[u8]| {
        let mut found = vec![0; what.len()];
        Ok::<bool, Failure>(
            size >= at + what.len() as u64 && {
                file.read_exact_at(&mut found, at).map_err(failed)?;
                found == what
            },
        )
    };
    if has(0, b"QFI\xfb")? {
        return Ok(Layout::Qcow2);
    }
    let last = (size.saturating_sub(512), &b"conectix"[..], "vpc");
    for (at, what, called) in OTHERS.into_iter().chain([last]) {
        if has(at, what)? {
            let message = format!(
                "it is {called}, which is not read: make qcow2 of it with qemu-img convert; --as raw takes it as the bytes of the disk"
            );
            return Err(named(path, message));
        }
    }
    Ok(Layout::Raw)
}

fn fill(pool: &Pool<'_>, name: &str, source: &Source<'_>) -> Outcome {
    let failed = |error| named(source.path, error);
    let (size, said, mut at) = (source.size()?, lines("bytes are imported"), 0);
    while let Some((start, end)) = source.next(at, size).map_err(failed)? {
        // Whole blocks: what is around them is zeros.
        let start = (start / BLOCK * BLOCK).max(at);
        if start >= size {
            return Ok(());
        }
        let end = end.div_ceil(BLOCK).saturating_mul(BLOCK).min(start + MOST_DATA).min(size);
        let mut bytes = vec![0; (end - start) as usize];
        source.read(&mut bytes, start).map_err(failed)?;
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        put(pool, name, start, &bytes)?;
        at = end;
        said(at, size);
        if at >= size {
            return Ok(());
        }
    }
    Ok(())
}

/// Writes what of these bytes is no zeros.
fn put(pool: &Pool<'_>, name: &str, at: u64, bytes: &[u8]) -> Outcome {
    let is_zero = |block: &&[u8]| block.iter().all(|byte| *byte == 0);
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK as usize).collect();
    let mut at = at;
    for run in blocks.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
        if !run.first().is_some_and(is_zero) {
            let data = BASE64_STANDARD.encode(run.concat());
            pool.ask(&Operation::Write { volume: name.to_owned(), offset: at, data, receiver: None })?;
        }
        at += run.len() as u64 * BLOCK;
    }
    Ok(())
}

/// An image that is being written.
enum Target {
    Raw(File),
    Qcow2(FormatAccess<ImageFile>),
}

impl Target {
    fn make(path: &Path, layout: Layout, size: u64) -> std::io::Result<Target> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        match layout {
            Layout::Raw => file.set_len(size).map(|()| Target::Raw(file)),
            Layout::Qcow2 => {
                let image = Qcow2::<ImageFile>::create_builder(ImageFile::try_from(file)?).size(size);
                let none = DenyImplicitOpenGate::default();
                let image = image.create_open(none, |file| Ok(Qcow2::builder(file)))?;
                Ok(Target::Qcow2(FormatAccess::new(image)))
            }
        }
    }

    fn write(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        match self {
            Target::Raw(file) => file.write_all_at(bytes, at),
            Target::Qcow2(image) => image.write(bytes, at),
        }
    }

    /// All of it is durable.
    fn end(self) -> std::io::Result<()> {
        match self {
            Target::Raw(file) => file.sync_all(),
            Target::Qcow2(image) => image.flush().and_then(|()| image.sync()),
        }
    }
}

/// Writes a volume, or a snapshot of one, to a new image.
pub(super) fn export(
    pool: &Pool<'_>,
    (name, snapshot): (&str, Option<&str>),
    path: &Path,
    layout: Option<Layout>,
) -> Outcome {
    let failed = |error: std::io::Error| Failure::new(format!("{}: {error}", path.display()));
    let volume = pool.volume(name)?;
    let found = match snapshot {
        None if volume["receiving"].is_object() => return Err(half_received(name)),
        None => volume,
        Some(snapshot) => snapshot_of(&volume, name, snapshot)?,
    };
    if snapshot.is_none() && found["served"] == true {
        let message = format!("{name} is served and changes: take a snapshot, and export {name}@SNAPSHOT");
        return Err(Failure::new(message));
    }
    if path.symlink_metadata().is_ok() {
        return Err(Failure::new(format!("{} is there already", path.display())));
    }
    let (size, number) = (number(&found["size"]), same(&found));
    let (volume, until) = (name.to_owned(), snapshot.map(str::to_owned));
    let has = pool.ask(&Operation::Diff { volume, until, since: None, number, since_number: None })?;
    let is_qcow2 = path.extension().is_some_and(|extension| extension == "qcow2");
    let layout = layout.unwrap_or(if is_qcow2 { Layout::Qcow2 } else { Layout::Raw });
    // It has its name once it is whole.
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let target = Target::make(&part, layout, size).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => Failure::new(format!(
            "there is {}, which an interrupted export has left, unless one is at work: delete it, and try again",
            part.display()
        )),
        _ => failed(error),
    })?;
    let done = copy(pool, (name, snapshot, number), &has, &target, failed);
    let done = done.and_then(|()| target.end().map_err(failed));
    let done = done.and_then(|()| std::fs::rename(&part, path).map_err(failed));
    done.inspect_err(|_| _ = std::fs::remove_file(&part))
}

fn copy(
    pool: &Pool<'_>,
    (name, snapshot, same): (&str, Option<&str>, Option<u32>),
    has: &serde_json::Value,
    target: &Target,
    failed: impl Fn(std::io::Error) -> Failure,
) -> Outcome {
    let ranges = has.as_array().into_iter().flatten();
    let ranges: Vec<(u64, u64)> = ranges.map(|range| (number(&range[0]), number(&range[1]))).collect();
    let (all, said, mut done) = (ranges.iter().map(|(_, len)| len).sum(), lines("bytes are exported"), 0);
    for (start, len) in ranges {
        for offset in (start..start + len).step_by(MOST_DATA as usize) {
            let len = MOST_DATA.min(start + len - offset);
            let (volume, snapshot) = (name.to_owned(), snapshot.map(str::to_owned));
            let read = Operation::Read { volume, snapshot, offset, len, number: same };
            if let Some(data) = pool.ask(&read)?.as_str() {
                let bytes = BASE64_STANDARD.decode(data).map_err(Failure::new)?;
                target.write(&bytes, offset).map_err(&failed)?;
            }
            done += len;
            said(done, all);
        }
    }
    Ok(())
}
