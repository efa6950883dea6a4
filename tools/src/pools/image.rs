//! `mason volume import` and `export`: volumes from and to image files, raw or qcow2.

use super::pool::{number, same};
use super::reach::{Pool, half_received};
use super::send::snapshot_of;
use super::stream::MOST_DATA;
use crate::failure::{Failure, Outcome};
use crate::progress::lines;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason_elements::parallax::tool::{Operation, Settings};
use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, Storage,
    StorageOpenOptions,
};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
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
    let failed = |error: std::io::Error| Failure::new(format!("{}: {error}", path.display()));
    let layout = layout.map_or_else(|| layout_of(path), Ok).map_err(failed)?;
    let file = ImageFile::open(StorageOpenOptions::new().filename(path).write(false)).map_err(failed)?;
    // What an image names is not opened: it may have come from a guest, and name anything.
    let none = DenyImplicitOpenGate::default();
    let image = match layout {
        Layout::Raw => Raw::builder(file).write(false).open(none).map(FormatAccess::new),
        Layout::Qcow2 => Qcow2::<ImageFile>::builder(file).write(false).open(none).map(FormatAccess::new),
    };
    let image = image.map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => {
            let message = "it needs other files: make one image of them with qemu-img convert";
            Failure::new(format!("{}: {message} ({error})", path.display()))
        }
        _ => failed(error),
    })?;
    if pool.find(name)?.is_some() {
        return Err(Failure::new(format!("there is a volume {name} already")));
    }
    let size = image.size().div_ceil(BLOCK).saturating_mul(BLOCK);
    let part = format!("{name}{PART}");
    pool.ask(&Operation::CreateVolume { name: part.clone(), size, settings })?;
    let done = fill(pool, &part, &image, failed).and_then(|()| {
        let (name, to) = (part.clone(), name.to_owned());
        pool.ask(&Operation::Rename { name, to }).map(drop)
    });
    done.inspect_err(|_| _ = pool.ask(&Operation::DeleteVolume { name: part }))
}

/// What an image begins with says what it is.
fn layout_of(path: &Path) -> std::io::Result<Layout> {
    let mut begins = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut begins)?;
    Ok(if begins == *b"QFI\xfb" { Layout::Qcow2 } else { Layout::Raw })
}

fn fill(
    pool: &Pool<'_>,
    name: &str,
    image: &FormatAccess<ImageFile>,
    failed: impl Fn(std::io::Error) -> Failure,
) -> Outcome {
    let (size, said, mut at) = (image.size(), lines("bytes are imported"), 0);
    while at < size {
        let (mapping, len) = image.get_mapping(at, size - at).map_err(&failed)?;
        let end = at + len / BLOCK * BLOCK;
        if matches!(mapping, Mapping::Zero { .. }) && end > at {
            at = end;
            continue;
        }
        let len = MOST_DATA.min(size - at);
        let mut bytes = vec![0; len as usize];
        image.read(&mut bytes, at).map_err(&failed)?;
        bytes.resize(len.next_multiple_of(BLOCK) as usize, 0);
        put(pool, name, at, &bytes)?;
        at += len;
        said(at, size);
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
    let target = Target::make(&part, layout, size).map_err(failed)?;
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
