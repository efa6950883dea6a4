//! A file or a block device: the disk that most graphs end in.

use super::control;
use blockmason::data::ALIGN;
use blockmason::describe::{Access as HandlerAccess, Build, Carries, ElementType, Family, Handler, Ports};
use blockmason::heads::HeadPlace;
use blockmason::io::{Access, FileIo, FileOptions, Image, Opened, Registry};
use blockmason::lang::value::{FilePath, Size};
use blockmason::{
    Children, Cx, Element, Error, Flow, Geometry, Kind, Op, Open, Ops, Prepared, Request, Result,
};
use rustix::fs::{FileType, OFlags};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, OnceLock};

blockmason::params! {
    /// A file or a block device.
    pub struct Params {
        /// The image file or block device.
        path: FilePath,
        /// Creates a sparse file of this size when it is missing, but none below /dev. An existing file keeps its own
        /// size.
        size: Option<Size>,
        /// Bypasses the page cache (O_DIRECT).
        direct: bool = "no",
        /// Opens for reading only; several processes may then share the image.
        readonly: bool = "no",
        /// Keeps the head of the volume here. Without it the head is beside the image, and that of a block
        /// device in the folder for state.
        head: Option<FilePath>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "file",
    summary: "a file or a block device",
    doc: "Reads and writes an image. The size is the file's own, to the byte. The image is locked: no \
          second process that respects locks can write it meanwhile.\n\n\
          A write is answered when the kernel has it, which outlives this process but not the power; a \
          flush or FUA is answered after fdatasync. When an fdatasync fails, the kernel forgets what \
          was not written: so every later flush and FUA fails too, until `reset` is called.\n\n\
          Where a graph has a layout above it (`stripe`, `linear`, `slice`), the image has a *head*, a small \
          file `IMAGE.mason-head` that names it and its layout; through another one it is not served. Keep \
          it with the image.\n\n\
          Discarded and zeroed ranges become holes where the file system can make them.",
    family: Family::Sink,
    params: Params::PARAMS,
    ports: Ports::SINK,
    handlers: &[Handler {
        name: "reset",
        access: HandlerAccess::Call,
        doc: "lets flushes succeed again after one has failed",
    }],
    example: "element Guest (type nbd) (listen unix:disk.sock)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Disk\n",
    carries: |params| match Params::from(params) {
        Ok(params) if params.readonly => Carries::NO_WRITES,
        _ => Carries::ALL,
    },
    check: Params::check,
    build: |build: &Build<'_>| {
        Ok(Arc::new(FileDisk::new(build.read(Params::from)?, build.graph, build.state_dir)?))
    },
    ..ElementType::BASE
};

/// The kernel's life: what was written to a file outlives this process, and not the kernel.
static BOOT: LazyLock<Option<String>> = LazyLock::new(|| {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(format!("boot {}", id.trim())).filter(|text| text.len() > "boot ".len())
});

/// The kernel's life as a text.
pub(crate) fn boot() -> Option<String> {
    BOOT.clone()
}

struct FileDisk {
    params: Params,
    graph: String,
    state_dir: PathBuf,
    geometry: Geometry,
    /// Set once the image is open: by `build` if it exists, else by `open`, which creates it.
    io: OnceLock<FileIo>,
}

impl FileDisk {
    fn new(params: Params, graph: &str, state_dir: &Path) -> Result<FileDisk> {
        let path = &params.path.0;
        let io = OnceLock::new();
        let geometry = match params.size {
            // A graph that is built and thrown away leaves nothing behind; so not yet.
            Some(size) if !params.readonly && !path.exists() => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                if !folder.is_none_or(Path::is_dir) {
                    return Err(Error::new(Kind::Unavailable, "its folder does not exist").with_path(path));
                }
                if folder.is_some_and(is_of_devices) {
                    return Err(Error::new(Kind::Unavailable, "there is no such device").with_path(path));
                }
                geometry(&params, size.0, None)?
            }
            _ => {
                let (image, geometry, options) = open_image(&params, graph)?;
                let _ = io.set(FileIo::new(image, options));
                geometry
            }
        };
        let (graph, state_dir) = (graph.to_owned(), state_dir.to_owned());
        Ok(FileDisk { params, graph, state_dir, geometry, io })
    }

    fn io(&self) -> Result<&FileIo> {
        self.io.get().ok_or_else(|| Error::internal("a request came before the file was opened"))
    }
}

fn open_image(params: &Params, graph: &str) -> Result<(Arc<Image>, Geometry, FileOptions)> {
    let path = &params.path.0;
    let image = Registry::of_process().open(
        path,
        Access { write: !params.readonly, direct: params.direct },
        graph,
    )?;
    let refused = |errno, what: &'static str| Error::os(errno, what).with_path(path);
    let stat = rustix::fs::fstat(image.file()).map_err(|e| refused(e, "it cannot be looked at"))?;
    let (size, device) = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => (stat.st_size as u64, false),
        FileType::BlockDevice => {
            let end = rustix::fs::seek(image.file(), rustix::fs::SeekFrom::End(0));
            (end.map_err(|e| refused(e, "its size cannot be found out"))?, true)
        }
        _ => return Err(Error::invalid("it is neither a file nor a block device").with_path(path)),
    };
    let geometry = geometry(params, size, Some((stat.st_blksize as u32, device)))?;
    Ok((image, geometry, FileOptions { size, direct: params.direct, device }))
}

/// What the disk looks like; of a file that does not exist yet, what it will look like.
fn geometry(params: &Params, size: u64, found: Option<(u32, bool)>) -> Result<Geometry> {
    if params.direct && !size.is_multiple_of(ALIGN as u64) {
        let message = format!("its size, {size}, is no multiple of {ALIGN}, as (direct yes) needs");
        return Err(Error::invalid(message).with_path(&params.path.0));
    }
    let (block, device) = found.unwrap_or((4096, false));
    let ops =
        Ops { discard: true, write_zeroes: true, fast_zero: true, cache: !params.direct, extents: !device };
    Ok(Geometry {
        min_block: if params.direct { ALIGN as u32 } else { 1 },
        preferred_block: block.max(4096).next_power_of_two().min(1 << 16),
        ops,
        needs_flush: true,
        read_only: params.readonly,
        ..Geometry::new(size)
    })
}

/// True where the kernel keeps its devices: a file that is made there is a slip of the pen, and in memory.
fn is_of_devices(folder: &Path) -> bool {
    let number = |path: &Path| path.metadata().map(|meta| meta.dev()).ok();
    let devices = number(Path::new("/dev")).filter(|devices| number(Path::new("/")) != Some(*devices));
    devices.is_some() && number(folder) == devices
}

/// Makes a sparse file unless there is something already. Complete when it appears under its name.
fn create(path: &Path, size: u64) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let refused = |errno, what: &'static str| Error::os(errno, what).with_path(path);
    let file = rustix::fs::open(
        path,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .map_err(|errno| refused(errno, "it cannot be created"))?;
    rustix::fs::ftruncate(&file, size).map_err(|errno| {
        // Half made, it would pass for a disk of size 0 the next time.
        let _ = rustix::fs::unlink(path);
        refused(errno, "it cannot be made that large")
    })
}

impl Element for FileDisk {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(self.geometry))
    }

    fn open(&self, _open: &Open<'_>) -> Result<Option<String>> {
        if let (None, Some(size)) = (self.io.get(), self.params.size) {
            create(&self.params.path.0, size.0)?;
            let (image, geometry, options) = open_image(&self.params, &self.graph)?;
            if geometry.size != self.geometry.size {
                let path = &self.params.path.0;
                return Err(Error::new(Kind::Busy, "it has been made by somebody else").with_path(path));
            }
            let _ = self.io.set(FileIo::new(image, options));
        }
        Ok(None)
    }

    fn head(&self) -> Option<HeadPlace> {
        let place = HeadPlace::of_image(&self.params.path.0, &self.state_dir).read_only(self.params.readonly);
        Some(place.kept_at(self.params.head.as_ref().map(|path| path.0.as_path())))
    }

    fn opened(&self) -> Option<Opened> {
        // Of an open file something is always known.
        Opened::of(&self.params.path.0, self.io.get()?.image().file(), self.geometry.size).ok()
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let io = match self.io() {
            Ok(io) => io,
            Err(error) => return cx.fail(&req, error),
        };
        match req.op {
            op if op.changes_data() && self.geometry.read_only => {
                cx.fail(&req, Error::new(Kind::Denied, "the disk is read-only"))
            }
            Op::Read => io.read(req, cx),
            Op::Write => io.write(req, cx),
            Op::Flush => cx.later(&req, io.sync(cx)),
            Op::Discard => io.discard(req, cx),
            Op::WriteZeroes => io.write_zeroes(req, cx),
            Op::Cache => io.cache(req),
            Op::Extents => io.extents(req, cx),
            Op::Control => control(&req, cx, boot),
        }
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        match handler {
            "reset" => {
                self.io()?.image().reset();
                Ok("flushes may succeed again".to_owned())
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Access, Path, Registry};
    use blockmason::testing::{TestDisk, play_against_model, run};
    use blockmason::{Kind, Op};

    fn disk_in(folder: &tempfile::TempDir, more: &str) -> String {
        format!("element D (type file) (path {}) {more}", folder.path().join("disk.img").display())
    }

    #[test]
    fn behaves_like_a_vector() {
        for (seed, more) in ["(size 100001)", "(size 128k) (direct yes)"].iter().enumerate() {
            // Not every file system of a temporary folder does O_DIRECT; the current folder's does.
            let folder = tempfile::tempdir_in(".").unwrap();
            run(seed as u64, async |host| {
                let disk = TestDisk::new(&host, crate::ALL, &disk_in(&folder, more), "D").await.unwrap();
                play_against_model(&disk, seed as u64, 400).await;
            });
        }
    }

    #[test]
    fn another_graph_is_refused_and_successive_ones_share_the_image() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let graph = disk_in(&folder, "(size 1M)");
            let first = TestDisk::new(&host, crate::ALL, &graph, "D").await.unwrap();
            let second = TestDisk::new(&host, crate::ALL, &graph, "D").await.unwrap();
            first.write(0, b"x").await.unwrap();
            assert_eq!(second.read(0, 1).await.unwrap(), b"x");
            let path = folder.path().join("disk.img");
            for write in [true, false] {
                let error = Registry::of_process()
                    .open(&path, Access { write, direct: false }, "other")
                    .err()
                    .unwrap();
                assert_eq!(error.kind(), Kind::Busy);
                assert!(error.to_string().ends_with("the graph test has it open"), "{error}");
            }
            let read_only = disk_in(&folder, "(readonly yes)");
            let third = TestDisk::new(&host, crate::ALL, &read_only, "D").await.unwrap();
            assert_eq!(third.read(0, 1).await.unwrap(), b"x");
        });
    }

    #[test]
    fn what_cannot_be_opened_is_one_sentence_with_the_place() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let error = TestDisk::new(&host, crate::ALL, &disk_in(&folder, ""), "D").await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unavailable);
            let text = error.to_string();
            assert!(text.contains("D (") && text.contains("test.mason:1:9"), "{text}");
            assert!(text.ends_with("disk.img: there is no such file"), "{text}");
        });
    }

    #[test]
    fn a_graph_that_is_only_built_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let text = disk_in(&folder, "(size 1M)");
            drop(blockmason::testing::graph(&host, crate::ALL, &text, "D").unwrap());
            assert!(!folder.path().join("disk.img").exists());
            TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
            assert_eq!(std::fs::metadata(folder.path().join("disk.img")).unwrap().len(), 1 << 20);
            let nowhere = text.replace("disk.img", "none/disk.img");
            let error = blockmason::testing::graph(&host, crate::ALL, &nowhere, "D").err().unwrap();
            assert!(error.to_string().ends_with("its folder does not exist"), "{error}");
            let device = "element D (type file) (path /dev/nosuch) (size 1M)";
            let made = blockmason::testing::graph(&host, crate::ALL, device, "D");
            // Where devices have no file system of their own they look like any folder.
            if let Err(error) = made {
                assert!(error.to_string().ends_with("there is no such device"), "{error}");
            } else {
                assert!(!super::is_of_devices(Path::new("/dev")));
            }
        });
    }

    #[test]
    fn reading_only() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.img"), [7; 1000]).unwrap();
        run(1, async |host| {
            let graph = disk_in(&folder, "(readonly yes)");
            let disk = TestDisk::new(&host, crate::ALL, &graph, "D").await.unwrap();
            assert_eq!(disk.read(990, 10).await.unwrap(), [7; 10]);
            assert_eq!(disk.write(0, b"x").await.unwrap_err().kind(), Kind::Denied);
        });
    }

    #[test]
    fn holes_are_extents() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, &disk_in(&folder, "(size 1M)"), "D").await.unwrap();
            disk.write(512 << 10, &[1; 4096]).await.unwrap();
            let holes: Vec<_> =
                disk.extents(0, 1 << 20).await.unwrap().iter().map(|e| (e.len, e.state.hole)).collect();
            assert_eq!(holes, [(512 << 10, true), (4096, false), ((1 << 20) - (512 << 10) - 4096, true)]);
            disk.op(Op::Discard, 512 << 10, 4096).await.unwrap();
            assert_eq!(disk.extents(0, 1 << 20).await.unwrap().len(), 1);
        });
    }
}
