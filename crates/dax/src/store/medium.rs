//! What a store lies on.
//!
//! What     [`Medium`], an open file with room for labels at its front (or beside it) and data behind; its
//!          [`Kind`], which decides how it is mapped and made safe.
//! Why      a file on a disk, on a file system of huge pages, in memory without a name, or on persistent memory
//!          differ in three ways only: the size of their pages, how their labels are written, and what makes
//!          stores to them safe. Those are found out here, once. In a file of huge pages the labels have the first page
//!          to themselves, for nothing smaller can be mapped there.
//! Owns     the open file. One that it creates has mode 0600 (rule R9) and comes into being with its labels:
//!          before they are safe it has no name (`O_TMPFILE`), or where the file system knows no such files another
//!          one, by which whoever creates the store next finds what a kill left, and removes it.
//! Fails    with an [`OpenError`].

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;
use uhmm_addr::{ByteSize, Geometry, PAGE_SIZE};
use uhmm_sys::dax::{Protection, Window};
use uhmm_sys::filelock::{self, FileLock, LockError};
use uhmm_sys::hugetlb::{Huge, Pool};
use uhmm_sys::mapping::Mapping;
use uhmm_sys::memfd::Memfd;

use super::labels::AREA_BYTES;
use super::{Area, Extent, OpenError};

/// Where data begins in a file: at a multiple of 2 MiB, behind the labels.
const DATA_AT: u64 = 2 << 20;
const HUGETLBFS: i64 = 0x9584_58f6;
const TMPFS: i64 = 0x0102_1994;
const RAMFS: i64 = 0x8584_58f6;

/// How a medium is mapped, and what makes stores to it safe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A file that the kernel makes safe, by `msync`: its pages are copies, or persistent memory behind which something
    /// else must be flushed.
    PageCache,
    /// Persistent memory, mapped in place with `MAP_SYNC`: a store is safe when its cache line is written back, because
    /// where the page lies was safe before it could be touched.
    Dax,
    /// Memory without anything behind it, in ordinary pages.
    Memory,
    /// The same in huge pages.
    Huge(Huge),
}

impl Kind {
    /// The size of its pages: the least alignment there can be.
    pub const fn page(self) -> Geometry {
        match self {
            Self::Huge(Huge::M2) => Geometry::M2,
            Self::Huge(Huge::G1) => Geometry::G1,
            _ => Geometry::K4,
        }
    }

    /// Whether it is mapped with `MAP_SYNC`. Without it a page that the file system has only just placed could be lost
    /// with power, and every store to it, however well flushed.
    pub(crate) const fn syncs(self) -> bool {
        matches!(self, Self::Dax)
    }
}

/// What a store lies on.
#[derive(Debug)]
pub struct Medium {
    file: File,
    kind: Kind,
    path: Option<PathBuf>,
    data_at: u64,
    /// Bytes of data, whole pages.
    data: u64,
    labels: Box<dyn Area>,
}

impl Medium {
    /// Opens the file at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Err(OpenError::Missing { path: path.into() }),
            opened => opened.map_err(|errno| OpenError::os("open", path, errno))?,
        };
        Self::over(file, path)
    }

    /// Creates the file at `path` with room for `capacity` bytes of data, and has `format` write its labels.
    pub(super) fn create<T>(
        path: &Path,
        capacity: ByteSize,
        format: impl FnOnce(&Self) -> Result<T, OpenError>,
    ) -> Result<(Self, T), OpenError> {
        let os = |errno| OpenError::os("create", path, errno);
        match rustix::fs::lstat(path) {
            Ok(_) => return Err(OpenError::Exists { path: path.into() }),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(os(errno)),
        }
        let new = New::make(path).map_err(os)?;
        let file = new.file.try_clone().map_err(|error| OpenError::Io {
            action: "create",
            path: path.into(),
            error,
        })?;
        kind_of(&file, path).and_then(|kind| {
            let data_at = data_at(kind);
            let page = kind.page();
            let size = capacity.bytes();
            if size == 0 || !size.is_multiple_of(page.bytes() as u64) || size > i64::MAX as u64 - data_at {
                return Err(OpenError::Capacity { capacity, page });
            }
            allocate(&file, kind, 0, data_at + size)
                .map_err(|errno| no_room(&file, path, kind, data_at + size, errno))?;
            let medium = Self::over(file, path)?;
            let labels = format(&medium)?;
            match new.name(path) {
                Err(Errno::EXIST) => return Err(OpenError::Exists { path: path.into() }),
                named => named.map_err(os)?,
            }
            // The name shall be as safe as the labels; a directory that cannot be synced has nothing to lose.
            let _ = File::open(parent(path)).and_then(|parent| parent.sync_all());
            Ok((medium, labels))
        })
    }

    /// Memory without a name; its labels are in memory as well.
    pub(super) fn memory(capacity: ByteSize, huge: Option<Huge>) -> Result<Self, OpenError> {
        let kind = huge.map_or(Kind::Memory, Kind::Huge);
        let (page, size) = (kind.page(), capacity.bytes());
        if size == 0 || !size.is_multiple_of(page.bytes() as u64) {
            return Err(OpenError::Capacity { capacity, page });
        }
        let path = Path::new("memory");
        let failed = |error: io::Error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::NOMEM);
            OpenError::os("create", path, errno)
        };
        let memory = Memfd::create("uhmm-dax", size, huge).map_err(failed)?;
        let file = memory.fd().try_clone_to_owned().map_err(failed)?;
        allocate(&file, kind, 0, size).map_err(|errno| no_room(&file, path, kind, size, errno))?;
        let labels = Memfd::create("uhmm-dax-labels", AREA_BYTES, None).map_err(failed)?;
        let labels = FileArea { file: labels.fd().try_clone_to_owned().map_err(failed)?.into(), safe: false };
        Ok(Self { file: file.into(), kind, path: None, data_at: 0, data: size, labels: Box::new(labels) })
    }

    fn over(file: OwnedFd, path: &Path) -> Result<Self, OpenError> {
        let os = |action| move |errno| OpenError::os(action, path, errno);
        let kind = kind_of(&file, path)?;
        let size = rustix::fs::fstat(&file).map_err(os("look at"))?.st_size.max(0) as u64;
        let data_at = data_at(kind);
        let page = kind.page().bytes() as u64;
        if size < data_at + page {
            return Err(OpenError::TooSmall { path: path.into(), size, least: data_at + page });
        }
        let data = (size - data_at) / page * page;
        let labels: Box<dyn Area> = if let Kind::Huge(huge) = kind {
            let mapping = Mapping::shared(file.as_fd(), 0, huge.bytes(), "");
            let mapping =
                mapping.map_err(|error| OpenError::Io { action: "map", path: path.into(), error })?;
            let file = file.try_clone().map_err(|error| OpenError::Io {
                action: "open",
                path: path.into(),
                error,
            })?;
            Box::new(MappedArea { mapping, file: file.into() })
        } else {
            let file = file.try_clone().map_err(|error| OpenError::Io {
                action: "open",
                path: path.into(),
                error,
            })?;
            Box::new(FileArea { file: file.into(), safe: kind != Kind::Memory })
        };
        Ok(Self { file: file.into(), kind, path: Some(path.into()), data_at, data, labels })
    }

    /// How it is mapped.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Its file, if that has a name.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The open file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Pages of data.
    pub const fn capacity(&self) -> u64 {
        self.data / PAGE_SIZE as u64
    }

    /// Where `pages` begin in the file, in bytes.
    pub const fn offset(&self, pages: Extent) -> u64 {
        self.data_at + pages.offset()
    }

    pub(super) fn labels(&self) -> &dyn Area {
        &*self.labels
    }

    /// Makes `pages` zero, for they belonged to somebody else (rule R9) or are bad. Returns when that is safe.
    pub(crate) fn zero(&self, pages: Extent) -> io::Result<()> {
        self.write_zero(pages)?;
        if matches!(self.kind, Kind::PageCache | Kind::Dax) { self.file.sync_data() } else { Ok(()) }
    }

    /// Lets the frames of `pages` go back to the system: they read as zeros, and take no memory until they are touched,
    /// or [`Medium::zero`] has had them come into being again.
    pub(crate) fn punch(&self, pages: Extent) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, punch, self.offset(pages), pages.bytes())?)
    }

    fn write_zero(&self, pages: Extent) -> io::Result<()> {
        let (at, len) = (self.offset(pages), pages.bytes());
        match rustix::fs::fallocate(&self.file, FallocateFlags::ZERO_RANGE, at, len) {
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
            zeroed => return Ok(zeroed?),
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, punch, at, len) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(at, len),
            punched => {
                punched?;
                Ok(allocate(&self.file, self.kind, at, len)?)
            }
        }
    }

    fn write_zeros(&self, at: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; 1 << 20];
        let end = at + len;
        for at in (at..end).step_by(zeros.len()) {
            let part = zeros.len().min((end - at) as usize);
            self.file.write_all_at(&zeros[..part], at)?;
        }
        Ok(())
    }
}

/// A file that is not there yet.
struct New {
    file: OwnedFd,
    /// What it is called meanwhile, where it must have a name; and the lock that says that somebody is about it.
    name: Option<(PathBuf, FileLock)>,
}

impl New {
    fn make(path: &Path) -> Result<Self, Errno> {
        sweep(path);
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        match rustix::fs::open(parent(path), flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::named(path),
            file => Ok(Self { file: file?, name: None }),
        }
    }

    fn named(path: &Path) -> Result<Self, Errno> {
        let mut name = meanwhile(path).ok_or(Errno::ISDIR)?;
        name.push(std::process::id().to_string());
        let name = path.with_file_name(name);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&name, flags, Mode::RUSR | Mode::WUSR)?;
        let lock = filelock::reopened(file.as_fd()).map_err(LockError::from);
        match lock.and_then(|own| FileLock::try_acquire(own, 0, filelock::Kind::Exclusive)) {
            Ok(lock) => Ok(Self { file, name: Some((name, lock)) }),
            Err(error) => {
                let _ = rustix::fs::unlink(&name);
                Err(match error {
                    LockError::Held => Errno::AGAIN,
                    LockError::Os(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO),
                })
            }
        }
    }

    /// Gives it the name `path`, which nothing may have.
    fn name(&self, path: &Path) -> Result<(), Errno> {
        match &self.name {
            None => {
                let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
            }
            Some((name, _)) => {
                match rustix::fs::renameat_with(CWD, name, CWD, path, RenameFlags::NOREPLACE) {
                    // A file system that cannot promise that; a link it may.
                    Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::link(name, path),
                    renamed => renamed,
                }
            }
        }
    }
}

impl Drop for New {
    fn drop(&mut self) {
        if let Some((name, _)) = &self.name {
            // Where it was renamed there is none.
            let _ = rustix::fs::unlink(name);
        }
    }
}

/// What a file is called before it is a store, but for the number behind it.
fn meanwhile(path: &Path) -> Option<OsString> {
    let mut name = OsString::from(".");
    name.push(path.file_name()?);
    name.push(".new-");
    Some(name)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes what processes left that were killed before their store had its name.
fn sweep(path: &Path) {
    let (Some(name), Ok(entries)) = (meanwhile(path), std::fs::read_dir(parent(path))) else { return };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let number = found.as_bytes().strip_prefix(name.as_bytes());
        if !number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit)) {
            continue;
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let Ok(file) = rustix::fs::open(entry.path(), flags, Mode::empty()) else { continue };
        // Whoever is still about it has it locked.
        if FileLock::try_acquire(file, 0, filelock::Kind::Exclusive).is_ok() {
            let _ = rustix::fs::unlink(entry.path());
        }
    }
}

/// Has the pages come into being: a device has its memory, whether somebody uses it or not.
fn allocate(file: impl AsFd, kind: Kind, at: u64, len: u64) -> Result<(), Errno> {
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), at, len) {
        // A file system that cannot; then a fault may find the disk full.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) if kind == Kind::PageCache => {
            let size = rustix::fs::fstat(&file)?.st_size.max(0) as u64;
            rustix::fs::ftruncate(&file, size.max(at + len))
        }
        allocated => allocated,
    }
}

fn no_room(file: impl AsFd, path: &Path, kind: Kind, size: u64, errno: Errno) -> OpenError {
    if let (Kind::Huge(huge), Errno::NOMEM | Errno::NOSPC) = (kind, errno) {
        let wanted = size.div_ceil(huge.bytes() as u64) as usize;
        // What it has got of them counts as free again.
        let _ = rustix::fs::ftruncate(&file, 0);
        if let Ok(system) = rustix::fs::fstatfs(&file) {
            // Without a limit both are 0, or -1.
            let (limit, left) = (system.f_blocks as usize, system.f_bavail as usize);
            if limit > 0 && limit < usize::MAX && left < wanted {
                return OpenError::HugeMount { path: path.into(), wanted, limit, left, page: kind.page() };
            }
        }
        let pool = Pool::read(huge).unwrap_or(Pool { size: huge, total: 0, free: 0 });
        return OpenError::NoHugePages {
            wanted,
            free: pool.free,
            page: kind.page(),
            command: pool.command_for(wanted),
        };
    }
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::NOMEM | Errno::FBIG => {
            OpenError::NoRoom { path: path.into(), size: ByteSize::new(size), errno }
        }
        errno => OpenError::os("allocate", path, errno),
    }
}

fn data_at(kind: Kind) -> u64 {
    if let Kind::Huge(huge) = kind { huge.bytes() as u64 } else { DATA_AT }
}

fn kind_of(file: impl AsFd, path: &Path) -> Result<Kind, OpenError> {
    let os = |errno| OpenError::os("look at", path, errno);
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file).map_err(os)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(OpenError::NotAFile { path: path.into() });
    }
    let system = rustix::fs::fstatfs(&file).map_err(os)?;
    Ok(match system.f_type {
        HUGETLBFS if system.f_bsize as usize == Huge::M2.bytes() => Kind::Huge(Huge::M2),
        HUGETLBFS => Kind::Huge(Huge::G1),
        TMPFS | RAMFS => Kind::Memory,
        _ => {
            let stat = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::empty());
            let dax = stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::DAX));
            if dax && maps_sync(file.as_fd()) { Kind::Dax } else { Kind::PageCache }
        }
    })
}

/// Whether the kernel maps the file with `MAP_SYNC`. Not every file in place is one: behind virtual persistent memory the
/// host has to be asked to flush (`dax_synchronous`).
fn maps_sync(file: BorrowedFd<'_>) -> bool {
    let window = Window::reserve(PAGE_SIZE, PAGE_SIZE, 0, Protection::ReadWrite);
    window.and_then(|window| window.map(0, PAGE_SIZE, file, 0, true)).is_ok()
}

/// Labels at the front of a file that can be read and written.
#[derive(Debug)]
struct FileArea {
    file: File,
    /// Whether there is anything to be safe on.
    safe: bool,
}

impl Area for FileArea {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        if self.safe { self.file.sync_data() } else { Ok(()) }
    }
}

/// Labels in the first huge page of a file that can only be mapped.
#[derive(Debug)]
struct MappedArea {
    mapping: Mapping,
    file: File,
}

impl MappedArea {
    fn at(&self, at: u64, len: usize) -> io::Result<*mut u8> {
        let fits = at.checked_add(len as u64).is_some_and(|end| end <= AREA_BYTES);
        if !fits {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.mapping.as_ptr().as_ptr().wrapping_add(at as usize))
    }
}

impl Area for MappedArea {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let from = self.at(at, into.len())?;
        // SAFETY: inside the mapping (checked), of which no references exist; other processes may write the same
        // bytes at any time, so what is read is checked like anything from outside before it is believed.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.at(at, bytes.len())?;
        // SAFETY: inside the mapping (checked), of which no references exist.
        unsafe { bytes.as_ptr().copy_to_nonoverlapping(to, bytes.len()) };
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // Whoever watches the file learns of writes through a mapping by its times alone.
        self.file.set_modified(std::time::SystemTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_does_not_map_with_sync_is_not_taken_for_persistent_memory() {
        let memory = Memfd::create("uhmm-test", 4096, None).unwrap();
        assert!(!maps_sync(memory.fd()));
        assert!(Kind::Dax.syncs() && !Kind::PageCache.syncs() && !Kind::Memory.syncs());
    }
}
