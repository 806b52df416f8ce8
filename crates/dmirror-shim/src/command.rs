//! The ioctls of the device.
//!
//! What    [`serve`]: one call, from the request and the address of its structure to an error number.
//! ABI     the kernel's `lib/test_hmm_uapi.h`: a structure of five 64-bit words, of which the last two are answers, and
//!         are written only where all went well.
//! Fails   with an error number.

use std::ffi::c_int;

use uhmm::{PAGE_SIZE, VaRange, VirtAddr};
use uhmm_dmirror::{Counts, Error, Handle, Unreachable, load, store};

/// `_IOWR('H', n, struct hmm_dmirror_cmd)`.
const READ: u32 = 0xc028_4800;
const WRITE: u32 = 0xc028_4801;
const MIGRATE_TO_DEV: u32 = 0xc028_4802;
const MIGRATE_TO_SYS: u32 = 0xc028_4803;
const SNAPSHOT: u32 = 0xc028_4804;
const EXCLUSIVE: u32 = 0xc028_4805;
const CHECK_EXCLUSIVE: u32 = 0xc028_4806;
const RELEASE: u32 = 0xc028_4807;

/// `struct hmm_dmirror_cmd`.
const WORDS: usize = 5;
const ADDR: usize = 0;
const PTR: usize = 1;
const NPAGES: usize = 2;
const CPAGES: usize = 3;
const FAULTS: usize = 4;

/// An error number.
#[derive(Clone, Copy)]
pub struct Errno(pub c_int);

impl From<Unreachable> for Errno {
    fn from(_: Unreachable) -> Self {
        Self(libc::EFAULT)
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        Self(match error {
            Error::Invalid => libc::EINVAL,
            Error::Fault => libc::EFAULT,
            Error::Permission => libc::EPERM,
            Error::NotThere => libc::ENOENT,
            Error::Busy => libc::EBUSY,
            Error::NoMemory => libc::ENOMEM,
            Error::NoDevice => libc::ENODEV,
            Error::Unsupported => libc::EOPNOTSUPP,
        })
    }
}

/// Whole pages at `addr`, as the program gives them.
pub fn range(addr: u64, bytes: Option<u64>) -> Result<VaRange, Errno> {
    let invalid = Errno(libc::EINVAL);
    let bytes = bytes.filter(|bytes| *bytes > 0 && addr.checked_add(*bytes).is_some()).ok_or(invalid)?;
    if !addr.is_multiple_of(PAGE_SIZE as u64) {
        return Err(invalid);
    }
    VaRange::new(VirtAddr::new(addr as usize), bytes as usize).map_err(|_| invalid)
}

/// Serves one request, whose structure is at `at`.
pub fn serve(handle: &Handle<'_>, request: u32, at: VirtAddr) -> Result<(), Errno> {
    let mut bytes = [0; WORDS * 8];
    load(at, &mut bytes)?;
    let word = |n: usize| u64::from_ne_bytes(bytes.as_chunks::<8>().0[n]);
    let range = range(word(ADDR), word(NPAGES).checked_mul(PAGE_SIZE as u64))?;
    let ptr = VirtAddr::new(word(PTR) as usize);
    let counts = carry_out(handle, request, range, ptr)?;
    bytes[CPAGES * 8..FAULTS * 8].copy_from_slice(&(counts.pages.get() as u64).to_ne_bytes());
    bytes[FAULTS * 8..].copy_from_slice(&counts.faults.to_ne_bytes());
    // SAFETY: the program's structure, which it gave to be answered in.
    Ok(unsafe { store(at, &bytes) }?)
}

fn carry_out(handle: &Handle<'_>, request: u32, range: VaRange, ptr: VirtAddr) -> Result<Counts, Errno> {
    // What the device reads goes to the program when all of it is there.
    let answered = |len, act: &dyn Fn(&mut [u8]) -> Result<Counts, Error>| {
        let mut bounce = bounce(len)?;
        let counts = act(&mut bounce)?;
        // SAFETY: the program's memory, which it gave to be answered in.
        unsafe { store(ptr, &bounce) }?;
        Ok(counts)
    };
    match request {
        READ => answered(range.bytes(), &|into| handle.read(range, into)),
        WRITE => {
            let mut bounce = bounce(range.bytes())?;
            load(ptr, &mut bounce)?;
            Ok(handle.write(range, &bounce)?)
        }
        MIGRATE_TO_DEV => answered(range.bytes(), &|into| handle.migrate_to_device(range, into)),
        MIGRATE_TO_SYS => Ok(handle.migrate_to_system(range)?),
        SNAPSHOT => answered(range.pages().get(), &|into| handle.snapshot(range, into)),
        EXCLUSIVE => answered(range.bytes(), &|into| handle.exclusive(range, into)),
        CHECK_EXCLUSIVE if handle.is_exclusive(range) => Err(Errno(libc::EPERM)),
        CHECK_EXCLUSIVE => Ok(Counts::default()),
        RELEASE => {
            handle.release()?;
            Ok(Counts::default())
        }
        _ => Err(Errno(libc::EINVAL)),
    }
}

fn bounce(len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| Errno(libc::ENOMEM))?;
    bytes.resize(len, 0);
    Ok(bytes)
}
