//! Memory as a device.
//!
//! What     [`MemDevice`]: a mapping whose pages are copied to and from with `memcpy`. *Private*: anonymous
//!          memory of this process. *Shared*: a memfd, which processes made by fork see with the same
//!          bytes, which can be passed to others, and which does not count as anonymous memory. *Coherent*: anonymous
//!          memory of this process, of one memory node if that is said, whose pages a space maps in place.
//! Why      the fastest device there is; what migration costs beside the copy shows here; and a compressing
//!          layer needs somewhere to put its pages.
//! Owns     the mapping, and the memfd if there is one, which is sealed against shrinking: a page that
//!          somebody cut off would be a SIGBUS in the middle of a copy.
//!          Private memory is named `uhmm:device`, where the kernel has names (`CONFIG_ANON_VMA_NAME`), so that
//!          whoever manages this process's memory can leave it alone; where that matters, use shared memory.
//!          A coherent device's frames change places with those of the space that has it: beside transfers, nothing
//!          here touches a page that may be absent. A child made by fork has none of it.
//! Fails    only at opening and for pages that it does not have. Memory that the machine promised and cannot
//!          deliver ends the process, as it does everywhere on Linux.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use uhmm_addr::{ByteSize, PAGE_SIZE, PageCount, VaRange, VirtAddr};
use uhmm_core::device::{
    Device, DeviceMemory, DevicePage, MemoryType, PeerTransfer, Transfer, TransferError,
};

use crate::{Backing, DeviceUrl, Handle, OUT_OF_RANGE, OpenError, admit, fits, whole_pages};

/// Mappings start at a multiple of this, so that huge pages fit.
const ALIGN: usize = 2 << 20;

/// A device that is memory of this machine.
#[derive(Debug)]
pub struct MemDevice {
    name: String,
    mapping: Mapping,
    shared: Option<OwnedFd>,
    memory_type: MemoryType,
}

impl MemDevice {
    /// Anonymous memory of this process. A child made by fork has a copy of its own.
    pub fn private(size: ByteSize) -> Result<Self, OpenError> {
        let pages = whole_pages(size)?;
        let mapping = Mapping::new(pages, None).map_err(|errno| OpenError::Memory { size, errno })?;
        Ok(Self::of(DeviceUrl::Memory { size }, mapping, None))
    }

    /// Memory that a space maps in place, for the program to load from and store to where it is; of memory node `node`,
    /// if one is named. One space at a time can have it.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use uhmm_addr::ByteSize;
    /// # use uhmm_core::device::{Device, MemoryType};
    /// # use uhmm_devices::MemDevice;
    /// let near = MemDevice::coherent(ByteSize::mib(1), None)?;
    /// assert_eq!(near.memory_type(), MemoryType::Coherent);
    /// assert_eq!(near.name(), "mem:1MiB?type=coherent");
    /// # Ok::<(), uhmm_devices::OpenError>(())
    /// ```
    pub fn coherent(size: ByteSize, node: Option<u32>) -> Result<Self, OpenError> {
        let pages = whole_pages(size)?;
        let refused = |errno| OpenError::Memory { size, errno };
        let mapping = Mapping::new(pages, None).map_err(refused)?;
        mapping.advise(Advice::LinuxNoHugepage).or_else(without_huge_pages).map_err(refused)?;
        mapping.advise(Advice::LinuxDontFork).map_err(refused)?;
        if let Some(node) = node {
            uhmm_sys::node::bind(mapping.range(), node).map_err(|errno| OpenError::Node { node, errno })?;
        }
        let url = DeviceUrl::Coherent { size, node };
        Ok(Self { memory_type: MemoryType::Coherent, ..Self::of(url, mapping, None) })
    }

    /// Memory that other processes can have too ([`MemDevice::handle`]), and that a child made by fork shares.
    pub fn shared(size: ByteSize) -> Result<Self, OpenError> {
        whole_pages(size)?;
        let refused = |errno| OpenError::Memory { size, errno };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match rustix::fs::memfd_create("uhmm-device", flags | MemfdFlags::NOEXEC_SEAL) {
            // Linux before 6.3 does not know the flag.
            Err(Errno::INVAL) => rustix::fs::memfd_create("uhmm-device", flags),
            created => created,
        };
        let fd = fd.map_err(refused)?;
        rustix::fs::ftruncate(&fd, size.bytes()).map_err(refused)?;
        Self::from_fd(fd, size)
    }

    /// The memory behind `fd`, which another process got from [`MemDevice::handle`].
    pub fn from_fd(fd: OwnedFd, size: ByteSize) -> Result<Self, OpenError> {
        let pages = whole_pages(size)?;
        let wrong = |_| OpenError::Descriptor { expected: "memfd that can be sealed" };
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).or_else(|errno| {
            let sealed =
                rustix::fs::fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
            if sealed { Ok(()) } else { Err(wrong(errno)) }
        })?;
        let has = rustix::fs::fstat(&fd).map_err(wrong)?.st_size as u64;
        if has < size.bytes() {
            return Err(OpenError::TooSmall { path: "memfd".into(), has, wanted: size.bytes() });
        }
        let mapping =
            Mapping::new(pages, Some(fd.as_fd())).map_err(|errno| OpenError::Memory { size, errno })?;
        Ok(Self::of(DeviceUrl::Memory { size }, mapping, Some(fd)))
    }

    fn of(url: DeviceUrl, mapping: Mapping, shared: Option<OwnedFd>) -> Self {
        Self { name: url.to_string(), mapping, shared, memory_type: MemoryType::Private }
    }

    /// The memfd, if the memory is shared.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.shared.as_ref().map(AsFd::as_fd)
    }

    /// What another process needs to have the same memory.
    pub fn handle(&self) -> Result<Handle, OpenError> {
        let fd = self.shared.as_ref().ok_or(OpenError::NotShared)?.try_clone().map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::MFILE);
            OpenError::System { action: "duplicate the descriptor of", path: "memfd".into(), errno }
        })?;
        Ok(Handle { backing: Backing::Memory, size: self.capacity().size(), fd })
    }
}

impl MemDevice {
    fn read_streaming(&self, batch: &mut [Transfer], stream: usize) {
        for transfer in batch {
            if admit(self.mapping.pages, transfer) {
                let from = self.mapping.at(transfer.page());
                // SAFETY: as in `write`, the other way round: the maker promised that the RAM can be written
                // and that nobody else accesses it.
                unsafe { copy(from, transfer.ram().as_ptr(), transfer.bytes(), stream) }
            }
        }
    }
}

impl Device for MemDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn memory_type(&self) -> MemoryType {
        self.memory_type
    }

    fn memory(&self) -> Option<DeviceMemory> {
        // SAFETY: anonymous memory in small pages, of the device's length, which lives and goes with it; its bytes are
        // reached through raw pointers, in transfers and in `zero`, of pages whose owner asked for it.
        let coherent = || unsafe { DeviceMemory::new(self.mapping.range()) };
        (self.memory_type == MemoryType::Coherent).then(coherent)
    }

    fn capacity(&self) -> PageCount {
        self.mapping.pages
    }

    fn write(&self, batch: &mut [Transfer]) {
        for transfer in batch {
            if admit(self.mapping.pages, transfer) {
                let to = self.mapping.at(transfer.page());
                // SAFETY: `admit` has checked that the pages lie in the mapping, which is writable and lives
                // as long as `self`; the transfer's maker promised that its RAM can be read, and RAM that
                // the maker may lend is not part of this mapping, which nobody else knows.
                unsafe { copy(transfer.ram().as_ptr(), to, transfer.bytes(), STREAM_OUT) }
            }
        }
    }

    fn read(&self, batch: &mut [Transfer]) {
        self.read_streaming(batch, STREAM_IN);
    }

    fn read_ahead(&self, batch: &mut [Transfer]) {
        self.read_streaming(batch, STREAM_OUT);
    }

    /// From any other device that is memory of this process.
    fn copy_from(&self, source: &dyn Device, batch: &mut [PeerTransfer]) -> bool {
        let Some(source) = source.as_any().and_then(<dyn Any>::downcast_ref::<Self>) else { return false };
        if ptr::eq(self, source) {
            return false;
        }
        for piece in batch {
            if fits(source.mapping.pages, piece.from(), piece.pages())
                && fits(self.mapping.pages, piece.to(), piece.pages())
            {
                let (from, to) = (source.mapping.at(piece.from()), self.mapping.at(piece.to()));
                // SAFETY: the pages lie in the two mappings (`fits`), which are different ones, and live as long
                // as the devices.
                unsafe { copy(from, to, piece.pages().bytes(), STREAM_OUT) }
            } else {
                piece.fail(OUT_OF_RANGE);
            }
        }
        true
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn discard(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        if !fits(self.mapping.pages, page, pages) {
            return Err(OUT_OF_RANGE);
        }
        if pages.is_zero() {
            return Ok(());
        }
        let done = match &self.shared {
            Some(fd) => {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::io::retry_on_intr(|| {
                    rustix::fs::fallocate(fd, punch, page.offset(), pages.bytes() as u64)
                })
            }
            // SAFETY: the pages lie in the mapping (`fits`), and the caller owns them: nobody reads or writes
            // them meanwhile.
            None => unsafe {
                rustix::mm::madvise(self.mapping.at(page).cast(), pages.bytes(), Advice::LinuxDontNeed)
            },
        };
        done.map_err(|errno| TransferError::Io(errno.raw_os_error()))
    }

    /// A coherent device's frames stay where they are, zeroed: a discard of memory that a space watches would be an event
    /// of its own.
    fn zero(&self, page: DevicePage, pages: PageCount) -> Result<(), TransferError> {
        if self.memory_type == MemoryType::Private {
            return self.discard(page, pages);
        }
        if !fits(self.mapping.pages, page, pages) {
            return Err(OUT_OF_RANGE);
        }
        // SAFETY: the pages lie in the mapping (`fits`), which is writable, and the caller owns them: nobody reads or
        // writes them meanwhile.
        unsafe { ptr::write_bytes(self.mapping.at(page), 0, pages.bytes()) };
        Ok(())
    }
}

/// Writes of at least so many bytes, and reads ahead, go past the caches: nobody will read the bytes soon.
const STREAM_OUT: usize = 64 << 10;
/// Reads of at least so many do: they would not fit into the cache of one processor, where the program, which
/// is about to use what a fault brought, finds the smaller ones.
const STREAM_IN: usize = 1 << 20;

/// Larger pieces make `memcpy` take ways that are slower from memory to a cache.
const PIECE: usize = 4096;

/// Copies `len` bytes; past the caches from `stream` bytes on, which saves reading memory that is written whole.
///
/// # Safety
/// As [`ptr::copy_nonoverlapping`].
unsafe fn copy(from: *const u8, to: *mut u8, len: usize, stream: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if len >= stream && (from as usize | to as usize | len).is_multiple_of(PAGE_SIZE) {
        // SAFETY: the caller's promise; both are aligned, and so is the length (checked).
        return unsafe { stream_pages(from, to, len) };
    }
    let _ = stream;
    for at in (0..len).step_by(PIECE) {
        // SAFETY: the caller's promise, of which this is a part.
        unsafe { ptr::copy_nonoverlapping(from.add(at), to.add(at), PIECE.min(len - at)) }
    }
}

/// Copies whole pages past the caches, a few of them side by side: a processor fetches ahead within a page, and as many
/// pages as it is told of.
///
/// # Safety
/// As [`ptr::copy_nonoverlapping`], with `from`, `to` and `len` multiples of the page size.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn stream_pages(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_sfence, _mm_stream_si128};
    const ABREAST: usize = 4 * PAGE_SIZE;
    const BLOCK: usize = 256;
    const VECTORS: usize = BLOCK / size_of::<__m128i>();
    for group in (0..len).step_by(ABREAST) {
        let end = ABREAST.min(len - group);
        for at in (0..PAGE_SIZE).step_by(BLOCK) {
            for page in (0..end).step_by(PAGE_SIZE) {
                let offset = group + page + at;
                // SAFETY: blocks of whole pages below `len`, which the caller promises, and aligned as those are; the
                // instructions are part of every x86-64 processor. The fence below orders the stores before whatever
                // follows, as ordinary ones would be.
                unsafe {
                    let source = from.add(offset).cast::<__m128i>();
                    let target = to.add(offset).cast::<__m128i>();
                    let block: [__m128i; VECTORS] = std::array::from_fn(|n| _mm_load_si128(source.add(n)));
                    for (n, vector) in block.into_iter().enumerate() {
                        _mm_stream_si128(target.add(n), vector);
                    }
                }
            }
        }
    }
    // SAFETY: part of every x86-64 processor, and touches no memory.
    unsafe { _mm_sfence() };
}

/// A kernel that has no huge pages does not know of advice against them.
fn without_huge_pages(errno: Errno) -> Result<(), Errno> {
    if errno == Errno::INVAL { Ok(()) } else { Err(errno) }
}

/// Memory of a device in this address space, at a multiple of [`ALIGN`].
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    pages: PageCount,
}

// SAFETY: the mapping is plain memory, reached only through raw pointers; callers of a device keep apart who
// accesses which page.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(pages: PageCount, file: Option<BorrowedFd<'_>>) -> Result<Self, Errno> {
        let len = pages.bytes();
        let reach = len.checked_add(ALIGN).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping where the kernel likes; it touches no memory that is in use.
        let reserved =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), reach, ProtFlags::empty(), flags) }?;
        let head = reserved.cast::<u8>().align_offset(ALIGN);
        let start = reserved.cast::<u8>().wrapping_add(head);
        let (prot, fixed) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::FIXED | MapFlags::NORESERVE);
        // SAFETY: `start..start + len` lies in the reservation made above, which nobody else knows, so that
        // mapping over it takes nothing from anybody.
        let mapped = unsafe {
            match file {
                Some(fd) => rustix::mm::mmap(start.cast(), len, prot, MapFlags::SHARED | fixed, fd, 0),
                None => rustix::mm::mmap_anonymous(start.cast(), len, prot, MapFlags::PRIVATE | fixed),
            }
        };
        if let Err(errno) = mapped {
            // SAFETY: the reservation is ours and nobody uses it.
            let _ = unsafe { rustix::mm::munmap(reserved, reach) };
            return Err(errno);
        }
        // SAFETY: both ends lie in the reservation, outside the mapping; nobody uses them. That an end stays
        // reserved costs addresses only.
        let _ = unsafe {
            let tail = reach - head - len;
            let ends = [(reserved.cast::<u8>(), head), (start.wrapping_add(len), tail)];
            ends.map(|(end, len)| if len == 0 { Ok(()) } else { rustix::mm::munmap(end.cast(), len) })
        };
        // SAFETY: advice on our own mapping. A kernel without huge pages refuses it, which costs speed only.
        let _ = unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxHugepage) };
        let base = NonNull::new(start).ok_or(Errno::NOMEM)?;
        if file.is_none() {
            // SAFETY: the mapping that was just made; the slice only says where, and nobody reads through it.
            let region = unsafe { slice::from_raw_parts(base.as_ptr(), len) };
            // A kernel without names refuses, and whoever looks for them finds none.
            let _ = rustix::process::set_virtual_memory_region_name(region, Some(c"uhmm:device"));
        }
        Ok(Self { base, pages })
    }

    fn range(&self) -> VaRange {
        VaRange::of_pages(VirtAddr::of(self.base.as_ptr()).page(), self.pages).expect("a device has pages")
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: advice on our own mapping, none that takes contents away from this process.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.pages.bytes(), advice) }
    }

    /// The first byte of `page`, which must be one of the mapping's.
    fn at(&self, page: DevicePage) -> *mut u8 {
        self.base.as_ptr().wrapping_add(page.offset() as usize)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and goes away with its owner, so that no pointer into it is
        // used any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.pages.bytes()) };
    }
}
