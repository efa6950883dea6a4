//! Where heads are kept.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The head of what a sink stores, as the sink tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadPlace {
    /// The head. One path for one volume, whatever names lead to it.
    pub path: PathBuf,
    /// What people call the volume: the path of its image, or where it is.
    pub called: String,
    /// The sink never writes: its head is compared and not written.
    pub read_only: bool,
    /// The image, if it is not there (yet).
    pub missing: Option<PathBuf>,
}

/// Bytes of a file name that is made of an id.
const LONGEST: usize = 200;

impl HeadPlace {
    /// Of an image file, beside it; of a block device, in the folder for state.
    pub fn of_image(image: &Path, state_dir: &Path) -> HeadPlace {
        let device = image.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
        let path = match device {
            true => HeadPlace::of_device(image, state_dir),
            false => beside(&whole(image)),
        };
        let missing = (!image.exists()).then(|| image.to_owned());
        HeadPlace { path, called: whole(image).display().to_string(), read_only: false, missing }
    }

    /// Of something elsewhere that `kind` and `id` name, in the folder for state.
    pub fn keyed(kind: &str, id: &str, state_dir: &Path) -> HeadPlace {
        let path = state_dir.join("heads").join(file_name(kind, id));
        HeadPlace { path, called: id.to_owned(), read_only: false, missing: None }
    }

    /// The same, kept elsewhere.
    pub fn kept_at(self, path: Option<&Path>) -> HeadPlace {
        HeadPlace { path: path.map_or_else(|| self.path.clone(), whole), ..self }
    }

    /// The same of a sink that may not write.
    pub fn read_only(self, read_only: bool) -> HeadPlace {
        HeadPlace { read_only, ..self }
    }

    fn of_device(device: &Path, state_dir: &Path) -> PathBuf {
        let id = stable_id(device, Path::new("/dev/disk"), Path::new("/sys/dev/block"));
        let id = id.unwrap_or_else(|| {
            let path = whole(device).display().to_string();
            tracing::warn!("{path}: the device has no stable id: its head is found by this path");
            path
        });
        HeadPlace::keyed("disk", &id, state_dir).path
    }
}

/// The path without links, as far as it exists.
fn whole(path: &Path) -> PathBuf {
    let absolute = || std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    std::fs::canonicalize(path).ok().unwrap_or_else(|| match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) => {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            std::fs::canonicalize(folder).map_or_else(|_| absolute(), |folder| folder.join(name))
        }
        _ => absolute(),
    })
}

fn beside(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".mason-head");
    PathBuf::from(path)
}

/// A file name of which no two ids share one.
fn file_name(kind: &str, id: &str) -> String {
    let mut name = format!("{kind}-");
    for byte in id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => name.push(char::from(byte)),
            _ => name.push_str(&format!("%{byte:02x}")),
        }
    }
    if name.len() > LONGEST {
        let sum = crc32fast::hash(name.as_bytes());
        name.truncate(LONGEST - 20);
        name.push_str(&format!("-{sum:08x}"));
    }
    name
}

/// What a block device is called wherever it is plugged in. `links` is `/dev/disk`, `sys` is
/// `/sys/dev/block`.
fn stable_id(device: &Path, links: &Path, sys: &Path) -> Option<String> {
    let number = device.metadata().ok()?.rdev();
    let linked = |folder: &str| {
        let entries = std::fs::read_dir(links.join(folder)).ok()?;
        let ours = |path: &PathBuf| {
            path.metadata().is_ok_and(|meta| meta.file_type().is_block_device() && meta.rdev() == number)
        };
        let names = entries.filter_map(|entry| {
            let path = entry.ok()?.path();
            ours(&path).then(|| path.file_name().map(|name| name.to_string_lossy().into_owned()))?
        });
        // World wide names say nothing of the bus by which the disk was found.
        names.min_by_key(|name| (!name.starts_with("wwn-") && !name.starts_with("nvme-eui."), name.clone()))
    };
    let read = |file: &str| {
        let device = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        let text = std::fs::read_to_string(sys.join(device).join(file)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    linked("by-id")
        .or_else(|| linked("by-partuuid"))
        .or_else(|| ["wwid", "device/wwid", "serial", "device/serial"].into_iter().find_map(read))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_volume_has_one_place() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().canonicalize().unwrap();
        let image = home.join("disk.img");
        let place = HeadPlace::of_image(&image, Path::new("/state"));
        assert_eq!((&place.missing, &place.path), (&Some(image.clone()), &home.join("disk.img.mason-head")));
        std::fs::write(&image, "").unwrap();
        std::os::unix::fs::symlink("disk.img", home.join("link")).unwrap();
        for name in ["disk.img", "./disk.img", "../DIR/disk.img", "link"] {
            let name = name.replace("DIR", home.file_name().unwrap().to_str().unwrap());
            let other = HeadPlace::of_image(&home.join(name), Path::new("/state"));
            assert_eq!((other.path, other.missing), (place.path.clone(), None));
        }
        let kept = place.kept_at(Some(&home.join("heads/one")));
        assert_eq!(kept.path, home.join("heads/one"));
        assert_eq!(kept.called, image.display().to_string());
        assert_eq!(HeadPlace::keyed("nbd", "nbd://h/a", Path::new("/state")).called, "nbd://h/a");
    }

    #[test]
    fn ids_become_file_names() {
        assert_eq!(file_name("nbd", "nbd://h:1/a b%"), "nbd-nbd%3a%2f%2fh%3a1%2fa%20b%25");
        assert_eq!(file_name("disk", ".."), "disk-..");
        let (one, two) = ("x".repeat(5000) + "1", "x".repeat(5000) + "2");
        assert_ne!(file_name("nbd", &one), file_name("nbd", &two));
        assert!(file_name("nbd", &one).len() <= LONGEST);
    }

    #[test]
    fn what_is_no_device_has_no_id() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(stable_id(&folder.path().join("none"), folder.path(), folder.path()), None);
        std::fs::create_dir(folder.path().join("by-id")).unwrap();
        std::fs::write(folder.path().join("by-id/wwn-1"), "").unwrap();
        assert_eq!(stable_id(Path::new("/dev/null"), folder.path(), folder.path()), None);
        let number = Path::new("/dev/null").metadata().unwrap().rdev();
        let name = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
        std::fs::create_dir(folder.path().join(&name)).unwrap();
        std::fs::write(folder.path().join(name).join("serial"), " S1 \n").unwrap();
        assert_eq!(stable_id(Path::new("/dev/null"), folder.path(), folder.path()), Some("S1".to_owned()));
    }
}
