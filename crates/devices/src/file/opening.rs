//! From a path to an open file of the right size.
//!
//! What     [`FileOptions`], which opens, creates and adopts files.
//! Why      what kind of file it is, who else uses it, how large it is and whether it can be accessed directly
//!          is found out here, once, so that a transfer has nothing left to ask.
//! Owns     nothing but what it hands out. A file it creates has mode 0600 (rule R9), and is removed again if
//!          it cannot be used.
//! Fails    with an [`OpenError`].

use std::env;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use uhmm_addr::{ByteSize, PAGE_SIZE};
use uhmm_sys::awake::Awake;

use super::FileDevice;
use super::ahead::Ahead;
use super::ring::Rings;
use crate::{DeviceUrl, OpenError, whole_pages};

/// Read and write, not inherited by exec, never anybody's terminal.
const BASE: OFlags = OFlags::RDWR.union(OFlags::CLOEXEC).union(OFlags::NOCTTY);
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Where temporary files go that outgrow memory.
const ROOMY: &str = "/var/tmp";
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// How a file becomes a device.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    io_uring: bool,
    direct: bool,
    rings: usize,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self { io_uring: true, direct: true, rings: 4 }
    }
}

impl FileOptions {
    /// Whether to use io_uring where the kernel allows it; otherwise, and without it, positioned calls.
    #[must_use]
    pub fn io_uring(self, use_it: bool) -> Self {
        Self { io_uring: use_it, ..self }
    }

    /// Whether to go past the page cache where the file system allows it.
    #[must_use]
    pub fn direct(self, use_it: bool) -> Self {
        Self { direct: use_it, ..self }
    }

    /// How many batches may be in io_uring at once (4). A batch that finds all rings taken uses positioned
    /// calls.
    #[must_use]
    pub fn rings(self, count: usize) -> Self {
        Self { rings: count, ..self }
    }

    /// Opens the regular file or block device at `path`, or creates a file of `size`.
    ///
    /// Without a size, the device has as many whole pages as there are. With one, a regular file that is
    /// shorter is extended; one that is longer is not cut, the device is its beginning. A regular file is
    /// locked (`flock`) so that no other process takes it as a device too; a block device must not be mounted.
    pub fn open(self, path: &Path, size: Option<ByteSize>) -> Result<FileDevice, OpenError> {
        size.map(whole_pages).transpose()?;
        let name = DeviceUrl::File { path: Some(path.into()), size }.to_string();
        let block = match rustix::fs::stat(path).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::RegularFile) => false,
            Ok(FileType::BlockDevice) => true,
            Ok(other) => return Err(not_a_file(path, other)),
            Err(Errno::NOENT) => return self.create(path, size, name),
            Err(errno) => return Err(refused("find", path, errno)),
        };
        let exclusive = if block { OFlags::EXCL } else { OFlags::empty() };
        let (fd, direct) = self.direct_if_possible(|flags| {
            free_soon(Errno::BUSY, || rustix::fs::open(path, flags | exclusive, Mode::empty()))
        });
        let fd = fd.map_err(|errno| refused("open", path, errno))?;
        let has = if block { block_size(&fd, path)? } else { file_size(&fd, path)? };
        if !block {
            lock(&fd, path)?;
        }
        let whole = ByteSize::new(has - has % PAGE_SIZE as u64);
        let size = match size {
            None if whole.bytes() == 0 => {
                return Err(OpenError::TooSmall { path: path.into(), has, wanted: PAGE_SIZE as u64 });
            }
            None => whole,
            Some(size) if size.bytes() > has && block => {
                return Err(OpenError::TooSmall { path: path.into(), has, wanted: size.bytes() });
            }
            Some(size) => {
                if size.bytes() > has {
                    extend(&fd, path, size)?;
                }
                size
            }
        };
        self.device(fd, direct, size, path.into(), name)
    }

    /// Makes a temporary file that has no name and is gone when the last descriptor is closed.
    ///
    /// It is in `directory`; without one in `$TMPDIR`, unless that is not set or is memory, then in `/var/tmp`.
    /// Without a size it has 90 % of the free space there. It takes space only as it is written.
    pub fn temporary(
        self,
        directory: Option<&Path>,
        size: Option<ByteSize>,
    ) -> Result<FileDevice, OpenError> {
        size.map(whole_pages).transpose()?;
        let directory = directory.map_or_else(roomy_directory, Path::to_path_buf);
        let free = rustix::fs::statvfs(&directory).map_err(|errno| refused("use", &directory, errno))?;
        let size = match size {
            Some(size) => size,
            None => {
                let bytes = free.f_bavail.saturating_mul(free.f_frsize) / 10 * 9;
                let bytes = bytes.min(i64::MAX as u64);
                ByteSize::new(bytes - bytes % PAGE_SIZE as u64)
            }
        };
        if size.bytes() == 0 {
            return Err(OpenError::NoSpace { directory });
        }
        let (fd, direct) = self.direct_if_possible(|flags| {
            match rustix::fs::open(&directory, flags | OFlags::TMPFILE, PRIVATE) {
                // The file system has no nameless files; or it has no direct access, which the caller finds out.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => unlinked(&directory, flags),
                opened => opened,
            }
        });
        let fd = fd.map_err(|errno| match errno {
            Errno::NOSPC | Errno::DQUOT => OpenError::NoSpace { directory: directory.clone() },
            errno => refused("create a temporary file in", &directory, errno),
        })?;
        extend(&fd, &directory, size)?;
        let name = DeviceUrl::File { path: None, size: Some(size) }.to_string();
        self.device(fd, direct, size, directory, name)
    }

    /// The file behind `fd`, which another process got from [`FileDevice::handle`]. It is not extended.
    pub fn from_fd(self, fd: OwnedFd, size: ByteSize) -> Result<FileDevice, OpenError> {
        whole_pages(size)?;
        let expected = "regular file or block device, open for reading and writing";
        let wrong = |_| OpenError::Descriptor { expected };
        let path = PathBuf::from("inherited file");
        let stat = rustix::fs::fstat(&fd).map_err(wrong)?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(wrong)?;
        let has = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => stat.st_size as u64,
            FileType::BlockDevice => block_size(&fd, &path)?,
            _ => return Err(wrong(Errno::INVAL)),
        };
        if flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(wrong(Errno::BADF));
        }
        if has < size.bytes() {
            return Err(OpenError::TooSmall { path, has, wanted: size.bytes() });
        }
        let name = DeviceUrl::File { path: None, size: Some(size) }.to_string();
        self.device(fd, flags.contains(OFlags::DIRECT), size, path, name)
    }

    fn create(self, path: &Path, size: Option<ByteSize>, name: String) -> Result<FileDevice, OpenError> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if rustix::fs::stat(directory).is_err() {
            return Err(OpenError::DirectoryMissing { directory: directory.into() });
        }
        let size = size.ok_or_else(|| OpenError::SizeNeeded { path: path.into() })?;
        let create = OFlags::CREATE | OFlags::EXCL;
        let (fd, direct) = self.direct_if_possible(|flags| {
            let opened = rustix::fs::open(path, flags | create, PRIVATE);
            if matches!(opened, Err(Errno::INVAL)) {
                // Some file systems create the file and then refuse to open it directly.
                let _ = rustix::fs::unlink(path);
            }
            opened
        });
        let fd = fd.map_err(|errno| refused("create", path, errno))?;
        let device = lock(&fd, path)
            .and_then(|()| extend(&fd, path, size))
            .and_then(|()| self.device(fd, direct, size, path.into(), name));
        if device.is_err() {
            let _ = rustix::fs::unlink(path);
        }
        device
    }

    /// Opens directly if that is wanted, possible, and fine with transfers of single pages.
    fn direct_if_possible(
        self,
        open: impl Fn(OFlags) -> Result<OwnedFd, Errno>,
    ) -> (Result<OwnedFd, Errno>, bool) {
        if self.direct {
            match open(BASE | OFlags::DIRECT) {
                Err(Errno::INVAL) => {}
                Ok(fd) => {
                    let direct = takes_pages(&fd) || rustix::fs::fcntl_setfl(&fd, OFlags::empty()).is_err();
                    return (Ok(fd), direct);
                }
                refused => return (refused, false),
            }
        }
        (open(BASE), false)
    }

    fn device(
        self,
        fd: OwnedFd,
        direct: bool,
        size: ByteSize,
        path: PathBuf,
        name: String,
    ) -> Result<FileDevice, OpenError> {
        let pages = whole_pages(size)?;
        // In memory there are no blocks to be had ahead, and through the page cache nobody waits for them.
        let ahead = direct && is_regular_on_disk(&fd);
        let rings = if self.io_uring { Rings::new(self.rings, fd.as_fd()) } else { None };
        Ok(FileDevice {
            name,
            path,
            fd,
            pages,
            direct,
            rings,
            keeps_space: AtomicBool::new(false),
            awake: Awake::default(),
            ahead: Ahead::new(ahead),
        })
    }
}

/// Whether direct access takes memory and offsets at multiples of a page. A kernel that does not tell takes it.
fn takes_pages(fd: &OwnedFd) -> bool {
    match rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            let fine = |align: u32| align != 0 && align <= PAGE_SIZE as u32;
            fine(stat.stx_dio_mem_align) && fine(stat.stx_dio_offset_align)
        }
        _ => true,
    }
}

/// A regular file whose file system is not memory.
fn is_regular_on_disk(fd: &OwnedFd) -> bool {
    let regular = rustix::fs::fstat(fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    regular && rustix::fs::fstatfs(fd).is_ok_and(|fs| !matches!(fs.f_type, TMPFS_MAGIC | RAMFS_MAGIC))
}

fn file_size(fd: &OwnedFd, path: &Path) -> Result<u64, OpenError> {
    let stat = rustix::fs::fstat(fd).map_err(|errno| refused("ask for the size of", path, errno))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(stat.st_size as u64),
        other => Err(not_a_file(path, other)),
    }
}

fn block_size(fd: &OwnedFd, path: &Path) -> Result<u64, OpenError> {
    const BLKGETSIZE64: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<usize>(0x12, 114);
    // SAFETY: the kernel answers this request with an u64, and refuses it on what is no block device.
    let size = unsafe { rustix::ioctl::ioctl(fd, rustix::ioctl::Getter::<BLKGETSIZE64, u64>::new()) };
    size.map_err(|errno| refused("ask for the size of", path, errno))
}

/// Keeps other processes from using the file as a device. File systems without locks go without.
fn lock(fd: &OwnedFd, path: &Path) -> Result<(), OpenError> {
    match free_soon(Errno::WOULDBLOCK, || rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive)) {
        Err(Errno::WOULDBLOCK) => Err(OpenError::Busy { path: path.into() }),
        _ => Ok(()),
    }
}

/// Tries again for a moment while the answer is `busy`: a process that ends, or that is between fork and exec,
/// lets go of its files only then.
fn free_soon<T>(busy: Errno, attempt: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..20 {
        match attempt() {
            Err(errno) if errno == busy => thread::sleep(Duration::from_millis(5)),
            done => return done,
        }
    }
    attempt()
}

fn extend(fd: &OwnedFd, path: &Path, size: ByteSize) -> Result<(), OpenError> {
    rustix::fs::ftruncate(fd, size.bytes()).map_err(|errno| match errno {
        Errno::FBIG | Errno::INVAL | Errno::NOSPC => OpenError::TooLarge { path: path.into(), size },
        errno => refused("extend", path, errno),
    })
}

/// A file in `directory` that has a name for an instant only.
fn unlinked(directory: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let process = rustix::process::getpid().as_raw_nonzero();
    for _ in 0..100 {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(OsString::from(format!(".uhmm-{process}-{serial}")));
        match rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, PRIVATE) {
            Err(Errno::EXIST) => {}
            Err(errno) => {
                if errno == Errno::INVAL {
                    let _ = rustix::fs::unlink(&path);
                }
                return Err(errno);
            }
            Ok(fd) => return rustix::fs::unlink(&path).map(|()| fd),
        }
    }
    Err(Errno::EXIST)
}

fn roomy_directory() -> PathBuf {
    let is_memory =
        |path: &Path| rustix::fs::statfs(path).is_ok_and(|fs| matches!(fs.f_type, TMPFS_MAGIC | RAMFS_MAGIC));
    match env::var_os("TMPDIR").map(PathBuf::from) {
        Some(path) if path.is_dir() && !is_memory(&path) => path,
        _ => PathBuf::from(ROOMY),
    }
}

fn not_a_file(path: &Path, kind: FileType) -> OpenError {
    let what = match kind {
        FileType::Directory => "directory",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        _ => "special file",
    };
    OpenError::NotAFile { path: path.into(), what }
}

fn refused(action: &'static str, path: &Path, errno: Errno) -> OpenError {
    let path = path.to_path_buf();
    match errno {
        Errno::NOENT | Errno::NOTDIR => OpenError::DirectoryMissing { directory: path },
        Errno::ACCESS | Errno::PERM | Errno::ROFS => OpenError::Permission { path, errno },
        Errno::BUSY | Errno::TXTBSY => OpenError::Busy { path },
        errno => OpenError::System { action, path, errno },
    }
}
