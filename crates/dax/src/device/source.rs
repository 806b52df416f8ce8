//! Where a device's bytes are.
//!
//! What     [`Source`], an open file and the [`Section`]s of it that are the device's, one after the other.
//! Why      a namespace of a store and a node of the kernel's `dax` bus are mapped, faulted and torn down alike.
//! Owns     the open file, and the claim that keeps the namespace from being changed.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};
use uhmm_addr::{ByteSize, Geometry, PAGE_SIZE};

use super::DeviceError;
use crate::store::{Claim, Kind, Mode as Purpose, NamespaceId, Store};

/// Consecutive pages of a device that are consecutive in its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Section {
    /// The first page, counted from the device's first.
    pub(crate) page: u64,
    /// Length in pages.
    pub(crate) len: u64,
    /// Where it begins in the file, in bytes.
    pub(crate) at: u64,
}

/// Where a device's bytes are.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) align: Geometry,
    pub(crate) kind: Kind,
    pub(crate) file: OwnedFd,
    pub(crate) sections: Vec<Section>,
    /// The store and what keeps the namespace; none for a node of the kernel's.
    pub(crate) store: Option<(Arc<Store>, Claim)>,
}

impl Source {
    /// A namespace.
    pub(crate) fn namespace(
        store: &Arc<Store>,
        id: NamespaceId,
        purpose: Purpose,
    ) -> Result<Self, DeviceError> {
        let claim = store.claim(id)?;
        let (name, namespace) = (claim.device_name().to_owned(), claim.namespace());
        if namespace.mode != purpose {
            let store = store.medium().path().map_or("STORE".into(), |path| path.display().to_string());
            return Err(DeviceError::Mode { device: name, mode: namespace.mode, wanted: purpose, store });
        }
        let medium = store.medium();
        let file = medium.fd().try_clone_to_owned();
        let file = file.map_err(|error| DeviceError::Io { device: name.clone(), error })?;
        let sections = namespace.pieces().map(|piece| Section {
            page: piece.page,
            len: piece.extent.len,
            at: medium.offset(piece.extent),
        });
        Ok(Self {
            align: namespace.align,
            kind: medium.kind(),
            sections: sections.collect(),
            name,
            file,
            store: Some((store.clone(), claim)),
        })
    }

    /// A node such as `/dev/dax0.0`, whose size and alignment `sysfs` knows.
    pub(crate) fn node(path: &Path, sysfs: &Path) -> Result<Self, DeviceError> {
        let not = |why: String| DeviceError::NotANode { path: path.into(), why };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| not(errno.to_string()))?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| not(errno.to_string()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
            return Err(not("it is no character device".into()));
        }
        let number = format!("{}:{}", rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let (size, align) = attributes(&sysfs.join("dev/char").join(number)).map_err(not)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let pages = size / PAGE_SIZE as u64;
        let sections = vec![Section { page: 0, len: pages, at: 0 }];
        Ok(Self { name, align, kind: Kind::Dax, file, sections, store: None })
    }

    /// One that says it is persistent memory, in a file that the kernel does not map with `MAP_SYNC`.
    #[cfg(test)]
    pub(crate) fn not_persistent(len: u64) -> Self {
        let file = rustix::fs::memfd_create("uhmm-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        let section = Section { page: 0, len: len / PAGE_SIZE as u64, at: 0 };
        let (name, align) = ("dax9.9".to_owned(), Geometry::M2);
        Self { name, align, kind: Kind::Dax, file, sections: vec![section], store: None }
    }

    /// Pages in it.
    pub(crate) fn pages(&self) -> u64 {
        self.sections.last().map_or(0, |last| last.page + last.len)
    }

    /// Its size.
    pub(crate) fn size(&self) -> ByteSize {
        ByteSize::new(self.pages() * PAGE_SIZE as u64)
    }

    /// The parts of its sections that are in `page..page + len`, in order.
    pub(crate) fn locate(&self, page: u64, len: u64) -> impl Iterator<Item = Section> {
        let end = page + len;
        self.sections.iter().filter_map(move |section| {
            let (from, to) = (section.page.max(page), (section.page + section.len).min(end));
            let skip = from.checked_sub(section.page)?;
            (from < to).then(|| Section {
                page: from,
                len: to - from,
                at: section.at + skip * PAGE_SIZE as u64,
            })
        })
    }
}

/// Size and alignment, as the kernel's `dax` bus shows them (`drivers/dax/bus.c`).
fn attributes(directory: &Path) -> Result<(u64, Geometry), String> {
    let number = |name: &str| {
        let path = directory.join(name);
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        text.trim().parse::<u64>().map_err(|_| format!("{} says {:?}", path.display(), text.trim()))
    };
    let (size, align) = (number("size")?, number("align")?);
    let known = [Geometry::K4, Geometry::M2, Geometry::G1];
    let geometry = known.into_iter().find(|geometry| geometry.bytes() as u64 == align);
    let geometry = geometry.ok_or_else(|| format!("its alignment {align} is none of 4K, 2M and 1G"))?;
    if size == 0 || !size.is_multiple_of(align) {
        return Err(format!("its size {size} is no multiple of its alignment {align} above 0"));
    }
    Ok((size, geometry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str, size: &str, align: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("uhmm-sysfs-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("size"), size).unwrap();
        fs::write(path.join("align"), align).unwrap();
        path
    }

    #[test]
    fn the_bus_is_believed_if_it_makes_sense() {
        for (name, size, align, told) in [
            ("good", "3233808384\n", "2097152\n", Ok((3_233_808_384, Geometry::M2))),
            ("odd", "3233808384\n", "65536\n", Err("its alignment 65536")),
            ("empty", "0\n", "4096\n", Err("its size 0")),
            ("torn", "4097\n", "4096\n", Err("its size 4097")),
            ("text", "many\n", "4096\n", Err("/size says \"many\"")),
        ] {
            let path = directory(name, size, align);
            match (attributes(&path), told) {
                (Err(why), Err(part)) => assert!(why.contains(part), "{why}"),
                (found, told) => assert_eq!(found, told.map_err(str::to_owned)),
            }
            fs::remove_dir_all(&path).unwrap();
        }
    }

    #[test]
    fn what_is_no_node_says_so() {
        for path in ["/dev/null", "/etc/hostname", "/does/not/exist"] {
            let told = Source::node(Path::new(path), Path::new("/sys")).unwrap_err().to_string();
            assert!(told.starts_with(&format!("{path:?} is no device-dax node")), "{told}");
        }
    }
}
